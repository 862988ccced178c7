"""How long a network takes to each of its exits, on the machine at hand."""
import json
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import psutil
import torch

from .calibration import single_exits, time_parts, timed_costs
from .exit_rule import ExitRule
from .metrics import exit_names
from .multi_exit import MultiExit

__all__ = ['LATENCY_NAME', 'measure_latency', 'write_latency']

LATENCY_NAME = 'latency.json'

# So often, and for so many seconds, everything is measured at least: the use of cores is counted in hundredths of one.
_ROUNDS, _SECONDS = 7, 0.4
# Share of the cores that other programs may take before the machine counts as busy.
_BUSY = 0.1


class _OtherPrograms:
    """Watches what other programs take of the cores that this process may use."""

    def __init__(self):
        self.process = psutil.Process()
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None
        self.share()

    def share(self) -> Optional[float]:
        """Return the share since the last call, None where the system does not tell."""
        of_cores = psutil.cpu_percent(percpu=True)
        if self.cores is not None and self.cores[-1] < len(of_cores):
            of_cores = [of_cores[i] for i in self.cores]
        used, own = sum(of_cores), self.process.cpu_percent()
        if not own or used < own / 2:  # as in containers that see no core
            return None
        return max(0., (used - own) / (100 * len(of_cores)))


def measure_latency(model: MultiExit, input_size: Tuple[int, int, int], device: torch.device) -> Dict[str, Any]:
    """Measure, image by image, the time to each exit with no other head asked, and to all of them for the ensemble.

    Args:
        model: The network, on the device.
        input_size: Channels, height and width of an image.
        device: Where to compute.

    Returns:
        `ms`, medians in milliseconds by name of the exit (see `exit_names`), `quartiles`, the first and the third of
        each, and `rounds`, of how many measurements; where they were measured: `device`, `threads` of the CPU, `dtype`,
        `torch`, its version, and `batch_size`, which is 1; `others`, the share of the cores that other programs took
        meanwhile, and `busy`, whether that was much. Both are None on an accelerator, whose use by others is not known.
    """
    images = torch.rand(1, *input_size, device=device)
    watch = _OtherPrograms()
    rounds = [timed_costs(model, ms) for ms in time_parts(model, images, _ROUNDS, _SECONDS)]
    others = watch.share() if device.type == 'cpu' else None
    rule = ExitRule(model.num_exits, model.num_classes)
    times = [
        [costs.of(replace(rule, thresholds=thresholds))[number] for costs in rounds]
        for number, (_, thresholds) in enumerate(single_exits(model.num_exits))
    ]
    times.append([sum(costs.sections) + sum(costs.heads) for costs in rounds])
    found = {name: statistics.quantiles(taken, method='inclusive') for name, taken in zip(exit_names(model), times)}
    return dict(
        ms={name: middle for name, (_, middle, _) in found.items()},
        quartiles={name: [low, high] for name, (low, _, high) in found.items()},
        rounds=len(rounds),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU',
        threads=torch.get_num_threads(),
        dtype=str(images.dtype).removeprefix('torch.'),
        torch=torch.__version__,
        batch_size=len(images),
        others=None if others is None else round(others, 3),
        busy=None if others is None else others > _BUSY,
    )


def write_latency(folder: Path, model: MultiExit, input_size: Tuple[int, int, int], device: torch.device) -> None:
    """Write what `measure_latency` returns into the folder of a run."""
    text = json.dumps(measure_latency(model, input_size, device), indent=2)
    beside = folder / f'.{LATENCY_NAME}'
    beside.write_text(text, encoding='utf-8')
    beside.replace(folder / LATENCY_NAME)
