"""A trained network in stages and in int8, calibrated again, and measured beside float32."""
import dataclasses
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from rich.console import Console

from ..costs import RunCosts, compute_costs
from ..data.image_data import ImageSplit
from ..errors import ConfigError
from ..evaluation.tables import print_rows
from ..evaluation.trained_network import EvaluationConfig, TrainedNetwork, check_held_out, open_network, subset
from ..inference.calibration import choose_point, exit_curve, fit_temperatures, measure_thresholds
from ..inference.export import export_network
from ..inference.gates import with_gates
from ..inference.quantize import quantize_staged
from ..inference.risk_control import choose_safely
from ..inference.staged_session import StagedSession
from ..models.exit_rule import ExitRule, follow_rule
from ..models.multi_exit import shown_name
from ..models.rule_notes import Leaving
from ..run_files import write_json
from .benchmark.paired import compare

__all__ = ['export_int8']

RANGES_FROM = 256  # validation images that give the ranges of activations
ROUNDS = 15


def read_split(network: TrainedNetwork, split: ImageSplit) -> Tuple[np.ndarray, torch.Tensor]:
    """Return preprocessed images (N, C, H, W), float32, and labels (N,)."""
    images, target = zip(*network.batches(split))
    return torch.cat(images).numpy(), torch.cat(target)


def run_exits(session: StagedSession, images: np.ndarray, rule: ExitRule, batch_size: int) -> List[torch.Tensor]:
    """Return the logits of every exit by itself, each (N, num_classes)."""
    parts = [session.run_exits(images[i:i + batch_size]) for i in range(0, len(images), batch_size)]
    logits = [torch.from_numpy(np.concatenate(of_exit)) for of_exit in zip(*parts)]
    if not rule.ensemble:
        return logits
    totals = [mean * (number + 1) for number, mean in enumerate(logits)]
    return [totals[0], *(b - a for a, b in pairwise(totals))]


def recalibrate(
        rule: ExitRule,
        before: List[torch.Tensor],
        logits: List[torch.Tensor],
        target: torch.Tensor,
        costs: RunCosts,
        aim: Dict[str, float],
) -> ExitRule:
    """Choose temperatures and thresholds anew, for what they were chosen for.

    Args:
        rule: The rule of the network in float32.
        before: That network's logits of every exit on the validation split, each (N, num_classes).
        logits: Those in int8.
        target: Labels (N,).
        costs: What the network's parts cost.
        aim: What the rule was calibrated for, see `choose_point`; for anything else early exit is to cost what it did.
    """
    if rule.promise is not None:
        promise = rule.promise
        return choose_safely(
            rule, logits, target, costs, promise.risk, promise.confidence, promise.risk_of, promise.bound)[0]
    temperatures = fit_temperatures(logits, target, rule.ensemble)
    anew = with_gates(dataclasses.replace(rule, thresholds=None, temperatures=temperatures), logits, target)
    if all(threshold is None for threshold in rule.thresholds):
        return anew
    if set(aim) not in ({'budget'}, {'accuracy_drop'}):
        row, = measure_thresholds(rule, [('', rule.thresholds)], before, target, costs)
        aim = dict(budget=row['cost'])
    point = choose_point(exit_curve(anew, logits, target, costs), **aim)
    return dataclasses.replace(anew, thresholds=point['thresholds'])


def measure(rule: ExitRule, logits: List[torch.Tensor], target: torch.Tensor, costs: RunCosts) -> Dict[str, Any]:
    """Return accuracy in percent of every exit alone and of early exit, and what early exit costs."""
    row, = measure_thresholds(rule, [('', rule.thresholds)], logits, target, costs)
    alone = [100 * (z.argmax(-1) == target).double().mean().item() for z in logits]
    return dict(top1=alone, early_exit=dict(top1=row['top1'], cost=row['cost'], leaving=row['leaving']))


def compare_speed(sessions: List[StagedSession], images: np.ndarray, size: int, console: Console) -> Dict[str, float]:
    """Time two sessions in turn; return how many times as fast the second one is, median and middle half."""
    batches = [images[i:i + size] for i in range(0, max(size, min(len(images), 64)) // size * size, size)]

    def run(session: StagedSession) -> float:
        start = time.perf_counter()
        for batch in batches:
            session.run(batch)
        return time.perf_counter() - start

    for session in sessions:
        run(session)
    figures = compare([lambda s=s: run(s) for s in sessions], ROUNDS)[1]
    return dict(median=1 / figures['ratio'], low=1 / figures['high'], high=1 / figures['low'])


def export_int8(checkpoint: str, output: Path, config: EvaluationConfig) -> Dict[str, Any]:
    """Write the network of a run in stages and in int8, with thresholds and temperatures of its own; print the figures.

    Ranges of activations are those on up to 256 validation images; temperatures and thresholds are chosen anew on the
    whole validation split, for the aim that they had. Accuracy is that of the test split, if there is one.

    Args:
        checkpoint: Folder of a run, or hf-hub:org/name.
        output: Where to; it may not hold anything yet.
        config: Which data.

    Raises:
        ConfigError, DataError, ExportError: See `open_network`, `export_network` and `quantize_staged`; or the data
            have no validation split.
    """
    network = open_network(checkpoint, config)
    model, data = network.model.cpu(), network.data
    if model.num_exits == 1:
        raise ConfigError(f'--checkpoint {checkpoint}: {shown_name(model)} has no auxiliary exits to leave at.')
    check_held_out(network, test=False)
    console = Console(highlight=False)
    images, target = read_split(network, data.validation)
    some, _ = read_split(network, subset(data.validation, RANGES_FROM))
    shown = 'test' if data.test is not None else 'validation'
    shown_images, shown_target = read_split(network, data.test) if shown == 'test' else (images, target)
    costs = compute_costs(model)
    rule = model.exit_rule or ExitRule(model.num_exits, model.num_classes)
    summary = Path(checkpoint.removeprefix('local-dir:'), 'early_exit.json')
    aim = json.loads(summary.read_text(encoding='utf-8')).get('aim', {}) if summary.is_file() else {}
    size = config.batch_size
    with tempfile.TemporaryDirectory() as beside:
        exact, trial, anew = Path(beside, 'float32'), Path(beside, 'int8'), Path(beside, 'anew')
        export_network(model, exact, staged=True)
        quantize_staged(exact, trial, some)
        floats, ints = StagedSession(exact), StagedSession(trial)
        before = run_exits(floats, images, rule, size)
        logits = run_exits(ints, images, rule, size)
        chosen = recalibrate(rule, before, logits, target, costs, aim)
        exits = follow_rule(chosen, logits)[1].bincount(minlength=model.num_exits)
        leaving = Leaving(tuple(exits.tolist()), chosen.digest())
        model.exit_rule = chosen = dataclasses.replace(chosen, leaving=leaving)
        export_network(model, anew, staged=True)  # temperatures are constants of the graphs
        manifest = quantize_staged(anew, output, some)
        ints = StagedSession(output)
        measured = dict(
            float32=measure(rule, run_exits(floats, shown_images, rule, size), shown_target, costs),
            int8=measure(chosen, run_exits(ints, shown_images, chosen, size), shown_target, costs),
        )
        speed = {n: compare_speed([floats, ints], shown_images, n, console) for n in (1, 32) if n <= len(shown_images)}
    manifest['int8'].update(
        split=shown, split_images=len(shown_target), measured=measured,
        speed_up={str(n): figures for n, figures in speed.items()})
    write_json(output / 'export.json', manifest)
    print_rows(console, list(_rows(measured)), f'{shown_name(model)} on {data.name}, {shown} split '
               f'({len(shown_target):,} images)')
    for n, figures in speed.items():
        console.print(
            f'batches of {n}: int8 runs {figures["median"]:.2f} × as fast ({figures["low"]:.2f} to '
            f'{figures["high"]:.2f}), each with its own thresholds')
    return manifest


def _rows(measured: Dict[str, Dict[str, Any]]):
    float32, int8 = measured['float32'], measured['int8']
    for number, (a, b) in enumerate(zip(float32['top1'], int8['top1'])):
        yield dict(exit=f'exit{number} alone', float32_top1=a, int8_top1=b, lost=a - b)
    a, b = float32['early_exit'], int8['early_exit']
    yield dict(
        exit='early exit', float32_top1=a['top1'], int8_top1=b['top1'], lost=a['top1'] - b['top1'],
        float32_cost=a['cost'], int8_cost=b['cost'])
