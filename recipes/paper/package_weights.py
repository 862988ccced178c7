#!/usr/bin/env python
"""Put the weights of a run into the package, in half precision and measured as they are there.

`python recipes/paper/package_weights.py --checkpoint RUN --name resnet20_cifar_sd.byot_cifar100 --budget 0.8`
"""
import dataclasses
import json
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Optional

import tyro
from safetensors.torch import load_file, save_file

import timm_selfdistill
from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.costs import exit_costs
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.evaluation.plots import plot_accuracy_against_compute
from timm_selfdistill.evaluation.trained_network import EvaluationConfig, open_network
from timm_selfdistill.hub.push import stage
from timm_selfdistill.metrics import evaluate_exits, exit_table
from timm_selfdistill.models.names import SUFFIX
from timm_selfdistill.run_files import CONFIG_NAME, RECORD, WEIGHTS_NAME, is_complete
from timm_selfdistill.training.records import append_record, exit_figures

LARGEST = 3 * 10 ** 6  # bytes; the package is downloaded by everybody


@dataclasses.dataclass(kw_only=True)
class PackageConfig:
    """Put the weights of a run into the package, in half precision and measured as they are there."""

    checkpoint: str
    """Folder of a complete run, with images held out for validation."""
    name: str
    """What timm.create_model will take: resnet20_cifar_sd.byot_cifar100."""
    budget: float
    """MACs that an image may take on average, as a share of the plain network's, for the thresholds."""
    dataset: Optional[str] = None
    """Hub id of the data set, for the card."""
    output: str = str(Path(timm_selfdistill.__file__).parent / 'weights')
    """Folder that they get a folder in, under their name; what is there of this name is replaced."""
    results: str = str(Path(__file__).parent / 'results' / 'cifar100.jsonl')
    """File of JSON lines that the run's line goes to, with the figures measured here."""


def halve(weights: Path) -> None:
    """Write the numbers of a weights file as float16."""
    state = load_file(weights)
    save_file({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, weights)


def main() -> None:
    config = tyro.cli(PackageConfig)
    run, destination = Path(config.checkpoint), Path(config.output, config.name)
    if not (is_complete(run) and (run / RECORD).is_file()):
        raise ConfigError(f'--checkpoint {config.checkpoint}: expected the folder of a run that has come to its end.')
    architecture = json.loads((run / CONFIG_NAME).read_text(encoding='utf-8'))['architecture']
    if not architecture.endswith(SUFFIX):
        raise ConfigError(f'--checkpoint {config.checkpoint}: {architecture} has no exits, and is not packaged.')
    if not re.fullmatch(re.escape(architecture) + r'\.\w+', config.name):
        raise ConfigError(f'--name {config.name}: expected {architecture}.<tag>, the tag of letters, digits and _.')
    with tempfile.TemporaryDirectory() as folder:
        work, staged = Path(folder, config.name), Path(folder, 'staged')
        shutil.copytree(run, work, ignore=shutil.ignore_patterns('best', 'checkpoints', 'early_exit*'))
        halve(work / WEIGHTS_NAME)
        network = open_network(str(work), EvaluationConfig())
        costs, results = exit_costs(network.model), {}
        for name, split in network.data.splits().items():
            if name != 'train':
                measured = evaluate_exits(network.model, network.batches(split), network.device)
                results[name] = exit_table(network.model, measured, costs)
        split, rows = list(results.items())[-1]
        title = f'{network.model.pretrained_cfg["architecture"]} on {network.data.name}, {split} split'
        plot_accuracy_against_compute(rows, title, work / 'accuracy_vs_compute.png')
        (work / 'results.json').write_text(json.dumps(results, indent=2), encoding='utf-8')
        record = json.loads((work / RECORD).read_text(encoding='utf-8'))
        record.update(exit_figures(rows))
        (work / RECORD).write_text(json.dumps(record, ensure_ascii=False) + '\n', encoding='utf-8')
        calibrate = Path(__file__).parents[1] / 'calibrate.py'
        sys.argv = [str(calibrate), '--checkpoint', str(work), '--budget', str(config.budget)]
        runpy.run_path(str(calibrate), run_name='__main__')
        staged.mkdir()
        stage(work, staged, config.name, dataset_id=config.dataset)
        shutil.rmtree(staged / '.eval_results', ignore_errors=True)  # for the Hub alone
        size = sum(path.stat().st_size for path in staged.rglob('*') if path.is_file())
        if size > LARGEST:
            raise ConfigError(f'--checkpoint {config.checkpoint}: {size:,} bytes, {LARGEST:,} at most are packaged.')
        shutil.rmtree(destination, ignore_errors=True)
        shutil.copytree(staged, destination)
        append_record(work, Path(config.results))
    print(f'{destination}: {size:,} bytes')


if __name__ == '__main__':
    run_command(main)
