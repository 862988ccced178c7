"""Choose when images leave a trained network early: `python recipes/calibrate.py --checkpoint RUN --budget 0.5`."""
import csv
import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple

import torch
import tyro
from rich.console import Console
from timm.data import resolve_data_config

from ..costs import RunCosts
from ..data.image_data import ImageData, ImageSplit, hold_out
from ..data.unlabelled import find_images, image_split
from ..errors import ConfigError, DataError
from ..evaluation.plots import plot_early_exit, plot_first_and_last
from ..evaluation.tables import print_rows
from ..evaluation.trained_network import (
    EvaluationConfig,
    TrainedNetwork,
    check_device,
    check_held_out,
    open_network,
)
from ..hub.card import write_card
from ..hub.networks import class_names, load_checkpoint, write_exit_rule
from ..inference.calibration import Calibration, measure_thresholds, pareto
from ..inference.early_exit import EarlyExit, EarlyExitOutput
from ..metrics import collect_logits
from ..models.exit_rule import ExitRule, confidence_score, follow_rule, single_exits
from ..models.multi_exit import shown_name
from ..run_files import is_complete, write_json
from .launch import run_command

SHEET = 16  # images that left first, and as many that left last


@dataclasses.dataclass(kw_only=True)
class CalibrateConfig(EvaluationConfig):
    """Choose temperatures and thresholds of early exit on the validation split, and measure them on the test split.

    Exactly one of --budget, --accuracy-drop, --latency and --risk says what for. The rule is written into the run's
    config.json, where timm_selfdistill.EarlyExit finds it. Where there is no test split nothing is measured.
    """

    checkpoint: str
    """Folder of a run."""
    budget: Optional[float] = None
    """MACs that an image may take on average, as a share of the plain network's: 0.5 for a half."""
    accuracy_drop: Optional[float] = None
    """Percentage points of top-1 accuracy that may be lost against running everything to the end; with --ensemble that
    is the ensemble of all exits, not the deepest one."""
    latency: Optional[float] = None
    """Milliseconds that an image may take on average on this machine."""
    risk: Optional[float] = None
    """A guarantee: early exit loses at most this share of accuracy against running to the end, 0.01 for one point."""
    confidence: Optional[float] = None
    """Probability over the held-out images with which --risk is kept; 0.95 when None."""
    risk_of: Literal['accuracy', 'agreement'] = 'accuracy'
    """Of what --risk is a share: accuracy, or agreement with the answers at the end, which takes no labels."""
    unlabelled: Optional[str] = None
    """Folder of images without labels to choose on, for --risk-of agreement; nothing else is measured then."""
    latency_batch_size: Optional[int] = None
    """Images at a time when the latency is measured; --batch-size when None."""
    criterion: Literal['confidence', 'margin', 'entropy', 'patience', 'gate'] = 'confidence'
    """What thresholds are compared with: the largest probability, by how much it exceeds the second, the entropy, how
    many exits in a row agree, or what gates say, small networks over these scores that are trained here."""
    ensemble: bool = False
    """Let all exits passed so far decide together."""
    test_fraction: Optional[float] = None
    """Part of the validation images that is kept apart to measure on, where the data have no test split."""
    output: Optional[Path] = None
    """Folder for early_exit.csv and the pictures; the run's when None. Files of that name are replaced."""


def aims(config: CalibrateConfig) -> List[str]:
    """Return which of the settings that say what for are given."""
    return [name for name in ('budget', 'accuracy_drop', 'latency', 'risk') if getattr(config, name) is not None]


def open_data(config: CalibrateConfig) -> TrainedNetwork:
    """Open the network, and the images to choose on and to measure on."""
    if config.unlabelled is None:
        network = open_network(config.checkpoint, config)
        if network.model.num_exits > 1:
            check_held_out(network, test=False)
            keep_test_apart(network.data, config.test_fraction)
        return network
    check_device(config.device)
    model, _ = load_checkpoint(config.checkpoint)
    data_config = resolve_data_config(model=model)
    files = find_images(Path(config.unlabelled))
    if not files:
        raise DataError(f'--unlabelled {config.unlabelled}: there are no images below it.')
    split = image_split(files, 'validation', 'L' if data_config['input_size'][0] == 1 else 'RGB')
    data = ImageData(
        name=Path(config.unlabelled).resolve().name, train=None, validation=split, test=None,
        num_classes=model.num_classes, label_names=class_names(model), image_size=data_config['input_size'][1:])
    keep_test_apart(data, config.test_fraction)
    return TrainedNetwork(model.to(config.device), data, data_config, config)


def check_settings(config: CalibrateConfig) -> None:
    """Raise ConfigError for settings that do not go together."""
    if len(aims(config)) != 1:
        raise ConfigError('--budget, --accuracy-drop, --latency, --risk: pass exactly one of them.')
    if config.latency_batch_size is not None and config.latency is None:
        raise ConfigError(f'--latency-batch-size {config.latency_batch_size}: is for --latency only.')
    if config.risk is None:
        if config.confidence is not None:
            raise ConfigError(f'--confidence {config.confidence}: is for --risk only.')
        if config.risk_of != 'accuracy':
            raise ConfigError(f'--risk-of {config.risk_of}: is for --risk only.')
    if config.unlabelled is not None:
        if config.risk is None or config.risk_of != 'agreement':
            raise ConfigError(f'--unlabelled {config.unlabelled}: goes with --risk and --risk-of agreement, as all '
                              f'else takes labels.')
        if config.dataset or config.data_dir:
            raise ConfigError(f'--unlabelled {config.unlabelled}: goes without --dataset and --data-dir.')
        if not Path(config.unlabelled).is_dir():
            raise ConfigError(f'--unlabelled {config.unlabelled}: expected a folder of images.')


def calibrate(predictor: EarlyExit, network: TrainedNetwork, config: CalibrateConfig) -> Calibration:
    """Choose the rule on the validation split."""
    if config.latency is not None and config.latency_batch_size is not None:
        network = dataclasses.replace(
            network, config=dataclasses.replace(network.config, batch_size=config.latency_batch_size))
    try:
        return predictor.calibrate(
            network.batches(network.data.validation), config.budget, config.accuracy_drop, config.latency, config.risk,
            0.95 if config.confidence is None else config.confidence, config.risk_of)
    except ValueError as e:
        option, = aims(config)
        raise ConfigError(f'--{option.replace("_", "-")}: {e}') from e


def keep_test_apart(data: ImageData, fraction: Optional[float]) -> None:
    """Divide the validation split into images to choose on and images to measure on, where that is asked for."""
    if fraction is None:
        return
    if not 0 < fraction < 1:
        raise ConfigError(f'--test-fraction {fraction}: expected more than 0 and less than 1.')
    if data.test is not None:
        raise ConfigError(f'--test-fraction {fraction}: {data.name} has a test split already; leave the option out.')
    data.validation, data.test = hold_out(data.validation, fraction, 'test')


@torch.no_grad()
def run_early(predictor: EarlyExit, network: TrainedNetwork, split: ImageSplit) -> EarlyExitOutput:
    """Run a split of the data, each image as deep as it needs."""
    outputs = [predictor.run(images.to(network.device)) for images, _ in network.batches(split)]
    return EarlyExitOutput(*(
        torch.cat([getattr(out, field.name).cpu() for out in outputs]) for field in dataclasses.fields(outputs[0])))


def summarize(out: EarlyExitOutput, target: torch.Tensor, rule: ExitRule, costs: RunCosts) -> Dict[str, Any]:
    """Return the row that `calibration.measure_thresholds` would give, of images that were run."""
    leaving = (out.exit_index.bincount(minlength=rule.num_exits) / len(target)).tolist()
    return dict(
        cost=sum(share * cost for share, cost in zip(leaving, costs.of(rule))),
        top1=100 * (out.logits.argmax(-1) == target).double().mean().item(),
        leaving=leaving,
    )


def write_curve(curves: Dict[str, List[Dict[str, Any]]], path: Path) -> None:
    """Write what every rule that was tried comes to on each part, as CSV; thresholds are separated by blanks."""
    with path.open('w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerow(['family', 'thresholds', *(f'{part}_{key}' for part in curves for key in ('cost', 'top1'))])
        for rows in zip(*curves.values()):
            thresholds = ' '.join('none' if t is None else repr(t) for t in rows[0]['thresholds'])
            writer.writerow([rows[0]['family'], thresholds, *(row[key] for row in rows for key in ('cost', 'top1'))])


def first_and_last(
        out: EarlyExitOutput,
        target: torch.Tensor,
        criterion: str,
        data: ImageData,
        split: ImageSplit,
) -> Tuple[List[Any], List[Any]]:
    """Return the images that leave at the shallowest exit and are surest there, and those least sure at the end.

    Each with the class predicted and the true one, as `plots.plot_first_and_last` takes them.
    """
    scored_by = criterion if criterion in ('margin', 'entropy') else 'confidence'
    sure = confidence_score(out.logits / out.temperatures[:, None], scored_by)
    order = sure.argsort(descending=True)
    order = order[out.exit_index[order].argsort(stable=True)].tolist()
    predictions = out.logits.argmax(-1)
    count = min(SHEET, len(order) // 2)

    def name(label: int) -> str:  # a network may know more classes than the data
        return data.label_names[label] if label < len(data.label_names or ()) else str(label)

    def describe(rows: List[int]) -> List[Any]:
        return [(split.image(row), name(int(predictions[row])), name(int(target[row]))) for row in rows]

    return describe(order[:count]), describe(order[::-1][:count])


def table_row(part: str, images: int, what: str, row: Dict[str, Any]) -> Dict[str, Any]:
    leaving = {f'leave_at_exit{i}': f'{100 * share:.1f} %' for i, share in enumerate(row['leaving'])}
    return dict(part=part, images=images, exit=what, top1=row['top1'], cost=row['cost'], **leaving)


def _main() -> None:
    config = tyro.cli(CalibrateConfig)
    check_settings(config)
    folder = Path(config.checkpoint.removeprefix('local-dir:'))
    if not (folder / 'config.json').is_file():
        raise ConfigError(f'--checkpoint {config.checkpoint}: expected the folder of a run, which the rule is written '
                          f'into; there is no config.json.')
    network = open_data(config)
    model, data = network.model, network.data
    if model.num_exits == 1:
        raise ConfigError(f'--checkpoint {config.checkpoint}: {shown_name(model)} has no auxiliary exits to leave at.')
    predictor = EarlyExit(model)
    # whatever rule the run had before
    predictor.rule = ExitRule(
        model.num_exits, model.num_classes, criterion=config.criterion, ensemble=config.ensemble)
    calibration = calibrate(predictor, network, config)
    rule, costs = calibration.rule, calibration.costs

    splits = {name: split for name, split in data.splits().items() if name != 'train'}
    shown, split = list(splits.items())[-1]  # the test split, if there is one
    parts = {name: collect_logits(model, network.batches(split), network.device) for name, split in splits.items()}
    if config.unlabelled is not None:  # what is right is what the network answers at its end
        at_end = dataclasses.replace(rule, thresholds=None)
        parts = {name: (logits, follow_rule(at_end, logits)[0].argmax(-1)) for name, (logits, _) in parts.items()}
    out, target = run_early(predictor, network, split), parts[shown][1]
    points = dict(validation=calibration.point)
    if shown == 'test':
        points['test'] = summarize(out, target, rule, costs)
    alone = ExitRule(rule.num_exits, rule.num_classes)
    rows, exits = [], {}
    for part, logits in parts.items():
        exits[part] = measure_thresholds(alone, single_exits(rule.num_exits), *logits, costs)
        rows.append(table_row(part, len(logits[1]), 'early exit', points[part]))
        rows += [table_row(part, len(logits[1]), f'exit{i} alone', row) for i, row in enumerate(exits[part])]
    tried = [(row['family'], row['thresholds']) for row in calibration.curve]
    curve = dict(validation=calibration.curve)
    if shown == 'test':
        curve['test'] = measure_thresholds(rule, tried, *parts['test'], costs)
    best = {row['thresholds'] for row in pareto(calibration.curve)}

    output = config.output or folder
    output.mkdir(parents=True, exist_ok=True)
    write_curve(curve, output / 'early_exit.csv')
    curves = {'early exit': [row for row in curve[shown] if row['thresholds'] in best]}
    for family, name in (('budgeted', 'budgeted batch'), ('shared', 'one threshold for all exits')):
        curves[name] = [row for row in curve[shown] if row['family'] == family]
    title = f'{shown_name(model)} on {data.name}'
    if config.unlabelled is not None:
        title += '; top-1 is agreement with the answers at the end'
    unit = calibration.unit if calibration.unit != 'ms' else 'ms for one image'
    on_split = f'{title}, {shown} split ({len(split):,} images)'
    chosen = 'chosen on the validation split' if shown == 'test' else 'chosen on these images, measured on no others'
    if rule.promise is not None:
        chosen += '\n' + str(rule.promise)
    plot_early_exit(
        {name: curve for name, curve in curves.items() if curve}, exits[shown], points[shown],
        f'{on_split}; {chosen}', output / 'early_exit.png', unit)
    plot_first_and_last(
        *first_and_last(out, target, rule.criterion, data, split),
        f'{on_split}; wrong ones in red, the true class in brackets', output / 'first_and_last.png')
    write_exit_rule(folder, rule)
    (option, value), = ((name, getattr(config, name)) for name in aims(config))
    summary = dict(
        dataset=data.name, aim={option: value}, unit=calibration.unit,
        images={part: len(logits[1]) for part, logits in parts.items()}, **points,
    )
    if config.unlabelled is not None:
        summary['agreement'] = True
    if config.test_fraction is not None:
        summary['test_fraction'] = config.test_fraction
    write_json(folder / 'early_exit.json', summary)
    if is_complete(folder):
        write_card(folder)

    console = Console(highlight=False)
    print_rows(console, rows, f'{title}; cost is {unit}')
    console.print(repr(predictor), soft_wrap=True, markup=False)
    if rule.promise is not None:
        console.print(f'guarantee: {rule.promise}', soft_wrap=True, markup=False)
    if shown != 'test':
        console.print(
            f'{data.name} has no test split, so nothing was measured: these are the images that the thresholds were '
            f'chosen on. --test-fraction 0.5 keeps half of them apart to measure on.', soft_wrap=True, markup=False)
    console.print(f'rule written to {folder / "config.json"}, the rest to {output}', soft_wrap=True, markup=False)


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
