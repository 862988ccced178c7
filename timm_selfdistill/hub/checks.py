"""Looks at configs and weights from the Hub or from strangers' folders before anything is done with them."""
import dataclasses
import inspect
import json
import re
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, build_model_with_cfg
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import WeightsError
from ..models.names import times
from ..run_files import CONFIG_NAME

__all__ = ['build_skeleton', 'check_config', 'check_memory', 'check_weights', 'read_config']


_CONFIG_BYTES = 8 * 2 ** 20  # Python makes some twenty times as much of it
_HEADER_BYTES = 16 * 2 ** 20  # safetensors makes some ten times as much of it
_MEMORY = 64 * 2 ** 20
_CLASSES = 10 ** 7
_PIXELS = 8192
_WINDOW = 32  # a few networks list the pairs of all positions in a window one by one
_PARTS = 1000
_TOTAL = 10 ** 5


# -- config.json ------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What a value may be, and how to say so."""
    accepts: Callable[[Any], bool]
    words: str


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float) -> _Kind:
    return _Kind(lambda v: _is_number(v, low, high), f'a number from {low:,} to {high:,}')


def _whole(low: int, high: int) -> _Kind:
    return _Kind(lambda v: isinstance(v, int) and _is_number(v, low, high), f'a whole number from {low:,} to {high:,}')


def _several(kind: _Kind, fewest: int, most: int) -> _Kind:
    count = f'{fewest}' if fewest == most else f'{fewest:,} to {most:,}'
    return _Kind(
        lambda v: isinstance(v, (list, tuple)) and fewest <= len(v) <= most and all(map(kind.accepts, v)),
        f'a list of {count}, each {kind.words}',
    )


def _either(*kinds: _Kind) -> _Kind:
    return _Kind(lambda v: any(k.accepts(v) for k in kinds), ', or '.join(k.words for k in kinds))


def _one_of(*values: Any) -> _Kind:
    return _Kind(lambda v: any(v is value or v == value and type(v) is type(value) for value in values),
                 f'one of {", ".join(map(repr, values))}')


def _odd_part(value: Any, name: str, room: List[float], depth: int = 8) -> Optional[Tuple[str, Any]]:
    """Find what JSON would not know, or what makes a value too much.

    Args:
        value: A value.
        name: Its name.
        room: How many parts it may have, and what its numbers may add up to; counted down.
        depth: How deep its parts may be nested.

    Returns:
        Name and value of the first such part, None if there is none.
    """
    parts: List[Tuple[str, Any]] = []
    if isinstance(value, (list, tuple)):
        plain = True
        parts = [(f'{name}[{i}]', v) for i, v in enumerate(value[:_PARTS])]
    elif isinstance(value, dict):
        plain = all(isinstance(k, str) for k in value)
        parts = [(f'{name}.{str(k)[:50]}', v) for k, v in islice(value.items(), _PARTS)]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        plain = abs(value) <= room[1]
        room[1] -= abs(value) if plain else 0
    else:
        plain = value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 10_000)
    room[0] -= 1
    if not plain or room[0] < 0 or depth < 0:
        return name, value
    return next(filter(None, (_odd_part(v, part, room, depth - 1) for part, v in parts)), None)


_TEXT = _Kind(lambda v: isinstance(v, str) and len(v) <= 100_000, 'a text')
_TEXTS = _either(_TEXT, _several(_TEXT, 0, _PARTS))
_FLAG = _Kind(lambda v: isinstance(v, bool), 'true or false')
_NAMED_TEXTS = _Kind(
    lambda v: isinstance(v, dict) and all(map(_TEXT.accepts, (*v, *v.values()))), 'an object of texts')
_SIDE = _whole(1, _PIXELS)
_IMAGE = _Kind(
    lambda v: isinstance(v, (list, tuple)) and len(v) == 3 and _whole(1, 1024).accepts(v[0])
    and all(map(_SIDE.accepts, v[1:])),
    f'channels (1 to 1,024), height and width (1 to {_PIXELS:,})',
)
_NOTHING = _Kind(lambda v: v is None, 'nothing')
_WINDOWS = _either(_whole(0, _WINDOW), _several(_whole(0, _WINDOW), 1, 100))

# The fields of timm's pretrained cfg that something is done with; the others only have to be plain.
_CFG: Dict[str, _Kind] = dict(
    url=_NOTHING,
    state_dict=_NOTHING,
    hf_hub_filename=_NOTHING,
    custom_load=_Kind(lambda v: v is None or v is False, 'false'),
    input_size=_IMAGE,
    test_input_size=_IMAGE,
    min_input_size=_IMAGE,
    fixed_input_size=_FLAG,
    interpolation=_one_of('bicubic', 'bilinear', 'box', 'hamming', 'lanczos', 'nearest', 'random'),
    crop_pct=_number(0.01, 10),
    test_crop_pct=_number(0.01, 10),
    crop_mode=_one_of('center', 'squash', 'border'),
    mean=_several(_number(-1e4, 1e4), 1, 1024),
    std=_several(_number(1e-6, 1e4), 1, 1024),
    num_classes=_whole(0, _CLASSES),
    label_offset=_whole(0, 1000),
    label_names=_either(_several(_TEXT, 0, _CLASSES), _NAMED_TEXTS),
    label_descriptions=_NAMED_TEXTS,
    pool_size=_several(_SIDE, 1, 3),
    test_pool_size=_several(_SIDE, 1, 3),
    first_conv=_TEXTS,
    classifier=_TEXTS,
    architecture=_TEXT,
    license=_TEXT,
    tag=_TEXT,
)
_ARGS: Dict[str, _Kind] = dict(
    num_classes=_whole(0, _CLASSES),
    in_chans=_whole(1, 1024),
    img_size=_either(_SIDE, _several(_SIDE, 2, 2)),
    exits=_either(_whole(0, 1000), _several(_whole(0, 1000), 0, 100)),
    truncate=_whole(0, 100),
    exit_head=_TEXT,
    window_size=_WINDOWS,
    window_sizes=_WINDOWS,
    drop_rate=_number(0, 1),
    drop_path_rate=_number(0, 1),
)
# Arguments of those who build a network say where from and how; a config says what.
_NOT_FOR_CONFIGS = {
    *inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters,
    'backbone_pretrained', 'device', 'dtype', 'feature_cls', 'features_only', 'out_indices', 'pruned',
}


def _check(value: Any, kind: _Kind, name: str, where: str) -> None:
    if not kind.accepts(value):
        raise WeightsError(f'{where}: {name} = {shortened(value)}: expected {kind.words}.')


def _check_plain(value: Any, total: int, name: str, where: str) -> None:
    odd = _odd_part(value, name, [_PARTS, total])
    if odd is not None:
        raise WeightsError(
            f'{where}: {odd[0]} = {shortened(odd[1])}: expected short texts, true, false, null, finite numbers, or '
            f'lists and objects of such: {_PARTS:,} at most, the numbers of which add up to {total:,} at most.'
        )


def read_config(path: Path, where: str) -> Dict[str, Any]:
    """Read a `config.json` in timm's format and check it, see `check_config`.

    Args:
        path: The file.
        where: What to call it in messages.

    Raises:
        WeightsError: It is too large, not JSON, or not such a config.
    """
    size = path.stat().st_size
    if size > _CONFIG_BYTES:
        raise WeightsError(f'{where}: {CONFIG_NAME} has {size:,} bytes: expected {_CONFIG_BYTES:,} at most.')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise WeightsError(f'{where}: {CONFIG_NAME} is not JSON: {e}') from e
    _check(config, _Kind(lambda v: isinstance(v, dict), 'a JSON object'), CONFIG_NAME, where)
    _check(config.get('architecture'), _Kind(
        lambda v: isinstance(v, str) and re.fullmatch(r'\w{1,200}', v) is not None, 'the name of a timm model'),
        'architecture', where)
    if not timm.is_model(config['architecture']):
        raise WeightsError(f'{where}: architecture = {config["architecture"]}: timm knows no such model.')
    for name in ('num_classes', 'label_names', 'label_descriptions'):
        if config.get(name) is not None:
            _check(config[name], _CFG[name], name, where)
    # timm's older configs are a pretrained cfg throughout
    check_config(config.get('pretrained_cfg', {}), config.get('model_args', {}), where)
    return config


def check_config(cfg: Any, model_args: Any, where: str) -> None:
    """Check what a config says of the weights and of the network, before either is looked at.

    Args:
        cfg: timm's pretrained cfg as a dict.
        model_args: Arguments of the network.
        where: What to call it in messages.

    Raises:
        WeightsError: A value is unknown, of the wrong type, out of range, or nothing that a config decides.
    """
    for name, values in (('pretrained_cfg', cfg), ('model_args', model_args)):
        _check(values, _Kind(lambda v: isinstance(v, dict), 'a JSON object'), name, where)
    fields = {f.name: f for f in dataclasses.fields(PretrainedCfg)}
    for name, value in cfg.items():
        if name not in fields:
            raise WeightsError(f'{where}: pretrained_cfg has an unknown key, {shortened(name)}.')
        if name not in _CFG:
            _check_plain(value, 2 * _CLASSES, f'pretrained_cfg.{name}', where)
        elif value is not None or fields[name].default is not None:
            _check(value, _CFG[name], f'pretrained_cfg.{name}', where)
    channels = cfg.get('input_size', fields['input_size'].default)[0]
    for name in ('mean', 'std'):
        if name in cfg and len(cfg[name]) not in (1, 3, channels):  # of 1 and 3 timm makes as many as it needs
            raise WeightsError(f'{where}: {len(cfg[name])} values in pretrained_cfg.{name}: expected {channels}.')
    names = cfg.get('label_names')
    if isinstance(names, (list, tuple)) and 'num_classes' in cfg and len(names) != cfg['num_classes']:
        raise WeightsError(f'{where}: {len(names):,} label_names: expected {cfg["num_classes"]:,}, one for each class.')
    for name, value in model_args.items():
        if not str(name).isidentifier() or name in _NOT_FOR_CONFIGS:
            raise WeightsError(f'{where}: model_args has the key {shortened(name)}, which no config may decide.')
        if name not in _ARGS:
            # the classes that a rule of early exit was made for take no memory
            _check_plain(value, 2 * _CLASSES if name == 'early_exit' else _TOTAL, f'model_args.{name}', where)
        elif value is not None:
            _check(value, _ARGS[name], f'model_args.{name}', where)


# -- the network and its weights --------------------------------------------------------------------------------------


class _TooMany(Exception):
    """Not a ValueError, which a constructor may take for one of its own."""


@contextmanager
def _limited(most: int) -> Iterator[None]:
    """Stop whoever registers more parameters than `most` with modules."""
    count = 0

    def look(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _TooMany

    handle = register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()


def build_skeleton(build: Callable[[], nn.Module], where: str, most: int) -> nn.Module:
    """Build what a config describes without memory for its weights.

    Args:
        build: Builds it.
        where: What to call the config in messages.
        most: Parameters (tensors) that it may make on the way.

    Returns:
        The network on the meta device.

    Raises:
        WeightsError: It cannot be built, or has too many parameters.
    """
    try:
        with torch.device('meta'), _limited(most), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # they are heard when it is built for use
            return build()
    except _TooMany as e:
        raise WeightsError(f'{where}: {CONFIG_NAME} describes a network of more than {most:,} parameters.') from e
    except Exception as e:  # whatever a constructor makes of arguments that it was not meant to get
        raise WeightsError(
            f'{where}: {CONFIG_NAME} describes no network that can be built: {type(e).__name__}: {e}') from e


def check_memory(network: nn.Module, usual: nn.Module, weights: Optional[Path], where: str) -> None:
    """Check that a network takes no more memory than its weights, or the usual network of its name, account for.

    Args:
        network: What a config describes, on the meta device.
        usual: What timm builds under that name, likewise.
        weights: File of the weights, None if there is none.
        where: What to call the config in messages.

    Raises:
        WeightsError: It takes more than four times as much as the larger of them, and more than 256 MiB.
    """
    most = 4 * max(_MEMORY, _bytes(usual), weights.stat().st_size if weights else 0)
    if _bytes(network) > most:
        raise WeightsError(
            f'{where}: {CONFIG_NAME} describes a network of {_bytes(network):,} bytes: expected {most:,} at most.')


def _bytes(network: nn.Module) -> int:
    # what a network computes and keeps besides its weights, such as masks of attention, may be the larger part
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


_DTYPES = {True: ('F64', 'F32', 'F16', 'BF16'), False: ('I64', 'I32', 'I16', 'I8', 'U8', 'BOOL', 'C64')}


def check_weights(path: Path, network: nn.Module, where: str) -> None:
    """Compare a safetensors file with the network that it is for, by the file's header alone.

    Args:
        path: The file.
        network: The network; may be on the meta device.
        where: What to call the file in messages.

    Raises:
        WeightsError: It is no safetensors file, is cut off, or holds other tensors than the network has.
    """
    with path.open('rb') as f:
        header = int.from_bytes(f.read(8), 'little')
    if header > _HEADER_BYTES:
        raise WeightsError(
            f'{where}: {path.name} is no safetensors file, or one with a header of {header:,} bytes: expected '
            f'{_HEADER_BYTES:,} at most.'
        )
    try:
        with safe_open(path, framework='pt') as f:
            parts = {name: f.get_slice(name) for name in f.keys()}
            held = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as e:
        raise WeightsError(f'{where}: {path.name} is no complete safetensors file: {e}') from e
    state = network.state_dict()
    _refuse_names(f'{where}: {path.name} lacks', [name for name in state if name not in held])
    _refuse_names(f'{where}: {path.name} holds unknown tensors,', [name for name in held if name not in state])
    for name, tensor in state.items():
        shape, dtype = held[name]
        if shape != tensor.shape:
            raise WeightsError(f'{where}: {path.name}: {name} is {times(shape)}: expected {times(tensor.shape)}.')
        if dtype not in _DTYPES[tensor.is_floating_point()]:
            raise WeightsError(f'{where}: {path.name}: {name} has the type {dtype}: expected {tensor.dtype}.')


def _refuse_names(problem: str, names: Sequence[str]) -> None:
    if names:
        more = f' and {len(names) - 3:,} more' if len(names) > 3 else ''
        raise WeightsError(f'{problem} {", ".join(map(shortened, names[:3]))}{more}.')
