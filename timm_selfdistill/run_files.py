"""The files of a run: their names, whether they are complete, and how rows are added."""
import csv
from pathlib import Path
from typing import Any, Dict

__all__ = ['CONFIG_NAME', 'LATENCY_NAME', 'RECORD', 'UNREADABLE', 'WEIGHTS_NAME', 'add_row', 'is_complete', 'keep_rows']

LATENCY_NAME = 'latency.json'

RECORD = 'record.json'

UNREADABLE = 'unreadable.csv'

CONFIG_NAME = 'config.json'

WEIGHTS_NAME = 'model.safetensors'


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a run that came to its end: its results are written last."""
    return (folder / 'results.json').is_file()


def keep_rows(summary: Path, epochs: int) -> None:
    """Take the lines of later epochs out of a `summary.csv`: they are trained again."""
    if not summary.exists():
        return
    header, *lines = summary.read_bytes().splitlines(keepends=True) or [b'']
    kept = [line for line in lines if line.endswith(b'\n') and int(line.partition(b',')[0]) < epochs]
    beside = summary.with_suffix('.csv.new')
    beside.write_bytes(b''.join([header, *kept] if kept else []))
    beside.replace(summary)


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
    beside = summary.with_suffix('.csv.new')
    with beside.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows([*rows, row])
    beside.replace(summary)
