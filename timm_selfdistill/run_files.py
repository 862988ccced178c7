"""The files of a run: their names, how one is replaced as a whole, and how rows are added.

A reader of the folder finds the old file or the new one, never half of one, at whatever moment the process is killed.
"""
import csv
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator

__all__ = [
    'ARGS', 'CONFIG_NAME', 'LATENCY_NAME', 'RECORD', 'RESULTS', 'SUMMARY', 'UNREADABLE', 'WEIGHTS_NAME', 'add_row',
    'is_complete', 'keep_rows', 'replaced', 'write_json',
]

ARGS = 'args.yaml'  # the settings
CONFIG_NAME = 'config.json'  # what timm builds the network from
LATENCY_NAME = 'latency.json'  # milliseconds to each exit
RECORD = 'record.json'  # the run in one line
RESULTS = 'results.json'  # figures of every exit on every split, written last
SUMMARY = 'summary.csv'  # one row an epoch
UNREADABLE = 'unreadable.csv'  # images that were left out
WEIGHTS_NAME = 'model.safetensors'


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file beside another, and put it in its place once it is complete.

    Args:
        path: The file to replace or to create.

    Yields:
        Where to write.

    Raises:
        OSError: The place cannot be written to; the old file stays.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'figures.txt')
        >>> with replaced(path) as beside:
        ...     _ = beside.write_text('1.5')
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('1.5', 1)
    """
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole."""
    with replaced(path) as beside:
        beside.write_text(json.dumps(content, indent=2), encoding='utf-8')


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a run that came to its end: its results are written last."""
    return (folder / RESULTS).is_file()


def keep_rows(summary: Path, epochs: int) -> None:
    """Take the lines of later epochs out of a `summary.csv`: they are trained again."""
    if not summary.exists():
        return
    header, *lines = summary.read_bytes().splitlines(keepends=True) or [b'']
    kept = [line for line in lines if line.endswith(b'\n') and int(line.partition(b',')[0]) < epochs]
    with replaced(summary) as beside:
        beside.write_bytes(b''.join([header, *kept] if kept else []))


def add_row(summary: Path, row: Dict[str, Any]) -> None:
    """Append an epoch's line to a `summary.csv` in timm's form.

    A run that an older version began may have other columns: those that one side lacks stay empty there.
    """
    rows = []
    names = list(row)
    if summary.exists():
        with summary.open(newline='', encoding='utf-8') as f:
            reader = csv.DictReader(f)
            rows, header = list(reader), list(reader.fieldnames or ())
        names = list(dict.fromkeys([*header, *names]))
        if names == header:
            with summary.open('a', newline='', encoding='utf-8') as f:
                csv.DictWriter(f, names).writerow(row)
            return
    with replaced(summary) as beside, beside.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows([*rows, row])
