"""The folder of a run: a new one, or the one to go on with."""
import time
from pathlib import Path
from typing import Collection, Optional

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..config import INCIDENTAL, PLACES, TrainConfig
from ..errors import ConfigError
from ..models.names import SUFFIX
from .initial import find_network

# Settings of older versions that left the result as it is.
_WITHOUT_EFFECT = ('log_interval',)

# What older versions wrote where None is the default now.
_WRITTEN_OUT = dict(exit_head='bottleneck')

__all__ = ['choose_folder', 'create_folder', 'recipe_problem', 'run_folder']


def run_folder(config: TrainConfig) -> Path:
    """Return the folder that `--output` and `--experiment` name, the latter date and model when None."""
    name = find_network(config.model).name
    if not config.has_exits:
        name = name.removesuffix(SUFFIX)
    return Path(config.output) / (config.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{name}')


def _newest_of_recipe(config: TrainConfig) -> Optional[Path]:
    """Find the newest run of these settings in `--output`."""
    runs = [args.parent for args in Path(config.output).glob('*/args.yaml')]
    runs = [run for run in runs if recipe_problem(run / 'args.yaml', config) is None]
    return max(runs, key=lambda run: (run / 'args.yaml').stat().st_mtime, default=None)


def _refusal(config: TrainConfig, folder: Path) -> Optional[str]:
    """Return why the run in an existing folder cannot be gone on with, None if it can."""
    if config.resume is None:
        return 'exists, and runs are never overwritten; choose another name, or pass `resume=auto` to go on with it'
    args = folder / 'args.yaml'
    if not args.is_file():
        empty = folder.is_dir() and not any(folder.iterdir())
        return None if empty else 'has no args.yaml and so is no run of this program'
    problem = recipe_problem(args, config, moved=True)
    return problem and f'holds a run {problem}'


def choose_folder(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Return the folder of a run, the same in every process, without writing anything.

    Raises:
        ConfigError: It exists and is not to be gone on with.
    """
    folder, problem = run_folder(config), None
    if accelerator.is_main_process:
        try:
            if config.resume is not None and config.experiment is None:
                folder = _newest_of_recipe(config) or folder
            if folder.exists():
                problem = _refusal(config, folder)
        except OSError as e:
            problem = f'cannot be read: {e.strerror}'
    folder, problem = broadcast_object_list([folder, problem])
    if problem:
        raise ConfigError(
            f'`output={config.output}`, `experiment={config.experiment}`: the folder {folder} {problem}.')
    return folder


def create_folder(config: TrainConfig, folder: Path, accelerator: Accelerator) -> None:
    """Create the folder of a run where it is not there yet.

    Raises:
        ConfigError: It cannot be created, or appeared meanwhile and is not to be gone on with.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=config.resume is not None)
        except OSError as e:
            problem = f'the folder {folder} cannot be created: {e.strerror}'
    problem, = broadcast_object_list([problem])
    if problem:
        raise ConfigError(f'`output={config.output}`, `experiment={config.experiment}`: {problem}.')


def recipe_problem(
        args: Path,
        config: TrainConfig,
        incidental: Collection[str] = (),
        moved: bool = False,
) -> Optional[str]:
    """Compare a config with the `args.yaml` of a run; say why that run cannot be gone on with, None if it can.

    Args:
        args: The file.
        config: The settings now.
        incidental: More settings that may differ than `INCIDENTAL`.
        moved: Folders of data and teacher may lie elsewhere, as on another machine; their own names count.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        before = yaml.safe_load(args.read_text(encoding='utf-8'))
    except yaml.YAMLError as e:
        return f'whose args.yaml cannot be read: {e}'
    if not before:  # killed before it was written
        return None
    before, now = {**TrainConfig().settings(), **before}, config.settings()
    for name, value in _WRITTEN_OUT.items():
        before[name], now[name] = before[name] or value, now[name] or value
    may_differ = {*INCIDENTAL, *incidental}
    if config.streaming:
        may_differ.discard('workers')  # each has its own share of a stream
    if moved:
        may_differ.update(name for name in PLACES if _same_place(before[name], now[name]))
    # of settings that are gone since
    changed = [
        f'`{name}` was {before[name]} and is none any more'
        for name in before if name not in now and name not in _WITHOUT_EFFECT and before[name] is not None
    ]
    changed += [
        f'`{name}` was {before[name]} and is {now[name]}'
        for name in now if name not in may_differ and before[name] != now[name]
    ]
    return f'of another recipe: {"; ".join(changed)}' if changed else None


def _same_place(before: Optional[str], now: Optional[str]) -> bool:
    return None not in (before, now) and Path(now).exists() and Path(before).name == Path(now).name
