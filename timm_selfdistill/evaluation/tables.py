"""Tables for a terminal."""
from pathlib import Path
from typing import Any, Dict, List, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError

__all__ = ['print_rows', 'render_generations', 'render_table', 'short_names']


def short_names(checkpoints: Sequence[str]) -> List[str]:
    """Name checkpoints for tables and pictures: by their last split, or in full where that is not enough.

    Raises:
        ConfigError: A checkpoint is given twice.
    """
    twice = next((c for i, c in enumerate(checkpoints) if c in checkpoints[:i]), None)
    if twice is not None:
        raise ConfigError(f'`checkpoint={twice}`: given twice.')
    names = [Path(c).name for c in checkpoints]
    return names if len(set(names)) == len(names) else list(checkpoints)


def print_rows(console: Console, rows: List[Dict[str, Any]], title: str) -> None:
    """Print rows as a table, a column for each key of the first; None and what a row lacks stay empty.

    Where there is little room the headings are broken, not the figures, which rather run over the edge.
    """
    table = Table(
        title=title, title_justify='left', box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        collapse_padding=True,
    )
    cells = {key: [_text(row.get(key)) for row in rows] for key in rows[0]}
    for key, value in rows[0].items():
        table.add_column(
            key.replace('_', ' '), justify='left' if isinstance(value, str) else 'right', overflow='fold',
            min_width=max(map(len, cells[key])),
        )
    for line in zip(*cells.values()):
        table.add_row(*line)
    needed = sum(max(map(len, column)) + 2 for column in cells.values())
    console.print(table, width=max(console.width, needed), crop=False)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.2f}' if abs(value) >= 1 else f'{value:.3g}'
    return '' if value is None else str(value)


def render_table(rows: List[Dict[str, Any]], title: str) -> Table:
    """Return rows of `metrics.exit_table` for a terminal; without labels they tell of agreement with the deepest."""
    table = Table(
        title=title, title_justify='left', box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        collapse_padding=True,
    )
    table.add_column('exit', no_wrap=True)
    table.add_column('after', overflow='fold')  # before any number is cut short
    top5 = rows[0]['top5'] is not None
    measure = 'agree\n%' if rows[0].get('agreement') else 'top-1\n%'
    shares = ('share\n%', measure, *(('top-5\n%',) if top5 else ()), 'NLL', 'ECE\n%', 'AURC\n%')
    for column in ('params', 'MACs', *shares):
        table.add_column(column, justify='right', no_wrap=True)
    for row in rows:
        table.add_row(
            row['exit'],
            row['stage'],
            f'{row["params"] / 1e6:.2f}M',
            f'{row["macs"] / 1e6:.1f}M' if row['macs'] < 1e9 else f'{row["macs"] / 1e9:.2f}G',
            f'{100 * row["share"]:.1f}',
            f'{row["top1"]:.2f}',
            *([f'{row["top5"]:.2f}'] if top5 else []),
            f'{row["loss"]:.3f}',
            f'{row["ece"]:.2f}',
            f'{row["aurc"]:.2f}' if 'aurc' in row else '',  # runs of older versions lack it
        )
    return table


def render_generations(rows: List[Dict[str, Any]], title: str) -> Table:
    """Return the generations for a terminal: top-1 accuracies and agreement with the teacher, in percent."""
    table = Table(
        title=f'generations, {title}: top-1 %', title_justify='left', box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, collapse_padding=True,
    )
    table.add_column('generation', justify='right', no_wrap=True)
    names = [name for name in rows[0] if name.startswith('exit') or name in ('ensemble', 'generations_ensemble')]
    for name in [*names, 'teacher_agreement']:
        table.add_column(name.replace('_', ' '), justify='right')
    for row in rows:
        values = [row.get(name) for name in [*names, 'teacher_agreement']]
        table.add_row(str(row['generation']), *('' if v is None else f'{v:.2f}' for v in values))
    return table
