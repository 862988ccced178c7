"""Data sets of labelled images through the `datasets` library."""
import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .publishing import place_name

__all__ = [
    'DIGITS', 'DataError', 'ImageData', 'ImageSplit', 'UnreadableImageError', 'data_name', 'load_digits',
    'load_image_data', 'seeded',
]

DIGITS = 'digits'
VALIDATION_NAMES = ('validation', 'valid', 'val', 'dev')


class DataError(ValueError):
    """The data cannot be used as they are; the message says what, where and what to do."""


class UnreadableImageError(DataError):
    """An image cannot be decoded."""

    local = True  # of several processes only the one that came upon it knows


class ImageSplit(Dataset):
    """One part of a data set.

    An item is a pair of image tensor (C, H, W) and label. The key is a row, or a pair of epoch and row: then the random
    draws of the transform depend on nothing but seed, epoch and row, not on worker, process or what ran before.

    Args:
        table: Table with an image and a label column.
        name: What to call the part in messages.
        image_column: Its image column.
        label_column: Its label column.
        mode: PIL mode that images are converted to, `RGB` or `L`.

    Attributes:
        index: Rows of the table that belong to the part, all at first.
        transform: Turns a PIL image into a tensor.
        seed: Seed of the transform's random draws.

    Raises:
        DataError: A row has no label.
    """

    def __init__(self, table: datasets.Dataset, name: str, image_column: str, label_column: str, mode: str = 'RGB'):
        self.name = self.origin = name
        self.image_column = image_column
        self.images = table.select_columns(image_column)
        self.mode = mode
        labels = table[label_column][:]
        missing = next((i for i, label in enumerate(labels) if label is None), None)
        if missing is not None:
            raise DataError(f'There is no label in row {missing} of the {name} part.')
        self._labels = np.asarray(labels)
        self.index = np.arange(len(labels))
        self.transform: Optional[Callable] = None
        self.seed = 0

    def select(self, index: np.ndarray, name: str) -> 'ImageSplit':
        """Return a part of this part, which messages still call by its row and part in the data set."""
        part = copy.copy(self)
        part.index, part.name = self.index[index], name
        return part

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray:
        """Labels (len(self),)."""
        return self._labels[self.index]

    def image(self, row: int):
        """Decode one image.

        Raises:
            UnreadableImageError: It cannot be decoded; the message names its row in the data set.
        """
        place = int(self.index[row])
        try:
            image = self.images[place][self.image_column]
        except (OSError, SyntaxError, ValueError) as e:
            raise UnreadableImageError(
                f'Cannot read the image in row {place} of the {self.origin} part: {e}') from e
        if image is None:
            raise UnreadableImageError(f'There is no image in row {place} of the {self.origin} part.')
        return image.convert(self.mode)

    def __getitem__(self, key: Union[int, Tuple[int, int]]) -> Tuple[torch.Tensor, int]:
        epoch, row = key if isinstance(key, tuple) else (None, key)
        image, label = self.image(row), int(self._labels[self.index[row]])
        if epoch is None:
            return self.transform(image), label
        with seeded(self.seed, epoch, row):
            return self.transform(image), label


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the generators that image transforms draw from, and put them back afterwards."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed would queue work for every GPU
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_state)


@dataclass
class ImageData:
    """A data set, its parts and its classes.

    Attributes:
        name: What to call it.
        train: The part to learn from.
        validation: The part to choose by; None where everything is learned from.
        test: The part to report on; None where the data set has none.
        num_classes: Classes in the data.
        label_names: Their names, where the data give them.
        image_size: Height and width of the first training image.
        mirrored: Whether a mirror image still shows the same class.
        superclasses: Superclass of each class (num_classes,), where the data have them and they were asked for.
    """
    name: str
    train: ImageSplit
    validation: Optional[ImageSplit]
    test: Optional[ImageSplit]
    num_classes: int
    label_names: Optional[List[str]]
    image_size: Tuple[int, int]
    mirrored: bool = True
    superclasses: Optional[np.ndarray] = None

    def superclasses_of(self, num_classes: int) -> Optional[torch.Tensor]:
        """Return `superclasses` for a network of more classes (num_classes,): those it alone knows are in none, -1."""
        if self.superclasses is None:
            return None
        return torch.from_numpy(np.pad(self.superclasses, (0, num_classes - self.num_classes), constant_values=-1))

    def parts(self) -> Dict[str, ImageSplit]:
        """Return the parts that exist, by name."""
        parts = dict(train=self.train, validation=self.validation, test=self.test)
        return {name: part for name, part in parts.items() if part is not None}


def load_digits() -> datasets.DatasetDict:
    """Return scikit-learn's digits: 1,797 scans of handwritten digits, 8×8 pixels in 17 grey levels.

    They come inside scikit-learn's wheel. Of every ten images of a class, in the file's order, seven are for training,
    one for validation and two for the test.
    """
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
        for name in ('train', 'validation', 'test')
    })


def _open(dataset: Optional[str], data_dir: Optional[str]) -> datasets.DatasetDict:
    if data_dir is None and dataset in (None, DIGITS):
        return load_digits()
    folder = Path(data_dir) if data_dir is not None else None
    if folder is not None and not folder.is_dir():
        raise DataError(f'--data-dir {data_dir}: no such folder.')
    if dataset is None:
        if (folder / 'dataset_dict.json').exists() or (folder / 'state.json').exists():
            return _as_dict(datasets.load_from_disk(data_dir))
        kinds = {p.suffix.lower() for p in folder.rglob('*') if p.is_file()}
        dataset = next((kind for kind in ('parquet', 'arrow') if f'.{kind}' in kinds), 'imagefolder')
    try:
        return _as_dict(datasets.load_dataset(dataset, data_dir=data_dir))
    except (ConnectionError, FileNotFoundError, ValueError) as e:
        reason = e
    except datasets.exceptions.DatasetGenerationError as e:  # it only says that it failed, its cause says why
        reason = e.__cause__ or e
    place = f'--dataset {dataset}' if data_dir is None else f'--data-dir {data_dir} (read as {dataset})'
    raise DataError(f'{place}: {reason}') from reason


def _as_dict(opened: Any) -> datasets.DatasetDict:
    return opened if isinstance(opened, dict) else datasets.DatasetDict(train=opened)


def _pick_column(kind: str, candidates: List[str], columns: List[str], chosen: Optional[str], name: str) -> str:
    """Find the column of one kind (image or label), or say which there are and how to choose."""
    option = f'--{kind}-column'
    if chosen is not None:
        if chosen not in candidates:
            raise DataError(
                f'{option} {chosen}: {name} has no {kind} column of that name; '
                f'its {kind} columns are: {", ".join(candidates) or "none"} (all columns: {", ".join(columns)}).'
            )
        return chosen
    if not candidates:
        wanted = 'images' if kind == 'image' else 'class labels or whole numbers'
        raise DataError(f'{name} has no {kind} column, which holds {wanted}; its columns are: {", ".join(columns)}.')
    if len(candidates) > 1:
        raise DataError(
            f'{name} has several {kind} columns: {", ".join(candidates)}. Pick one, for example '
            f'{option} {candidates[0]}.'
        )
    return candidates[0]


def _pick_columns(
        features: datasets.Features,
        image_column: Optional[str],
        label_column: Optional[str],
        name: str,
) -> Tuple[str, str]:
    columns = list(features)
    images = [c for c in columns if isinstance(features[c], datasets.Image)]
    labels = [c for c in columns if isinstance(features[c], datasets.ClassLabel)]
    integers = [
        c for c in columns if isinstance(features[c], datasets.Value) and features[c].dtype.startswith(('int', 'uint'))
    ]
    if label_column is not None:
        labels = labels + integers
    image = _pick_column('image', images, columns, image_column, name)
    return image, _pick_column('label', labels or integers, columns, label_column, name)


def _hold_out(split: ImageSplit, fraction: float) -> Tuple[ImageSplit, ImageSplit]:
    """Split off the same part of the training data in every run, of every class its share."""
    from sklearn.model_selection import train_test_split

    try:
        kept, held_out = train_test_split(
            np.arange(len(split)), test_size=fraction, stratify=split.labels, random_state=0)
    except ValueError as e:  # a class with a single image, or fewer images than classes
        raise DataError(
            f'Cannot hold out {fraction:g} of {len(split)} training images for validation: {e} '
            f'Give the data a validation part, or pass --val-fraction 0.'
        ) from e
    return split.select(np.sort(kept), 'train'), split.select(np.sort(held_out), 'validation')


def _check_labels(split: ImageSplit, num_classes: int) -> None:
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(wrong):
        raise DataError(
            f'Label {split.labels[wrong[0]]} in row {wrong[0]} of the {split.name} part is out of range: '
            f'expected 0 to {num_classes - 1} ({len(wrong)} such rows).'
        )


def _superclasses(table: datasets.Dataset, column: str, labels: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    """Find the one superclass of each class (num_classes,) in the training part."""
    integers = [
        c for c, f in table.features.items()
        if isinstance(f, datasets.ClassLabel) or isinstance(f, datasets.Value) and f.dtype.startswith(('int', 'uint'))
    ]
    if column not in integers:
        raise DataError(
            f'--superclass-column {column}: {name} has no such column of class labels or whole numbers; it has: '
            f'{", ".join(integers) or "none"}.'
        )
    values = np.asarray(table[column][:])
    found = np.full(num_classes, -1)
    for label in range(num_classes):
        of_class = np.unique(values[labels == label])
        if len(of_class) != 1:
            problem = 'lies in several' if len(of_class) else 'has no training image, so its one is unknown'
            raise DataError(f'--superclass-column {column}: each class needs one superclass, class {label} {problem}.')
        found[label] = of_class[0]
    return found


def data_name(dataset: Optional[str], data_dir: Optional[str]) -> str:
    """Return what data opened with these settings are called."""
    place = dataset or data_dir
    return place_name(place, hub_id=place == dataset) if place else DIGITS


def load_image_data(
        dataset: Optional[str] = None,
        data_dir: Optional[str] = None,
        image_column: Optional[str] = None,
        label_column: Optional[str] = None,
        val_fraction: float = 0.1,
        in_chans: int = 3,
        superclass_column: Optional[str] = None,
) -> ImageData:
    """Open a data set of labelled images.

    Args:
        dataset: `digits`, a Hugging Face Hub id, or a loader of the `datasets` library such as `imagefolder`. Found
            out from the files when None and `data_dir` is given, else `digits`.
        data_dir: Local folder with parquet or arrow files, a saved data set, or images in one folder a class.
        image_column: Which column holds the images; read from the features when None.
        label_column: Which column holds the labels; read from the features when None.
        val_fraction: Part of the training data held out for validation where the data set has no such part; 0 holds
            out nothing.
        in_chans: Channels that images are converted to: 3, colour, or 1, grey.
        superclass_column: Which column holds the superclass of the label; None where none is needed.

    Raises:
        DataError: No such folder, columns missing or ambiguous, labels out of range, no training part, a class without
            one superclass.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f'--val-fraction {val_fraction}: expected 0 or more and less than 1.')
    name = data_name(dataset, data_dir)
    opened = _open(dataset, data_dir)
    if 'train' not in opened:
        raise DataError(f'{name} has no part named train; its parts are: {", ".join(opened)}.')
    features = opened['train'].features
    image_column, label_column = _pick_columns(features, image_column, label_column, name)

    def part(*names: str) -> Optional[ImageSplit]:
        found = next((n for n in names if n in opened), None)
        if found is None:
            return None
        return ImageSplit(opened[found], found, image_column, label_column, mode='L' if in_chans == 1 else 'RGB')

    train, validation, test = part('train'), part(*VALIDATION_NAMES), part('test')
    if test is not None and len(test) and (test.labels == -1).all():
        test = None  # how the Hub marks a part whose labels are withheld
    if not len(train):
        raise DataError(f'The train part of {name} is empty.')
    feature = features[label_column]
    label_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    num_classes = len(label_names) if label_names else int(np.max(train.labels)) + 1
    for split in (train, validation, test):
        if split is not None:
            _check_labels(split, num_classes)
    superclasses = None
    if superclass_column is not None:
        superclasses = _superclasses(opened['train'], superclass_column, train.labels, num_classes, name)
    if validation is None and val_fraction > 0:
        train, validation = _hold_out(train, val_fraction)
    width, height = train.image(0).size
    return ImageData(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        label_names=label_names,
        image_size=(height, width),
        mirrored=not (dataset in (None, DIGITS) and data_dir is None),
        superclasses=superclasses,
    )
