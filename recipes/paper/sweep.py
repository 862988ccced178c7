#!/usr/bin/env python
"""Give every timm model exits and write down where they stand, what they cost and what failed.

`python recipes/paper/sweep.py` takes all names. Nothing is downloaded and no weights are made:
all runs on the meta device.
"""
import csv
import dataclasses
import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
import tyro
from rich.progress import track

from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.costs import exit_costs
from timm_selfdistill.models.names import SUFFIX, times

NUM_CLASSES = 1000
FIELDS = (
    'name', 'class', 'input_size', 'stages', 'exits', 'modules', 'stage_shares', 'exit_shares',
    'params', 'params_added', 'exit_params', 'problem',
)


@dataclasses.dataclass
class SweepConfig:
    """Give every timm model exits and write a row for each."""

    names: str = '*'
    """Names of timm models, with wildcards."""
    every: int = 1
    """Take every so many of them."""
    output: Path = Path(__file__).parent / 'results' / 'timm_sweep.csv'
    """Table to write."""
    workers: int = os.cpu_count() or 1
    """Processes."""


def probe(base: str) -> Dict[str, Any]:
    """Build a name with exits, run every exit alone and all together; return its row."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    said: List[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger('timm_selfdistill').handlers = [handler]
    row: Dict[str, Any] = dict.fromkeys(FIELDS, '')
    row['name'] = base + SUFFIX
    try:
        with torch.device('meta'):
            model = timm.create_model(base + SUFFIX, num_classes=NUM_CLASSES).eval()
        x = torch.empty(2, *model.pretrained_cfg['input_size'], device='meta')
        with torch.no_grad():
            shapes = [tuple(z.shape) for z in model.forward_exits(x)]
        if shapes != [(2, NUM_CLASSES)] * model.num_exits:
            raise RuntimeError(f'logits of shapes {shapes}')
        costs = list(exit_costs(model).values())  # runs every truncated network
        if len(model.exits) and costs[len(model.exits) - 1].share >= 1:
            raise RuntimeError('the last auxiliary exit saves nothing')
        numel = sum(p.numel() for p in model.backbone.parameters())
        row.update({
            'class': type(model.backbone).__name__,
            'input_size': times(x.shape[1:]),
            'stages': len(model.stages),
            'exits': ' '.join(str(i) for i in model.exits),
            'modules': ' '.join(model.stages[i].module for i in model.exits),
            'stage_shares': ' '.join(f'{model.stages[i].share:.4f}' for i in model.exits),
            'exit_shares': ' '.join(f'{cost.share:.4f}' for cost in costs[:len(model.exits)]),
            'params': numel,
            'params_added': sum(p.numel() for p in model.parameters()) - numel,
            'exit_params': ' '.join(str(cost.params) for cost in costs[:len(model.exits)]),
            'problem': ' '.join(said),
        })
    except Exception as error:  # one model's failure is a row of the table
        row['problem'] = f'{type(error).__name__}: {error}'.replace('\n', ' ')
    return row


def main() -> None:
    config = tyro.cli(SweepConfig)
    names = timm.list_models(config.names)
    bases = [n for n in names if timm.model_entrypoint(n).__module__.startswith('timm.')][::config.every]
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context('spawn')) as pool:
        rows = list(track(pool.map(probe, bases), total=len(bases), description='Models'))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with open(config.output, 'w', newline='') as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    failed = [row for row in rows if not row['class']]
    without = [row for row in rows if row['class'] and not row['exits']]
    built = len(rows) - len(failed)
    print(f'{len(rows)} models, {built} built and run, {len(without)} of them without auxiliary exits')
    for row in failed + without:
        print(f'{row["name"]}: {row["problem"]}')
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    run_command(main)
