"""The command line of training, and the YAML files that give its defaults."""
import argparse
import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Annotated, Any, Dict, List, Sequence, Union, get_type_hints

import tyro
import yaml

from ..config import TrainConfig
from ..errors import ConfigError, nearest
from ..training.presets import PRESETS

__all__ = ['parse_train_config', 'setting_helps']


def _read_yaml(path: Union[str, Path]) -> Dict[str, Any]:
    """Read settings; those of the file that `base` names, beside this one or further away, give way to them."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except OSError as e:
        raise ConfigError(f'--config {path}: {e.strerror}.') from e
    except yaml.YAMLError as e:
        raise ConfigError(f'--config {path}: not YAML: {e}') from e
    if not isinstance(settings, dict):
        raise ConfigError(f'--config {path}: expected lines of "name: value".')
    base = settings.pop('base', None)
    if base is None:
        return settings
    try:
        return {**_read_yaml(Path(path).parent / str(base)), **settings}
    except RecursionError as e:
        raise ConfigError(f'--config {path}: base: {base} comes back to itself.') from e


def _arguments(settings: Dict[str, Any], source: str) -> List[str]:
    """Turn settings from elsewhere into command line arguments, so that one parser checks all."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    arguments = []
    for key, value in settings.items():
        name = str(key).replace('-', '_')
        if name not in names:
            raise ConfigError(f'{source}: there is no setting {key}{nearest(name, names)}.')
        option = f'--{name.replace("_", "-")}'
        if isinstance(value, bool):
            arguments.append(option if value else f'--no-{option[2:]}')
        elif isinstance(value, dict):
            arguments += [option, *(f'{k}={v}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        else:
            arguments += [option, str(value)]
    return arguments


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Read a `TrainConfig` from command line arguments; a `--preset` and `-c/--config` files give way to the rest.

    Raises:
        ConfigError: A setting is out of range, or a config file cannot be read.
        SystemExit: An argument is unknown or has the wrong type; the reason has been printed.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument('-c', '--config', action='append', default=[])
    files.add_argument('--preset')
    known, rest = files.parse_known_args(argv)
    # tyro knows no option that may or may not have a value
    for i in reversed([i for i, word in enumerate(rest) if word == '--push-to-hub']):
        if i + 1 == len(rest) or rest[i + 1].startswith('--'):
            rest.insert(i + 1, 'auto')
    if known.preset not in (None, *PRESETS):
        raise ConfigError(f'--preset {known.preset}: unknown, expected one of {", ".join(PRESETS)}.')
    arguments = _arguments(PRESETS.get(known.preset, {}), f'--preset {known.preset}')
    for path in known.config:
        arguments += _arguments(_read_yaml(path), f'--config {path}')
    grouped = tyro.cli(
        tyro.conf.OmitArgPrefixes[_grouped()],
        args=arguments + rest,
        description='Train a multi-exit network by self-distillation. -c/--config FILE reads defaults from YAML, '
                    f'--preset {"|".join(PRESETS)} takes those of the authors of Be Your Own Teacher.',
    )
    config = TrainConfig(**{name: value for group in vars(grouped).values() for name, value in vars(group).items()})
    config.check()
    return config


def _grouped() -> type:
    """Return a dataclass of dataclasses, one a group of settings: tyro shows each under a heading of its own."""
    helps, hints = setting_helps(), get_type_hints(TrainConfig)
    groups: Dict[str, List[Any]] = {}
    for field in dataclasses.fields(TrainConfig):
        annotated = Annotated[hints[field.name], tyro.conf.arg(help=helps[field.name])]
        groups.setdefault(field.metadata['group'], []).append((field.name, annotated, field.default))
    made = []
    for group, fields in groups.items():
        of_group = dataclasses.make_dataclass(group.title().replace(' ', ''), fields)
        made.append((
            f'group_{len(made)}', Annotated[of_group, tyro.conf.arg(name=group)],
            dataclasses.field(default_factory=of_group)))
    return dataclasses.make_dataclass('Settings', made)


def setting_helps() -> Dict[str, str]:
    """Return the text that stands below each field of `TrainConfig` in its source, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(TrainConfig))).body[0].body
    return {
        field.target.id: ' '.join(text.value.value.split()) for field, text in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
