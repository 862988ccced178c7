"""Going on without the images that cannot be read: found, left out, and listed."""
import csv
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Set, Tuple

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, UnreadableImageError
from ..run_files import replaced
from .image_data import ImageSplit
from .source import Shard
from .workers import keep_worker_alive, readable

__all__ = [
    'SkippedImages', 'Unreadable', 'find_unreadable', 'leave_out', 'list_unreadable', 'read_unreadable',
    'write_unreadable',
]


# Unreadable images that are told one by one on a terminal, and images from which on worker processes look for them.
_TOLD, _MANY = 10, 5000


class Unreadable(NamedTuple):
    """An image that cannot be read.

    Attributes:
        split: Split of the data set as it came, whatever is held out of it.
        place: Row in it, or shard and example of a stream.
        path: Where it lies; empty if it is known by its place alone.
        reason: What is wrong.
    """
    split: str
    place: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f'{self.path or f"{self.place} of the {self.split} split"}: {self.reason}'


class _Rows(Dataset):
    """Tells of each row of a split whether its image can be read: what is wrong, or None."""

    def __init__(self, split: ImageSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Optional[Unreadable]:
        try:
            self.split.image(row)
        except UnreadableImageError as e:
            return Unreadable(self.split.origin, f'row {self.split.index[row]}', e.path or '', e.reason)
        return None


def find_unreadable(
        split: ImageSplit,
        workers: int = 0,
        shard: Shard = Shard(),
        progress: bool = False,
) -> List[Unreadable]:
    """Decode the images of one process's share of a split; return those that cannot be.

    Args:
        split: The split.
        workers: Processes that decode a large one.
        shard: The share of this process.
        progress: Show a bar for a large split, if on a terminal.
    """
    large = len(split) >= _MANY * shard.world_size
    batches = DataLoader(
        _Rows(split),
        batch_size=64,
        sampler=shard.rows(len(split)),
        num_workers=workers if large else 0,
        collate_fn=lambda rows: [row for row in rows if row is not None],
        worker_init_fn=keep_worker_alive,
    )
    console = Console(stderr=True)
    hidden = not (progress and large and console.is_terminal)
    found = track(readable(batches), f'check {split.name}', total=len(batches), console=console, transient=True,
                  disable=hidden)
    return [image for batch in found for image in batch]


def leave_out(split: ImageSplit, images: List[Unreadable], label_names: Optional[List[str]] = None) -> None:
    """Take unreadable images out of a split, which keeps the order of the others.

    Raises:
        DataError: Nothing is left of the split, or of a class of the training split.
    """
    split.checked = True
    images = [image for image in images if image.split == split.origin]
    if not images:
        return
    labels = np.unique(split.labels)
    kept = ~np.isin(split.index, [int(image.place.removeprefix('row ')) for image in images])
    if not kept.any():
        raise DataError(f'None of the {len(split):,} images of the {split.name} split can be read: {images[0]}.')
    split.index = split.index[kept]
    lost = np.setdiff1d(labels, split.labels)
    if split.name == 'train' and len(lost):
        names = ', '.join(label_names[i] if label_names else str(i) for i in lost)
        raise DataError(
            f'`skip_unreadable`: no image of class {names} can be read in the train split, so that it could not be '
            f'learned. Repair images of it, or take it out of the data.'
        )


def list_unreadable(images: List[Unreadable], say: Callable[[str], Any], file: Optional[Path] = None) -> None:
    """Report the images that are left out, the first of them one by one."""
    for image in images[:_TOLD]:
        say(f'skipped  {image}')
    if images:
        where = f'; {file} lists all' if file else ''
        say(f'skipped  {len(images):,} image{"s" if len(images) > 1 else ""} that cannot be read{where}')


def read_unreadable(file: Path) -> Optional[List[Unreadable]]:
    """Read a list of unreadable images, None where there is none.

    Raises:
        DataError: The file cannot be read.
    """
    if not file.exists():
        return None
    try:
        with file.open(newline='', encoding='utf-8') as lines:
            return [Unreadable(**row) for row in csv.DictReader(lines)]
    except (OSError, TypeError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f'{file}: cannot be read ({e}), and says which images the run leaves out.') from e


def write_unreadable(file: Path, images: Iterable[Unreadable]) -> None:
    """Write a list of unreadable images, all at once."""
    with replaced(file) as beside, beside.open('w', newline='', encoding='utf-8') as lines:
        csv.writer(lines).writerows([Unreadable._fields, *images])


class SkippedImages:
    """Notes the unreadable images of a stream where they are met, by a loader's worker as a rule.

    Attributes:
        file: List that each is added to once, see `write_unreadable`; none when None.
    """

    def __init__(self):
        self.file: Optional[Path] = None
        self._known: Set[Tuple[str, str]] = set()

    def note(self, image: Unreadable) -> None:
        """Add an image that is not in the list yet, and tell of it if it is one of the first."""
        if self.file is not None:
            self._known.update((known.split, known.place) for known in read_unreadable(self.file) or [])
        if (image.split, image.place) in self._known:
            return
        self._known.add((image.split, image.place))
        if self.file is not None:
            with self.file.open('a', newline='', encoding='utf-8') as lines:
                csv.writer(lines).writerow(image)
        if len(self._known) <= _TOLD:
            print(f'skipped  {image}', file=sys.stderr, flush=True)
        elif len(self._known) == _TOLD + 1:
            print(f'skipped  more images that cannot be read; {self.file} lists them', file=sys.stderr, flush=True)
