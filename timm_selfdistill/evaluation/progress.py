"""How far a long task is: bars on a terminal, a line a minute elsewhere."""
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Dict, Iterable, Iterator, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

__all__ = ['Watch', 'follow']

# Seconds between two lines where there is no terminal.
_EVERY = 60.


@dataclass
class _Task:
    label: str
    total: Optional[int]
    done: int
    first: int
    began: float
    told: float
    images: int = 0
    text: str = ''
    bar: Optional[int] = None

    def pace(self) -> str:
        """Return images a second, and the time that the rest will take at this speed."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        steps = self.done - self.first
        rate = self.images / seconds
        if not steps:
            return ''
        said = [f'{rate:,.0f} images/s' if rate >= 10 else f'{rate:.2g} images/s'] if self.images else []
        if self.total is not None:
            said.append(f'{timedelta(seconds=round((self.total - self.done) * seconds / steps))} left')
        return '  '.join(said)

    def said(self) -> str:
        """Return all that is known, what matters most first."""
        count = f'{self.done:,}' if self.total is None else f'{self.done:,}/{self.total:,}'
        return '  '.join(filter(None, (f'{self.label} {count}', self.pace(), self.text)))


class Watch:
    """Shows how far tasks are. A context: what it has drawn is gone at its end.

    Args:
        console: Where to show it.

    Examples:
        >>> with Watch(Console(quiet=True)) as watch:
        ...     watch.begin('train', total=2)
        ...     watch.advance('train', images=64)
    """

    def __init__(self, console: Console):
        self.console = console
        self._tasks: Dict[str, _Task] = {}
        # one column of text, so that a narrow terminal cuts its end
        self._bars = Progress(
            BarColumn(bar_width=10), TextColumn('{task.fields[said]}', markup=False, table_column=Column(no_wrap=True)),
            console=console, transient=True,
        ) if console.is_terminal and not console.quiet else None

    def __enter__(self) -> 'Watch':
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, label: str, total: Optional[int] = None, done: int = 0) -> None:
        """Begin a task.

        Args:
            label: What it is called.
            total: Its steps, where their number is known.
            done: Steps that are done already.
        """
        now = time.monotonic()
        task = self._tasks[label] = _Task(label, total, done, done, now, now)
        if self._bars is not None:
            task.bar = self._bars.add_task('', total=total, completed=done, said=task.said())

    def advance(self, label: str, images: int = 0, text: Optional[str] = None) -> None:
        """Say that a step, of so many images, is done; `text` is shown beside it until there is another one."""
        task = self._tasks[label]
        task.done, task.images = task.done + 1, task.images + images
        task.text = task.text if text is None else text
        if task.bar is not None:
            self._bars.update(task.bar, completed=task.done, said=task.said())
        elif time.monotonic() - task.told >= _EVERY:
            task.told = time.monotonic()
            self.console.print(task.said(), soft_wrap=True, markup=False)

    def end(self, label: str) -> None:
        """End a task."""
        task = self._tasks.pop(label)
        if task.bar is not None:
            self._bars.remove_task(task.bar)


def follow(batches: Iterable, label: str, console: Console, total: Optional[int] = None) -> Iterator:
    """Pass on batches while showing how far they are.

    Args:
        batches: Tuples whose first entries are images, or lists of something for each of them.
        label: What is done with them.
        console: Where to show it.
        total: Their number; their length, if they have one, when None.
    """
    total = total if total is not None else len(batches) if hasattr(batches, '__len__') else None
    with Watch(console) as watch:
        watch.begin(label, total)
        for batch in batches:
            yield batch
            watch.advance(label, len(batch[0]))
