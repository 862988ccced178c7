"""Compare speed and size: `python recipes/benchmark.py` at inference, `python recipes/benchmark.py train` in training,
`python recipes/benchmark.py latency` with images that leave early.

Machines are noisy, so every figure is a ratio: what is compared runs in turn in the same process, again and again, and
the median of the ratios and their spread are told."""
import dataclasses
import json
import platform
import sys

import timm
import torch
import tyro
from rich.console import Console

from ..launch import run_command
from . import inference, latency, training

__all__ = ['main']


def _main() -> None:
    arguments = sys.argv[1:]
    kinds = dict(
        inference=inference.InferenceBenchmarkConfig, train=training.TrainBenchmarkConfig,
        latency=latency.LatencyBenchmarkConfig,
    )
    if not {*arguments} & {*kinds, '-h', '--help'}:
        arguments = ['inference', *arguments]
    config = tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, description=__doc__)
    console = Console(width=None if sys.stdout.isatty() else 110)
    if isinstance(config, latency.LatencyBenchmarkConfig):
        latency.run_benchmark(config, console)  # writes a table of its own
        return
    if isinstance(config, training.TrainBenchmarkConfig):
        figures = dict(rows=training.run_benchmark(config, console))
    else:
        figures = inference.run_benchmark(config, console)
    if config.output:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{torch.get_num_threads()} CPU threads'
        machine = dict(torch=torch.__version__, timm=timm.__version__, python=platform.python_version(), device=where)
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ('models', 'device', 'output')}
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(dict(machine=machine, settings=settings, **figures), indent=1) + '\n')


def main() -> None:
    """Run the command."""
    run_command(_main)
