"""Speed and memory of training, for `python recipes/benchmark.py train`."""
import dataclasses
import gc
import itertools
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Literal, Optional, Tuple

import psutil
import timm
import torch
from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.table import Table

from ...config import TrainConfig
from ...costs import device_time
from ...data.loaders import Loaders
from ...hub.networks import save_model
from ...training.run import Run
from ...training.trainer import create_accelerator
from .paired import compare

Method = Literal['plain', 'deep-supervision', 'byot', 'kd', 'disjoint', 'mixed']
Batch = Tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass
class TrainBenchmarkConfig:
    """Compare the steps of methods and regimes with plain training, the loop with a bare one, and the loaders with each
    other; with `accelerate launch --mixed_precision bf16` in mixed precision."""

    model: str = 'resnet18_cifar'
    """Network that is trained."""
    teacher: str = 'resnet50_cifar'
    """Network that teaches it in the method kd; its own training is not counted."""
    methods: Tuple[Method, ...] = ('plain', 'deep-supervision', 'byot', 'kd', 'disjoint', 'mixed')
    """What to compare, the first with all others; disjoint and mixed are byot in these regimes, of the latter the first
    epochs."""
    batch_size: int = 64
    """Images of a step."""
    num_classes: int = 100
    """Classes of the networks."""
    data_dir: Optional[str] = None
    """Images to train on; digits at 32×32 when None."""
    img_size: Optional[int] = None
    """Side of the images, as in train.py."""
    exit_head: Optional[str] = None
    """Kind of exit head, as in train.py."""
    label_column: Optional[str] = None
    """Column of the labels, where the data set leaves a choice."""
    rounds: int = 11
    """Times that everything is compared."""
    compile: bool = False
    """Compile the steps."""
    loop: bool = True
    """Compare the trainer's loop with a bare one as well."""
    loaders: bool = True
    """Compare the loaders as well."""
    output: Optional[Path] = None
    """Write the figures to this JSON file as well."""


def _open(
        config: TrainBenchmarkConfig,
        method: str,
        folder: Path,
        name: str,
        accelerator: Optional[Accelerator] = None,
) -> Run:
    """Set up a run with the default settings but for what is compared, in the folder `name`."""
    regime = method if method in ('disjoint', 'mixed') else 'joint'
    settings = TrainConfig(
        model=config.model, method='byot' if regime != 'joint' else method, regime=regime,
        teacher=str(folder / 'teacher') if method == 'kd' else None, epochs=1000,
        batch_size=config.batch_size, num_classes=config.num_classes, data_dir=config.data_dir,
        img_size=config.img_size, exit_head=config.exit_head,
        label_column=config.label_column, compile=config.compile, output=str(folder), experiment=name,
    )
    run = Run(settings, accelerator or create_accelerator(settings), folder / name)
    run.setup.wrap_for(alone=regime == 'mixed')
    run.setup.task.train()
    return run


def _endless(run: Run) -> Iterator[Batch]:
    for epoch in itertools.count():
        run.setup.loader.batch_sampler.set_epoch(epoch)
        yield from run.setup.loader


def _parts(run: Run, batches: Iterator[Batch]) -> Dict[str, float]:
    """Take a step, waiting for the device after each of its parts; return their seconds."""
    marks = [device_time(run.loop.device)]
    images, target = next(batches)
    marks.append(device_time(run.loop.device))
    with run.setup.accelerator.autocast():
        loss = run.setup.task(images, target)['loss']
    marks.append(device_time(run.loop.device))
    run.setup.accelerator.backward(loss)
    marks.append(device_time(run.loop.device))
    run.setup.optimizer.step()
    run.setup.optimizer.zero_grad()
    marks.append(device_time(run.loop.device))
    return dict(zip(('data', 'forward', 'backward', 'optimizer'), (b - a for a, b in itertools.pairwise(marks))))


def _step(run: Run, batches: Iterator[Batch], steps: int) -> float:
    """Return the seconds that a step of the trainer takes, data included."""
    started = device_time(run.loop.device)
    for _ in range(steps):
        run.loop.train_batch(*next(batches))
    return (device_time(run.loop.device) - started) / steps


def _bare_step(run: Run, batches: List[Batch], optimizer: torch.optim.Optimizer) -> float:
    """Return the seconds of a step as one would write it without a trainer."""
    started = device_time(run.loop.device)
    for images, target in batches:
        with run.setup.accelerator.autocast():
            loss = run.setup.task(images, target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (device_time(run.loop.device) - started) / len(batches)


class _Given:
    """A loader of batches that are there already."""

    def __init__(self, batches: List[Batch]):
        self.batches = batches
        self.batch_sampler = self
        self.steps = len(batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        pass

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def _loop_step(run: Run) -> float:
    """Return the seconds of a step of the trainer's whole loop."""
    run.keeper.progress.step = 0
    started = device_time(run.loop.device)
    run.loop.train_epoch()
    return (device_time(run.loop.device) - started) / len(run.setup.loader)


def _epoch(loader: Any) -> float:
    """Return the seconds in which a loader gives an image."""
    loader.batch_sampler.set_epoch(loader.batch_sampler.epoch + 1)
    started, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return (device_time(images.device) - started) / count


def _peak(config: TrainBenchmarkConfig, method: str, folder: Path) -> Optional[int]:
    """Return the bytes that a run needs at most in three steps, of a GPU's memory or else of this process's."""
    status = Path('/proc/self/status')
    if not torch.cuda.is_available() and not status.exists():
        return None
    # libraries and what they set up are no part of it
    warm = _open(dataclasses.replace(config, model='test_resnet', img_size=32), 'byot', folder, f'{method}-warm')
    _step(warm, _endless(warm), 1)
    del warm
    gc.collect()
    before = psutil.Process().memory_info().rss
    run = _open(config, method, folder, f'{method}-peak')
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _step(run, _endless(run), 3)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    words = status.read_text().split()
    return int(words[words.index('VmHWM:') + 1]) * 1024 - before


def _peak_memory(config: TrainBenchmarkConfig, method: str, folder: Path) -> Optional[int]:
    """Return what `_peak` does in a fresh process, whose memory nothing else has filled."""
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, config, method, folder).result()


def measure(config: TrainBenchmarkConfig, folder: Path) -> List[Dict[str, Any]]:
    """Measure everything; return a row a comparison.

    Args:
        config: The settings.
        compare: Calls functions that return seconds in turn, and returns the medians and, but for the first one, the
            ratios to it.
        folder: Where runs may write.
    """
    if 'kd' in config.methods:
        save_model(timm.create_model(config.teacher, num_classes=config.num_classes), folder / 'teacher')
    peaks = {method: _peak_memory(config, method, folder) for method in config.methods}
    accelerator = create_accelerator(TrainConfig())
    runs = {method: _open(config, method, folder, method, accelerator) for method in config.methods}
    streams = {method: _endless(run) for method, run in runs.items()}
    steps = 20 if torch.cuda.is_available() else 1
    for method, run in runs.items():
        _step(run, streams[method], 3 * steps)
    rows = []
    stepping = {m: (lambda m=m: _step(runs[m], streams[m], steps)) for m in runs}
    for method, figures in zip(runs, compare(list(stepping.values()), config.rounds)):
        parts = [_parts(runs[method], streams[method]) for _ in range(config.rounds)]
        rows.append(dict(
            what='step', name=method, **figures, images_per_second=config.batch_size / figures['seconds'],
            macs=list(runs[method].setup.costs.values())[-1].macs, peak_bytes=peaks[method],
            **{name: sorted(p[name] for p in parts)[len(parts) // 2] for name in parts[0]},
        ))
    if config.loop:
        rows += _loop(config, folder, accelerator)
    if config.loaders:
        rows += _loaders(config, folder, accelerator)
    return rows


def _loop(config: TrainBenchmarkConfig, folder: Path, accelerator: Accelerator) -> List[Dict]:
    """Compare the trainer's loop with a bare one, with the same network over the same batches."""
    run = _open(config, 'byot', folder, 'loop', accelerator)
    batches = list(itertools.islice(_endless(run), 50 if torch.cuda.is_available() else 4))
    run.setup.loader = _Given(batches)
    options = dict(lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
    optimizer = torch.optim.SGD(run.setup.task.trainable_module.parameters(), **options)
    loops = [lambda: _bare_step(run, batches, optimizer), lambda: _loop_step(run)]
    for loop in (*loops, *loops):
        loop()
    figures = compare(loops, config.rounds)
    return [
        dict(what='loop', name=name, **f, images_per_second=config.batch_size / f['seconds'])
        for name, f in zip(('bare loop', 'trainer'), figures)
    ]


def _loaders(config: TrainBenchmarkConfig, folder: Path, accelerator: Accelerator) -> List[Dict]:
    """Compare the loaders, without training."""
    run = _open(config, 'plain', folder, 'loaders', accelerator)
    kinds = {}
    for kind, workers in (('workers', 0), ('workers', torch.get_num_threads()), ('device', None)):
        settings = dataclasses.replace(run.setup.config, loader=kind, workers=workers)
        name = kind if workers is None else f'{workers or "no"} {kind}'
        kinds[name] = Loaders(settings, run.setup.data, run.setup.data_config, accelerator).train()
    for loader in kinds.values():
        _epoch(loader)
    figures = compare([lambda loader=loader: _epoch(loader) for loader in kinds.values()], max(3, config.rounds // 3))
    return [
        dict(what='loader', name=name, **f, images_per_second=1 / f['seconds']) for name, f in zip(kinds, figures)
    ]


def render(rows: List[Dict[str, Any]], config: TrainBenchmarkConfig, console: Console) -> None:
    """Show the rows as tables."""
    titles = dict(
        step=f'steps of {config.model}, batches of {config.batch_size}',
        loop='the loop over batches that are there, byot',
        loader='loaders without training',
    )
    for what, title in titles.items():
        chosen = [row for row in rows if row['what'] == what]
        if not chosen:
            continue
        table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        columns = ['', 'images/s', 'time', 'middle half']
        if what == 'step':
            columns += ['MACs', 'data ms', 'forward', 'backward', 'optimizer', 'peak MiB']
        for column in columns:
            table.add_column(column, justify='right' if column else 'left', no_wrap=True)
        for row in chosen:
            ratio = [f'{row["ratio"]:.3f}', f'{row["low"]:.3f}-{row["high"]:.3f}'] if 'ratio' in row else ['1', '']
            cells = [row['name'], f'{row["images_per_second"]:,.0f}', *ratio]
            if what == 'step':
                parts = [f'{1000 * row[p]:.1f}' for p in ('data', 'forward', 'backward', 'optimizer')]
                peak = f'{row["peak_bytes"] / 2**20:,.0f}' if row['peak_bytes'] else ''
                cells += [f'{row["macs"] / chosen[0]["macs"]:.3f}', *parts, peak]
            table.add_row(*cells)
        console.print(table)


def run_benchmark(config: TrainBenchmarkConfig, console: Console) -> List[Dict[str, Any]]:
    """Measure and show."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(config, Path(folder))
    render(rows, config, console)
    return rows
