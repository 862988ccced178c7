"""Measure how frozen features carry over to other data: `python recipes/transfer.py --checkpoint RUN --dataset ID`."""
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import tyro
from rich.console import Console

from ..errors import ConfigError, DataError
from ..evaluation.analyses import linear_probe
from ..evaluation.plots import plot_exit_bars
from ..evaluation.tables import print_rows, short_names
from ..evaluation.trained_network import EvaluationConfig, TrainedNetwork, list_checkpoints, open_network
from ..metrics import collect_features
from ..models.names import exit_names
from .launch import run_command


@dataclasses.dataclass(kw_only=True)
class TransferConfig(EvaluationConfig):
    """Learn a linear classifier of other data on the frozen features of every exit of trained networks.

    It is learned on the train split, its strength chosen on the validation split, and measured on the test split once.
    """

    checkpoint: Tuple[str, ...]
    """Folders of runs, or hf-hub:org/name. A folder of generations stands for all of them."""
    output: Path = Path('output/transfer')
    """Folder for transfer.csv, transfer.json and the picture; files of that name are replaced."""


def probe(network: TrainedNetwork) -> List[Dict[str, Any]]:
    """Learn and measure a linear classifier on the features of every exit: one dict an exit, shallow to deep."""
    parts = network.data.splits()
    features = {}
    for part in ('train', 'validation', 'test'):
        if part not in parts:
            raise DataError(
                f'{network.data.name} has only the splits {", ".join(parts)}; a {part} split is needed too.')
        by_exit, target = collect_features(network.model, network.batches(parts[part]), network.device)
        features[part] = [(f.numpy(), target.numpy()) for f in by_exit]
    return [
        dict(exit=name, features=train[0].shape[1], **linear_probe(train, validation, test))
        for name, train, validation, test in zip(exit_names(network.model), *features.values())
    ]


def _main() -> None:
    config = tyro.cli(TransferConfig)
    if not (config.dataset or config.data_dir):
        raise ConfigError('--dataset, --data-dir: pass one of them, the data to carry the features over to.')
    checkpoints = list_checkpoints(config.checkpoint)
    rows = []
    for network_name, checkpoint in zip(short_names(checkpoints), checkpoints):
        network = open_network(checkpoint, config, other_classes=True)
        rows += [dict(network=network_name, **row) for row in probe(network)]
    config.output.mkdir(parents=True, exist_ok=True)
    result = dict(dataset=network.data.name, images=len(network.data.test), checkpoints=checkpoints, exits=rows)
    (config.output / 'transfer.json').write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    with (config.output / 'transfer.csv').open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    groups: Dict[str, Dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row['network'], {})[row['exit']] = row['test_top1']
    title = f'linear classifier on frozen features, {network.data.name}, test split ({result["images"]:,} images)'
    plot_exit_bars(groups, 'top-1 accuracy, %', title, config.output / 'transfer.png')
    console = Console(highlight=False)
    print_rows(console, rows, title)
    console.print(f'written to {config.output}', soft_wrap=True, markup=False)


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
