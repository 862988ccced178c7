"""What of a run's settings may be published: no places on a machine, nothing that the result does not depend on."""
import ast
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional

from .config import DIGITS, TrainConfig

__all__ = ['data_name', 'place_name', 'public_settings', 'public_text']

_URL = re.compile(r'(?!file:)[a-z][a-z0-9+.-]+://\S+', re.IGNORECASE)
_HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+')
# How the name of a file begins that lies at a fixed place, and what stands before the place in it.
_KIND = re.compile(r'(?:local-dir:|file:(?://)?)', re.IGNORECASE)
_DRIVE = re.compile(r'[A-Za-z]:(?=[\\/])')
_ROOTED = re.compile(
    r'/[^\s/]|~[^\s\\/]*(?:[\\/]|$)|\.{1,2}[\\/]|\\\\|\$\{?\w+\}?[\\/]|%\w+%|[A-Za-z]:[\\/]|[\w.-]+\\\w')
# Folders in folders, and files of weights or data.
_NESTED = re.compile(
    r'[\w.@+-]+(?:/[\w.@+-]+){2,}/?|[\w.@+/-]+/[\w.@+-]+\.'
    r'(?:pth|pt|bin|ckpt|safetensors|tar|zip|gz|npz|npy|pkl|h5|onnx|json|yaml|yml|csv|txt|parquet|arrow)')
# Arguments that take a place, whatever it looks like.
_ARGUMENT = re.compile(r'(?:.*_)?(?:path|file|dir|folder|root)', re.IGNORECASE)
_QUOTED = re.compile(r'''("[^"]*"|'[^']*')''')
_WORD = re.compile(r'''[a-z][a-z0-9+.-]+://[^\s'"(),;\[\]{}<>|]+|[^\s'"(),;\[\]{}<>|=]+''', re.IGNORECASE)


def place_name(place: str, hub_id: bool = False) -> str:
    """Return the last name of a place on a machine; what lies elsewhere (`hf-hub:...`, a URL) stays, without passwords.

    Args:
        place: A file or folder as any system writes it, absolute or relative, with `local-dir:` before it or not.
        hub_id: Whether `org/name` is an id on the Hub, unless there is such a folder here.

    Examples:
        >>> place_name('/home/me/photos/pets'), place_name('hf-hub:org/resnet50_sd')
        ('pets', 'hf-hub:org/resnet50_sd')
    """
    if _URL.fullmatch(place):  # what follows the address may be a signature
        return re.sub(r'//[^/@]*@', '//', re.split('[?#]', place)[0])
    if place.startswith('hf-hub:') or (hub_id and _HUB_ID.fullmatch(place) and not Path(place).exists()):
        return place
    inside = _DRIVE.sub('', _KIND.sub('', place, count=1), count=1)
    return re.split(r'[\\/]+', inside.rstrip('\\/'))[-1]


def public_text(text: str, nested: bool = True) -> str:
    """Return a text with every place on a machine in it reduced to its last name.

    Places are absolute, of the home folder or a variable, begin with `./` or `../`, belong to Windows, or follow
    `local-dir:` or `file:`. Words, ids on the Hub and URLs are none.

    Args:
        text: The text; `name=value` and Python's literals are read as such.
        nested: Whether relative folders in folders (`runs/mine/last`) and files (`runs/last.pth`) are places as well.
    """
    name, equals, value = text.partition('=')
    if equals and name.isidentifier():
        return f'{name}={_public(value, _ARGUMENT.fullmatch(name), nested)}'
    if text[:1] in ('(', '[', '{', '"', "'") and '\\' not in text:  # which in Windows' paths is no escape
        try:
            literal = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            literal = text
        if literal != text:
            public = _public(literal, False, nested)
            return text if public == literal else repr(public)
    if _is_place(text, nested) and not _QUOTED.search(text):
        return place_name(text)
    return ''.join(
        f'{part[0]}{public_text(part[1:-1], nested)}{part[0]}' if _QUOTED.fullmatch(part)
        else _WORD.sub(lambda word: _public_word(word[0], nested), part)
        for part in _QUOTED.split(text)
    )


def _is_place(text: str, nested: bool) -> bool:
    if _URL.fullmatch(text) or text.startswith('hf-hub:'):
        return False
    return bool(_KIND.match(text) or _ROOTED.match(text) or (nested and _NESTED.fullmatch(text)))


def _public_word(word: str, nested: bool) -> str:
    if _URL.fullmatch(word) or _is_place(word, nested):
        return place_name(word)
    before, colon, after = word.partition(':')
    return f'{before}:{_public_word(after, nested)}' if colon and before != 'hf-hub' else word


def _public(value: Any, place: Any, nested: bool = True) -> Any:
    """Clean a value and what it is made of; as a place where that is what it must be."""
    if isinstance(value, dict):
        return {
            _public(k, False, nested): _public(v, place or isinstance(k, str) and _ARGUMENT.fullmatch(k), nested)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple, set)):
        return type(value)(_public(v, place, nested) for v in value)
    if not isinstance(value, str):
        return value
    return place_name(value) if place and value[:1] not in '([{"\'' else public_text(value, nested)


def public_settings(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Return what of the settings of a run may be published, by what the metadata of `TrainConfig`'s fields say.

    A `path` is published by its name, a `cosmetic` or `secret` setting not at all, nor one that is unknown. In all
    others places on this machine are reduced to their names, such as `checkpoint_path=...` in `model_kwargs`.
    """
    fields = {field.name: field.metadata for field in dataclasses.fields(TrainConfig)}
    public = {}
    for name, value in settings.items():
        kind = fields[name].get('kind') if name in fields else 'secret'
        if kind == 'path' and isinstance(value, str):
            public[name] = place_name(value, fields[name].get('hub_id', False))
        elif kind not in ('cosmetic', 'secret'):
            public[name] = _public(value, False)
    return public


def data_name(dataset: Optional[str], data_dir: Optional[str]) -> str:
    """Return what data opened with these settings are called."""
    if dataset:
        return place_name(dataset, hub_id=True)
    return place_name(os.path.abspath(data_dir)) if data_dir else DIGITS
