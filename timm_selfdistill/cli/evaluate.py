"""Measure every exit of a trained network, for example `python recipes/evaluate.py --checkpoint output/train/RUN`."""
import dataclasses
import json
from functools import partial
from typing import Literal

import tyro
from rich.console import Console

from ..costs import exit_costs
from ..errors import ConfigError
from ..evaluation.progress import follow
from ..evaluation.tables import render_table
from ..evaluation.trained_network import SplitConfig, choose_split, open_network
from ..metrics import collect_logits, ensemble_logits, evaluate_exits, exit_table, learn_ensemble
from ..models.multi_exit import shown_name
from .launch import run_command


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig(SplitConfig):
    """Measure every exit of a trained network, and the ensemble of all."""

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    ensemble: Literal['logits', 'probabilities', 'learned'] = 'logits'
    """Mean of the exits' logits, mean of their softmax scores, or the logits with weights that are learned on the
    validation split."""
    json: bool = False
    """Print JSON instead of a table."""


def _main() -> None:
    config = tyro.cli(EvaluateConfig)
    network = open_network(config.checkpoint, config, unlabelled=True)
    model, data, device = network.model, network.data, network.device
    split = choose_split(data, config.split)
    weights = None
    if config.ensemble == 'learned' and not data.num_classes:
        raise ConfigError('`ensemble=learned`: the weights are learned from labels, and these images have none.')
    if config.ensemble == 'learned' and model.num_exits > 1:
        if data.validation is None:
            raise ConfigError(f'--ensemble learned: {data.name} has no validation split to learn the weights on.')
        if split == 'validation':
            raise ConfigError(
                '--ensemble learned: the weights are learned on the validation split, so another one has to be '
                'measured; pass --split test or --split train.'
            )
        weights = learn_ensemble(*collect_logits(model, network.batches(data.validation), device))
    by = 'probabilities' if config.ensemble == 'probabilities' else 'logits'
    batches = follow(network.batches(data.splits()[split]), f'evaluate {split}', Console(stderr=True))
    metrics = evaluate_exits(
        model, batches, device, ensemble=partial(ensemble_logits, by=by, weights=weights),
        agreement=not data.num_classes)
    rows = exit_table(model, metrics, exit_costs(model, network.data_config['input_size']))
    if config.json:
        result = dict(checkpoint=config.checkpoint, dataset=data.name, split=split)
        result['ensemble'] = config.ensemble if model.num_exits > 1 else None
        if weights is not None:
            result['ensemble_weights'] = weights.tolist()
        print(json.dumps(dict(result, exits=rows), indent=2))
        return
    console = Console(highlight=False)
    title = f'{shown_name(model)} on {data.name}, {split} split ({rows[0]["count"]:,} images)'
    console.print(render_table(rows, title))
    if weights is not None:
        console.print(f'weights of the exits in the ensemble: {", ".join(f"{w:.3f}" for w in weights.tolist())}')


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
