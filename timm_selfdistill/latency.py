"""How long a network takes to each of its exits, on the machine at hand."""
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Tuple

import torch

from .calibration import measure_costs, single_exits
from .exit_rule import ExitRule
from .metrics import exit_names
from .multi_exit import MultiExit

__all__ = ['LATENCY_NAME', 'measure_latency', 'write_latency']

LATENCY_NAME = 'latency.json'

_ROUNDS = 7


def measure_latency(model: MultiExit, input_size: Tuple[int, int, int], device: torch.device) -> Dict[str, Any]:
    """Measure, image by image, the time to each exit with no other head asked, and to all of them for the ensemble.

    Args:
        model: The network, on the device.
        input_size: Channels, height and width of an image.
        device: Where to compute.

    Returns:
        `ms`, medians in milliseconds by name of the exit (see `exit_names`), and where they were measured: `device`,
        `threads` of the CPU, `dtype`, `torch`, its version, and `batch_size`, which is 1.
    """
    images = torch.rand(1, *input_size, device=device)
    costs = measure_costs(model, images, _ROUNDS)
    rule = ExitRule(model.num_exits, model.num_classes)
    ms = [
        costs.of(replace(rule, thresholds=thresholds))[number]
        for number, (_, thresholds) in enumerate(single_exits(model.num_exits))
    ]
    return dict(
        ms=dict(zip(exit_names(model), [*ms, sum(costs.sections) + sum(costs.heads)])),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU',
        threads=torch.get_num_threads(),
        dtype=str(images.dtype).removeprefix('torch.'),
        torch=torch.__version__,
        batch_size=len(images),
    )


def write_latency(folder: Path, model: MultiExit, input_size: Tuple[int, int, int], device: torch.device) -> None:
    """Write what `measure_latency` returns into the folder of a run."""
    text = json.dumps(measure_latency(model, input_size, device), indent=2)
    beside = folder / f'.{LATENCY_NAME}'
    beside.write_text(text, encoding='utf-8')
    beside.replace(folder / LATENCY_NAME)
