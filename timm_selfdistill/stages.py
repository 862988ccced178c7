"""Where a network may be cut, and what it has cost up to there."""
import copy
from dataclasses import dataclass
from typing import Any, Callable, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['ExitSpec', 'Stage', 'choose_exits', 'count_macs', 'find_stages', 'meta_copy', 'take_taps']

ExitSpec = Union[None, int, Sequence[int]]

# An exit pays only between these shares of the forward MACs: before, little more than a stem has run and there is
# nothing to classify with; after, there is nothing left to save.
MIN_SHARE = 0.10
MAX_SHARE = 0.95


@dataclass(frozen=True)
class Stage:
    """A place where a network may be cut: one entry of timm's `feature_info`, measured by a probe.

    Attributes:
        index: Position in `feature_info`, which is also the index `forward_intermediates` takes.
        module: Name that timm gives the place. Informative only, for some networks no module has it.
        num_chs: Channels of the feature map.
        reduction: Input height over the map's height, rounded.
        size: Height and width of the map, in pixels.
        share: Part of the whole network's forward multiply-adds that has run once the map exists, 0 to 1.
    """
    index: int
    module: str
    num_chs: int
    reduction: int
    size: Tuple[int, int]
    share: float


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model in eval mode onto the meta device: its shapes without its memory, the original untouched."""
    memo: dict = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device='meta'), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device='meta')
    return copy.deepcopy(model, memo).to('meta').eval()


def count_macs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Tuple[int, Any]:
    """Call `fn`; return the multiply-adds of the convolutions and matrix products it executed, and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = fn(*args, **kwargs)
    return counter.get_total_flops() // 2, result  # a multiply-add is two floating point operations


def find_stages(model: nn.Module) -> Tuple[Stage, ...]:
    """Probe where a timm model may be cut.

    The model's own `forward_intermediates` runs on the meta device, once up to each place and on the input size the
    model was built for, so that shapes and multiply-adds are those of the real forward pass, not declared metadata.

    Args:
        model: A timm model with `feature_info` and `forward_intermediates`.

    Returns:
        The stages in network order.

    Raises:
        ValueError: The model has no `forward_intermediates` or no `feature_info`.
    """
    if not hasattr(model, 'forward_intermediates') or not getattr(model, 'feature_info', None):
        raise ValueError(
            f'{type(model).__name__} cannot be given exits: it has no forward_intermediates() or feature_info. '
            f'Any model of timm >= 1.0.31 has both.'
        )
    probe = meta_copy(model)
    x = torch.empty((1, *get_model_input_config(model)['input_size']), device='meta')
    total, _ = count_macs(probe, x)
    stages = []
    for index, info in enumerate(_feature_dicts(model)):
        macs, (tap,) = count_macs(take_taps, probe, x, [index])
        height, width = tap.shape[-2:]
        stages.append(Stage(
            index=index,
            module=info.get('module', ''),
            num_chs=tap.shape[1],
            reduction=max(1, round(x.shape[-2] / height)),
            size=(height, width),
            share=macs / max(total, 1),
        ))
    return tuple(stages)


def _feature_dicts(model: nn.Module) -> Sequence[dict]:
    info = model.feature_info
    return info if isinstance(info, (list, tuple)) else info.get_dicts()


def take_taps(model: nn.Module, x: torch.Tensor, indices: Sequence[int]) -> Sequence[torch.Tensor]:
    """Run a timm model no further than the last of `indices`; return the feature maps there, each (N, C, H, W)."""
    return model.forward_intermediates(
        x, indices=list(indices), stop_early=True, intermediates_only=True, output_fmt='NCHW')


def choose_exits(stages: Sequence[Stage], exits: ExitSpec = None, name: str = 'this model') -> Tuple[int, ...]:
    """Choose the stages after which auxiliary exits stand.

    Args:
        stages: What `find_stages` returned.
        exits: None takes the last stage of each resolution but the deepest, as Be Your Own Teacher does (for a
            ResNet: layer1, layer2, layer3), or for networks of one resolution, such as ViTs, the quarters of the
            compute. An int asks for that many exits spread evenly over the compute. A sequence names indices of
            `feature_info` and is taken as it is; an empty one means no auxiliary exit.
        name: What to call the model in errors.

    Returns:
        Increasing indices into `stages`.

    Raises:
        ValueError: An index is out of range or the indices do not increase, or more exits than stages are asked for.
    """
    last = len(stages) - 1
    if exits is None:
        ends = [a.index for a, b in zip(stages, stages[1:]) if a.size != b.size]
        ends = [i for i in ends if MIN_SHARE <= stages[i].share <= MAX_SHARE]
        return tuple(ends) if ends else _spread(stages, min(3, last))
    if isinstance(exits, bool) or not isinstance(exits, (int, list, tuple)):
        raise ValueError(f'exits={exits!r}: expected None, a number of exits, or indices such as (1, 2).')
    if isinstance(exits, int):
        if not 0 <= exits <= last:
            raise ValueError(f'exits={exits}: {name} has {len(stages)} stages, so 0 to {last} auxiliary exits.')
        return _spread(stages, exits)
    exits = tuple(exits)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in exits):
        raise ValueError(f'exits={exits!r}: expected whole numbers, indices of feature_info.')
    if any(i < 0 or i >= last for i in exits):
        where = ', '.join(f'{s.index} ({s.module})' for s in stages[:-1])
        raise ValueError(
            f'exits={exits}: out of range for {name}. Auxiliary exits may stand after the stages {where}; '
            f'the end of the network, stage {last}, always has its own classifier.'
        )
    if any(a >= b for a, b in zip(exits, exits[1:])):
        raise ValueError(f'exits={exits}: indices must increase, shallow to deep, without repeats.')
    return exits


def _spread(stages: Sequence[Stage], count: int) -> Tuple[int, ...]:
    """Pick `count` stages, never the last, whose shares are closest to even steps of the compute."""
    chosen: list = []
    for step in range(1, count + 1):
        lowest = chosen[-1] + 1 if chosen else 0
        highest = len(stages) - 1 - (count - step)  # leave a stage for each exit still to come
        candidates = range(lowest, highest)
        chosen.append(min(candidates, key=lambda i: abs(stages[i].share - step / (count + 1))))
    return tuple(chosen)
