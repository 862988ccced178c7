"""Speed of early exit on real images, for `python recipes/benchmark.py latency`."""
import copy
import csv
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from timm.data import resolve_data_config

from timm_selfdistill.costs import compute_costs, device_time, measure_costs
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.evaluation.tables import print_rows
from timm_selfdistill.evaluation.trained_network import (
    EvaluationConfig,
    TrainedNetwork,
    check_held_out,
    open_network,
    subset,
)
from timm_selfdistill.hub.networks import load_network
from timm_selfdistill.inference.calibration import choose_point
from timm_selfdistill.inference.early_exit import EarlyExit
from timm_selfdistill.models.exit_rule import ExitRule, single_exits
from timm_selfdistill.models.multi_exit import MultiExit, shown_name
from timm_selfdistill.models.names import exit_names
from timm_selfdistill.models.probe import copy_model, count_macs, meta_probe
from timm_selfdistill.training.cpu import keep_freed_memory

TOLERATED = 0.01  # share of images that rounding may send another way: convolutions round by the size of their batch

Outcome = Tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(kw_only=True)
class LatencyBenchmarkConfig(EvaluationConfig):
    """Compare early exit with the plain network, with all exits, and with the network truncated at each of them, on
    images of the test part; thresholds are chosen on the validation part.

    Images lie on the device before anything is timed, and every batch is waited for.
    """

    checkpoint: str
    """Folder of a run."""
    batch_size: int = 256
    """Images at a time while the thresholds are chosen; nothing is timed with it."""
    batch_sizes: Tuple[int, ...] = (1, 32, 256)
    """Images at a time that everything is timed with."""
    images: int = 2048
    """Images of the test part to take, of every class its share; those that fill no last batch are left out."""
    budgets: Tuple[float, ...] = (0.4, 0.6, 0.8)
    """Thresholds to compare: the most accurate ones with which an image takes in the mean such a share of the plain
    network's multiply-adds."""
    drops: Tuple[float, ...] = (0.,)
    """More thresholds: the cheapest ones that lose so many percentage points of top-1 accuracy at most."""
    static: Optional[str] = None
    """Checkpoint of a smaller network to compare with, trained and fed alike; its exits are left out."""
    earlyon: bool = False
    """Compare with the package earlyon 0.3 as well, on the same network, heads and thresholds; it has to be installed.
    """
    rounds: int = 7
    """Times that everything is compared."""
    channels_last: bool = True
    """Let all networks run with channels last in memory, as they were trained."""
    output: Optional[Path] = None
    """Write the figures to this CSV file, and a picture beside it."""

    def check(self) -> None:
        """Raise ConfigError where a setting is out of range."""
        for name, least in (('batch_sizes', 1), ('images', 1), ('rounds', 2)):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or min(values) < least:
                raise ConfigError(f'--{name.replace("_", "-")} {" ".join(map(str, values))}: expected {least} or more.')
        if self.output is not None and self.output.suffix != '.csv':
            raise ConfigError(f'--output {self.output}: expected the name of a CSV file.')
        if self.earlyon and importlib.util.find_spec('earlyon') is None:
            raise ConfigError('--earlyon: that package is not installed; pip install earlyon==0.3 does it.')


@dataclasses.dataclass
class Contender:
    """Something that classifies images.

    Attributes:
        name: What to call it.
        group: What it is a kind of, for the picture.
        run: Classifies a batch (N, C, H, W); this is timed.
        read: Takes from what `run` returned the logits (N, num_classes) and the number of the exit of each image (N,).
        expect: Says what should come of it, given the logits of every exit and the size of the batches; None where
            nothing is known.
        rule: When images leave, and so which parts of the network run; None for another network.
        share: Multiply-adds of the other network, as a share of the plain network's.
    """
    name: str
    group: str
    run: Callable[[torch.Tensor], Any]
    read: Callable[[Any], Outcome]
    expect: Optional[Callable[[List[torch.Tensor], int], Outcome]]
    rule: Optional[ExitRule] = None
    share: Optional[float] = None


def _at(number: int, logits: torch.Tensor) -> Outcome:
    return logits, torch.full(logits.shape[:1], number, device=logits.device)


def truncated(name: str, group: str, network: nn.Module, number: int, rule: ExitRule) -> Contender:
    """A network that ends at one exit, as if by a rule all images left there."""
    return Contender(
        name, group, network, lambda out: _at(number, out), lambda logits, size: _at(number, logits[number]), rule)


def early_exit(name: str, predictor: EarlyExit, rule: ExitRule) -> Contender:
    """EarlyExit with another rule."""
    predictor = copy.copy(predictor)  # probing how images leave takes seconds, so that is shared
    predictor.rule = rule

    def read(out: Any) -> Outcome:
        return out.logits, out.exit_index

    return Contender(
        name, 'early exit', predictor.run, read, lambda logits, size: read(predictor.simulate(logits)), rule)


def earlyon(
        name: str,
        predictor: EarlyExit,
        rule: ExitRule,
        input_size: Tuple[int, int, int],
) -> Contender:
    """The package earlyon with the same network, heads, temperatures and thresholds.

    Its batches of more than one image leave as a whole, where all images are sure.

    Raises:
        ConfigError: It cannot take this network.
    """
    from earlyon.core.types import FINAL_HEAD, EarlyExitConfig, ExitPoint
    from earlyon.core.wrappers import EarlyExitWrapper
    model = copy_model(predictor.model)  # its hooks stay, and would be called in every other pass as well
    cuts = getattr(predictor._run, 'cuts', None)
    if cuts is None or any(head.takes_logits for head in model.exit_heads):
        raise ConfigError('--earlyon: it needs a module for every exit, and heads that take nothing but its output.')
    names = exit_names(model)[:model.num_exits - 1]
    deepest = len(names)
    places = zip(names, cuts, model.exits)
    grids = predictor._run.grids(*input_size)
    config = EarlyExitConfig(
        'own', model.num_classes,
        [ExitPoint(name, f'backbone.{cut.module}', model.stages[i].num_chs) for name, cut, i in places],
        confidence_thresholds=[1. if t is None else t for t in rule.thresholds],
        enabled_exits=[t is not None for t in rule.thresholds],
        temperatures=dict(zip([*names, FINAL_HEAD], rule.temperatures)),
    )
    wrapper = EarlyExitWrapper(
        model, dict(zip(names, model.exit_heads)), nn.Identity(), config, (1, *input_size),
        {name: lambda output, i=i, cut=cut: cut.read(output, grids.get(i))
         for i, (name, cut) in enumerate(zip(names, cuts))},
    ).eval()

    def run(images: torch.Tensor) -> Any:
        return wrapper(images) if len(images) == 1 else wrapper.forward_inference_batched(images)

    def read(out: Any) -> Outcome:
        logits = out.prediction if hasattr(out, 'prediction') else out.predictions
        return _at(out.exit_taken if out.exit_taken >= 0 else deepest, logits)

    def expect(logits: List[torch.Tensor], size: int) -> Outcome:
        sure = torch.stack([rule.judge(i, z, {})[1] >= rule.level(i) for i, z in enumerate(logits)])
        exits = sure.unflatten(1, (-1, size)).all(2).int().argmax(0).repeat_interleave(size)
        return torch.stack(logits)[exits, torch.arange(len(exits), device=exits.device)], exits

    return Contender(name, 'earlyon', run, read, expect, rule)


def open_static(checkpoint: str, network: TrainedNetwork) -> nn.Module:
    """Open the smaller network that is compared with, without its exits.

    Raises:
        ConfigError: It cannot be opened, or expects other images or classes than the network.
    """
    try:
        model, _ = load_network(checkpoint)
    except (OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f'--static {checkpoint}: {e}') from e
    if isinstance(model, MultiExit):
        model = model.truncate(model.num_exits - 1)
    theirs, ours = (
        dict(resolve_data_config(model=m), num_classes=m.num_classes) for m in (model, network.model))
    same = {name for name in ours if np.array_equal(theirs[name], ours[name])}  # a JSON file makes tuples to lists
    other = ', '.join(f'{name} {theirs[name]} (not {value})' for name, value in ours.items() if name not in same)
    if other:
        raise ConfigError(f'--static {checkpoint}: it expects {other}; only what is fed alike can be compared.')
    return model.to(network.device)


def choose_rules(predictor: EarlyExit, network: TrainedNetwork, config: LatencyBenchmarkConfig) -> Dict[str, ExitRule]:
    """Choose the thresholds on the validation part; return the rules by name.

    Raises:
        ConfigError: No thresholds stay within a budget.
    """
    calibration = predictor.calibrate(network.batches(network.data.validation), accuracy_drop=0.)
    rules = dict(
        none=dataclasses.replace(calibration.rule, thresholds=None),
        # all heads run and are asked, but at such temperatures no image is ever sure, however far apart its logits lie
        never=dataclasses.replace(calibration.rule, thresholds=1., temperatures=[1e9] * predictor.rule.num_exits),
    )
    aims = [('budget', value) for value in config.budgets] + [('accuracy_drop', value) for value in config.drops]
    for aim, value in aims:
        try:
            point = choose_point(calibration.curve, **{aim: value})
        except ValueError as e:
            raise ConfigError(f'--{"budgets" if aim == "budget" else "drops"} {value}: {e}') from e
        name = f'{aim.removeprefix("accuracy_")} {value:g}'
        rules[name] = dataclasses.replace(calibration.rule, thresholds=point['thresholds'])
    return rules


def list_contenders(network: TrainedNetwork, config: LatencyBenchmarkConfig) -> List[Contender]:
    """Return everything that is compared, the plain network first."""
    model, size = network.model, network.data_config['input_size']
    static = None if config.static is None else open_static(config.static, network)
    predictor = EarlyExit(model, thresholds=1.)  # its own rule, if it has one, is of no account
    rules = choose_rules(predictor, network, config)
    last = model.num_exits - 1
    alone = [ExitRule(model.num_exits, model.num_classes, thresholds) for _, thresholds in single_exits(last + 1)]
    contenders = [
        truncated('plain', 'plain network', model.truncate(last), last, alone[last]),
        Contender(
            'all exits', 'all exits', model.forward_exits, lambda out: _at(last, out[-1]),
            lambda logits, size: _at(last, logits[-1]), rules['never']),
    ]
    contenders += [
        truncated(f'only {name}', 'truncated', model.truncate(i), i, alone[i])
        for i, name in enumerate(exit_names(model)[:last])]
    contenders += [early_exit(f'early exit, {name}', predictor, rule) for name, rule in rules.items()]
    if config.earlyon:
        contenders += [
            earlyon(f'earlyon, {name}', predictor, rule, size)
            for name, rule in rules.items() if name not in ('none', 'never')]
    if static is not None:
        share = plain_macs(static, size) / plain_macs(model, size)
        contenders.append(
            Contender('static', 'static network', static, lambda out: _at(last, out), None, share=share))
    return contenders


def plain_macs(model: nn.Module, input_size: Tuple[int, int, int]) -> int:
    """Count the multiply-adds of a forward pass of one image."""
    return count_macs(*meta_probe(model, input_size))[0]


def load_images(network: TrainedNetwork, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Put images of the test part (N, C, H, W) and their labels (N,) on the device.

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
        compare: Callable,
) -> List[Dict[str, Any]]:
    """Time everything with batches of one size; return a row for each.

    How fast it should be is told twice: by multiply-adds, and by the time that the parts of the network take by
    themselves. The first includes that some multiply-adds take longer than others, the second is the price of letting
    images leave alone.

    Args:
        contenders: What to time, the plain network first.
        model: The multi-exit network.
        images: Images (N, C, H, W) on the device.
        target: Labels (N,).
        size: Images of a batch.
        rounds: Times that everything is compared.
        compare: Calls functions that return seconds in turn, and returns the medians and, but for the first one, the
            ratios to it.
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


def render(rows: List[Dict[str, Any]], title: str, console: Console) -> None:
    """Show the rows of one size of batches as a table."""
    lines = []
    for row in rows:
        left = [n for key, n in row.items() if key.startswith('left_at_') and n is not None]
        low, high = row['time_ratio_low'], row['time_ratio_high']
        lines.append(dict(
            contender=row['contender'],
            top1=row['top1'],
            images_s=f'{row["images_per_second"]:,.0f}' if row['images_per_second'] >= 100 else
            f'{row["images_per_second"]:.1f}',
            p50_ms=row['p50_ms'],
            p95_ms=row['p95_ms'],
            time=f'{row["time_ratio"]:.3f}',
            middle_half='' if low is None else f'{low:.3f}-{high:.3f}',
            speed_up=f'{row["speed_up"]:.2f}',
            by_MACs=f'{row["predicted_speed_up"]:.2f}',
            achieved=f'{100 * row["achieved"]:.0f} %',
            of_parts=row['achieved_by_time'] and f'{100 * row["achieved_by_time"]:.0f} %',
            **{'left_at_exits_%': '/'.join(f'{100 * n / row["images"]:.0f}' for n in left)},
        ))
    print_rows(console, lines, title)


def plot(rows: List[Dict[str, Any]], title: str, path: Path) -> None:
    """Draw accuracy over speed, and below it at which exits images leave, a column for each size of batches, as a PNG.
    """
    sizes = list(dict.fromkeys(row['batch_size'] for row in rows))
    figure = Figure(figsize=(max(6.4, 4.6 * len(sizes)), 7.6), layout='constrained')
    panels = figure.subplots(2, len(sizes), squeeze=False, height_ratios=(3, 2))
    styles = dict(zip(
        ('plain network', 'all exits', 'truncated', 'early exit', 'earlyon', 'static network'),
        (('s', 'black'), ('P', 'grey'), ('o', 'tab:blue'), ('*', 'tab:red'), ('X', 'tab:green'), ('D', 'tab:purple')),
    ))
    exits = [key for key in rows[0] if key.startswith('left_at_')]
    colours = [colormaps['Blues'](0.35 + 0.65 * i / max(len(exits) - 1, 1)) for i in range(len(exits))]
    for (top, bottom), size in zip(panels.T, sizes):
        here = [row for row in rows if row['batch_size'] == size]
        for group, (marker, colour) in styles.items():
            of_group = [row for row in here if row['group'] == group]
            for n, row in enumerate(of_group):
                point = (row['images_per_second'], row['top1'])
                if group == 'early exit':  # points of several settings often lie close together
                    label, shade = row['contender'], colormaps['autumn'](n / max(len(of_group) - 1, 1))
                else:
                    label, shade = None if n else group, colour
                size_of = 10 if marker == '*' else 6
                top.plot(*point, marker, color=shade, markersize=size_of, markeredgewidth=0, label=label, alpha=0.8)
                if group == 'truncated':  # the legend names the rest
                    top.annotate(
                        row['contender'].removeprefix('only '), point, xytext=(0, -11), textcoords='offset points',
                        fontsize=7, color=shade, ha='center',
                    )
        top.set_xlabel('images/s')
        top.set_title('one image at a time' if size == 1 else f'batches of {size}', fontsize=9)
        top.margins(x=0.15, y=0.1)
        top.grid(alpha=0.3)
        leaving = [row for row in here if row['group'] in ('early exit', 'earlyon') and any(row[e] for e in exits[:-1])]
        base = np.zeros(len(leaving))
        for i, (key, colour) in enumerate(zip(exits, colours)):
            shares = np.array([100 * row[key] / row['images'] for row in leaving])
            bottom.bar(range(len(leaving)), shares, 0.9, base, color=colour, label=f'exit{i}')
            base += shares
        bottom.set_xticks(range(len(leaving)), [r['contender'] for r in leaving], fontsize=7, rotation=40, ha='right')
        bottom.set_ylim(0, 100)
    panels[0, 0].set_ylabel('top-1 accuracy, %')
    panels[1, 0].set_ylabel('images that leave at an exit, %')
    figure.suptitle(title, fontsize=10)
    both = [axes.get_legend_handles_labels() for axes in panels[:, 0]]
    handles, names = (sum(parts, []) for parts in zip(*both))
    columns = min(8, 2 + 2 * len(sizes))
    figure.legend(handles, names, loc='outside lower center', ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def run_benchmark(config: LatencyBenchmarkConfig, compare: Callable, console: Console) -> List[Dict[str, Any]]:
    """Measure, show and write.

    Raises:
        ConfigError, DataError: A setting cannot be used, or the data have no validation or no test part.
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
        measured = measure(contenders, model, images, target, size, config.rounds, compare)
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
