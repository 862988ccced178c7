#!/usr/bin/env python
"""Print the CIFAR-100 table from the runs' own lines, beside the papers' figures: `python recipes/paper/table.py`.

Mean ± standard deviation over seeds of the last epoch's test accuracies. A gain is the difference to plain training by
the same recipe: the runs whose settings differ in nothing but what teaches. Nothing is averaged over runs of different
settings, and settings that are not those of the row are reported.
"""
import collections
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import tyro
from matplotlib.figure import Figure
from rows import METHODS, PROTOCOLS, ROWS

from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import INCIDENTAL, PLACES, TrainConfig
from timm_selfdistill.errors import ConfigError

HERE = Path(__file__).parent

# Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094), CIFAR-100, top-1: baseline, exits, ensemble.
PAPER = {
    'vgg19_bn': (64.47, (63.59, 67.04, 68.03, 67.73), 68.54),
    'resnet18': (77.09, (67.85, 74.57, 78.23, 78.64), 79.67),
    'resnet50': (77.68, (68.23, 74.21, 75.23, 80.56), 81.04),
    'resnet101': (77.98, (69.45, 77.29, 81.17, 81.23), 82.03),
    'resnet152': (79.21, (68.84, 78.72, 81.43, 81.61), 82.29),
    'resnext29_8x64d': (81.29, (71.15, 79.00, 81.48, 81.51), 81.90),
    'wide_resnet20_8': (79.76, (68.85, 78.15, 80.98, 80.92), 81.38),
    'wide_resnet44_8': (79.93, (72.54, 81.15, 81.96, 82.09), 82.61),
    'wide_resnet28_12': (80.07, (71.21, 80.86, 81.58, 81.59), 82.09),
    'pyramidnet101_a240': (81.12, (69.23, 78.15, 80.98, 82.30), 83.51),
}
# The same authors' later code, AutoAugment and Cutout; it tells no baseline.
LATER = {'resnet18': ((76.25, 79.30, 81.06, 81.33), 82.32)}

# Settings by which what teaches differs, and not the recipe.
TEACHING = {
    'method', 'exits', 'exit_head', 'alpha', 'alpha_end', 'temperature', 'temperature_end', 'square_temperature',
    'hint_weight', 'hint_on', 'hint_form', 'hint_exits', 'hint_linear', 'exit_teacher',
    'exit_weights', 'last_phase_epochs', 'teacher', 'label_weight', 'teacher_temperature', 'patriarch', 'eta', 'tsd_k',
    'generations', 'superclass_column', 'seed',
}
COLUMNS = (
    'recipe', 'runs', 'exit 0', 'exit 1', 'exit 2', 'deepest', 'ensemble', 'deepest, gain', 'ensemble, gain',
    'ECE, deepest', 'hours', 'images/s',
)

Row = Dict[str, Any]


@dataclasses.dataclass
class TableConfig:
    """Print the table of the runs so far as Markdown, and draw it."""

    results: str = str(HERE / 'results' / 'cifar100.jsonl')
    """File of JSON lines that the runs have appended."""
    picture: Optional[str] = str(HERE / 'results' / 'cifar100.png')
    """File to draw the figures to; nothing is drawn when None, or where there are no figures."""


def read_runs(path: Path) -> Dict[str, List[Row]]:
    """Read the lines of complete runs, by recipe.

    Raises:
        ConfigError: A line cannot be read, a seed comes twice, or runs of one recipe have different settings.
    """
    groups: Dict[str, List[Row]] = collections.defaultdict(list)
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row['settings'] = {**TrainConfig().settings(), **row['settings']}  # some did not exist when it was written
            groups[row['recipe']].append(row)
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f'--results {path}: line {number} is no line of a run: {e!r}.') from e
    for recipe, rows in groups.items():
        seeds = [row['seed'] for row in rows]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            raise ConfigError(f'--results {path}: {recipe} has several lines with seed {twice[0]}; keep one of them.')
        for row in rows[1:]:
            differ = _differences(rows[0]['settings'], row['settings'], {*PLACES, 'seed'})
            if differ:
                raise ConfigError(
                    f'--results {path}: runs of {recipe} are not of one recipe: {differ[0]}. Keep them in two files.')
    return dict(groups)


def _differences(one: Row, other: Row, without: Iterable[str]) -> List[str]:
    names = [name for name in sorted({*one, *other} - set(without)) if one.get(name) != other.get(name)]
    return [f'{name} {other.get(name)} instead of {one.get(name)}' for name in names]


def recipes_of(network: str) -> List[str]:
    """List a network's recipes that have a row: plain training first, the paper's setting first."""
    names = [f'{network}_{method}{recipe}' for recipe in PROTOCOLS for method in METHODS]
    for name in (f'{network}_generations', f'{network}_generations_tsd'):
        if name in ROWS:
            count = _settings_of(name)['generations']
            names += [f'{name}/generation{number}' for number in range(count + 1)]
    return [name for name in names if '/' in name or name in ROWS]


def _settings_of(name: str) -> Row:
    return parse_train_config(ROWS[name].arguments).settings()


def changed_settings(recipe: str, rows: Sequence[Row]) -> List[str]:
    """Say what runs were trained with that their row does not say."""
    name, _, generation = recipe.partition('/')
    if name not in ROWS:
        return []
    without = {*INCIDENTAL, *PLACES, 'seed'}
    if generation:  # a generation's own settings
        without |= {'generations', 'patriarch', 'eta', 'label_weight', 'teacher_temperature'}
    return _differences(_settings_of(name), rows[0]['settings'], without)


def baseline_of(rows: Sequence[Row], runs: Dict[str, List[Row]]) -> Optional[List[Row]]:
    """Find the runs of plain training by the same recipe; None if there are none."""
    for others in runs.values():
        settings = others[0]['settings']
        plain = (settings['method'], settings['patriarch'], settings['teacher']) == ('plain', 'plain', None)
        same = not _differences(settings, rows[0]['settings'], TEACHING | PLACES)
        if plain and same and all(others[0][key] == rows[0][key] for key in ('network', 'dataset', 'part')):
            return others
    return None


def _mean(values: Iterable[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float]) -> Optional[float]:
    return statistics.stdev(values) if len(values) > 1 else None


def _number(values: Sequence[Optional[float]], digits: int = 2) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return '-'
    spread = _spread(known)
    return f'{_mean(known):.{digits}f}' + ('' if spread is None else f' ± {spread:.{digits}f}')


def _gain(value: Optional[float], plain: Optional[float]) -> str:
    return '-' if None in (value, plain) else f'{value - plain:+.2f}'


def _cells(exits: Sequence[str], deepest: str, ensemble: str) -> List[str]:
    """Lay out exits: three columns for the auxiliary ones, however many there are."""
    shown = list(exits[:2]) + [' / '.join(exits[2:])] if len(exits) > 2 else [*exits, '-', '-', '-'][:3]
    return [*shown, deepest, ensemble]


def _own_line(recipe: str, runs: Dict[str, List[Row]], mark: str) -> List[str]:
    rows = runs.get(recipe, [])
    if not rows:
        return [recipe, '-', *['-'] * (len(COLUMNS) - 2)]
    *exits, deepest = ([row['top1'][i] for row in rows] for i in range(len(rows[0]['top1'])))
    ensemble = [row['ensemble_top1'] for row in rows]
    baseline = baseline_of(rows, runs)
    plain = _mean(row['top1'][-1] for row in baseline) if baseline else None
    gains = ['-', '-'] if baseline is rows else [_gain(_mean(values), plain) for values in (deepest, ensemble)]
    return [
        recipe + mark, str(len(rows)), *_cells(list(map(_number, exits)), _number(deepest), _number(ensemble)), *gains,
        _number([row['ece'][-1] for row in rows]), _number([_mean(row['hours'] for row in rows)]),
        _number([_mean(row['images_per_second'] for row in rows)], 0),
    ]


def _published(network: str) -> List[List[str]]:
    """Return what others have printed of a network, as lines of the table."""
    lines, unknown = [], ['-', '-', '-']
    if network in PAPER:
        plain, (*exits, deepest), ensemble = PAPER[network]
        lines.append(['*the paper, plain*', '', *_cells([], f'{plain:.2f}', '-'), '-', '-', *unknown])
        lines.append([
            '*the paper, BYOT*', '', *_cells([f'{v:.2f}' for v in exits], f'{deepest:.2f}', f'{ensemble:.2f}'),
            _gain(deepest, plain), _gain(ensemble, plain), *unknown,
        ])
    if network in LATER:
        (*exits, deepest), ensemble = LATER[network]
        lines.append([
            '*its authors\' later code, BYOT*', '',
            *_cells([f'{v:.2f}' for v in exits], f'{deepest:.2f}', f'{ensemble:.2f}'), '-', '-', *unknown,
        ])
    return lines


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines]
    return '\n'.join([texts[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *texts[1:]])


def networks(runs: Dict[str, List[Row]]) -> Tuple[List[str], List[str]]:
    """Return the networks that have figures and those of the table that have none."""
    table = [*PAPER, 'resnet110', 'densenet100_12']
    seen = {rows[0]['network'].removesuffix('_cifar') for rows in runs.values()}
    return [n for n in table if n in seen] + sorted(seen - {*table}), [n for n in table if n not in seen]


def render(runs: Dict[str, List[Row]]) -> str:
    """Write the table and what belongs to it as Markdown."""
    with_figures, without = networks(runs)
    lines, notes = [COLUMNS], []
    for network in with_figures:
        planned = recipes_of(network)
        others = [r for r, rows in runs.items() if rows[0]['network'].removesuffix('_cifar') == network]
        for recipe in dict.fromkeys([*planned, *sorted(others)]):
            changed = changed_settings(recipe, runs[recipe]) if recipe in runs else []
            note = '; '.join(changed)
            if changed and note not in notes:
                notes.append(note)
            lines.append(_own_line(recipe, runs, f' ({notes.index(note) + 1})' if changed else ''))
        lines += _published(network)
    paragraphs = []
    if runs:
        rows = [row for group in runs.values() for row in group]
        where = ', '.join(dict.fromkeys(f'{row["dataset"]}, {row["part"]} part' for row in rows))
        paragraphs += [f'Top-1 accuracy in percent: {where}; the last epoch, mean ± standard deviation over seeds.']
        paragraphs += [_markdown(lines)]
        paragraphs += [f'({i}) not as its row says: {note}.' for i, note in enumerate(notes, 1)]
        paragraphs.append('Trained with: ' + ' | '.join(
            f'{key}: {"; ".join(dict.fromkeys(row[key] for row in rows))}'
            for key in ('hardware', 'precision', 'torch', 'timm', 'commit')))
    if without:
        paragraphs.append(f'No figures yet: {", ".join(without)}.')
    return '\n\n'.join(paragraphs)


def draw(runs: Dict[str, List[Row]], path: Path) -> None:
    """Draw exits and ensemble, a panel for each network, and generations in panels of their own, as a PNG."""
    panels: List[Tuple[str, Dict[str, List[Row]], bool]] = []
    for network in networks(runs)[0]:
        own = {r: rows for r, rows in runs.items() if rows[0]['network'].removesuffix('_cifar') == network}
        for lineage in (False, True):
            part = {r: rows for r, rows in own.items() if ('/' in r) == lineage}
            if part:
                panels.append((network, part, lineage))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.6 * lines), layout='constrained')
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (network, own, lineage) in zip(grid, panels):
        (_draw_generations if lineage else _draw_exits)(axes, network, own)
        axes.set_title(network, fontsize=10)
        axes.set_ylabel('test top-1, %')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, framealpha=0.7, edgecolor='none', loc='lower right')
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    figure.suptitle('mean over seeds; bars and bands: ± one standard deviation', fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_exits(axes: Any, network: str, own: Dict[str, List[Row]]) -> None:
    colours = {name: f'C{i}' for i, name in enumerate(own)}
    most = max(len(rows[0]['top1']) for rows in own.values())
    if network in PAPER:
        plain, exits, ensemble = PAPER[network]
        most = max(most, len(exits))
        axes.plot(range(len(exits) + 1), [*exits, ensemble], 'x:', color='black', linewidth=1, label='the paper, BYOT')
        axes.axhline(plain, color='black', linewidth=0.8, linestyle='--', label='the paper, plain')
    for recipe, rows in own.items():
        values = [[row['top1'][i] for row in rows] for i in range(len(rows[0]['top1']))]
        label = f'{recipe.removeprefix(network + "_")}, {len(rows)} run{"s" * (len(rows) > 1)}'
        if len(values) == 1:
            mean, spread = _mean(values[0]), _spread(values[0]) or 0.
            axes.axhline(mean, color=colours[recipe], linewidth=1.2, label=label)
            axes.axhspan(mean - spread, mean + spread, color=colours[recipe], alpha=0.15, linewidth=0)
            continue
        values.append([row['ensemble_top1'] for row in rows])
        x = [*range(len(values) - 2), most - 1, most]
        axes.errorbar(
            x, [_mean(v) for v in values], [_spread(v) or 0. for v in values], fmt='o-', color=colours[recipe],
            linewidth=1.2, markersize=4, capsize=2, label=label,
        )
    axes.set_xticks(range(most + 1), [*(f'exit {i}' for i in range(most - 1)), 'deepest', 'ensemble'], fontsize=8)


def _draw_generations(axes: Any, network: str, own: Dict[str, List[Row]]) -> None:
    lineages: Dict[str, Dict[int, List[float]]] = collections.defaultdict(dict)
    for recipe, rows in own.items():
        name, _, generation = recipe.partition('/generation')
        lineages[name][int(generation)] = [row['top1'][-1] for row in rows]
    for name, generations in lineages.items():
        numbers = sorted(generations)
        values = [generations[number] for number in numbers]
        axes.errorbar(
            numbers, [_mean(v) for v in values], [_spread(v) or 0. for v in values], fmt='o-', linewidth=1.2,
            markersize=4, capsize=2, label=name.removeprefix(network + '_'),
        )
    axes.set_xticks(sorted({number for generations in lineages.values() for number in generations}))
    axes.set_xlabel('generation')


def main() -> None:
    config = tyro.cli(TableConfig, description=__doc__)
    runs = read_runs(Path(config.results))
    print(render(runs))
    if runs and config.picture is not None:
        draw(runs, Path(config.picture))


if __name__ == '__main__':
    run_command(main)
