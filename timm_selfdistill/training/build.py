"""From a config to the network and the task that it describes."""
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.optim import get_optimizer_info

from ..config import TrainConfig
from ..costs import exit_costs
from ..data.image_data import ImageData
from ..data.labels import match_classes
from ..errors import ConfigError, DataError, reason_of
from ..hub.networks import class_names, load_network
from ..models.multi_exit import MultiExit
from ..models.names import SUFFIX, model_name, names_tuple, times
from ..models.probe import count_macs, meta_copy
from ..publishing import place_name
from ..tasks import DistillationConfig, Linear, SelfDistillationTask
from .initial import InitialNetwork, Loaded, find_network, load_weights, read_weights

__all__ = ['LOOKAHEAD', 'BuiltModel', 'build_model', 'build_task', 'check_optimizer', 'check_slices']

# timm's prefix of the names of optimizers that look ahead (Zhang et al., NeurIPS 2019, arXiv 1907.08610).
LOOKAHEAD = 'lookahead_'


def _image_size(config: TrainConfig, own: int, cfg: Any, trained: bool, data: ImageData) -> Tuple[int, str]:
    """Return the side of the images, and why it is that."""
    if config.img_size:
        return config.img_size, 'as asked for'
    if cfg.fixed_input_size:
        return own, 'the one size that the network takes'
    if trained:
        return own, 'what the weights were trained at'
    smallest = cfg.min_input_size[-1] if cfg.min_input_size else 32
    size = min(own, max(smallest, *data.image_size))
    height, width = data.image_size
    if size == own:
        return own, f'the network\'s own size; the first image has {height}×{width}'
    if size == smallest and size > max(height, width):
        return size, f'the smallest that the network takes; the first image has {height}×{width}'
    return size, f'that of the first image, {height}×{width}; `img_size` sets another'


@dataclasses.dataclass
class BuiltModel:
    """A network to train.

    Attributes:
        model: The network, with the weights that it starts from.
        data_config: Its preprocessing, as `timm.data.resolve_data_config` makes them.
        notes: What is to be reported of it.
        trained: Whether it starts from weights.
        fresh_classifier: Whether its deepest classifier is an untrained one.
    """
    model: MultiExit
    data_config: Dict[str, Any]
    notes: List[str]
    trained: bool
    fresh_classifier: bool


def _num_classes(
        config: TrainConfig,
        network: InitialNetwork,
        data: ImageData,
        weights: Optional[Dict[str, torch.Tensor]],
) -> int:
    """Return the number of classes of the network.

    Raises:
        ConfigError: It is to have fewer than the data, or, without labels, is not known.
    """
    count = config.num_classes or data.num_classes
    if count < data.num_classes:
        raise ConfigError(
            f'`num_classes={count}`: {data.name} has {data.num_classes} classes, the model needs as many or more.')
    if count:
        return count
    cfg = timm.get_pretrained_cfg(network.name.removesuffix(SUFFIX))
    if network.where is not None:
        return network.cfg['num_classes']
    if weights is not None:
        names = [f'{prefix}{name}.weight' for name in names_tuple(cfg.classifier) for prefix in ('', 'backbone.')]
        return next((weights[name].shape[0] for name in names if name in weights), cfg.num_classes)
    if config.backbone_pretrained:
        return cfg.num_classes
    raise ConfigError(
        '`unlabelled`: the deepest exit teaches, so the network has to be trained; pass `model` with the folder of a '
        'run, `initial_checkpoint` or `backbone_pretrained`.'
    )


def build_model(config: TrainConfig, data: ImageData, network: Optional[InitialNetwork] = None) -> BuiltModel:
    """Create the network that a config asks for, with its weights, and the preprocessing that goes with it.

    Args:
        config: The settings.
        data: What it is to learn from.
        network: What `find_network` returned for `config.model`.

    Raises:
        ConfigError: The model is unknown, has fewer classes than the data, or refuses its arguments, the image size or
            the weights.
    """
    network = network or find_network(config.model)
    name = network.name
    own = config.model_arguments()
    file = config.initial_checkpoint or own.pop('checkpoint_path', None)
    if file and network.where is not None:
        raise ConfigError(
            f'`initial_checkpoint={file}`: `model={config.model}` has weights of its own; pass a timm name.')
    setting = 'initial_checkpoint' if config.initial_checkpoint else 'model_kwargs=checkpoint_path'
    weights = read_weights(str(file), setting) if file else None
    trained = bool(file) or network.where is not None or config.backbone_pretrained
    num_classes = _num_classes(config, network, data, weights)
    cfg = timm.get_pretrained_cfg(name)
    view = dict(network.view)
    size, why = _image_size(config, view.get('input_size', cfg.input_size)[-1], cfg, trained, data)
    arguments = dict(
        network.arguments,
        num_classes=num_classes,
        in_chans=config.in_chans,
        img_size=size if cfg.fixed_input_size and size != cfg.input_size[-1] else None,
        backbone_pretrained=(network.tag or True) if config.backbone_pretrained else None,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
    )
    if not config.has_exits:
        arguments['exits'] = ()
    elif config.exits is not None:
        arguments['exits'] = config.exits
    if config.exit_head is not None:
        arguments['exit_head'] = config.exit_head
    arguments.update(own)
    if view:
        arguments['pretrained_cfg_overlay'] = dict(view, **(own.get('pretrained_cfg_overlay') or {}))
    given = ', '.join(f'{k}={v}' for k, v in arguments.items() if v is not None)
    try:
        model = timm.create_model(name, **arguments)
        if not isinstance(model, MultiExit):
            raise ConfigError(
                f'`model_kwargs={" ".join(config.model_kwargs)}`: with this `model={config.model}` becomes one of the '
                f'kind {type(model).__name__}, which has no exits to train; leave out what cuts the network.'
            )
        exit_costs(model, (config.in_chans, size, size))  # a forward pass on the meta device
    except ConfigError:
        raise
    except Exception as e:
        # what is passed on to the network unchecked may fail there in any way
        if not own and not isinstance(e, (AssertionError, TypeError, ValueError, RuntimeError)):
            raise
        raise ConfigError(
            f'`model={config.model}`: {reason_of(e)} (with {given}; images of {size}×{size})') from e
    notes, fresh = list(network.notes), not trained
    if config.backbone_pretrained:
        fresh = num_classes != timm.get_pretrained_cfg(name.removesuffix(SUFFIX)).num_classes
    elif trained:
        if weights is not None:
            loaded = load_weights(model, weights, Path(str(file)).name, f'`{setting}={file}`')
        else:
            loaded = _load_network(config, model, network, data)
        notes.append(loaded.line)
        fresh = loaded.fresh_classifier
    notes.append(f'images of {times((config.in_chans, size, size))}: {why}')
    grey = config.in_chans == 1 and len(cfg.mean) != 1
    mean, std = view.get('mean', cfg.mean), view.get('std', cfg.std)
    data_config = resolve_data_config(
        dict(
            input_size=(config.in_chans, size, size),
            mean=config.mean or ([sum(mean) / len(mean)] if grey else None),
            std=config.std or ([sum(std) / len(std)] if grey else None),
            crop_pct=1.0 if max(data.image_size) <= size else None,
        ),
        model=model,
    )
    return BuiltModel(model, data_config, notes, trained, fresh)


def _load_network(config: TrainConfig, model: MultiExit, network: InitialNetwork, data: ImageData) -> Loaded:
    """Load the weights of the network that `--model` names."""
    names = network.class_names, data.label_names
    return load_weights(
        model,
        load_file(network.file()),
        place_name(network.where, hub_id=True),
        f'`model={config.model}`',
        same_classes=None in names or names[0] == names[1],
        exits=network.arguments.get('exits'),
    )


def check_slices(task: SelfDistillationTask, input_size: Sequence[int], batch_size: int, slices: int) -> None:
    """Check that batch norm can normalise a slice of a step, by a forward pass on the meta device.

    Args:
        task: What is trained.
        input_size: Channels, height and width of the images.
        batch_size: Images of a step.
        slices: Pieces of it that go through the network by themselves.

    Raises:
        ConfigError: A slice is one image, and a map has one pixel: that is one value to take a variance of.
    """
    if batch_size // slices > 1:
        return
    probe = meta_copy(task.trainable_module).train()
    try:
        probe(torch.empty((1, *input_size), device='meta'))
    except ValueError as e:
        if 'Expected more than 1 value per channel' not in str(e):
            raise
        raise ConfigError(
            f'`batch_size={batch_size}`: batch norm cannot take the variance of a single image whose map '
            f'{model_name(task.get_eval_model())} has shrunk to one pixel. Pass {2 * slices} or more, two images for '
            f'each process and each of `grad_accum_steps`.'
        ) from e


def check_optimizer(create: Callable[[nn.Module], torch.optim.Optimizer], name: str, device: torch.device) -> None:
    """Check that an optimizer makes a step with a convolution and a linear layer.

    Raises:
        ConfigError: It cannot be had on this device or with these settings.
    """
    info = get_optimizer_info(name.removeprefix(LOOKAHEAD))
    if info.second_order:
        raise ConfigError(
            f'`opt={name}`: needs gradients of gradients, which are not computed here. Choose another one, such as '
            f'sgd or adamw.'
        )
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 2)).to(device)
    try:
        optimizer = create(network)
        network(torch.ones((2, 2, 1, 1), device=device)).square().mean().backward()
        optimizer.step()
    except Exception as e:  # of libraries that timm knows and this package does not
        raise ConfigError(
            f'`opt={name}`: cannot be used on {device.type}: {reason_of(e)}. Choose another one, such as sgd or adamw.'
        ) from e


def _open_teacher(
        config: TrainConfig,
        data_config: Dict[str, Any],
        num_classes: int,
        data: Optional[ImageData],
) -> Tuple[Optional[nn.Module], Optional[List[int]]]:
    """Load the network that `--teacher` names, if any, and find the student's classes among its own, by name.

    Raises:
        ConfigError: There is none, or it does not take the student's images, or does not know its classes.
    """
    if config.teacher is None:
        return None, None
    try:
        teacher = load_network(config.teacher)[0]
        size = data_config['input_size']
        count_macs(meta_copy(teacher), torch.empty((1, *size), device='meta'))
    except (AssertionError, OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f'`teacher={config.teacher}`: {e}') from e
    names, known = data.label_names if data is not None else None, class_names(teacher)
    if names is None or known is None or len(names) != num_classes:  # the task checks their numbers
        if data is not None:
            data.notes.append(
                f'the classes of {config.teacher} and of the data cannot be compared by name; their numbers are taken '
                f'to mean the same'
            )
        return teacher, None
    try:
        return teacher, match_classes(known, names, teacher.num_classes, num_classes, 'The network')
    except DataError as e:
        raise ConfigError(f'`teacher={config.teacher}`: {e}') from e


def distillation_config(config: TrainConfig) -> DistillationConfig:
    """Return what the exits learn by the settings of a run, defaults filled in."""
    distils, classic = config.method == 'byot', config.method == 'kd'
    shared = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(DistillationConfig)
        if field.name not in ('alpha', 'temperature', 'hint_weight', 'eta', 'label_weight', 'teacher_temperature')
    }
    alpha = config.alpha if config.alpha_end is None else Linear(config.alpha, config.alpha_end)
    temperature = config.temperature
    if config.temperature_end is not None:
        temperature = Linear(temperature, config.temperature_end)
    return DistillationConfig(
        alpha=alpha if distils else 0.,
        temperature=temperature,
        hint_weight=config.hint_weight if distils else 0.,
        eta=config.patriarch_eta,
        label_weight=config.label_weight if config.label_weight is not None else 0.1 if classic else 0.6,
        teacher_temperature=config.teacher_temperature or (4.0 if classic else 1.0),
        **shared,
    )


def build_task(
        config: TrainConfig,
        model: MultiExit,
        device: torch.device,
        data_config: Dict[str, Any],
        data: Optional[ImageData] = None,
) -> SelfDistillationTask:
    """Create the task that a method names; a teacher's classes are matched with those of the data by name.

    Raises:
        ConfigError: The settings or the teacher do not fit the model.
    """
    if config.patriarch == 'tsd' and config.tsd_k > model.num_classes:
        raise ConfigError(
            f'`tsd_k={config.tsd_k}`: expected a number from 2 to {model.num_classes}, the number of classes.')
    teacher, teacher_classes = _open_teacher(config, data_config, model.num_classes, data)
    try:
        return SelfDistillationTask(
            model,
            distillation_config(config),
            criterion_kwargs=dict(smoothing=config.smoothing, soft_targets=config.mixup > 0 or config.cutmix > 0),
            teacher=teacher,
            teacher_classes=teacher_classes,
            mean=data_config['mean'],
            std=data_config['std'],
            device=device,
            verbose=False,
        )
    except ValueError as e:
        option = f'`model={config.model}`' if config.teacher is None else f'`teacher={config.teacher}`'
        raise ConfigError(f'{option}: {e}') from e
