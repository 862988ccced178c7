"""From a config to the network and the task that it describes."""
from typing import Any, Dict, Optional, Tuple

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import split_model_name_tag

from .config import ConfigError, TrainConfig, nearest
from .data import ImageData
from .hub import load_network
from .metrics import exit_costs
from .multi_exit import MultiExit
from .stages import count_macs, meta_copy
from .tasks import SelfDistillationTask
from .wrapper import SUFFIX

__all__ = ['build_model', 'build_task', 'resolve_model_name']


def resolve_model_name(model: str) -> Tuple[str, str]:
    """Split `--model` into the registered multi-exit name and the tag of the backbone's weights, '' without.

    Raises:
        ConfigError: timm has no such model; the message offers the nearest names.
    """
    base, tag = split_model_name_tag(model)
    base = base.removesuffix(SUFFIX)
    if timm.is_model(base + SUFFIX):
        return base + SUFFIX, tag
    names = (name for name in timm.list_models() if not name.endswith(SUFFIX))
    raise ConfigError(f'--model {model}: timm has no such model{nearest(base, names)}.')


def _image_size(config: TrainConfig, cfg: Any, data: ImageData) -> int:
    own = cfg.input_size[-1]
    if config.img_size:
        return config.img_size
    if cfg.fixed_input_size or config.backbone_pretrained:
        return own
    smallest = cfg.min_input_size[-1] if cfg.min_input_size else 32
    return min(own, max(smallest, *data.image_size))


def build_model(config: TrainConfig, data: ImageData) -> Tuple[MultiExit, Dict[str, Any]]:
    """Create the network that a config asks for, and the preprocessing that goes with it.

    Returns:
        The network, and a data config as `timm.data.resolve_data_config` makes them.

    Raises:
        ConfigError: The model is unknown, has fewer classes than the data, or refuses its arguments or image size.
    """
    name, tag = resolve_model_name(config.model)
    num_classes = config.num_classes or data.num_classes
    if num_classes < data.num_classes:
        raise ConfigError(
            f'--num-classes {num_classes}: {data.name} has {data.num_classes} classes, the model needs as many or more.'
        )
    cfg = timm.get_pretrained_cfg(name)
    size = _image_size(config, cfg, data)
    arguments = dict(
        num_classes=num_classes,
        in_chans=config.in_chans,
        img_size=size if cfg.fixed_input_size and size != cfg.input_size[-1] else None,
        exits=() if config.method in ('kd', 'plain') else config.exits,
        exit_head=config.exit_head,
        backbone_pretrained=(tag or True) if config.backbone_pretrained else None,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
    )
    arguments.update(config.model_arguments())
    try:
        model = timm.create_model(name, **arguments)
        exit_costs(model, (config.in_chans, size, size))  # a forward pass on the meta device
    except (AssertionError, TypeError, ValueError, RuntimeError) as e:
        given = ', '.join(f'{k}={v}' for k, v in arguments.items() if v is not None)
        raise ConfigError(f'--model {config.model}: {e} (with {given}; images of {size}×{size})') from e
    grey = config.in_chans == 1 and len(cfg.mean) != 1
    data_config = resolve_data_config(
        dict(
            input_size=(config.in_chans, size, size),
            mean=config.mean or ([sum(cfg.mean) / len(cfg.mean)] if grey else None),
            std=config.std or ([sum(cfg.std) / len(cfg.std)] if grey else None),
            crop_pct=1.0 if max(data.image_size) <= size else None,
        ),
        model=model,
    )
    return model, data_config


def _open_teacher(config: TrainConfig, data_config: Dict[str, Any]) -> Optional[nn.Module]:
    """Load the network that `--teacher` names, if any.

    Raises:
        ConfigError: There is none, or it does not take the student's images.
    """
    if config.teacher is None:
        return None
    try:
        teacher = load_network(config.teacher)[0]
        size = data_config['input_size']
        count_macs(meta_copy(teacher), torch.empty((1, *size), device='meta'))
    except (AssertionError, OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f'--teacher {config.teacher}: {e}') from e
    return teacher


def build_task(
        config: TrainConfig,
        model: MultiExit,
        device: torch.device,
        data_config: Dict[str, Any],
) -> SelfDistillationTask:
    """Create the task that a method names.

    Raises:
        ConfigError: The settings or the teacher do not fit the model.
    """
    distil = config.method == 'byot'
    if config.patriarch == 'tsd' and config.tsd_k > model.num_classes:
        raise ConfigError(
            f'--tsd-k {config.tsd_k}: expected a number from 2 to {model.num_classes}, the number of classes.')
    teacher = _open_teacher(config, data_config)
    try:
        return SelfDistillationTask(
            model,
            criterion_kwargs=dict(smoothing=config.smoothing, soft_targets=config.mixup > 0 or config.cutmix > 0),
            alpha=config.alpha if distil else 0.,
            alpha_end=config.alpha_end if distil else None,
            temperature=config.temperature,
            temperature_end=config.temperature_end,
            square_temperature=config.square_temperature,
            hint_weight=config.hint_weight if distil else 0.,
            hint_weight_end=config.hint_weight_end if distil else None,
            hint_on=config.hint_on,
            hint_form=config.hint_form,
            hint_exits=config.hint_exits,
            hint_linear=config.hint_linear,
            exit_teacher=config.exit_teacher,
            weighting=config.exit_weights,
            teacher=teacher,
            mean=data_config['mean'],
            std=data_config['std'],
            device=device,
            verbose=False,
            **config.teaching(),
        )
    except ValueError as e:
        option = f'--model {config.model}' if config.teacher is None else f'--teacher {config.teacher}'
        raise ConfigError(f'{option}: {e}') from e
