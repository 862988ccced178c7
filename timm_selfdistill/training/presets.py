"""Settings that published code trains with."""
from typing import Any, Dict

__all__ = ['PRESETS']

_AUTHORS = dict(
    opt='momentum', momentum=0.9, lr=0.1, weight_decay=5e-4, decay_norms_and_biases=True, batch_size=128,
    sched='multistep', decay_rate=0.1, warmup_epochs=0, crop='pad', hflip=0.5, mean=[0.4914, 0.4822, 0.4465],
    std=[0.2023, 0.1994, 0.201], method='byot', temperature=3.0,
)

# What the authors of Be Your Own Teacher trained CIFAR-100 networks with, by their two published code bases. Their
# hints are 5e-7 times a sum and 0.03 times a norm over 128 images. That is 5e-7 · 128 times the mean over images of
# the sum over features, and 0.03 · √128 times the root of such a mean. By a comment in their later code the shallowest
# exit has no hint; by the code itself it is the last exit before the deepest that has none.
PRESETS: Dict[str, Dict[str, Any]] = {
    'byot-scan': dict(
        _AUTHORS, exit_head='bottleneck-attention', alpha=0.5, square_temperature=True, hint_weight=6.4e-5,
        hint_form='sum', epochs=200, decay_milestones=[75, 130, 180],
    ),
    'byot-tpami': dict(
        _AUTHORS, exit_head='separable-double', alpha=0.3, square_temperature=False, hint_weight=0.33941,
        hint_form='norm', hint_exits='all-but-last', hint_linear=True, epochs=250, decay_milestones=[83, 166, 240],
        aa='cifar10', cutout=16,
    ),
}
