"""How long a network takes to each of its exits, on the machine at hand."""
import os
import platform
import statistics
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import psutil
import torch
import torch.nn as nn

from .models.exit_head import ExitHead, chain_logits
from .models.exit_rule import ExitRule, single_exits
from .models.multi_exit import MultiExit
from .models.names import exit_names
from .models.probe import count_macs, eval_mode, meta_probe, take_taps
from .run_files import LATENCY_NAME, write_json

__all__ = [
    'MS', 'SHARE', 'ExitCost', 'RunCosts', 'compute_costs', 'device_time', 'exit_costs', 'measure_costs',
    'measure_latency', 'time_parts', 'timed_costs', 'write_latency',
]

SHARE = "share of the plain network's MACs"

MS = 'ms'


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
    write_json(folder / LATENCY_NAME, measure_latency(model, input_size, device))


def device_time(device: torch.device) -> float:
    """Return the time, in seconds, at which a device has done all that it was told."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class ExitCost:
    """What leaving at an exit costs.

    Attributes:
        params: Parameters of the network truncated there.
        macs: Its MACs for one image.
        share: Its MACs over those of the plain network.
    """
    params: int
    macs: int
    share: float


def exit_costs(
        model: MultiExit,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> 'OrderedDict[str, ExitCost]':
    """Count what each exit costs on its own, and what all of them together cost the ensemble.

    Args:
        model: The network.
        input_size: Channels, height and width of an image; what the model was built for when None.

    Examples:
        >>> import timm, timm_selfdistill
        >>> costs = exit_costs(timm.create_model('test_resnet_sd', exits=(2, 3)))
        >>> list(costs), costs['exit2'].share
        (['exit0', 'exit1', 'exit2', 'ensemble'], 1.0)
    """
    probe, x = meta_probe(model, input_size)
    full, _ = count_macs(probe, x)
    costs = OrderedDict()
    networks: List[Tuple[nn.Module, Any]] = [(net, net) for net in map(probe.truncate, range(model.num_exits))]
    for name, (net, forward) in zip(exit_names(model), [*networks, (probe, probe.forward_exits)]):
        macs, _ = count_macs(forward, x)
        costs[name] = ExitCost(sum(p.numel() for p in net.parameters()), macs, macs / max(full, 1))
    return costs


@dataclass(frozen=True)
class RunCosts:
    """What the parts of a multi-exit network cost for one image.

    Attributes:
        sections: Cost of the network from each exit to the next, the first from the images on, one for each exit.
        heads: Cost of each exit's head, one for each exit; the deepest exit's counts to its section, so it is 0.
        unit: What the costs are counted in, `SHARE` or `MS`.
        chained: Whether heads take the logits of the exit before, so that all of them run, but for the last one if it
            is not asked.
    """
    sections: Tuple[float, ...]
    heads: Tuple[float, ...]
    unit: str = SHARE
    chained: bool = False

    def of(self, rule: ExitRule) -> List[float]:
        """Return what an image costs that leaves at each exit, one value for each.

        Heads that the rule does not ask do not run, unless a later one takes their logits.
        """
        taken = len(self.heads) - 2 if self.chained else 0  # the deepest exit takes none
        run = (head if i < taken or rule.asks(i) else 0. for i, head in enumerate(self.heads))
        return list(accumulate(section + head for section, head in zip(self.sections, run)))


def _is_chained(model: MultiExit) -> bool:
    return any(head.takes_logits for head in model.exit_heads)


def _sections(upto: Iterable[float]) -> List[float]:
    """Return the steps between costs up to each exit, none of them below 0."""
    # in networks of parallel branches a shallow map alone may take as much as a deeper one
    highest = list(accumulate(upto, max))
    return [b - a for a, b in zip([0, *highest], highest)]


def compute_costs(model: MultiExit, input_size: Optional[Tuple[int, int, int]] = None) -> RunCosts:
    """Count the MACs of the network's parts, as shares of those of the plain network.

    Args:
        model: The network.
        input_size: Channels, height and width of an image; what the model was built for when None.
    """
    probe, x = meta_probe(model, input_size)
    full, _ = count_macs(probe, x)
    upto, heads, taps = [], [], []
    for number in range(len(probe.exits)):
        macs, taps = count_macs(take_taps, probe.backbone, x, probe.exits[:number + 1])
        upto.append(min(macs, full))
    previous: Optional[torch.Tensor] = None
    for head, tap in zip(probe.exit_heads, taps):
        macs, previous = count_macs(_run_head, head, tap, previous)
        heads.append(macs)
    shares = [[macs / max(full, 1) for macs in part] for part in (_sections([*upto, full]), [*heads, 0])]
    return RunCosts(tuple(shares[0]), tuple(shares[1]), SHARE, _is_chained(model))


def _run_head(head: ExitHead, tap: torch.Tensor, previous: Optional[torch.Tensor]) -> torch.Tensor:
    return head.forward_head(head.forward_features(tap), previous)


def measure_costs(model: MultiExit, images: torch.Tensor, rounds: int = 15) -> RunCosts:
    """Measure the time that the network's parts take on this machine, in milliseconds for one image.

    Everything runs in turn, again and again; the medians count. What parts of a batch cost may be more for an image
    than in the whole batch, and choosing and moving images costs as well: neither is in here.

    Args:
        model: The network, on the device of the images; run in eval mode and left in the mode it was in.
        images: A batch (N, C, H, W) of the size that is used later.
        rounds: Times that everything is measured.

    Raises:
        ValueError: There are no images, or fewer rounds than one.
    """
    return timed_costs(model, [median(of_part) for of_part in zip(*time_parts(model, images, rounds))])


def timed_costs(model: MultiExit, ms: Sequence[float]) -> RunCosts:
    """Return the costs of a network's parts, given what `time_parts` measured in a round."""
    upto, heads = ms[:model.num_exits], ms[model.num_exits:]
    return RunCosts(tuple(_sections(upto)), (*heads, 0.), MS, _is_chained(model))


@torch.no_grad()
def time_parts(model: MultiExit, images: torch.Tensor, rounds: int, seconds: float = 0.) -> List[List[float]]:
    """Measure the time that the network's parts take on this machine, in turn and again and again.

    Args:
        model: See `measure_costs`.
        images: Likewise.
        rounds: Times that everything is measured at least.
        seconds: Time that this is to take at least.

    Returns:
        A list a round: milliseconds for one image to each exit's map, to the deepest exit, and of each head.

    Raises:
        ValueError: There are no images, or fewer rounds than one.
    """
    if not len(images) or rounds < 1:
        raise ValueError(f'{len(images)} images, rounds={rounds}: expected 1 or more of both.')
    with eval_mode(model):
        taps = take_taps(model.backbone, images, model.exits) if model.exits else []
        logits = chain_logits(model.exit_heads, [h.forward_features(tap) for h, tap in zip(model.exit_heads, taps)])
        calls: List[Callable[[], Any]] = [
            lambda i=i: take_taps(model.backbone, images, model.exits[:i + 1]) for i in range(len(taps))]
        calls.append(lambda: model(images))
        for head, tap, previous in zip(model.exit_heads, taps, [None, *logits]):
            calls.append(lambda head=head, tap=tap, previous=previous: _run_head(head, tap, previous))
        measured: List[List[float]] = []
        begin = device_time(images.device)
        while len(measured) < rounds + 2 or device_time(images.device) - begin < seconds:
            taken = []
            for call in calls:
                start = device_time(images.device)
                call()
                taken.append(1000 * (device_time(images.device) - start) / len(images))
            measured.append(taken)
    return measured[2:]  # the first ones choose algorithms and allocate memory
