#!/usr/bin/env python
"""Compare the methods on a small network: `python recipes/paper/study.py --data-dir path/to/cifar100`.

Some superclasses of CIFAR-100, and on them: plain training, deep supervision, self-distillation, and generations of
students behind four patriarchs, those with a tolerant loss of the same softness. Each run is one of `recipes/train.py`,
and what is complete in `--work` is not run again. The defaults take half an hour on two CPU cores. Runs this
short underfit, and networks that underfit lose by self-distillation: README says when it pays.
"""
import concurrent.futures
import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List, Literal, Tuple

import datasets
import numpy as np
import timm
import torch
import tyro
import yaml
from matplotlib.figure import Figure

from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError, DataError
from timm_selfdistill.losses import TOLERANCES, eta_for_top_score
from timm_selfdistill.training.generations import train_generations
from timm_selfdistill.training.trainer import train

RESULTS = Path(__file__).parent / 'results'


@dataclasses.dataclass
class StudyConfig:
    """Plain training, deep supervision, self-distillation and tolerant teachers, side by side on a small network."""

    data_dir: str
    """Folder of CIFAR-100 as parquet files, with fine_label and coarse_label."""
    model: str = 'resnet20_cifar'
    """Any timm model for 32×32 images."""
    superclasses: int = 4
    """How many superclasses of five classes each; the first ones."""
    images: int = 250
    """Training images of each class, 500 at most; the first ones."""
    epochs: int = 10
    """Epochs of every run."""
    generations: int = 3
    """Students behind every patriarch."""
    top_score: float = 0.8
    """Score of the label at which every tolerant patriarch is best off."""
    seed: int = 42
    """Seed of every run; a generation adds its number."""
    jobs: int = 2
    """Runs at a time, each with its share of the cores."""
    precision: Literal['bf16', 'no'] = 'bf16'
    """bf16 autocast, which takes half the time on CPUs that know the type, or full precision."""
    work: str = 'output/study'
    """Folder of the data and the runs."""
    output: str = str(RESULTS)
    """Folder of study.csv and study.png."""


def make_data(config: StudyConfig) -> Tuple[str, int]:
    """Write the part of CIFAR-100 that is used; return its folder and the number of its classes."""
    try:
        whole = datasets.load_dataset('parquet', data_dir=config.data_dir)
        coarse = {part: np.asarray(table['coarse_label'][:]) for part, table in whole.items()}
    except (FileNotFoundError, KeyError, ValueError, datasets.exceptions.DatasetGenerationError) as e:
        raise DataError(f'--data-dir {config.data_dir}: expected CIFAR-100 as parquet files: {e}') from e
    folder = Path(config.work) / f'data-{config.superclasses}x{config.images}'
    for part, table in whole.items():
        fine = np.asarray(table['fine_label'][:])
        used = coarse[part] < config.superclasses
        classes = np.unique(fine[used])
        if part == 'train':
            rank = np.zeros(len(fine), dtype=int)
            for label in classes:
                rank[fine == label] = np.arange((fine == label).sum())
            used &= rank < config.images
        table = table.select(np.flatnonzero(used)).remove_columns('fine_label')
        table = table.add_column('fine_label', np.searchsorted(classes, fine[used]))
        if not (folder / f'{part}.parquet').exists():
            folder.mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / f'{part}.parquet')
    return str(folder), len(classes)


def plan(config: StudyConfig, data_dir: str, num_classes: int) -> List[TrainConfig]:
    """List the runs, the long ones first."""
    base = TrainConfig(
        model=config.model, data_dir=data_dir, label_column='fine_label', superclass_column='coarse_label',
        epochs=config.epochs, batch_size=64, lr=0.1, seed=config.seed,
        output=str(Path(config.work) / config.precision),
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), workers=0,
    )
    lines = [dataclasses.replace(
        base, method='plain', generations=config.generations, resume='auto', patriarch=patriarch,
        experiment=f'generations-{patriarch}',
        eta=None if patriarch == 'plain' else eta_for_top_score(patriarch, config.top_score, num_classes, base.tsd_k),
    ) for patriarch in ('plain', *TOLERANCES)]
    single = [dataclasses.replace(base, method=m, experiment=m) for m in ('byot', 'deep-supervision')]
    # what another seed alone changes; the plain patriarch is the run with the first seed
    single += [
        dataclasses.replace(base, method='plain', seed=seed, experiment=f'plain-seed{seed}')
        for seed in range(config.seed + 1, config.seed + 3)
    ]
    return lines + single


def _prepare_worker(free: Any, precision: str) -> None:
    os.sched_setaffinity(0, free.get())
    os.environ['ACCELERATE_MIXED_PRECISION'] = precision  # as accelerate's launcher does


def run(config: TrainConfig) -> float:
    """Do one run unless it is complete already; return the seconds it took.

    Raises:
        ConfigError: There is one of another recipe.
    """
    started = time.perf_counter()
    folder = Path(config.output) / config.experiment
    if config.generations is not None:
        train_generations(config)
    elif (folder / 'results.json').exists():
        if yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8')) != config.settings():
            raise ConfigError(f'--work: {folder} holds a run of another recipe; choose another folder.')
    else:
        shutil.rmtree(folder, ignore_errors=True)
        train(config)
    return time.perf_counter() - started


def collect(runs: List[TrainConfig]) -> List[Dict[str, Any]]:
    """Gather the rows of all runs: test accuracies in percent, and what the generations tell besides."""
    rows = []
    for config in runs:
        folder = Path(config.output) / config.experiment
        row = dict(method=config.method, patriarch=config.patriarch, eta=config.eta)
        if config.generations is None:
            results = json.loads((folder / 'results.json').read_text())['test']
            rows.append(dict(row, seed=config.seed, **{r['exit']: r['top1'] for r in results}))
        else:
            with (folder / 'generations.csv').open(newline='') as f:
                rows += [dict(row, **generation) for generation in csv.DictReader(f)]
    return rows


def draw(rows: List[Dict[str, Any]], title: str, path: Path) -> None:
    """Draw the exits of each method, the generations behind each patriarch, and what the generations know."""
    figure = Figure(figsize=(13, 4.2), layout='constrained')
    methods, accuracies, knowledge = figure.subplots(1, 3)
    plain = [
        float(row['exit0']) for row in rows
        if (row['method'], row['patriarch']) == ('plain', 'plain') and row.get('generation', '0') == '0'
    ]
    for axes in (methods, accuracies):
        axes.axhspan(min(plain), max(plain), color='grey', alpha=0.25, label=f'plain, {len(plain)} seeds')
    for row in rows:
        if row['method'] != 'plain':
            exits = sorted(name for name in row if name.startswith('exit'))
            methods.plot(range(len(exits)), [row[name] for name in exits], 'o-', label=row['method'])
            methods.plot(len(exits), row['ensemble'], '*', color=methods.lines[-1].get_color(), markersize=11)
    methods.set_xticks(range(len(exits) + 1), [*(f'exit {i}' for i in range(len(exits))), 'ensemble'])
    for patriarch in dict.fromkeys(row['patriarch'] for row in rows):
        line = [row for row in rows if row['patriarch'] == patriarch and 'generation' in row]
        numbers = [int(row['generation']) for row in line]
        accuracies.plot(numbers, [float(row['exit0']) for row in line], 'o-', label=patriarch)
        knowledge.plot(numbers, [float(row['test_sibling_mass']) for row in line], 'o-', label=patriarch)
    for axes in (accuracies, knowledge):
        axes.set_xticks(numbers)
        axes.set_xlabel('generation')
    for axes, label in (
        (methods, 'test top-1, %'), (accuracies, 'test top-1, %'),
        (knowledge, 'score of the label\'s siblings, test images'),
    ):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    config = tyro.cli(StudyConfig)
    started = time.perf_counter()
    data_dir, num_classes = make_data(config)
    runs = plan(config, data_dir, num_classes)
    cores = np.array_split(sorted(os.sched_getaffinity(0)), config.jobs)
    context = multiprocessing.get_context('spawn')
    free = context.Queue()
    for share in cores:
        free.put({int(core) for core in share} or os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(
        config.jobs, mp_context=context, initializer=_prepare_worker, initargs=(free, config.precision),
    ) as pool:
        for done, seconds in zip(runs, pool.map(run, runs)):
            print(f'{done.experiment}: {seconds:.0f} s', flush=True)
    rows = collect(runs)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (output / 'study.csv').open('w', newline='') as f:
        writer = csv.DictWriter(f, names, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    train_images, test_images = (
        len(datasets.load_dataset('parquet', data_files=f'{data_dir}/{part}.parquet')['train'])
        for part in ('train', 'test')
    )
    draw(
        rows,
        f'{config.model}, {num_classes} classes of CIFAR-100, {train_images:,} images to learn from '
        f'(a tenth held out), {test_images:,} to test on, {config.epochs} epochs, seed {config.seed}',
        output / 'study.png',
    )
    print(
        f'{time.perf_counter() - started:.0f} s, {config.jobs} jobs on {os.cpu_count()} cores, '
        f'torch {torch.__version__}, timm {timm.__version__}'
    )


if __name__ == '__main__':
    run_command(main)
