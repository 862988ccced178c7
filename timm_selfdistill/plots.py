"""The pictures of a run."""
from pathlib import Path
from typing import Any, Dict, List, Union

from matplotlib.figure import Figure

__all__ = ['plot_accuracy_against_compute']


def plot_accuracy_against_compute(table: List[Dict[str, Any]], title: str, path: Union[str, Path]) -> None:
    """Draw every exit's top-1 accuracy over its multiply-adds, and the ensemble's, as a PNG.

    Args:
        table: Rows of `metrics.exit_table`.
        title: Title of the picture.
        path: File to write.
    """
    *exits, ensemble = table
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
        axes.plot(
            ensemble['macs'] / 1e6, ensemble['top1'], '*', color='tab:orange', markersize=12,
            label=f'ensemble, {ensemble["top1"]:.2f} %',
        )
        axes.axhline(exits[-1]['top1'], color='grey', linewidth=0.8, linestyle=':', label='deepest exit')
        figure.legend(loc='outside lower center', ncols=3, frameon=False)
    axes.margins(x=0.12, y=0.2)
    axes.set_xlabel('multiply-adds for one image, millions')
    axes.set_ylabel('top-1 accuracy, %')
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
