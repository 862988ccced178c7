"""The command line of training, and the YAML files that give its defaults."""
import argparse
import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

import tyro
import yaml

from ..config import TrainConfig
from ..errors import ConfigError, nearest
from ..training.presets import PRESETS

__all__ = ['parse_train_config']


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
    config = tyro.cli(
        TrainConfig,
        args=arguments + rest,
        description='Train a multi-exit network by self-distillation. -c/--config FILE reads defaults from YAML, '
                    f'--preset {"|".join(PRESETS)} takes those of the authors of Be Your Own Teacher.',
    )
    config.check()
    return config
