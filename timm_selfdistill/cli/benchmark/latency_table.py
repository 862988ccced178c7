"""Table and picture of the speed of early exit."""
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console

from ...evaluation.tables import print_rows


def render(rows: List[Dict[str, Any]], title: str, console: Console) -> None:
    """Show the rows of one size of batches as a table."""
    lines = []
    for row in rows:
        left = [n for key, n in row.items() if key.startswith('left_at_') and n is not None]
        low, high = row['time_ratio_low'], row['time_ratio_high']
        lines.append(dict(
            contender=row['contender'],
            top1=row['top1'],
            images_s=f'{row["images_per_second"]:,.0f}' if row['images_per_second'] >= 100 else
            f'{row["images_per_second"]:.1f}',
            p50_ms=row['p50_ms'],
            p95_ms=row['p95_ms'],
            time=f'{row["time_ratio"]:.3f}',
            middle_half='' if low is None else f'{low:.3f}-{high:.3f}',
            speed_up=f'{row["speed_up"]:.2f}',
            by_MACs=f'{row["predicted_speed_up"]:.2f}',
            achieved=f'{100 * row["achieved"]:.0f} %',
            of_parts=row['achieved_by_time'] and f'{100 * row["achieved_by_time"]:.0f} %',
            **{'left_at_exits_%': '/'.join(f'{100 * n / row["images"]:.0f}' for n in left)},
        ))
    print_rows(console, lines, title)


def plot(rows: List[Dict[str, Any]], title: str, path: Path) -> None:
    """Draw accuracy over speed, and below it at which exits images leave, a column for each size of batches, as a PNG.
    """
    sizes = list(dict.fromkeys(row['batch_size'] for row in rows))
    figure = Figure(figsize=(max(6.4, 4.6 * len(sizes)), 7.6), layout='constrained')
    panels = figure.subplots(2, len(sizes), squeeze=False, height_ratios=(3, 2))
    styles = dict(zip(
        ('plain network', 'all exits', 'truncated', 'early exit', 'earlyon', 'static network'),
        (('s', 'black'), ('P', 'grey'), ('o', 'tab:blue'), ('*', 'tab:red'), ('X', 'tab:green'), ('D', 'tab:purple')),
    ))
    exits = [key for key in rows[0] if key.startswith('left_at_')]
    colours = [colormaps['Blues'](0.35 + 0.65 * i / max(len(exits) - 1, 1)) for i in range(len(exits))]
    for (top, bottom), size in zip(panels.T, sizes):
        here = [row for row in rows if row['batch_size'] == size]
        for group, (marker, colour) in styles.items():
            of_group = [row for row in here if row['group'] == group]
            for n, row in enumerate(of_group):
                point = (row['images_per_second'], row['top1'])
                if group == 'early exit':  # points of several settings often lie close together
                    label, shade = row['contender'], colormaps['autumn'](n / max(len(of_group) - 1, 1))
                else:
                    label, shade = None if n else group, colour
                size_of = 10 if marker == '*' else 6
                top.plot(*point, marker, color=shade, markersize=size_of, markeredgewidth=0, label=label, alpha=0.8)
                if group == 'truncated':  # the legend names the rest
                    top.annotate(
                        row['contender'].removeprefix('only '), point, xytext=(0, -11), textcoords='offset points',
                        fontsize=7, color=shade, ha='center',
                    )
        top.set_xlabel('images/s')
        top.set_title('one image at a time' if size == 1 else f'batches of {size}', fontsize=9)
        top.margins(x=0.15, y=0.1)
        top.grid(alpha=0.3)
        leaving = [row for row in here if row['group'] in ('early exit', 'earlyon') and any(row[e] for e in exits[:-1])]
        base = np.zeros(len(leaving))
        for i, (key, colour) in enumerate(zip(exits, colours)):
            shares = np.array([100 * row[key] / row['images'] for row in leaving])
            bottom.bar(range(len(leaving)), shares, 0.9, base, color=colour, label=f'exit{i}')
            base += shares
        bottom.set_xticks(range(len(leaving)), [r['contender'] for r in leaving], fontsize=7, rotation=40, ha='right')
        bottom.set_ylim(0, 100)
    panels[0, 0].set_ylabel('top-1 accuracy, %')
    panels[1, 0].set_ylabel('images that leave at an exit, %')
    figure.suptitle(title, fontsize=10)
    both = [axes.get_legend_handles_labels() for axes in panels[:, 0]]
    handles, names = (sum(parts, []) for parts in zip(*both))
    columns = min(8, 2 + 2 * len(sizes))
    figure.legend(handles, names, loc='outside lower center', ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
