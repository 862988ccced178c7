"""Opens the files of a data set as tables, one a split, or finds them for a stream.

What lies in a folder is told in this order: a data set that the `datasets` library saved; images with its metadata
file; parquet files; arrow files; images in one folder a class. Splits are told by name, see `split_names`.
"""
import glob
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import datasets
import pyarrow.parquet as pq

from ..config import DIGITS
from ..errors import DataError, counted
from .image_folder import IMAGE_SUFFIXES, read_image_folder, walk
from .labels import shortened
from .split_names import SPLITS, choose_splits, split_of, splits_in

__all__ = [
    'IMAGES', 'SAVED', 'Files', 'check_tables', 'empty_split', 'find_files', 'load_digits', 'name_splits',
    'open_files', 'reason_of',
]

IMAGES, SAVED = 'imagefolder', 'saved data set'
_TABLES = ('parquet', 'arrow')
_METADATA = ('metadata.csv', 'metadata.jsonl', 'metadata.parquet')


@dataclass
class Files:
    """Where the splits of a data set lie.

    Attributes:
        kind: `digits`, `imagefolder`, `saved data set`, or what `datasets.load_dataset` takes as its first argument.
        data_dir: The folder, None where there is none.
        data_files: Files of each split; None where `kind` alone tells.
        notes: What was left aside and why.
    """
    kind: str
    data_dir: Optional[str]
    data_files: Optional[Dict[str, List[str]]] = None
    notes: List[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """What to call it in messages."""
        if self.data_dir is None:
            return f'`dataset={self.kind}`'
        return f'`data_dir={self.data_dir}` (read as {self.kind})'

    def arguments(self) -> List[Dict[str, Any]]:
        """Return the arguments of `datasets.load_dataset` and of `datasets.load_dataset_builder` that open the splits.

        Each split that has files is opened by itself: opened together all would get the features of the first one, and
        with them its names of the classes, whatever their own order.
        """
        if self.data_files is None:
            return [dict(path=self.kind, data_dir=self.data_dir)]
        more = dict(drop_labels=True) if self.kind == IMAGES else {}
        return [
            dict(path=self.kind, data_files={split: [glob.escape(file) for file in files]}, **more)
            for split, files in self.data_files.items()
        ]


def find_files(dataset: Optional[str], data_dir: Optional[str]) -> Files:
    """Find out what a data set is and where its splits lie; images in class folders are found when they are opened.

    Args:
        dataset: See `data.load_image_data`.
        data_dir: Likewise.

    Raises:
        DataError: The folder does not exist or cannot be read, or files do not tell their split.
    """
    if data_dir is None:
        return Files(DIGITS if dataset is None else dataset, None)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        problem = 'is a file, expected a folder' if folder.exists() else 'no such folder'
        raise DataError(f'`data_dir={data_dir}`: {problem}.')
    data_dir = str(folder)
    if dataset not in (None, IMAGES, *_TABLES):
        return Files(dataset, data_dir)
    if dataset is None and any((folder / name).exists() for name in ('dataset_dict.json', 'state.json')):
        return Files(SAVED, data_dir)
    found = [(path, name) for path, names in walk(folder) for name in names if not name.startswith('.')]
    if dataset in (None, IMAGES) and any(name in _METADATA for _, name in found):
        return _sorted_by_split(IMAGES, folder, [
            (path, name) for path, name in found if name in _METADATA or Path(name).suffix.lower() in IMAGE_SUFFIXES])
    suffixes = Counter(Path(name).suffix.lower() for _, name in found)
    kind = dataset or next((kind for kind in _TABLES if suffixes[f'.{kind}']), IMAGES)
    if kind == IMAGES:
        return Files(IMAGES, data_dir)
    files = _sorted_by_split(kind, folder, [pair for pair in found if Path(pair[1]).suffix.lower() == f'.{kind}'])
    images = sum(suffixes[suffix] for suffix in IMAGE_SUFFIXES)
    if images:
        files.notes.append(f'left aside: {counted(images, "image file")}, since there are {kind} files')
    return files


def _sorted_by_split(kind: str, folder: Path, found: List[Tuple[str, str]]) -> Files:
    """Sort files by split: that of the folders that each lies in, else that of a word of its name."""
    named: Dict[Optional[str], List[str]] = {}
    spelt: Dict[str, str] = {}
    for path, name in found:
        inner = Path(path).relative_to(folder).parts
        folders = [part for part in inner if split_of(part) is not None]
        splits = {split_of(folders[0])} if folders else set() if kind == IMAGES else splits_in(Path(name).stem)
        if len(splits) > 1:
            raise DataError(
                f'{Path(path, name)}: the name means the splits {" and ".join(sorted(splits))}. Rename the file.')
        split = next(iter(splits), None)
        if folders and spelt.setdefault(split, folders[0]) != folders[0]:
            choose_splits((spelt[split], folders[0]), str(folder))
        named.setdefault(split, []).append(str(Path(path, name)))
    if None in named and len(named) == 1:
        named = dict(train=named[None])
    left = named.pop(None, [])
    notes = [f'left aside, as no split is in their names: {shortened([Path(p).name for p in left], 3)}'] if left else []
    return Files(kind, str(folder), {split: sorted(named[split]) for split in SPLITS if split in named}, notes)


def reason_of(error: BaseException) -> str:
    """Return what went wrong in one line; an error of the `datasets` library that only says it failed has a cause."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        error = error.__cause__ or error
    if isinstance(error, OSError) and error.strerror:
        return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    return ' '.join(str(error).split()) or type(error).__name__


def load_digits() -> datasets.DatasetDict:
    """Return scikit-learn's digits: 1,797 scans of handwritten digits, 8×8 pixels in 17 grey levels.

    They come inside scikit-learn's wheel. Of every ten images of a class, in the file's order, seven are for training,
    one for validation and two for the test.
    """
    import numpy as np
    from sklearn.datasets import load_digits as load

    bunch = load()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    rank = np.zeros(len(bunch.target), dtype=int)
    for label in range(10):
        of_class = bunch.target == label
        rank[of_class] = np.arange(of_class.sum())
    part = np.select([rank % 5 == 0, rank % 10 == 1], ['test', 'validation'], 'train')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    return datasets.DatasetDict({
        name: datasets.Dataset.from_dict(
            dict(image=list(pixels[part == name]), label=bunch.target[part == name].tolist()), features=features)
        for name in SPLITS
    })


def _image_tables(files: Files) -> Dict[str, datasets.Dataset]:
    """Make a table of every split of images in class folders: their paths, and the names of their folders."""
    splits, notes = read_image_folder(Path(files.data_dir))
    files.notes += notes
    tables = {}
    for split, samples in splits.items():
        names = sorted({name for _, name in samples})
        numbers = {name: number for number, name in enumerate(names)}
        tables[split] = datasets.Dataset.from_dict(
            dict(image=[os.path.abspath(path) for path, _ in samples], label=[numbers[name] for _, name in samples]),
            features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names)),
        )
    return tables


def open_files(files: Files) -> Dict[str, datasets.Dataset]:
    """Open a data set as tables, by split, in the order train, validation, test.

    Args:
        files: What `find_files` returned; notes are added to it of splits that are left aside.

    Raises:
        DataError: It cannot be read, or two of its splits are the same one.
    """
    try:
        if files.kind == DIGITS:
            return dict(load_digits())
        if files.kind == IMAGES and files.data_files is None and files.data_dir is not None:
            return _image_tables(files)
        if files.kind == SAVED:
            return name_splits(_load_saved(Path(files.data_dir)), files)
        check_tables(files)
        opened: Dict[str, datasets.Dataset] = {}
        for arguments in files.arguments():
            opened.update(datasets.load_dataset(**arguments))
    except DataError:
        raise
    except (ConnectionError, OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as e:
        raise DataError(f'{files.place}: {reason_of(e)}') from e
    return name_splits(opened, files)


def _load_saved(folder: Path) -> Dict[str, datasets.Dataset]:
    """Load a data set, or a single split, that the `datasets` library saved."""
    about = folder / 'dataset_dict.json'
    names = json.loads(about.read_text(encoding='utf-8'))['splits'] if about.exists() else None
    folders = dict(train=folder) if names is None else {name: folder / name for name in names}
    for name, saved in folders.items():
        if not json.loads((saved / 'state.json').read_text(encoding='utf-8'))['_data_files']:
            raise DataError(empty_split(name, str(folder)))
    return {name: datasets.load_from_disk(str(saved)) for name, saved in folders.items()}


def check_tables(files: Files) -> None:
    """Check that the parquet files of a split have rows and agree on what their columns hold.

    Raises:
        DataError: They do not.
    """
    if files.kind != 'parquet' or files.data_files is None:
        return
    for split, paths in files.data_files.items():
        if not sum(pq.read_metadata(path).num_rows for path in paths):
            raise DataError(empty_split(split, files.data_dir))
        features = [datasets.Features.from_arrow_schema(pq.read_schema(path)) for path in paths]
        other = next((i for i, own in enumerate(features) if own != features[0]), None)
        if other is not None:
            columns = [c for c in features[other] if features[other][c] != features[0].get(c)] or [*features[0]]
            raise DataError(
                f'{paths[other]} and {paths[0]} are both of the {split} split, but do not agree on what their columns '
                f'hold: {shortened(columns)}. Columns and names of classes have to be the same in all files of a split.'
            )


def empty_split(split: str, where: str) -> str:
    """Return what to say of a split without images."""
    return f'The {split} split of {where} is empty. Give it images, or remove it from the data.'


def name_splits(opened: Dict[str, Any], files: Files) -> Dict[str, Any]:
    """Call splits by the names used here; notes are added of those that are none.

    Raises:
        DataError: Two mean the same split, or none means any.
    """
    found, others = choose_splits(opened, files.place)
    if not found:
        raise DataError(
            f'{files.place} has no part named train, validation or test; its parts are: {", ".join(opened)}.')
    if others:
        files.notes.append(f'left aside: {shortened(others)}, not the names of splits')
    return {split: opened[name] for split, name in found.items()}
