"""Classify images: `python recipes/predict.py --checkpoint RUN --input FOLDER --output out.csv`."""
import csv
import dataclasses
import glob
import json
import statistics
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Literal, Optional, TextIO, Tuple

import torch
import tyro
from rich.console import Console
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, Dataset

from ..costs import compute_costs, device_time
from ..data.augment import eval_transform
from ..data.image_data import ImageSplit, load_image_data
from ..data.source import DataSource
from ..data.unlabelled import find_images, image_split
from ..data.unreadable import Unreadable, list_unreadable, write_unreadable
from ..data.workers import keep_worker_alive, readable
from ..errors import ConfigError, DataError, UnreadableImageError, counted
from ..evaluation.progress import follow
from ..evaluation.trained_network import check_device, choose_split
from ..hub.networks import class_names, load_checkpoint
from ..inference.early_exit import EarlyExit, EarlyExitOutput
from ..models.multi_exit import MultiExit
from ..run_files import replaced
from .launch import run_command

__all__ = ['PredictConfig', 'main']

# Batches that are timed with and without early exit.
_TIMED = 8


@dataclasses.dataclass(kw_only=True)
class PredictConfig:
    """Classify images, each by the first exit that is sure of it."""

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    input: Tuple[str, ...] = ()
    """Images: files, folders with all below them, or patterns such as 'photos/*.jpg'."""
    dataset: Optional[str] = None
    """A data set instead, as in train.py."""
    data_dir: Optional[str] = None
    """Likewise."""
    split: Optional[Literal['train', 'validation', 'test']] = None
    """Split of the data set; when None the test split, or validation, or train where there is neither."""
    output: Optional[Path] = None
    """File of the answers, .csv or .jsonl; the standard output when None."""
    format: Optional[Literal['csv', 'jsonl']] = None
    """csv, or JSON lines; by the name of --output when None."""
    thresholds: Optional[Tuple[float, ...]] = None
    """Confidence from which on an image leaves: one number, or one for each auxiliary exit. Those that came with the
    weights when None; without such every image runs to the end."""
    top_k: int = 1
    """Classes to list for an image, the likeliest first."""
    all_exits: bool = False
    """Give every exit's answer as well; all of the network runs then."""
    batch_size: int = 64
    """Images at a time."""
    workers: int = 0
    """Loader processes."""
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """Where to compute."""


class _Images(Dataset):
    """Gives each image of a split with its row, or what is wrong with it."""

    def __init__(self, split: ImageSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Tuple[int, Any]:
        try:
            return row, self.split[row][0]
        except UnreadableImageError as e:
            return row, Unreadable(self.split.origin, f'row {self.split.index[row]}', e.path or '', e.reason)


def _batch(items: List[Tuple[int, Any]]) -> Tuple[List[int], Optional[torch.Tensor], List[Unreadable]]:
    good = [(row, image) for row, image in items if isinstance(image, torch.Tensor)]
    bad = [image for _, image in items if not isinstance(image, torch.Tensor)]
    return [row for row, _ in good], torch.stack([image for _, image in good]) if good else None, bad


def _find_files(inputs: Tuple[str, ...]) -> List[str]:
    """Return the files that `--input` names, in its order.

    Raises:
        DataError: A path or a pattern names none.
    """
    files: List[str] = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            found = find_images(path)
            if not found:
                raise DataError(f'`input={given}`: there are no images below this folder.')
        elif path.exists():
            found = [str(path)]
        else:
            found = []
            for match in sorted(glob.glob(str(path), recursive=True)):
                found += find_images(Path(match)) if Path(match).is_dir() else [match]
            if not found:
                raise DataError(f'`input={given}`: there is no such file or folder, and as a pattern it matches none.')
        files += found
    return list(dict.fromkeys(files))


def _open_images(config: PredictConfig, channels: int) -> Tuple[ImageSplit, List[str]]:
    """Open what is to be classified; return it and what each image is called."""
    if bool(config.input) == bool(config.dataset or config.data_dir):
        raise ConfigError('`input`: pass files or folders, or else `dataset` or `data_dir`, one of them.')
    if config.input:
        files = _find_files(config.input)
        return image_split(files, 'input', 'L' if channels == 1 else 'RGB'), files
    data = load_image_data(DataSource(
        dataset=config.dataset, data_dir=config.data_dir, val_fraction=0., in_chans=channels, skip_unreadable=True))
    name = choose_split(data, config.split)
    split = data.splits()[name]
    paths = [stored and stored['path'] for stored in split.images[split.image_column]]
    return split, [path or f'{name}/{row}' for row, path in enumerate(paths)]


def _answers(probabilities: torch.Tensor, names: List[str], top: int) -> List[List[Dict[str, Any]]]:
    """Return for each image its likeliest classes."""
    values, classes = probabilities.cpu().topk(top)
    return [
        [dict(label=names[c], confidence=round(v, 6)) for v, c in zip(row, numbers)]
        for row, numbers in zip(values.tolist(), classes.tolist())
    ]


class _Writer:
    """Writes answers as CSV or as JSON lines.

    Args:
        file: Where to.
        kind: `csv` or `jsonl`.
    """

    def __init__(self, file: TextIO, kind: str):
        self.file, self.kind = file, kind
        self.csv: Optional[csv.DictWriter] = None

    def write(
            self,
            name: str,
            top: List[Dict[str, Any]],
            exit_index: int,
            exits: Optional[List[Dict[str, Any]]],
    ) -> None:
        """Write what became of an image."""
        row = dict(file=name, **top[0], exit=exit_index)
        if self.kind == 'jsonl':
            if len(top) > 1:
                row['top'] = top
            if exits is not None:
                row['exits'] = exits
            self.file.write(json.dumps(row, ensure_ascii=False) + '\n')
            return
        for rank, answer in enumerate(top[1:], 2):
            row.update((f'{key}_{rank}', value) for key, value in answer.items())
        for number, answer in enumerate(exits or ()):
            row.update((f'exit{number}_{key}', value) for key, value in answer.items())
        if self.csv is None:
            self.csv = csv.DictWriter(self.file, list(row), lineterminator='\n')
            self.csv.writeheader()
        self.csv.writerow(row)


@contextmanager
def _opened(output: Optional[Path]) -> Iterator[TextIO]:
    """Open the file of the answers, which replaces an older one when it is complete."""
    if output is None:
        yield sys.stdout
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output) as beside, beside.open('w', newline='', encoding='utf-8') as file:
        yield file


@dataclasses.dataclass
class _Tally:
    """What the summary is made of: the exits taken, and seconds of a batch to the end and with early exit."""
    exits: List[int] = dataclasses.field(default_factory=list)
    whole: List[float] = dataclasses.field(default_factory=list)
    early: List[float] = dataclasses.field(default_factory=list)

    def time(self, model: MultiExit, predictor: EarlyExit, images: torch.Tensor) -> None:
        """Run a batch both ways, in turn."""
        device, runs = images.device, [(model, self.whole), (predictor, self.early)]
        for run, seconds in runs if len(self.whole) % 2 else reversed(runs):
            run(images)
            began = device_time(device)
            run(images)
            seconds.append(device_time(device) - began)


def _check(config: PredictConfig, model: MultiExit) -> str:
    """Check the settings; return the format of the answers."""
    for option, least in (('batch_size', 1), ('workers', 0)):
        if getattr(config, option) < least:
            raise ConfigError(f'`{option}={getattr(config, option)}`: expected {least} or more.')
    if not 1 <= config.top_k <= model.num_classes:
        raise ConfigError(f'`top_k={config.top_k}`: expected a number from 1 to {model.num_classes}, the classes.')
    kinds = {'.csv': 'csv', '.jsonl': 'jsonl', '.json': 'jsonl'}
    if config.format is None and config.output is not None and config.output.suffix not in kinds:
        raise ConfigError(f'`output={config.output}`: expected a name that ends in .csv or .jsonl; or pass `format`.')
    return config.format or (kinds[config.output.suffix] if config.output else 'csv')


def _predictor(config: PredictConfig, model: MultiExit) -> EarlyExit:
    """Return the predictor, with the thresholds asked for or those of the weights."""
    given = config.thresholds
    if given is None:
        return EarlyExit(model)
    temperatures = model.exit_rule.temperatures if model.exit_rule is not None else None
    try:
        return EarlyExit(model, given[0] if len(given) == 1 else given, temperatures=temperatures)
    except ValueError as e:
        raise ConfigError(f'`thresholds={" ".join(map(str, given))}`: {e}') from e


@torch.no_grad()
def predict(config: PredictConfig, say: Console) -> None:
    """Classify images and write the answers in the order of the images.

    Args:
        config: What, with which network, and where to.
        say: Where progress and the summary are shown.

    Raises:
        ConfigError: A setting cannot be used.
        DataError: There are no images, or none that can be read.
    """
    check_device(config.device)
    model, _ = load_checkpoint(config.checkpoint)
    kind = _check(config, model)
    data_config = resolve_data_config(model=model)
    split, files = _open_images(config, data_config['input_size'][0])
    split.transform = eval_transform(data_config)
    names = class_names(model) or [str(number) for number in range(model.num_classes)]
    predictor = _predictor(config, model.to(config.device))
    rule, tally, unreadable = predictor.rule, _Tally(), []
    leaves = any(threshold is not None for threshold in rule.thresholds)
    loader = DataLoader(
        _Images(split), config.batch_size, num_workers=config.workers, collate_fn=_batch,
        worker_init_fn=keep_worker_alive)
    began = time.perf_counter()
    with _opened(config.output) as file:
        writer = _Writer(file, kind)
        for rows, images, bad in follow(readable(loader), 'predict', say, len(loader)):
            unreadable += bad
            if images is None:
                continue
            images = images.to(config.device)
            every: Optional[List[torch.Tensor]] = None
            if config.all_exits:
                every = [z.float() for z in model.forward_exits(images)]
                out: EarlyExitOutput = predictor.simulate(every)
            else:
                out = predictor(images)
            of_exits = zip(*(
                (answer for answer, in _answers((z / t).softmax(-1), names, 1))
                for z, t in zip(every or (), rule.temperatures)
            ))
            top = _answers(out.probabilities, names, config.top_k)
            exits = out.exit_index.tolist()
            for row, best, number in zip(rows, top, exits):
                writer.write(files[row], best, number, list(next(of_exits)) if every else None)
            tally.exits += exits
            if leaves and len(tally.whole) < _TIMED:
                tally.time(model, predictor, images)
    seconds = time.perf_counter() - began
    if unreadable:
        beside = config.output.with_suffix('.unreadable.csv') if config.output else None
        if beside is not None:
            write_unreadable(beside, unreadable)
        list_unreadable(unreadable, partial(say.print, soft_wrap=True, markup=False), beside)
    if not tally.exits:
        raise DataError(f'None of the {counted(len(unreadable), "image")} can be read: {unreadable[0]}.')
    for line in _summary(model, predictor, tally, seconds):
        say.print(line, soft_wrap=True, markup=False)
    if config.output is not None:
        say.print(f'answers written to {config.output}', soft_wrap=True, markup=False)


def _summary(model: MultiExit, predictor: EarlyExit, tally: _Tally, seconds: float) -> Iterator[str]:
    """Yield lines that say where images left and what that saved."""
    count, rule = len(tally.exits), predictor.rule
    yield f'{counted(count, "image")} in {seconds:.1f} s, {count / seconds:,.0f} images/s with reading'
    shares = ', '.join(
        f'exit{i} {tally.exits.count(i):,} ({100 * tally.exits.count(i) / count:.0f} %)' for i in range(rule.num_exits))
    yield f'left at {shares}'
    if not tally.whole:
        yield 'There are no thresholds, so no image leaves early; calibrate.py chooses some, or pass --thresholds.'
        return
    size = tuple(resolve_data_config(model=model)['input_size'])
    costs = compute_costs(model, size)
    of_exit = costs.of(rule)
    mean = sum(of_exit[i] for i in tally.exits) / count
    whole = costs.of(dataclasses.replace(rule, thresholds=None))[-1]
    ratios = [a / b for a, b in zip(tally.whole, tally.early)]
    spread = f', {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} batches' if len(ratios) > 1 else ''
    yield (
        f'early exit took {100 * mean / whole:.0f} % of the MACs and was {statistics.median(ratios):.2f} times as fast '
        f'as running to the end{spread}'
    )


def main() -> None:
    """Run the command."""
    run_command(lambda: predict(tyro.cli(PredictConfig), Console(stderr=True, highlight=False)))


if __name__ == '__main__':
    main()
