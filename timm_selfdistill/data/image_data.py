"""Data sets of labelled images through the `datasets` library."""
import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import DataError, UnreadableImageError
from .columns import choose_columns, with_images
from .data_files import DIGITS, IMAGES, empty_split, find_files, open_files
from .images import decode_image, printable
from .labels import Classes, Key, find_classes, label_keys, shortened
from .source import DataSource

__all__ = ['ImageData', 'ImageSplit', 'classes_for', 'hold_out', 'load_image_data', 'seeded']


class ImageSplit(Dataset):
    """One split of a data set.

    An item is a pair of image tensor (C, H, W) and label. The key is a row, or a pair of epoch and row: then the random
    draws of the transform depend on nothing but seed, epoch and row, not on worker, process or what ran before.

    Args:
        table: Table with an image column.
        name: What to call the split in messages.
        image_column: Its image column.
        labels: Number of the class of every row (N,).
        mode: PIL mode that images are converted to, `RGB` or `L`.

    Attributes:
        index: Rows of the table that belong to the split, all at first.
        transform: Turns a PIL image into a tensor.
        seed: Seed of the transform's random draws.
        checked: Whether the images that cannot be read have been left out.
    """

    def __init__(self, table: datasets.Dataset, name: str, image_column: str, labels: np.ndarray, mode: str = 'RGB'):
        self.name = self.origin = name
        self.image_column = image_column
        # undecoded: so it is known where an image lies
        self.images = table.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        self.mode = mode
        self._labels = np.asarray(labels)
        self.index = np.arange(len(labels))
        self.transform: Optional[Callable] = None
        self.seed = 0
        self.checked = False

    def select(self, index: np.ndarray, name: str) -> 'ImageSplit':
        """Return rows of this split, which messages still call by row and split in the data set."""
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
            UnreadableImageError: It cannot be decoded; the message names its path, if it has one, and its row in the
                data set.
        """
        number = int(self.index[row])
        stored = self.images[number][self.image_column]
        path = stored and stored['path']
        place = f'in row {number} of the {self.origin} split'
        if path:
            place = f'{printable(path)} (row {number} of the {self.origin} split)'
        return decode_image(stored, self.mode, place)

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
    """A data set, its splits and its classes.

    Attributes:
        name: What to call it.
        train: The split to learn from; None where only what a network makes of the others is asked.
        validation: The split to choose by; None where everything is learned from.
        test: The split to report on; None where the data set has none.
        num_classes: Classes in the data, or of the network that the labels were matched with.
        label_names: Their names, where the data or the network give them.
        image_size: Height and width of the first training image.
        mirrored: Whether a mirror image still shows the same class.
        superclasses: Superclass of each class (num_classes,), where the data have them and they were asked for.
        notes: What was found and how, what was left aside and why; sentences for the user.
    """
    name: str
    train: Optional[ImageSplit]
    validation: Optional[ImageSplit]
    test: Optional[ImageSplit]
    num_classes: int
    label_names: Optional[List[str]]
    image_size: Tuple[int, int]
    mirrored: bool = True
    superclasses: Optional[np.ndarray] = None
    notes: List[str] = field(default_factory=list)

    def superclasses_of(self, num_classes: int) -> Optional[torch.Tensor]:
        """Return `superclasses` for a network of more classes (num_classes,): those it alone knows are in none, -1."""
        if self.superclasses is None:
            return None
        return torch.from_numpy(np.pad(self.superclasses, (0, num_classes - self.num_classes), constant_values=-1))

    def splits(self) -> Dict[str, ImageSplit]:
        """Return the splits that exist, by name."""
        parts = dict(train=self.train, validation=self.validation, test=self.test)
        return {name: part for name, part in parts.items() if part is not None}

    def described(self) -> List[str]:
        """Return what was found: splits and classes with their counts, then the notes."""
        counts = [f'{len(p):,} {n}' if hasattr(p, '__len__') else f'some {n}' for n, p in self.splits().items()]
        named = f': {shortened(self.label_names)}' if self.label_names else ', without names'
        classes = f'{self.num_classes} classes{named}' if self.num_classes else 'no labels'
        return [f'{self.name}: {", ".join(counts)} images; {classes}', *self.notes]


def hold_out(split: ImageSplit, fraction: float, name: str = 'validation') -> Tuple[ImageSplit, ImageSplit]:
    """Split off the same images in every run, of every class its share; return what is kept and this.

    Where that leaves a class without an image on one of the sides, every class keeps an image, and those held out are
    drawn from the others.

    Raises:
        DataError: Every class has a single image.
    """
    from sklearn.model_selection import train_test_split

    try:
        kept, held_out = train_test_split(
            np.arange(len(split)), test_size=fraction, stratify=split.labels, random_state=0)
    except ValueError as e:  # a class with a single image, or fewer images held out than classes
        order = np.random.default_rng(0).permutation(len(split))
        _, first = np.unique(split.labels[order], return_index=True)
        spare = np.delete(order, first)
        if not len(spare):
            raise DataError(
                f'Cannot hold out {fraction:g} of the {len(split)} {split.name} images for {name}, as every class has '
                f'a single image. Give the classes more images, or the data a {name} split.'
            ) from e
        held_out = spare[:max(1, round(fraction * len(split)))]
        kept = np.setdiff1d(order, held_out)
    return split.select(np.sort(kept), split.name), split.select(np.sort(held_out), name)


def _superclasses(table: datasets.Dataset, column: str, labels: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    """Find the one superclass of each class (num_classes,) in the training split."""
    integers = [
        c for c, f in table.features.items()
        if isinstance(f, datasets.ClassLabel) or isinstance(f, datasets.Value) and f.dtype.startswith(('int', 'uint'))
    ]
    if column not in integers:
        raise DataError(
            f'`superclass_column={column}`: {name} has no such column of class labels or whole numbers; it has: '
            f'{", ".join(integers) or "none"}.'
        )
    values = np.asarray(table[column][:])
    found = np.full(num_classes, -1)
    for label in range(num_classes):
        of_class = np.unique(values[labels == label])
        if len(of_class) != 1:
            problem = 'lies in several' if len(of_class) else 'has no training image, so its one is unknown'
            raise DataError(f'`superclass_column={column}`: each class needs one superclass, class {label} {problem}.')
        found[label] = of_class[0]
    return found


def first_image(decode: Callable, images: Iterable, skip_unreadable: bool):
    """Decode the first image, or with `skip_unreadable` the first that can be.

    Raises:
        UnreadableImageError: It cannot be decoded, or none can.
    """
    problem = None
    for image in images:
        try:
            return decode(image)
        except UnreadableImageError as e:
            problem = problem or e
            if not skip_unreadable:
                break
    raise problem


def classes_for(
        found: Classes,
        names: Optional[Sequence[str]],
        count: int,
        notes: List[str],
) -> Classes:
    """Return the classes of a network, as labels of data meet them.

    Args:
        found: The classes of the data.
        names: Names of the network's classes, None where it has none.
        count: How many it has.
        notes: What is assumed is added to it.

    Raises:
        DataError: The data name classes and the network does not, and they are not as many.
    """
    if names is not None:
        return Classes(names, count, 'the network')
    if found.names is None or all(name.isdecimal() for name in found.names):
        return Classes(None, count, 'the network')
    if found.count != count:
        raise DataError(
            f'The data name {found.count} classes ({shortened(found.names)}), the network has {count} without names, '
            f'so they cannot be matched.'
        )
    notes.append('the network\'s classes have no names: those of the data are taken in their order')
    return Classes(found.names, count, 'the network')


def load_image_data(source: DataSource = DataSource(), known: bool = False) -> ImageData:
    """Open a data set of labelled images.

    Args:
        source: What to read. With `skip_unreadable` the size of the images is that of the first that can be read;
            `unreadable.leave_out` takes the others out.
        known: The network exists: its classes are `num_classes`, and the data need no train split.

    Raises:
        DataError: No such folder, columns missing or ambiguous, labels that are none or name unknown classes, splits
            missing or empty, a class without one superclass.
        UnreadableImageError: The first image cannot be decoded.

    Examples:
        >>> data = load_image_data(DataSource('digits'))
        >>> {name: len(split) for name, split in data.splits().items()}
        {'train': 1250, 'validation': 183, 'test': 364}
    """
    name, files = source.name, find_files(source.dataset, source.data_dir)
    class_names, num_classes = source.class_names, source.num_classes
    tables = {split: table.with_format(None) for split, table in open_files(files).items()}
    notes = files.notes
    if 'train' not in tables and not known:
        raise DataError(f'{name} has no split named train; its splits are: {", ".join(tables)}.')
    for split, table in tables.items():
        if not len(table):
            raise DataError(empty_split(split, name))
    first = next(iter(tables.values()))
    image_column, label_column = choose_columns(
        first.features, source.image_column, source.label_column, name, notes)
    keys: Dict[str, List[Key]] = {}
    for split, table in list(tables.items()):
        keys[split] = label_keys(table, label_column, split, name)
        if split == 'test' and all(key == -1 for key in keys[split]):
            del tables[split], keys[split]
            notes.append('left aside: the test split, as all of its labels are -1, which stands for withheld')
    if not keys:
        raise DataError(f'{name} has no labels: those of its only split, test, are all -1, which stands for withheld.')
    classes, told = find_classes(
        first.features[label_column], next(iter(keys.values())), label_column, num_classes)
    if known or class_names is not None:
        classes = classes_for(classes, class_names, num_classes or len(class_names), notes)
    else:
        notes += told
        if classes.count < 2:
            raise DataError(
                f'{name} has the single class {(classes.names or [0])[0]}, expected two or more'
                f'{". A class is a folder directly below a split" if files.kind == IMAGES else ""}.'
            )

    def part(split: str) -> Optional[ImageSplit]:
        if split not in tables:
            return None
        labels = classes.numbers(keys[split], split, name)
        if classes.counts(keys[split][0]):
            notes.append(f'the labels of the {split} split have no names and are taken to count the classes from 0')
        table = with_images(tables[split], image_column, split, name)
        return ImageSplit(table, split, image_column, labels, mode='L' if source.in_chans == 1 else 'RGB')

    train, validation, test = part('train'), part('validation'), part('test')
    superclasses = None
    if source.superclass_column is not None:
        if train is None:
            raise DataError(
                f'`superclass_column={source.superclass_column}`: {name} has no train split to find them in.')
        superclasses = _superclasses(tables['train'], source.superclass_column, train.labels, classes.count, name)
    if validation is None and train is not None and source.val_fraction > 0:
        train, validation = hold_out(train, source.val_fraction)
        counts = np.bincount(validation.labels, minlength=classes.count)[np.unique(train.labels)]
        notes.append(
            f'{len(validation):,} images are held out of the train split for validation'
            + (f'; {np.sum(counts == 0)} classes have too few images to be among them' if not counts.all() else '')
        )
    leading = train or validation or test
    width, height = first_image(leading.image, range(len(leading)), source.skip_unreadable).size
    return ImageData(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=classes.count,
        label_names=classes.names,
        image_size=(height, width),
        mirrored=files.kind != DIGITS,
        superclasses=superclasses,
        notes=notes,
    )
