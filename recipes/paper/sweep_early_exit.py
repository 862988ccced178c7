#!/usr/bin/env python
"""Run the smallest model of every class of timm with early exit, and write down how images leave it.

`python recipes/paper/sweep_early_exit.py` takes one of each class in results/timm_sweep.csv. Nothing is
downloaded, weights are random. Every image's logits are compared with those of the exit it took in a pass of the whole
batch.
"""
import csv
import dataclasses
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
import torch.nn as nn
import tyro
from rich.progress import track

from timm_selfdistill import EarlyExit
from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.inference.cuts import randomise, small_size
from timm_selfdistill.models.exit_rule import confidence_score
from timm_selfdistill.models.names import times

RESULTS = Path(__file__).parent / 'results'
IMAGES = 6
FIELDS = ('class', 'name', 'input_size', 'kind', 'how', 'left_at', 'largest_difference', 'seconds_to_make')


@dataclasses.dataclass
class SweepConfig:
    """Run one model of every class with early exit, and write a row for each."""

    output: Path = RESULTS / 'early_exit_sweep.csv'
    """Table to write."""


def smallest_of_each_class() -> List[str]:
    """Names of timm models with exits, one for every class."""
    smallest: Dict[str, Dict[str, str]] = {}
    for row in csv.DictReader(open(RESULTS / 'timm_sweep.csv', newline='')):
        best = smallest.setdefault(row['class'], row)
        if int(row['params']) < int(best['params']):
            smallest[row['class']] = row
    return sorted(row['name'] for row in smallest.values())


def create(name: str) -> nn.Module:
    """Create a network of seven classes, for small images where it is made for one size."""
    for size in (128, 112):
        try:
            return timm.create_model(name, num_classes=7, img_size=size).eval()
        except (AssertionError, RuntimeError, TypeError, ValueError):  # it takes no such size
            pass
    return timm.create_model(name, num_classes=7).eval()


@torch.no_grad()
def probe(name: str) -> Dict[str, Any]:
    """Run a few images such that about half of those that come to an exit leave there; return the table's row.

    Raises:
        RuntimeError: Images left at other exits than they should have.
    """
    torch.manual_seed(0)
    model = create(name)
    randomise(model)
    start = time.perf_counter()
    predictor = EarlyExit(model)
    seconds = time.perf_counter() - start
    run = predictor.runner
    # graphs were made for the size that the network was built for, which for some takes minutes
    images = torch.randn(IMAGES, *(run.size if run.kind == 'graphs' else small_size(model)))
    exits = model.forward_exits(images)
    left = torch.arange(IMAGES)
    thresholds = []
    for logits in exits[:-1]:
        sure, order = confidence_score(logits[left]).sort()
        middle = max(1, len(left) // 2)
        # between two images, so that rounding cannot decide
        thresholds.append(sure[middle - 1:middle + 1].mean().item() if len(left) > 1 else None)
        left = left[order[:middle]]
    predictor.rule = dataclasses.replace(predictor.rule, thresholds=thresholds)
    out = predictor.run(images)
    if not torch.equal(out.exit_index, predictor.simulate(exits).exit_index):
        raise RuntimeError(f'{name}: images left at {out.exit_index.tolist()}, not where they should have.')
    differences = [
        ((out.logits[row] - exits[number][row]).abs().max() / exits[number].abs().max()).item()
        for row, number in enumerate(out.exit_index.tolist())
    ]
    return {
        'class': type(model.backbone).__name__,
        'name': name,
        'input_size': times(images.shape[1:]),
        'kind': run.kind,
        'how': ' '.join(cut.module for cut in run.cuts) if run.kind == 'hooks' else run.how,
        'left_at': ' '.join(map(str, out.exit_index.tolist())),
        'largest_difference': f'{max(differences):.1e}',
        'seconds_to_make': f'{seconds:.1f}',
    }


def main() -> None:
    config = tyro.cli(SweepConfig)
    warnings.simplefilter('ignore')
    names = smallest_of_each_class()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    kinds: Counter = Counter()
    with open(config.output, 'w', newline='') as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
        writer.writeheader()
        for name in track(names, description='Models'):
            row = probe(name)
            kinds[row['kind']] += 1
            writer.writerow(row)
            file.flush()
    print(f'{len(names)} classes: ' + ', '.join(f'{count} by {kind}' for kind, count in sorted(kinds.items())))


if __name__ == '__main__':
    run_command(main)
