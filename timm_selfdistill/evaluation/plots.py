"""The pictures of a run."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple, Union

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    'plot_accuracy_against_compute', 'plot_early_exit', 'plot_exit_bars', 'plot_first_and_last', 'plot_generations',
    'plot_gradient_sizes', 'plot_secondary_information', 'plot_weight_noise',
]

_ENSEMBLE = 'tab:orange'


def _exit_colours(names: Iterable[str]) -> Dict[str, Any]:
    """Colour exits from light, the shallowest, to dark, the deepest; the ensemble apart from them."""
    exits = [name for name in names if name != 'ensemble']
    shades = {name: colormaps['Blues'](1 - 0.65 * i / max(len(exits) - 1, 1)) for i, name in enumerate(exits[::-1])}
    return dict(shades, ensemble=_ENSEMBLE)


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    crowded = sum(map(len, names)) > 10 * axes.figure.get_figwidth() / axes.get_gridspec().ncols
    slant = dict(rotation=30, ha='right') if crowded else {}
    axes.set_xticks(range(len(names)), names, fontsize=8, **slant)


def plot_accuracy_against_compute(table: List[Dict[str, Any]], title: str, path: Union[str, Path]) -> None:
    """Draw every exit's top-1 accuracy over its MACs, and the ensemble's, as a PNG.

    Args:
        table: Rows of `metrics.exit_table`.
        title: Title of the picture.
        path: File to write.
    """
    exits = [row for row in table if row['exit'] != 'ensemble']
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    axes = figure.subplots()
    macs = [row['macs'] / 1e6 for row in exits]
    axes.plot(macs, [row['top1'] for row in exits], 'o-', color='tab:blue', label='exits')
    for x, row in zip(macs, exits):
        first = row is exits[0]  # the curve rises from it, so that below it there is room
        axes.annotate(
            f'{row["exit"]}\n{row["top1"]:.2f} %',
            (x, row['top1']),
            xytext=(6, -4) if first else (-5, 4),
            textcoords='offset points',
            ha='left' if first else 'right',
            va='top' if first else 'bottom',
            fontsize=8,
        )
    if len(exits) > 1:
        ensemble = table[-1]
        axes.plot(
            ensemble['macs'] / 1e6, ensemble['top1'], '*', color=_ENSEMBLE, markersize=12,
            label=f'ensemble, {ensemble["top1"]:.2f} %',
        )
        axes.axhline(exits[-1]['top1'], color='grey', linewidth=0.8, linestyle=':', label='deepest exit')
        figure.legend(loc='outside lower center', ncols=3, frameon=False)
    axes.margins(x=0.12, y=0.2)
    axes.set_xlabel('MACs for one image, millions')
    axes.set_ylabel('agreement with the deepest exit, %' if table[0].get('agreement') else 'top-1 accuracy, %')
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_exit_bars(
        groups: Mapping[str, Mapping[str, float]],
        label: str,
        title: str,
        path: Union[str, Path],
) -> None:
    """Draw one value of every exit, of several networks side by side, as a PNG.

    Args:
        groups: By network the exits' values by exit name, shallow to deep; scatter ratios, for example.
        label: What the values are.
        title: Title of the picture.
        path: File to write.
    """
    most = max(map(len, groups.values()))
    figure = Figure(figsize=(max(6.4, 0.55 * most * len(groups)), 4.2), layout='constrained')
    axes = figure.subplots()
    width = 0.84 / most
    for x, values in enumerate(groups.values()):
        colours = _exit_colours(values)
        for i, (name, value) in enumerate(values.items()):
            bar = axes.bar(x + (i - (len(values) - 1) / 2) * width, value, 0.92 * width, color=colours[name])
            axes.bar_label(bar, [f'{name}\n{value:.4g}'], fontsize=7, padding=2)
    _name_groups(axes, list(groups))
    axes.margins(y=0.15)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(axis='y', alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def plot_weight_noise(groups: Mapping[str, List[Dict[str, Any]]], title: str, path: Union[str, Path]) -> None:
    """Draw loss and accuracy of every exit over the noise on the weights, a column for each network, as a PNG.

    Bands reach one standard deviation over the draws of noise to either side.

    Args:
        groups: By network the rows of `analyses.weight_noise`.
        title: Title of the picture.
        path: File to write.
    """
    figure = Figure(figsize=(max(6.4, 3.2 * len(groups)), 6.4), layout='constrained')
    panels = figure.subplots(2, len(groups), sharex=True, sharey='row', squeeze=False)
    labels: Dict[str, Any] = {}
    for column, (network, rows) in zip(panels.T, groups.items()):
        names = list(dict.fromkeys(row['exit'] for row in rows))
        colours = _exit_colours(names)
        for name in names:
            of_exit = sorted((row for row in rows if row['exit'] == name), key=lambda row: row['sigma'])
            sigmas = [row['sigma'] for row in of_exit]
            for axes, key in zip(column, ('top1', 'loss')):
                middle = [row[key] for row in of_exit]
                spread = [row[f'{key}_std'] for row in of_exit]
                style = '--' if name == 'ensemble' else '-'
                line, = axes.plot(sigmas, middle, style, color=colours[name], linewidth=1.4)
                low, high = ([m + sign * s for m, s in zip(middle, spread)] for sign in (-1, 1))
                axes.fill_between(sigmas, low, high, color=colours[name], alpha=0.15, linewidth=0)
            labels.setdefault(name, line)
        column[0].set_title(network, fontsize=9)
        column[1].set_xlabel('σ of the noise on the weights')
        for axes in column:
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel('top-1 accuracy, %')
    panels[1, 0].set_ylabel('negative log likelihood')
    panels[1, 0].set_yscale('log')
    figure.suptitle(title, fontsize=10)
    figure.legend(labels.values(), labels.keys(), loc='outside lower center', ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def plot_gradient_sizes(
        groups: Mapping[str, Mapping[str, Mapping[str, float]]],
        title: str,
        path: Union[str, Path],
) -> None:
    """Draw the mean absolute gradient of every layer, a panel for each loss and a line for each network, as a PNG.

    Args:
        groups: By the loss's name, then by network, what `analyses.gradient_sizes` returned.
        title: Title of the picture.
        path: File to write.
    """
    figure = Figure(figsize=(max(6.4, 4.4 * len(groups)), 4.2), layout='constrained')
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (loss, networks) in zip(panels, groups.items()):
        for network, sizes in networks.items():
            # a layer that the loss does not reach has no place on a logarithmic axis
            values = [size if size > 0 else float('nan') for size in sizes.values()]
            axes.plot(range(1, len(values) + 1), values, 'o-', markersize=3, linewidth=1.2, label=network)
        axes.set_yscale('log')
        axes.set_title(loss, fontsize=9)
        axes.set_xlabel('layer, first to last')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('mean |gradient|')
    figure.suptitle(title, fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=min(len(names), 4), frameon=False)
    figure.savefig(path, dpi=150)


def plot_secondary_information(
        groups: Mapping[str, Mapping[str, Mapping[str, float]]],
        title: str,
        path: Union[str, Path],
) -> None:
    """Draw the means of the secondary information, a panel for each figure, as a PNG.

    Args:
        groups: By network, then by split of the data, the means of what `secondary.secondary_information` returned.
        title: Title of the picture.
        path: File to write.
    """
    first = next(iter(groups.values()))
    parts, keys = list(first), list(next(iter(first.values())))
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * lines + 0.4), layout='constrained')
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, key in zip(panels, keys):
        width = 0.84 / len(parts)
        for i, part in enumerate(parts):
            values = [means[part][key] for means in groups.values()]
            places = [x + (i - (len(parts) - 1) / 2) * width for x in range(len(groups))]
            bars = axes.bar(places, values, 0.92 * width, color=f'C{i}', label=part)
            axes.bar_label(bars, [f'{v:.3g}' for v in values], fontsize=6, padding=1)
        _name_groups(axes, list(groups))
        axes.margins(y=0.12)
        axes.set_title(key.replace('_', ' '), fontsize=9)
        axes.grid(axis='y', alpha=0.3)
        axes.set_axisbelow(True)
    for axes in panels[len(keys):]:
        axes.remove()
    figure.suptitle(title, fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=len(parts), frameon=False)
    figure.savefig(path, dpi=150)


def plot_generations(rows: List[Dict[str, Any]], title: str, path: Union[str, Path]) -> None:
    """Draw the accuracy of every exit and of the ensembles over the generations, and the agreement with the teacher.

    Args:
        rows: One dict a generation: `generation`, its number; the top-1 accuracies in percent `exit0` to `exitN`,
            `ensemble` of its exits and `generations_ensemble` of all generations so far; and `teacher_agreement`,
            percent of the images that it classifies as its teacher does, None or absent where it has no teacher.
        title: Title of the picture.
        path: File to write, a PNG.
    """
    figure = Figure(figsize=(6.4, 5.6), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    exits = sorted((key for key in rows[0] if key.removeprefix('exit').isdigit()), key=lambda key: int(key[4:]))
    colours = _exit_colours([*exits, 'ensemble'])
    styles = {name: dict(color=colours[name], marker='o') for name in exits}
    if len(exits) > 1:
        styles['ensemble'] = dict(color=_ENSEMBLE, marker='s', label='ensemble of the exits')
    styles['generations_ensemble'] = dict(
        color='tab:red', marker='D', linestyle='--', label='ensemble of the generations')
    numbers = [row['generation'] for row in rows]
    for name, style in styles.items():
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            values = [float('nan') if value is None else value for value in values]
            top.plot(numbers, values, markersize=4, linewidth=1.4, **{'label': name, **style})
    taught = [row for row in rows if row.get('teacher_agreement') is not None]
    bottom.plot(
        [row['generation'] for row in taught], [row['teacher_agreement'] for row in taught], 'o-', color='grey',
        markersize=4, linewidth=1.4,
    )
    bottom.set_xticks(numbers)
    bottom.set_xlim(numbers[0] - 0.3, numbers[-1] + 0.3)
    bottom.set_xlabel('generation')
    bottom.set_ylabel('agreement with\nthe teacher, %')
    top.set_ylabel('top-1 accuracy, %')
    top.set_title(title, fontsize=10)
    for axes in (top, bottom):
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def plot_early_exit(
        curves: Mapping[str, List[Dict[str, Any]]],
        exits: List[Dict[str, Any]],
        point: Dict[str, Any],
        title: str,
        path: Union[str, Path],
        label: str = "share of the plain network's MACs",
) -> None:
    """Draw accuracy over mean cost of early exit, and beside it at which exits images leave, as a PNG.

    Args:
        curves: By name the rows of a curve, see `calibration.measure_thresholds`; the right panel follows the first.
            Up to three.
        exits: Rows of the single exits, shallow to deep.
        point: The row chosen.
        title: Title of the picture.
        path: File to write.
        label: What the costs are, and their unit.
    """
    figure = Figure(figsize=(10, 4.4), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    curves = {name: sorted(rows, key=lambda row: row['cost']) for name, rows in curves.items()}
    for i, ((name, rows), colour) in enumerate(zip(curves.items(), ('tab:green', 'tab:orange', 'tab:purple'))):
        left.plot(
            [row['cost'] for row in rows], [row['top1'] for row in rows], '-' if i else '.-', label=name, color=colour,
            linewidth=1.2, zorder=2 if i else 3,
        )
    names = [f'exit{i}' for i in range(len(exits))]
    colours = _exit_colours(names)
    for name, row in zip(names, exits):
        left.plot(row['cost'], row['top1'], 'o', color=colours[name], markeredgecolor='black', zorder=4)
        left.annotate(name, (row['cost'], row['top1']), xytext=(5, -11), textcoords='offset points', fontsize=8)
    left.plot(
        point['cost'], point['top1'], '*', color='tab:red', markersize=14, zorder=5,
        label=f'chosen: {point["top1"]:.2f} % at {point["cost"]:.3g}',
    )
    left.margins(x=0.08, y=0.1)
    left.set_ylabel('top-1 accuracy, %')
    left.set_xlabel(label)
    left.grid(alpha=0.3)
    left.legend(loc='lower right', frameon=False, fontsize=8)
    along = next(iter(curves.values()))
    steps = [along[0]['cost'] + i / 8 * (along[-1]['cost'] - along[0]['cost']) for i in range(9)]
    bars = [min(along, key=lambda row: abs(row['cost'] - step)) for step in steps]
    bars = sorted({row['cost']: row for row in [*bars, point]}.values(), key=lambda row: row['cost'])
    bottom = [0.] * len(bars)
    for i, name in enumerate(names):
        shares = [100 * row['leaving'][i] for row in bars]
        right.bar(range(len(bars)), shares, 0.9, bottom, color=colours[name], label=name)
        bottom = [low + share for low, share in zip(bottom, shares)]
    right.set_xticks(range(len(bars)), [f'{row["cost"]:.3g}' for row in bars], fontsize=7)
    for row, text in zip(bars, right.get_xticklabels()):
        if row['cost'] == point['cost']:
            text.set(color='tab:red', fontweight='bold')
    right.set_ylim(0, 100)
    right.set_ylabel('images that leave at an exit, %')
    right.set_xlabel(f'{next(iter(curves))}, {label}')
    right.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=len(names), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def plot_first_and_last(
        first: Sequence[Tuple[Any, str, str]],
        last: Sequence[Tuple[Any, str, str]],
        title: str,
        path: Union[str, Path],
) -> None:
    """Draw the images that left a network first and last, as a PNG; those classified wrongly in red.

    Over an image stands the class predicted; where that is wrong, the true one follows in brackets.

    Args:
        first: Image, a PIL image or an array (H, W, C) or (H, W), name of the class predicted, and of the true one.
        last: The same of the images that left last.
        title: Title of the picture.
        path: File to write.
    """
    columns = 8
    parts = {'left first': first, 'left last': last}
    lines = {name: max(1, -(-len(images) // columns)) for name, images in parts.items()}
    figure = Figure(figsize=(1.25 * columns, 1.5 * sum(lines.values()) + 0.8), layout='constrained')
    figure.suptitle(title, fontsize=10)
    for part, (name, images) in zip(figure.subfigures(2, 1, height_ratios=list(lines.values())), parts.items()):
        part.suptitle(name, fontsize=10, fontweight='bold')
        panels = part.subplots(lines[name], columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, (image, predicted, true) in zip(panels, images):
            axes.imshow(image, cmap='gray', interpolation='nearest')
            wrong = predicted != true
            words = [_shorten(predicted), f'({_shorten(true)})'] if wrong else [_shorten(true)]
            axes.set_title('\n'.join(words), fontsize=7, color='tab:red' if wrong else 'black', pad=2)
    figure.savefig(path, dpi=150)


def _shorten(name: str, most: int = 17) -> str:
    return name if len(name) <= most else f'{name[:most - 1]}…'
