"""Where a network may be cut, and what it has cost up to there."""
import logging
from dataclasses import dataclass, replace
from typing import Callable, List, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .names import model_name, times
from .probe import _GRID_FROM_VALUES, MacCounter, ShortLSTMs, count_macs, feature_dicts, meta_copy, take_taps

__all__ = ['ExitSpec', 'Stage', 'choose_exits', 'find_stages']

_logger = logging.getLogger(__name__)

ExitSpec = Union[None, int, Sequence[int]]

# An exit pays only between these shares of the forward MACs, its head included in the upper one: before, little more
# than a stem has run and there is nothing to classify with; after, there is nothing left to save. And it has to save
# something against the next one.
MIN_SHARE = 0.04
MAX_SHARE = 0.95
MIN_SAVING = 0.05
DEFAULT_EXITS = 3  # Be Your Own Teacher cuts every network into four sections


@dataclass(frozen=True)
class Stage:
    """A place where a network may be cut: one entry of timm's `feature_info`, measured by a probe.

    Attributes:
        index: Position in `feature_info`, which is also the index `forward_intermediates` takes.
        module: Name that timm gives the place. Informative only, for some networks no module has it.
        num_chs: Channels of the feature map.
        reduction: Input height over the map's height, rounded.
        size: Height and width of the map, in pixels.
        share: Part of the whole network's forward MACs that has run once the map exists, 0 to 1.
        macs: These MACs, for one image.
    """
    index: int
    module: str
    num_chs: int
    reduction: int
    size: Tuple[int, int]
    share: float
    macs: int


def find_stages(model: nn.Module) -> Tuple[Stage, ...]:
    """Probe where a timm model may be cut.

    The model's own `forward_intermediates` runs on the meta device, on the input size the model was built for, so that
    shapes and MACs are those of the real forward pass, not declared metadata.

    Args:
        model: A timm model with `feature_info` and `forward_intermediates`.

    Returns:
        The stages in network order.

    Raises:
        ValueError: The model has no `forward_intermediates` or no `feature_info`, or it does not run on the
            size of images it was built for.

    Examples:
        >>> import timm
        >>> [stage.module for stage in find_stages(timm.create_model('test_resnet'))]
        ['act1', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    if not hasattr(model, 'forward_intermediates') or not getattr(model, 'feature_info', None):
        raise ValueError(
            f'{model_name(model)} cannot be given exits: it has no forward_intermediates() or feature_info. '
            f'Any model of timm >= 1.0.31 has both.'
        )
    size = get_model_input_config(model)['input_size']
    try:
        return _measure(model, torch.empty((1, *size), device='meta', dtype=next(model.parameters()).dtype))
    except (AssertionError, RuntimeError) as error:
        own = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', size)
        raise ValueError(
            f'{model_name(model)} cannot run on images of {times(size)} (channels, height, width), the size of its '
            f'weights is {times(own)}: {error}'
        ) from error


def _measure(model: nn.Module, x: torch.Tensor) -> Tuple[Stage, ...]:
    """Run a copy of a model on one image (1, C, H, W) of the meta device; see `find_stages`."""
    probe = meta_copy(model)
    infos = feature_dicts(model)
    with torch.no_grad(), ShortLSTMs(), _AgeTracker() as tracker:
        try:
            final, taps = take_taps(probe, x, range(len(infos)), with_final=True)
        except RuntimeError as error:
            if 'meta tensors' not in str(error):
                raise
            _GRID_FROM_VALUES.add(type(model))
            tracker.flops = 0
            final, taps = take_taps(probe, x, range(len(infos)), with_final=True)
        if hasattr(probe, 'get_classifier'):  # encoders have none, and refuse forward_head()
            probe.forward_head(final)
    total = tracker.macs
    if len({tap.shape[-2:] for tap in taps}) == 1:
        # One block after the other: what had run when a map came into being is what a run that ends there does.
        macs_upto = [tracker.ages[tap] // 2 for tap in taps]
    else:
        # Hierarchical networks may finish more than the map needs before they stop, so each place is run by itself.
        macs_upto = [count_macs(take_taps, probe, x, [index])[0] for index in range(len(infos))]
    return tuple(
        Stage(
            index=index,
            module=info.get('module', ''),
            num_chs=tap.shape[1],
            reduction=max(1, round(x.shape[-2] / tap.shape[-2])),
            size=tuple(tap.shape[-2:]),
            share=macs / max(total, 1),
            macs=macs,
        ) for index, (info, tap, macs) in enumerate(zip(infos, taps, macs_upto))
    )


class _AgeTracker(MacCounter):
    """Notes for every tensor how many operations had been counted when its values came into being.

    Views, norms and whatever else costs nothing counted are as old as what they were made of: networks often normalise
    and reshape the maps of all their blocks only at the very end.
    """

    def __init__(self):
        super().__init__()
        self.ages = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        age = self.flops
        if age == before:
            made_of = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            age = max((self.ages.get(t, 0) for t in made_of), default=0)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.ages[t] = age
        return out


def choose_exits(
        stages: Sequence[Stage],
        exits: ExitSpec = None,
        name: str = 'this model',
        head_macs: Callable[[Stage], int] = lambda stage: 0,
) -> Tuple[int, ...]:
    """Choose the stages after which auxiliary exits stand.

    Args:
        stages: What `find_stages` returned.
        exits: None takes the last stage of each resolution but the deepest, as Be Your Own Teacher does, at most the
            paper's three (for a ResNet: layer1, layer2, layer3), or for networks of one resolution, such as ViTs, the
            quarters of the compute; no exit where little more than a stem has run, none that saves next to nothing
            against the next. An int asks for that many exits spread evenly over the compute. A sequence names indices
            of `feature_info` and is taken as it is; an empty one means no auxiliary exit.
        name: What to call the model in errors.
        head_macs: Gives the MACs of an exit head after a stage.

    Returns:
        Increasing indices into `stages`.

    Raises:
        ValueError: An index is out of range or the indices do not increase, or more exits than stages are asked for.
    """
    last = len(stages) - 1
    if exits is None:
        worthy = _worthy(stages, head_macs)
        ends = [s for s in worthy if stages[s.index + 1].size != s.size]
        chosen = _boundaries(ends, worthy) if ends else _spread(worthy, min(DEFAULT_EXITS, len(worthy)))
        if not chosen:
            _logger.warning(
                f'{name} gets no auxiliary exits: no place to leave it early has run {MIN_SHARE:.0%} of its '
                f'MACs and saves {1 - MAX_SHARE:.0%} of them. Name indices, such as exits=(1, 2), to insist.'
            )
        return tuple(chosen)
    if isinstance(exits, bool) or not isinstance(exits, (int, list, tuple)):
        raise ValueError(f'exits={exits!r}: expected None, a number of exits, or indices such as (1, 2).')
    if isinstance(exits, int):
        if not 0 <= exits <= last:
            raise ValueError(f'exits={exits}: {name} has {len(stages)} stages, so 0 to {last} auxiliary exits.')
        worthy = _worthy(stages, head_macs)
        return tuple(_spread(worthy if len(worthy) >= exits else stages[:-1], exits))
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


def _worthy(stages: Sequence[Stage], head_macs: Callable[[Stage], int]) -> List[Stage]:
    """Keep the stages after which an exit has something to go by and costs less than all the exits that come later.

    The head counts into the shares of the stages returned. Where it is dear, as on large maps of small networks, or
    where branches run side by side, a shallow exit may cost more than a deeper one.
    """
    worthy: List[Stage] = []
    least = MAX_SHARE
    for stage in reversed(stages[:-1]):
        cost = stage.share * (1 + head_macs(stage) / max(stage.macs, 1))
        if stage.share >= MIN_SHARE and cost < least:
            worthy.insert(0, replace(stage, share=cost))
            least = cost
    return worthy


def _boundaries(ends: Sequence[Stage], worthy: Sequence[Stage]) -> List[int]:
    """Pick the deepest ends of a resolution, then other stages halfway into what is left; return their indices."""
    chosen: List[Stage] = []
    for stage in reversed(ends):
        if len(chosen) < DEFAULT_EXITS and all(c.share - stage.share >= MIN_SAVING for c in chosen):
            chosen.append(stage)
    while len(chosen) < DEFAULT_EXITS:
        # some networks spend most of their compute after their last change of resolution
        taken = [0., 1., *(c.share for c in chosen)]
        best = max(worthy, key=lambda s: min(abs(s.share - t) for t in taken))
        if min(abs(best.share - t) for t in taken) < MIN_SAVING:
            break
        chosen.append(best)
    return sorted(c.index for c in chosen)


def _spread(stages: Sequence[Stage], count: int) -> List[int]:
    """Pick `count` of the stages whose shares are closest to even steps of the compute; return their indices."""
    chosen: List[int] = []
    lowest = 0
    for step in range(1, count + 1):
        highest = len(stages) - (count - step)  # leave a stage for each exit still to come
        best = min(range(lowest, highest), key=lambda i: abs(stages[i].share - step / (count + 1)))
        chosen.append(stages[best].index)
        lowest = best + 1
    return chosen
