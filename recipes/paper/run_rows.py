#!/usr/bin/env python
"""Train the rows of the tables on one GPU: `python recipes/paper/run_rows.py --data-dir DATA --hours 8`.

A row is a network, a protocol of `recipes/cifar100` or `recipes/finetune` (see `rows.py`), and a seed. Rows run one
after the other; those that are complete are left alone. When the time is up the one at work writes a checkpoint, and
the same command resumes it, on another machine too if `--output` and `--results` are copied there. `python
recipes/paper/table.py` prints what there is so far. What follows a `--` goes to `recipes/train.py` in every row: `--
--compile`. With several GPUs, start one driver for each, with rows or seeds of its own: `CUDA_VISIBLE_DEVICES=1 python
recipes/paper/run_rows.py --seeds 1`.
"""
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Literal, Optional, Tuple

import tyro
from rows import Row, find_rows

from timm_selfdistill.cli.launch import PREEMPTED, run_command
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.run_files import is_complete
from timm_selfdistill.training.folders import recipe_problem
from timm_selfdistill.training.records import append_record
from timm_selfdistill.training.signals import StopSignals

HERE = Path(__file__).parent

@dataclasses.dataclass
class RowsConfig:
    """Train rows of the tables one after the other, until all are complete or the time is up."""

    data_dir: Optional[str] = None
    """Folder of CIFAR-100, or of photos for the rows lite0_*; when None, say where the data are behind the --, as in
    -- --dataset uoft-cs/cifar100."""
    rows: Tuple[str, ...] = ()
    """Rows to train, in this order: names such as resnet18_byot, patterns of them such as 'resnet18_*', or YAML
    files. When none are given all of the CIFAR-100 table, ResNet-18 first. What a row starts from is trained before."""
    seeds: Tuple[int, ...] = (0, 1, 2)
    """Seeds of every row."""
    hours: Optional[float] = None
    """Time after which no row begins and the one at work is told to write its checkpoint; leave it a few minutes for
    that."""
    initial_checkpoint: Optional[str] = None
    """File of weights that fine-tuning begins with; timm's own are downloaded when None."""
    precision: Literal['no', 'fp16', 'bf16'] = 'no'
    """Mixed precision of all rows."""
    output: str = 'output/cifar100'
    """Folder of the runs and their logs."""
    results: str = str(HERE / 'results' / 'cifar100.jsonl')
    """File that every complete run appends its line to."""


@dataclasses.dataclass
class Job:
    """One row and seed: its name, what it is started with, and the folder of the run whose weights it starts from."""

    name: str
    arguments: List[str]
    config: TrainConfig
    start: Optional[Path] = None

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.experiment

    def parts(self) -> List[Path]:
        """Return the folders of the runs it consists of."""
        generations = self.config.generations
        return [self.folder] if generations is None else [
            self.folder / f'generation{number}' for number in range(generations + 1)]

    def complete(self) -> bool:
        """Tell whether there is nothing left to do.

        Raises:
            ConfigError: The folder holds a run of other settings.
        """
        args = self.folder / 'args.yaml'
        problem = recipe_problem(args, self.config, moved=True) if args.is_file() else None
        if problem:
            raise ConfigError(f'--output: {self.folder} holds a run {problem}; choose another folder.')
        if self.config.generations is None:
            return is_complete(self.folder)
        table = self.folder / 'generations.csv'
        lines = table.read_text(encoding='utf-8').splitlines() if table.is_file() else []
        return len(lines) > len(self.parts()) and all(map(is_complete, self.parts()))

    def tidy(self, results: Path) -> None:
        """Make sure that the complete runs' lines are among the results, and drop checkpoints that nobody needs."""
        for folder in self.parts():
            try:
                append_record(folder, results)
            except OSError as e:
                print(f'warning: {self.name}: no line in {results}: {e.filename}: {e.strerror}', flush=True)
            shutil.rmtree(folder / 'checkpoints', ignore_errors=True)


def plan(config: RowsConfig, options: List[str]) -> List[Job]:
    """List what is to be done, in order.

    Raises:
        ConfigError: There is no such row, or its settings do not hold.
    """
    jobs: Dict[str, Job] = {}
    for block in find_rows(config.rows):
        parsed = {}
        for seed in config.seeds:
            for row in block:
                name = f'{row.name}-seed{seed}'
                start = Path(config.output) / f'{row.start}-seed{seed}' if row.start else None
                arguments = [
                    *row.arguments, *_weights(row, start, config), '--recipe', row.name,
                    '--output', config.output, '--results', config.results,
                    '--resume', 'auto', '--checkpoint-every', '10m', '--experiment', name,
                    *(('--data-dir', config.data_dir) if config.data_dir else ()), *options, '--seed', str(seed),
                ]
                parsed[row] = parsed.get(row) or parse_train_config(arguments)
                own = dataclasses.replace(parsed[row], seed=seed, experiment=name)
                if start:
                    own = dataclasses.replace(own, model=str(start))
                jobs.setdefault(name, Job(name, arguments, own, start))
    return list(jobs.values())


def _weights(row: Row, start: Optional[Path], config: RowsConfig) -> Tuple[str, ...]:
    """Return the arguments by which a row finds the weights that it starts from."""
    if start:
        return '--model', str(start)
    if config.initial_checkpoint and parse_train_config(row.arguments).backbone_pretrained:
        return '--no-backbone-pretrained', '--initial-checkpoint', config.initial_checkpoint
    return ()


def train(job: Job, log: Path, environment: Dict[str, str], deadline: float, signals: StopSignals) -> bool:
    """Train one row until it ends or the time is up; return whether it was told to stop."""
    stopped = False
    with log.open('ab') as f:
        process = subprocess.Popen(
            [sys.executable, str(HERE.parent / 'train.py'), *job.arguments],
            stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
        )
        while process.poll() is None:
            if not stopped and (signals.received or time.monotonic() > deadline):
                process.terminate()
                stopped = True
            time.sleep(0.1)
    return stopped


def main() -> None:
    cut = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    config = tyro.cli(RowsConfig, args=sys.argv[1:cut], description=__doc__)
    started = time.monotonic()
    deadline = started + 3600 * config.hours if config.hours is not None else float('inf')
    jobs = plan(config, sys.argv[cut + 1:])
    for job in jobs:  # settings that do not fit are told of now, not in some hours
        job.complete()
    output, results = Path(config.output), Path(config.results)
    output.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, ACCELERATE_MIXED_PRECISION=config.precision)  # as accelerate's launcher does
    done, failed, left = [], [], []
    with StopSignals() as signals:
        for job in jobs:
            log, began, stopped = output / f'{job.name}.log', time.monotonic(), False
            complete = job.complete()
            if not complete:
                if signals.received or time.monotonic() > deadline:
                    left.append(job.name)
                    continue
                if job.start and not is_complete(job.start):
                    (left if job.start.name in left else failed).append(job.name)
                    print(f'{job.name}: does not begin, {job.start.name} has not come to its end', flush=True)
                    continue
                print(f'{job.name}: begins or goes on, see {log}', flush=True)
                stopped = train(job, log, environment, deadline, signals)
                complete = job.complete()
            if complete:
                job.tidy(results)
                done.append(job.name)
                print(f'{job.name}: complete ({(time.monotonic() - began) / 3600:.2f} h)', flush=True)
            elif stopped:
                left.append(job.name)
                print(f'{job.name}: told to stop after {(time.monotonic() - began) / 3600:.2f} h', flush=True)
            else:
                failed.append(job.name)
                last = log.read_text(encoding='utf-8', errors='replace').splitlines()[-5:]
                print('\n    '.join([f'{job.name}: failed; the last of {log}:', *last]), flush=True)
    print(f'{len(done)} of {len(jobs)} complete, {len(failed)} failed, {len(left)} left.')
    for word, names in (('failed', failed), ('left', left)):
        if names:
            print(f'{word}: {", ".join(names)}')
    if left:
        print(f'This goes on:\n    {shlex.join([Path(sys.executable).name, *sys.argv])}')
        sys.exit(PREEMPTED)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    run_command(main)
