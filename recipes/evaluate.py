#!/usr/bin/env python
"""Measure every exit of a trained network, for example `python recipes/evaluate.py --checkpoint output/train/RUN`."""
import dataclasses
import json
from typing import Literal, Optional

import torch
import tyro
import yaml
from rich.console import Console
from timm.data import resolve_data_config

from timm_selfdistill.data import DataError, create_eval_loader, eval_transform, load_image_data
from timm_selfdistill.hub import load_checkpoint
from timm_selfdistill.launch import run_command
from timm_selfdistill.metrics import evaluate_exits, exit_table
from timm_selfdistill.report import render_table


@dataclasses.dataclass
class EvaluateConfig:
    """Measure every exit of a trained network, and the ensemble of all."""

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    dataset: Optional[str] = None
    """As in train.py. What the run was trained on when neither this nor --data-dir is given."""
    data_dir: Optional[str] = None
    """As in train.py."""
    image_column: Optional[str] = None
    """As in train.py."""
    label_column: Optional[str] = None
    """As in train.py."""
    split: Optional[Literal['train', 'validation', 'test']] = None
    """Part of the data; when None the test part, or validation where there is none."""
    batch_size: int = 256
    """Images at a time."""
    workers: int = 0
    """Loader processes."""
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """Where to compute."""
    json: bool = False
    """Print JSON instead of a table."""


def main() -> None:
    config = tyro.cli(EvaluateConfig)
    model, folder = load_checkpoint(config.checkpoint)
    source = {name: getattr(config, name) for name in ('dataset', 'data_dir', 'image_column', 'label_column')}
    if not (config.dataset or config.data_dir):
        args = folder / 'args.yaml' if folder else None
        if args is None or not args.is_file():
            raise DataError(f'--checkpoint {config.checkpoint} does not say on what it was trained; pass --dataset.')
        trained = yaml.safe_load(args.read_text(encoding='utf-8'))
        source = {name: value if value is not None else trained.get(name) for name, value in source.items()}
        source['val_fraction'] = trained.get('val_fraction', 0.)
    data_config = resolve_data_config(model=model)
    data = load_image_data(**source, in_chans=data_config['input_size'][0])
    if data.num_classes > model.num_classes:
        raise DataError(f'{data.name} has {data.num_classes} classes, the model {model.num_classes}.')
    parts = data.parts()
    split = config.split or ('test' if 'test' in parts else 'validation')
    if split not in parts:
        raise DataError(f'--split {split}: {data.name} has only the parts {", ".join(parts)}.')
    loader = create_eval_loader(parts[split], eval_transform(data_config), config.batch_size, config.workers)
    metrics = evaluate_exits(model.to(config.device), loader, torch.device(config.device))
    rows = exit_table(model, metrics, data_config['input_size'])
    if config.json:
        print(json.dumps(dict(checkpoint=config.checkpoint, dataset=data.name, split=split, exits=rows), indent=2))
    else:
        title = f'{model.pretrained_cfg["architecture"]} on {data.name}, {split} part ({rows[0]["count"]:,} images)'
        Console(highlight=False).print(render_table(rows, title))


if __name__ == '__main__':
    run_command(main)
