"""Speed of early exit on real images, for `python recipes/benchmark.py latency`."""
import csv
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from rich.console import Console

from ...costs import compute_costs, device_time, measure_costs
from ...errors import ConfigError
from ...evaluation.trained_network import (
    TrainedNetwork,
    check_held_out,
    open_network,
    subset,
)
from ...models.multi_exit import MultiExit, shown_name
from ...training.cpu import keep_freed_memory
from .contenders import Contender, LatencyBenchmarkConfig, Outcome, list_contenders
from .latency_table import plot, render
from .paired import compare

TOLERATED = 0.01  # share of images that rounding may send another way: convolutions round by the size of their batch


def load_images(network: TrainedNetwork, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Put images of the test split (N, C, H, W) and their labels (N,) on the device.

    They are shuffled: where a part is sorted by class, batches would be of images equally hard.
    """
    batches = network.batches(subset(network.data.test, count))
    images, target = (torch.cat(parts) for parts in zip(*batches))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].to(network.device), target[order].to(network.device)


def check_outcome(contender: Contender, outcome: Outcome, logits: List[torch.Tensor], size: int) -> Optional[int]:
    """Count images that left elsewhere or were classified otherwise than they should; None if nothing is known.

    Raises:
        RuntimeError: They are more than rounding explains.
    """
    if contender.expect is None:
        return None
    decided, exits = contender.expect(logits, size)
    differ = (exits != outcome[1]) | (decided.argmax(1) != outcome[0].argmax(1))
    count = differ.sum().item()
    if count > max(1, TOLERATED * len(differ)):
        raise RuntimeError(
            f'{contender.name}, batches of {size}: {count} of {len(differ)} images leave elsewhere or are classified '
            f'otherwise than the logits of all exits say, so its speed compares nothing.'
        )
    return count


@torch.inference_mode()
def measure(
        contenders: List[Contender],
        model: MultiExit,
        images: torch.Tensor,
        target: torch.Tensor,
        size: int,
        rounds: int,
) -> List[Dict[str, Any]]:
    """Time everything with batches of one size; return a row for each.

    How fast it should be is told twice: by MACs, and by the time that the parts of the network take by
    themselves. The first includes that some MACs take longer than others, the second is the price of letting
    images leave alone.

    Args:
        contenders: What to time, the plain network first.
        model: The multi-exit network.
        images: Images (N, C, H, W) on the device.
        target: Labels (N,).
        size: Images of a batch.
        rounds: Times that everything is compared.
    """
    count = len(images) // size * size
    batches, target = images[:count].split(size), target[:count]
    logits = [torch.cat(of_exit) for of_exit in zip(*map(model.forward_exits, batches))]
    outcomes = []
    for contender in contenders:  # a whole pass, as each size of what is left of a batch is slow the first time
        parts = [contender.read(contender.run(batch)) for batch in batches]
        outcomes.append(tuple(torch.cat(part) for part in zip(*parts)))
    differing = [check_outcome(c, outcome, logits, size) for c, outcome in zip(contenders, outcomes)]
    latencies: List[List[float]] = [[] for _ in contenders]

    def run_all(contender: Contender, taken: List[float]) -> float:
        first = begin = device_time(images.device)
        for batch in batches:
            contender.run(batch)
            end = device_time(images.device)
            taken.append(end - begin)
            begin = end
        return end - first

    figures = compare([lambda c=c, t=t: run_all(c, t) for c, t in zip(contenders, latencies)], rounds)
    shares = compute_costs(model, tuple(images.shape[1:]))
    parts = measure_costs(model, batches[0], 2 * rounds)
    rows = []
    for contender, (decided, exits), differ, taken, times in zip(contenders, outcomes, differing, latencies, figures):
        left = exits.bincount(minlength=model.num_exits).tolist()
        cost, time = contender.share, None
        if contender.rule is not None:
            cost, time = (
                sum(n * c for n, c in zip(left, costs.of(contender.rule))) / (count * sum(costs.sections))
                for costs in (shares, parts)
            )
        p50, p95 = np.percentile(taken, (50, 95))
        speed_up = 1 / times.get('ratio', 1)
        rows.append(dict(
            contender=contender.name,
            group=contender.group,
            batch_size=size,
            images=count,
            top1=100 * (decided.argmax(1) == target).double().mean().item(),
            images_per_second=count / times['seconds'],
            p50_ms=1000 * p50,
            p95_ms=1000 * p95,
            time_ratio=times.get('ratio', 1.),
            time_ratio_low=times.get('low'),
            time_ratio_high=times.get('high'),
            cost=cost,
            predicted_speed_up=1 / cost,
            speed_up=speed_up,
            achieved=speed_up * cost,
            predicted_by_time=time and 1 / time,
            achieved_by_time=time and speed_up * time,
            **{f'left_at_exit{i}': n if contender.expect else None for i, n in enumerate(left)},
            differing=differ,
            thresholds=' '.join('none' if t is None else repr(t) for t in contender.rule.thresholds)
            if contender.group in ('early exit', 'earlyon') else None,
        ))
    return rows


def run_benchmark(config: LatencyBenchmarkConfig, console: Console) -> List[Dict[str, Any]]:
    """Measure, show and write.

    Raises:
        ConfigError, DataError: A setting cannot be used, or the data have no validation or no test split.
    """
    config.check()
    network = open_network(config.checkpoint, config)
    model, data, device = network.model, network.data, network.device
    if model.num_exits == 1:
        raise ConfigError(f'--checkpoint {config.checkpoint}: {shown_name(model)} has no auxiliary exits to leave at.')
    check_held_out(network)
    keep_freed_memory()
    most = min(config.images, len(data.test))
    if max(config.batch_sizes) > most:
        raise ConfigError(f'--batch-sizes {max(config.batch_sizes)}: expected {most} at most, the images of the test '
                          f'part that --images {config.images} takes.')
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    contenders = list_contenders(network, config)
    images, target = load_images(network, config.images)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    machine = dict(
        model=shown_name(model),
        dataset=data.name,
        rounds=config.rounds,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        threads=torch.get_num_threads(),
        dtype=str(images.dtype).removeprefix('torch.'),
        channels_last=config.channels_last,
        torch=torch.__version__,
    )
    title = f'{machine["model"]} on {data.name}, {machine["device"]}, {machine["threads"]} CPU threads'
    rows: List[Dict[str, Any]] = []
    for size in config.batch_sizes:
        measured = measure(contenders, model, images, target, size, config.rounds)
        render(measured, f'{title}, batches of {size}, {measured[0]["images"]:,} images', console)
        rows += [dict(row, **machine) for row in measured]
    if config.output:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.output.open('w', newline='', encoding='utf-8') as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, title, config.output.with_suffix('.png'))
    return rows
