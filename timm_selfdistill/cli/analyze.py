"""Run the papers' analyses of trained networks, for example `python recipes/analyze.py --checkpoint RUN1 RUN2`."""
import dataclasses
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple

import tyro
from rich.console import Console

from ..errors import ConfigError, DataError
from ..evaluation.analyses import (
    all_exits_loss,
    deepest_loss,
    gradient_sizes,
    scatter_ratios,
    weight_noise,
)
from ..evaluation.plots import (
    plot_exit_bars,
    plot_gradient_sizes,
    plot_secondary_information,
    plot_weight_noise,
)
from ..evaluation.secondary import secondary_information
from ..evaluation.tables import print_rows, short_names
from ..evaluation.trained_network import (
    SplitConfig,
    TrainedNetwork,
    choose_split,
    list_checkpoints,
    open_network,
    subset,
)
from ..metrics import collect_logits, ensemble_logits
from ..models.names import exit_names
from .launch import run_command

Analysis = Literal['noise', 'gradients', 'scatter', 'secondary']
LOSSES = {'deepest exit': deepest_loss, 'sum of all exits': all_exits_loss}


@dataclasses.dataclass(kw_only=True)
class AnalyzeConfig(SplitConfig):
    """Run the papers' analyses of one or several trained networks on the same images, side by side.

    noise: every exit under Gaussian noise on all weights. gradients: mean absolute gradient of every layer. scatter:
    within-class over between-class scatter of every exit's features. secondary: what the scores say about the other
    classes, on the training split and on the part measured.
    """

    checkpoint: Tuple[str, ...]
    """Folders of runs, or hf-hub:org/name. A folder of generations stands for all of them."""
    analysis: Tuple[Analysis, ...] = ('noise', 'gradients', 'scatter', 'secondary')
    """Which ones to run."""
    images: Optional[int] = 1000
    """Images of each part that are used, of every class its share; None for all."""
    sigmas: Tuple[float, ...] = (0., 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05)
    """Standard deviations of the noise."""
    repeats: int = 5
    """Draws of noise to average over."""
    seed: int = 0
    """Seed of the noise and of the choice of images."""
    superclass_column: Optional[str] = None
    """Column of the labels' superclasses, for the share of a label's siblings in the secondary information."""
    top_k: Optional[int] = None
    """Classes that count as similar, the first one included; 5 when None, or all where there are fewer."""
    output: Path = Path('output/analysis')
    """Folder for analysis.json and the pictures; files of that name are replaced."""


def secondary_rows(network: TrainedNetwork, config: AnalyzeConfig, split: str) -> List[Dict[str, Any]]:
    """Average the secondary information of every exit; the deepest one counts as the others' teacher."""
    model, data = network.model, network.data
    k = min(5, model.num_classes) if config.top_k is None else config.top_k
    if not 2 <= k <= model.num_classes:
        raise ConfigError(f'--top-k {k}: expected 2 to {model.num_classes}, the number of classes.')
    superclasses = data.superclasses_of(model.num_classes)
    rows = []
    for part in dict.fromkeys(part for part in ('train', split) if part in data.splits()):
        images = subset(data.splits()[part], config.images, config.seed)
        logits, target = collect_logits(model, network.batches(images), network.device)
        for name, output in zip(exit_names(model), [*logits, ensemble_logits(logits)]):
            figures = secondary_information(output, target, k, superclasses, teacher_logits=logits[-1])
            rows.append(dict(part=part, exit=name, **{key: v.mean().item() for key, v in figures.items()}))
    return rows


def analyze(network: TrainedNetwork, config: AnalyzeConfig, split: str) -> Dict[str, Any]:
    """Run the analyses asked for; returns their results by name."""
    model, device = network.model, network.device
    # read once: the noise alone goes through them as often as there are draws
    batches = list(network.batches(subset(network.data.splits()[split], config.images, config.seed)))
    result: Dict[str, Any] = {}
    if 'noise' in config.analysis:
        result['noise'] = weight_noise(model, batches, config.sigmas, config.seed, config.repeats, device)
    if 'gradients' in config.analysis:
        result['gradients'] = {name: gradient_sizes(model, batches, loss, device) for name, loss in LOSSES.items()}
    if 'scatter' in config.analysis:
        try:
            result['scatter'] = OrderedDict(zip(exit_names(model), scatter_ratios(model, batches, device)))
        except ValueError as e:
            raise DataError(f'--images {config.images}: {e}') from e
    if 'secondary' in config.analysis:
        result['secondary'] = secondary_rows(network, config, split)
    return result


def open_alike(config: AnalyzeConfig) -> 'OrderedDict[str, TrainedNetwork]':
    """Open all checkpoints, by their short names.

    Raises:
        ConfigError: They have not all the same classes, or are not measured on the same data.
    """
    checkpoints = list_checkpoints(config.checkpoint)
    networks = OrderedDict(
        (name, open_network(checkpoint, config, config.superclass_column))
        for name, checkpoint in zip(short_names(checkpoints), checkpoints)
    )
    (first, one), *others = networks.items()
    for name, other in others:
        if other.model.num_classes != one.model.num_classes:
            raise ConfigError(
                f'--checkpoint: {first} has {one.model.num_classes} classes, {name} has {other.model.num_classes}; '
                f'only networks for the same classes can be compared.'
            )
        if not config.dataset and not config.data_dir:
            sizes = [{part: len(images) for part, images in n.data.splits().items()} for n in (one, other)]
            if one.data.name != other.data.name or sizes[0] != sizes[1]:
                raise ConfigError(
                    f'--checkpoint: {first} was trained on {one.data.name} {sizes[0]}, {name} on {other.data.name} '
                    f'{sizes[1]}; pass --dataset or --data-dir to compare them on the same images.'
                )
    return networks


def print_results(console: Console, results: Dict[str, Dict[str, Any]], config: AnalyzeConfig, title: str) -> None:
    """Print what fits a table; the layers' gradients are in the picture and the JSON file."""
    if 'noise' in config.analysis:
        rows = []
        for name, result in results.items():
            for exit_name in dict.fromkeys(row['exit'] for row in result['noise']):
                of_exit = [row for row in result['noise'] if row['exit'] == exit_name]
                top1 = {f'{row["sigma"]:g}': f'{row["top1"]:.2f}' for row in of_exit}
                rows.append(dict(network=name, exit=exit_name, **top1))
        print_rows(console, rows, f'top-1 % by σ of the noise on all weights, {title}')
    if 'scatter' in config.analysis:
        rows = [
            dict(network=name, exit=exit_name, ratio=ratio)
            for name, result in results.items() for exit_name, ratio in result['scatter'].items()
        ]
        print_rows(console, rows, f'SSE/SSB of the features, {title}')
    if 'secondary' in config.analysis:
        rows = [dict(network=name, **row) for name, result in results.items() for row in result['secondary']]
        print_rows(console, rows, f'secondary information, {title}')


def plot_results(
        results: Dict[str, Dict[str, Any]],
        networks: Dict[str, TrainedNetwork],
        title: str,
        folder: Path,
) -> None:
    """Draw the pictures of the analyses that were run."""
    def of(analysis: str) -> Dict[str, Any]:
        return {name: result[analysis] for name, result in results.items() if analysis in result}

    if of('noise'):
        plot_weight_noise(of('noise'), f'noise on all weights, {title}', folder / 'weight_noise.png')
    if of('gradients'):
        by_loss = {loss: {name: sizes[loss] for name, sizes in of('gradients').items()} for loss in LOSSES}
        plot_gradient_sizes(by_loss, f'gradient of the cross entropy, {title}', folder / 'gradient_sizes.png')
    if of('scatter'):
        plot_exit_bars(
            of('scatter'), 'SSE/SSB (lower is better)', f'scatter within over between classes, {title}',
            folder / 'scatter_ratios.png',
        )
    if of('secondary'):
        deepest = {  # without its distance to itself
            name: {
                row['part']: {k: v for k, v in row.items() if isinstance(v, float) and not k.startswith('teacher')}
                for row in rows if row['exit'] == f'exit{networks[name].model.num_exits - 1}'
            } for name, rows in of('secondary').items()
        }
        plot_secondary_information(
            deepest, f'secondary information at the deepest exit, {next(iter(networks.values())).data.name}',
            folder / 'secondary_information.png',
        )


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None: strong noise can make a loss infinite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _main() -> None:
    config = tyro.cli(AnalyzeConfig)
    for name, low in (('repeats', 1), ('seed', 0)):
        if getattr(config, name) < low:
            raise ConfigError(f'--{name} {getattr(config, name)}: expected {low} or more.')
    if not all(sigma >= 0 for sigma in config.sigmas):
        raise ConfigError(f'--sigmas {" ".join(map(str, config.sigmas))}: expected numbers of 0 or more.')
    networks = open_alike(config)
    data = next(iter(networks.values())).data
    split = choose_split(data, config.split)
    results = {name: analyze(network, config, split) for name, network in networks.items()}
    count = len(subset(data.splits()[split], config.images, config.seed))
    config.output.mkdir(parents=True, exist_ok=True)
    settings = dict(dataset=data.name, split=split, images=count, repeats=config.repeats, seed=config.seed)
    (config.output / 'analysis.json').write_text(
        json.dumps(finite(dict(settings, networks=results)), indent=1) + '\n', encoding='utf-8')
    title = f'{data.name}, {split} split ({count:,} images)'
    plot_results(results, networks, title, config.output)
    console = Console(highlight=False)
    print_results(console, results, config, title)
    console.print(f'written to {config.output}', soft_wrap=True, markup=False)


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
