"""What a run starts from: a network of timm, a trained network, or a file of weights."""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from timm.models import adapt_input_conv, load_state_dict, split_model_name_tag

from ..errors import ConfigError, counted, nearest, reason_of
from ..hub.sources import fetch_weights, read_source
from ..models.multi_exit import MultiExit
from ..models.names import SUFFIX, model_name, names_tuple, times
from ..models.wrapper import GATES
from ..run_files import is_complete

__all__ = ['InitialNetwork', 'Loaded', 'find_network', 'load_weights', 'read_weights']

# What the weights' config says that the network is built by, or that the settings of the run say anew.
_NOT_KEPT = ('early_exit', 'num_classes', 'in_chans', 'img_size')

# Entries of timm's pretrained cfg that say how the weights saw their images.
_VIEW = (
    'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'test_input_size', 'test_crop_pct',
)


@dataclass
class InitialNetwork:
    """What `--model` names.

    Attributes:
        name: Its registered name, `<name>_sd`.
        tag: Tag of timm's weights, '' without.
        where: Where its own weights are, `hf-hub:...` or `local-dir:...`; None for a name of timm.
        cfg: Their pretrained cfg, of which `view` is what says how they saw their images.
        arguments: What builds the network besides.
        notes: What is to be reported of it.
    """
    name: str
    tag: str = ''
    where: Optional[str] = None
    cfg: Dict[str, Any] = field(default_factory=dict)
    arguments: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    @property
    def class_names(self) -> Optional[List[str]]:
        """Names of the classes that it knows."""
        return self.cfg.get('label_names')

    @property
    def view(self) -> Dict[str, Any]:
        return {key: self.cfg[key] for key in _VIEW if self.cfg.get(key) is not None}

    def file(self) -> Path:
        """Return the file of its weights, fetched if need be.

        Raises:
            ConfigError: There is none.
        """
        try:
            return fetch_weights(self.cfg, self.where)
        except (HTTPError, OSError, RuntimeError, ValueError) as e:
            raise ConfigError(f'`model={self.where}`: {e}') from e


def find_network(model: str) -> InitialNetwork:
    """Find what `--model` names; weights are not read yet.

    Raises:
        ConfigError: timm has no such model (the message offers the nearest names), or what lies there is no network.
    """
    kind, colon, _ = model.partition(':')
    base, tag = split_model_name_tag(model)
    base = base.removesuffix(SUFFIX)
    if timm.is_model(base + SUFFIX):
        return InitialNetwork(base + SUFFIX, tag)
    path = Path(model).expanduser()
    if colon and kind in ('hf-hub', 'local-dir'):
        where = model
    elif path.exists() or '/' in model or '\\' in model:
        where = f'local-dir:{path}'
    else:
        names = (name for name in timm.list_models() if not name.endswith(SUFFIX))
        raise ConfigError(
            f'`model={model}`: timm has no such model{nearest(base, names)}. A folder of weights, or '
            f'hf-hub:org/name, can be given as well.'
        )
    return _read_network(model, where)


def _read_network(model: str, where: str) -> InitialNetwork:
    folder = Path(where.partition(':')[2]) if where.startswith('local-dir:') else None
    if folder is not None and not folder.is_dir():
        problem = 'this is a file; `initial_checkpoint` takes one' if folder.exists() else 'there is no such folder'
        raise ConfigError(f'`model={model}`: {problem}. Expected a timm name, the folder of a run, or hf-hub:org/name.')
    try:
        cfg, architecture, saved = read_source(where)
        if folder is not None:
            fetch_weights(cfg, where)
    except (HTTPError, OSError, RuntimeError, ValueError) as e:
        raise ConfigError(
            f'`model={model}`: {str(e).rstrip(".")}. Expected the folder of a run, or a network that timm has saved.'
        ) from e
    name = architecture.removesuffix(SUFFIX) + SUFFIX
    if not timm.is_model(name):
        raise ConfigError(f'`model={model}`: its config is of {architecture}, which timm does not have.')
    if saved.get('truncate') is not None:
        raise ConfigError(f'`model={model}`: it was cut off at exit {saved["truncate"]}; expected a whole network.')
    notes = []
    if folder is not None and (folder / 'args.yaml').is_file() and not is_complete(folder):
        notes.append(f'the run in {folder} is not complete; the weights of its last complete epoch are taken')
    saved = {key: value for key, value in saved.items() if key not in _NOT_KEPT}
    return InitialNetwork(name, '', where, cfg, saved, notes)


def read_weights(file: str, setting: str = 'initial_checkpoint') -> Dict[str, torch.Tensor]:
    """Read a file of weights as timm does, without executing anything in it.

    Args:
        file: The file.
        setting: The setting that names it, for errors.

    Raises:
        ConfigError: There is none, it holds no weights, or reading it would run code.
    """
    setting = f'`{setting}={file}`'
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(
            f'{setting}: {"this is a folder, a file is needed" if path.is_dir() else "there is no such file"}.')
    try:
        state = load_state_dict(str(path))
    except (EOFError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as e:
        if 'weights_only' in str(e) and _is_pickled(path):
            raise ConfigError(
                f'{setting}: it holds more than tensors, and reading that could run code. Save the weights alone, with '
                f'safetensors.torch.save_file or torch.save(model.state_dict(), file).'
            ) from e
        reason = 'it is neither' if 'weights_only' in str(e) else reason_of(e)
        raise ConfigError(f'{setting}: cannot be read as safetensors or .pth: {reason}.') from e
    except Exception as e:  # whatever unpickling a file that is none may come upon
        raise ConfigError(f'{setting}: cannot be read as safetensors or .pth: {reason_of(e)}.') from e
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ConfigError(f'{setting}: it holds no tensors by name. Expected what model.state_dict() returns.')
    return tensors


def _is_pickled(path: Path) -> bool:
    """Return whether a file begins as those that torch saves: as an archive, or in older versions as a pickle."""
    with path.open('rb') as file:
        return file.read(1) in (b'P', b'\x80')


@dataclass
class Loaded:
    """What became of weights.

    Attributes:
        line: One line that says so.
        fresh_classifier: Whether the deepest exit's classifier is an untrained one.
    """
    line: str
    fresh_classifier: bool


def load_weights(
        model: MultiExit,
        weights: Dict[str, torch.Tensor],
        place: str,
        setting: str,
        same_classes: bool = True,
        exits: Optional[Sequence[int]] = None,
) -> Loaded:
    """Load weights of the plain or the multi-exit network, adapted as timm does to other classes and channels.

    A classifier for other classes is left as it is, as are heads of exits that are not in the weights. Weights in
    another format that timm reads for this family of networks are converted by timm.

    Args:
        model: The network.
        weights: Tensors by name.
        place: What to call them.
        setting: The setting that names them, for errors.
        same_classes: Whether as many classes as the network's are the network's.
        exits: Where the exits stood whose heads are among the weights; where those of the network stand when None.

    Raises:
        ConfigError: They are not of this network; the message names the first tensors that do not fit.
    """
    # gates belong to an exit rule, which does not outlast training
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(GATES)}
    total, own = len(weights), model.state_dict()
    state = _of_this_network(model, weights)
    adapted = _adapt_stem(model, state)
    fresh, fresh_classifier = _drop_classifiers(model, state, own, same_classes)
    fresh += _drop_heads(model, state, own, exits)
    aside = [name for name in state if name not in own and not _has_child(model, name)]
    for name in aside:
        del state[name]
    _check_fit(model, state, own, setting)
    count = sum(name in state for name in own)
    model.load_state_dict({**own, **state})
    line = f'loaded {count} of {total} tensors from {place}'
    if fresh:
        line += f'; fresh: {", ".join(fresh)}'
    if adapted:
        line += f'; adapted: {", ".join(adapted)}'
    if aside:
        line += f'; left aside: {_listed(aside)}'
    return Loaded(line, fresh_classifier)


def _of_this_network(model: MultiExit, weights: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return weights under the names that they have in the multi-exit network."""
    if any(name.startswith(('backbone.', 'exit_heads.')) for name in weights):
        return dict(weights)
    changing = tuple(f'{_plain(name)}.' for name in _deepest_classifiers(model))
    changing += tuple(f'{_plain(name)}.' for name in names_tuple(model._traits.get('first_conv')))
    fits = all(
        name in weights and weights[name].shape == tensor.shape
        for name, tensor in model.backbone.state_dict().items()
        if not name.startswith(changing) and not name.endswith('num_batches_tracked')
    )
    convert = getattr(sys.modules[type(model.backbone).__module__], 'checkpoint_filter_fn', None)
    if not fits and convert is not None:
        try:
            weights = convert(dict(weights), model.backbone)
        except Exception:  # not of this family at all, as is reported of the names and shapes
            pass
    state = {f'backbone.{name}': tensor for name, tensor in weights.items()}
    return {name: t for name, t in state.items() if name in model.state_dict()} if model.pruned else state


def _deepest_classifiers(model: MultiExit) -> Sequence[str]:
    return [name for name in model.classifiers() if not name.startswith('exit_heads.')]


def _adapt_stem(model: MultiExit, state: Dict[str, torch.Tensor]) -> List[str]:
    """Adapt the first convolution to the network's channels as timm does; return what was."""
    adapted = []
    for name in names_tuple(model._traits.get('first_conv')):
        module, weight = model.get_submodule(name), state.get(f'{name}.weight')
        if not isinstance(module, nn.Conv2d) or weight is None or weight.ndim != 4:
            continue
        if weight.shape == module.weight.shape:
            continue
        before, now = weight.shape[1] * model.in_chans // module.in_channels * module.groups, model.in_chans
        try:
            state[f'{name}.weight'] = adapt_input_conv(now, weight, base_chans=max(1, before))
        except (AssertionError, NotImplementedError, RuntimeError):
            continue  # reported as of another shape
        adapted.append(f'stem ({before} → {now} channels)')
    return adapted


def _drop_classifiers(
        model: MultiExit,
        state: Dict[str, torch.Tensor],
        own: Dict[str, torch.Tensor],
        same_classes: bool,
) -> Tuple[List[str], bool]:
    """Take classifiers for other classes out of weights; return what is fresh, and whether the deepest one is."""
    before: Optional[int] = None
    for name in model.classifiers():
        weight = state.get(f'{name}.weight')
        if weight is not None and not (same_classes and weight.shape[0] == own[f'{name}.weight'].shape[0]):
            before = weight.shape[0]
            _drop(state, f'{name}.')
    # an encoder's classifier may have a norm as well
    deepest = ['head.'] if model.head is not None else [f'{name}.' for name in _deepest_classifiers(model)]
    fresh = [prefix for prefix in deepest if any(k.startswith(prefix) and k not in state for k in own)]
    for prefix in fresh:
        _drop(state, prefix)
    if not fresh:
        return [], False
    if before is None:
        return ['classifier (none in the weights)'], True
    classes = f'{before} → {model.num_classes} classes' if before != model.num_classes else f'{before} other classes'
    return [f'classifier ({classes})'], True


def _drop(state: Dict[str, torch.Tensor], prefix: str) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        del state[key]


def _drop_heads(
        model: MultiExit,
        state: Dict[str, torch.Tensor],
        own: Dict[str, torch.Tensor],
        exits: Optional[Sequence[int]],
) -> List[str]:
    """Give each exit the head that stood at its place, take all others out of weights; return what is fresh."""
    heads: Dict[int, Dict[str, torch.Tensor]] = {}
    for key in [k for k in state if k.startswith('exit_heads.')]:
        _, number, rest = key.split('.', 2)
        heads.setdefault(int(number), {})[rest] = state.pop(key)
    exits = exits if exits is not None else model.exits if len(heads) == len(model.exits) else ()
    fresh = []
    for i, place in enumerate(model.exits):
        prefix = f'exit_heads.{i}.'
        head = heads.get(exits.index(place), {}) if place in exits else {}
        wanted = {k.removeprefix(prefix): v.shape for k, v in own.items() if k.startswith(prefix)}
        # its classifier alone may be missing, and has been told of
        fits = {*wanted} - {*head} <= {'fc.weight', 'fc.bias'} and all(wanted.get(k) == head[k].shape for k in head)
        if head and fits:
            state.update((prefix + k, tensor) for k, tensor in head.items())
        else:
            fresh.append(i)
    if not fresh:
        return []
    return [f'head of exit {fresh[0]}' if len(fresh) == 1 else f'heads of exits {", ".join(map(str, fresh))}']


def _has_child(model: MultiExit, name: str) -> bool:
    """Return whether the network has the outermost module or tensor that a name belongs to."""
    inner = model.backbone if name.startswith('backbone.') else model
    first = name.removeprefix('backbone.').partition('.')[0]
    return hasattr(inner, first) and getattr(inner, first) is not None


def _check_fit(
        model: MultiExit,
        state: Dict[str, torch.Tensor],
        own: Dict[str, torch.Tensor],
        setting: str,
) -> None:
    """Raise ConfigError where a tensor of the deepest exit is missing, of another shape, or has no place."""
    stays = tuple(f'{name}.' for name in model.classifiers()) + ('exit_heads.', 'head.')
    missing = [n for n in own if n not in state and not n.startswith(stays) and not n.endswith('num_batches_tracked')]
    shapes = [
        f'{_plain(n)} {times(state[n].shape)} instead of {times(own[n].shape)}'
        for n in state if n in own and state[n].shape != own[n].shape
    ]
    without = [n for n in state if n not in own]
    problems = [
        f'{counted(len(names), "tensor")} {what} ({_listed(names)})'
        for names, what in ((missing, 'missing'), (shapes, 'of another shape'), (without, 'without a place')) if names
    ]
    if problems:
        raise ConfigError(
            f'{setting}: these are no weights of {model_name(model).removesuffix(SUFFIX)}: {"; ".join(problems)}.')


def _plain(name: str) -> str:
    return name.removeprefix('backbone.')


def _listed(names: Sequence[str]) -> str:
    return ', '.join(map(_plain, names[:3])) + (', ...' if len(names) > 3 else '')
