"""The folder of a run: a new one, or the one to go on with."""
import csv
import time
from pathlib import Path
from typing import Any, Dict, Optional

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .build import resolve_model_name
from .config import ConfigError, TrainConfig, recipe_problem
from .wrapper import SUFFIX

__all__ = ['add_row', 'choose_folder', 'create_folder', 'is_complete', 'keep_rows', 'run_folder']


def run_folder(config: TrainConfig) -> Path:
    """Return the folder that `--output` and `--experiment` name, the latter date and model when None."""
    name, _ = resolve_model_name(config.model)
    if not config.has_exits:
        name = name.removesuffix(SUFFIX)
    return Path(config.output) / (config.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{name}')


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a run that came to its end: its results are written last."""
    return (folder / 'results.json').is_file()


def _newest_of_recipe(config: TrainConfig) -> Optional[Path]:
    """Find the newest run of these settings in `--output`."""
    runs = [args.parent for args in Path(config.output).glob('*/args.yaml')]
    runs = [run for run in runs if recipe_problem(run / 'args.yaml', config) is None]
    return max(runs, key=lambda run: (run / 'args.yaml').stat().st_mtime, default=None)


def _refusal(config: TrainConfig, folder: Path) -> Optional[str]:
    """Say why the run in an existing folder cannot be gone on with, None if it can."""
    if config.resume is None:
        return 'exists, and runs are never overwritten; choose another name, or pass --resume auto to go on with it'
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
            f'--output {config.output}, --experiment {config.experiment}: the folder {folder} {problem}.')
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
        raise ConfigError(f'--output {config.output}, --experiment {config.experiment}: {problem}.')


def keep_rows(summary: Path, epochs: int) -> None:
    """Take the lines of later epochs out of a `summary.csv`: they are trained again."""
    if not summary.exists():
        return
    header, *lines = summary.read_bytes().splitlines(keepends=True) or [b'']
    kept = [line for line in lines if line.endswith(b'\n') and int(line.partition(b',')[0]) < epochs]
    beside = summary.with_suffix('.csv.new')
    beside.write_bytes(b''.join([header, *kept] if kept else []))
    beside.replace(summary)


def add_row(summary: Path, row: Dict[str, Any]) -> None:
    """Append an epoch's line to a `summary.csv` in timm's form.

    A run that an older version began may have other columns: those that one side lacks stay empty there.
    """
    rows = []
    names = list(row)
    if summary.exists():
        with summary.open(newline='', encoding='utf-8') as f:
            reader = csv.DictReader(f)
            rows, header = list(reader), list(reader.fieldnames or ())
        names = list(dict.fromkeys([*header, *names]))
        if names == header:
            with summary.open('a', newline='', encoding='utf-8') as f:
                csv.DictWriter(f, names).writerow(row)
            return
    beside = summary.with_suffix('.csv.new')
    with beside.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows([*rows, row])
    beside.replace(summary)
