"""Everything that self-distillation trains, as one module."""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models.multi_exit import MultiExit
from ..models.probe import meta_copy
from ..models.wrapper import nested_group_matcher
from .config import DistillationConfig

__all__ = ['SelfDistillationModule']


class SelfDistillationModule(nn.Module):
    """Everything that self-distillation trains, in one forward pass, so that DDP sees every parameter used.

    Args:
        model: The multi-exit network.
        config: With a `hint_weight` above 0 projections are learned from what the auxiliary exits see to what the
            deepest one sees. They exist for the hint loss alone and do not belong to the model. With `exit_weights`
            `equilibrium` gradients in the backbone are scaled so that each of its sections learns from the mean, not
            the sum, of the exits behind it: gradient equilibrium (Li et al., ICCV 2019, arXiv 1908.06294).

    Attributes:
        detach_taps: Train the backbone by the deepest exit alone; the other exits follow it.
        backbone_alone: Train the backbone by the deepest exit alone; the other exits do not even run.

    A frozen backbone (`MultiExit.freeze_backbone`, called before) is no part of this module's state: checkpoints and
    moving averages hold what is trained. Loading such a state leaves the backbone as it is.

    Raises:
        ValueError: Gradients of a frozen backbone are to be scaled.
    """

    def __init__(self, model: MultiExit, config: DistillationConfig = DistillationConfig()):
        super().__init__()
        self.model = model
        self.hint_on = config.hint_on
        self.hint_linear = config.hint_linear
        self.detach_taps = self.backbone_alone = False
        like = next(model.parameters())
        heads = list(model.exit_heads) if config.hint_weight > 0 else []
        self.projections = nn.ModuleList(
            self._projection(head) for head in (heads[:-1] if config.hint_exits == 'all-but-last' else heads)
        ).to(device=like.device, dtype=like.dtype)
        if config.exit_weights == 'equilibrium':
            if model.backbone_frozen:
                raise ValueError('exit_weights=equilibrium: scales gradients in a backbone, and a frozen one has none.')
            self._scale_gradients()
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    def _projection(self, head: nn.Module) -> nn.Module:
        if self.hint_on == 'maps':
            narrow, wide, create = head.map_chs, self.model.stages[-1].num_chs, partial(nn.Conv2d, kernel_size=1)
        else:
            narrow, wide, create = head.num_features, self.model.head_hidden_size, nn.Linear
        return create(narrow, wide) if self.hint_linear or narrow != wide else nn.Identity()

    def _scale_gradients(self) -> None:
        # The paper rescales at every exit what comes from its head and what comes from behind. Multiplied up, a section
        # with m exits behind it receives 1/m of the gradient of each of them, which is done here in one step.
        probe, seen = meta_copy(self.model), set()
        parameters = dict(self.model.backbone.named_parameters())
        for k in range(self.model.num_exits - 1):
            needed = {name for name, _ in probe.truncate(k).backbone.named_parameters()}
            for name in needed - seen:
                parameters[name].register_hook(partial(self._scale_gradient, 1 / (self.model.num_exits - k)))
            seen |= needed

    def _scale_gradient(self, scale: float, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self.detach_taps else gradient * scale

    def is_frozen(self, name: str) -> bool:
        """Return whether a parameter or buffer of this module belongs to a frozen backbone."""
        of_deepest = name.startswith('model.') and not name.startswith('model.exit_heads.')
        return self.model.backbone_frozen and of_deepest

    def no_weight_decay(self):
        return {f'model.{n}' for n in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        return nested_group_matcher(self, 'model', coarse)

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def num_exits(self) -> int:
        return self.model.num_exits

    def forward_exits(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the network's logits, for evaluation where parameters are sharded and this module brings them back."""
        return self.model.forward_exits(x)

    def forward(
            self,
            x: torch.Tensor,
    ) -> Tuple[List[torch.Tensor], List[Optional[torch.Tensor]], Optional[torch.Tensor]]:
        """Run all exits.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits of every exit, each (N, num_classes); projected features of the auxiliary exits, each
            (N, num_features), or maps (N, num_features, H, W), None at exits without a hint; the same of the deepest
            exit, detached, None where no exit has a hint.
        """
        if self.backbone_alone:
            return [self.model(x)], [], None
        without = [None] * (self.num_exits - 1 - len(self.projections))
        if not len(self.projections):
            return self.model.forward_exits(x, detach_taps=self.detach_taps), without, None
        on_maps = self.hint_on == 'maps'
        logits, seen = self.model.forward_exits(
            x, return_features=not on_maps, return_maps=on_maps, detach_taps=self.detach_taps)
        hints = [project(s) for project, s in zip(self.projections, seen)]
        if on_maps:  # sizes that the heads' strides do not divide
            size = seen[-1].shape[-2:]
            hints = [h if h.shape[-2:] == size else F.adaptive_avg_pool2d(h, size) for h in hints]
        return logits, hints + without, seen[-1]


def _drop_frozen(module: SelfDistillationModule, state: Dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [n for n in state if n.startswith(prefix) and module.is_frozen(n[len(prefix):])]:
        del state[name]


def _expect_no_frozen(module: SelfDistillationModule, keys: Any) -> None:
    # the names have the prefixes of the modules around this one
    for name in [n for n in keys.missing_keys if module.is_frozen('model.' + n.partition('model.')[2])]:
        keys.missing_keys.remove(name)
