"""Settings that are out of bounds, or that exclude or need each other."""
import dataclasses
import math
from typing import TYPE_CHECKING, Any, Mapping

from ..errors import ConfigError

if TYPE_CHECKING:
    from .settings import TrainConfig

__all__ = ['ETA', 'check_settings']

# Shares of the cross entropy by default. They are not of equal softness: see losses.eta_for_top_score.
ETA = {'tsd': 0.6, 'label-smoothing': 0.9, 'confidence-penalty': 0.9}


def check_settings(config: 'TrainConfig') -> None:
    """Raise ConfigError for the first setting that is out of its bounds or excludes another one."""
    for field in dataclasses.fields(config):
        _check_bounds(config, field.name, field.metadata)
    if config.in_chans not in (1, 3):
        raise ConfigError(f'`in_chans={config.in_chans}`: expected 3 (colour) or 1 (grey).')
    for name in ('mean', 'std'):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, config.in_chans):
            raise ConfigError(f'`{name}={" ".join(map(str, values))}`: expected 1 or {config.in_chans} numbers.')
    if config.std is not None and not min(config.std) > 0:
        raise ConfigError(f'`std={" ".join(map(str, config.std))}`: expected numbers greater than 0.')
    if not 0 < config.scale[0] <= config.scale[1] <= 1:
        raise ConfigError(f'`scale={config.scale[0]} {config.scale[1]}`: expected two rising numbers from 0 to 1.')
    config.model_arguments()
    config.checkpoint_interval()
    _check_weights(config)
    _check_data(config)
    _check_regime(config)
    _check_teaching(config)


def _check_bounds(config: 'TrainConfig', name: str, metadata: Mapping[str, Any]) -> None:
    value = getattr(config, name)
    low, high, above = (
        getattr(config, bound) if isinstance(bound, str) else bound
        for bound in map(metadata.get, ('at_least', 'at_most', 'above'))
    )
    if value is None or (low, high, above) == (None, None, None):
        return
    if above is not None and not above < value < math.inf:
        raise ConfigError(f'`{name}={value}`: expected more than {above}.')
    if low is not None and (not low <= value <= (math.inf if high is None else high) or value == math.inf):
        allowed = f'a number of {low} or more' if high is None else f'a number from {low} to {high}'
        raise ConfigError(f'`{name}={value}`: expected {allowed}.')


def _check_weights(config: 'TrainConfig') -> None:
    """Raise ConfigError where the network is to start from two weights."""
    if config.initial_checkpoint is not None and config.backbone_pretrained:
        raise ConfigError(
            f'`initial_checkpoint={config.initial_checkpoint}`: with `backbone_pretrained` the network has timm\'s '
            f'weights; leave out one of them.'
        )


def _check_regime(config: 'TrainConfig') -> None:
    """Raise ConfigError for settings that the regime excludes or needs."""
    if config.regime != 'joint' and not config.has_exits:
        raise ConfigError(
            f'`regime={config.regime}`: `method={config.method}` trains no auxiliary exits; expected '
            f'`method=byot` or `method=deep-supervision`.'
        )
    if config.backbone_epochs is not None and config.regime != 'mixed':
        raise ConfigError(f'`backbone_epochs={config.backbone_epochs}`: goes with `regime=mixed` only.')
    if config.regime == 'mixed' and not config.epochs_alone < config.epochs:
        allowed = f'a number from 1 to {config.epochs - 1}' if config.epochs > 1 else '`epochs` of 2 or more'
        raise ConfigError(
            f'`backbone_epochs={config.epochs_alone}`: of `epochs={config.epochs}` none would be left for the '
            f'auxiliary exits; expected {allowed}.'
        )
    if config.regime == 'disjoint':
        excluded = dict(generations=None, last_phase_epochs=0, patriarch='plain')
        for name, without in excluded.items():
            if getattr(config, name) != without:
                raise ConfigError(
                    f'`{name}={getattr(config, name)}`: with `regime=disjoint` the network itself learns nothing.')
        if config.exit_weights == 'equilibrium':
            raise ConfigError(
                '`exit_weights=equilibrium`: scales gradients in the network, which has none with '
                '`regime=disjoint`.')
    if config.unlabelled:
        _check_unlabelled(config)


def _check_unlabelled(config: 'TrainConfig') -> None:
    """Raise ConfigError for settings that need labels."""
    if (config.method, config.regime) != ('byot', 'disjoint'):
        raise ConfigError(
            f'`unlabelled`: `method={config.method}` with `regime={config.regime}` learns from labels; expected '
            f'`method=byot` with `regime=disjoint`.'
        )
    if config.alpha != 1 or config.alpha_end not in (None, 1):
        alpha = 'alpha' if config.alpha != 1 else 'alpha_end'
        raise ConfigError(
            f'`unlabelled`: `{alpha}={getattr(config, alpha):g}` leaves a share to the labels; expected `alpha=1`.')
    for name in ('dataset', 'label_column', 'superclass_column', 'teacher', 'streaming'):
        if getattr(config, name):
            raise ConfigError(f'`{name}={getattr(config, name)}`: cannot be had together with `unlabelled`.')
    if config.data_dir is None:
        raise ConfigError('`unlabelled`: pass `data_dir`, a folder of images.')


def _check_data(config: 'TrainConfig') -> None:
    """Raise ConfigError for settings about data that exclude or need each other."""
    if config.images_per_epoch is not None and not config.streaming:
        raise ConfigError(f'`images_per_epoch={config.images_per_epoch}`: goes with `streaming` only.')
    if config.streaming and config.loader == 'device':
        raise ConfigError('`loader=device`: streamed data are not kept; leave out `streaming` or pass workers.')
    for name in ('generations', 'superclass_column'):
        if config.streaming and getattr(config, name) is not None:
            raise ConfigError(
                f'`{name}={getattr(config, name)}`: needs data that are not streamed; leave out `streaming`.')


def _check_teaching(config: 'TrainConfig') -> None:
    """Raise ConfigError for settings about teachers that exclude or need each other."""
    if config.method == 'kd' and config.teacher is None:
        raise ConfigError('`method=kd`: pass `teacher`, the network that teaches.')
    if config.teacher is not None and config.patriarch != 'plain':
        raise ConfigError(
            f'`patriarch={config.patriarch}`: a patriarch has no teacher, and `teacher={config.teacher}` was given.'
        )
    if config.teacher is not None and config.generations is not None:
        raise ConfigError(
            f'`teacher={config.teacher}`: with `generations={config.generations}` each generation teaches the next.')
    for name in ('label_weight', 'teacher_temperature'):
        if getattr(config, name) is not None and config.teacher is None and config.generations is None:
            raise ConfigError(
                f'`{name}={getattr(config, name)}`: there is no teacher; pass `teacher` or `generations`.')
    if config.eta is not None and config.patriarch == 'plain':
        others = ', '.join(ETA)
        raise ConfigError(f'`eta={config.eta}`: `patriarch=plain` has the cross entropy alone; others are {others}.')
    if config.resume is not None and config.generations is not None and config.experiment is None:
        raise ConfigError('`resume=auto`: pass `experiment`, the name of the generations to go on with.')
