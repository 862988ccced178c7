"""What the labels of a data set mean: classes are told by name, and numbered as the network that meets them does.

A column of labels may hold class labels of the `datasets` library, texts, booleans, or whole numbers, as integers or
floats. All but the numbers are names. Two splits of one data set, or data and a trained network, may list the same
names in different orders; `Classes` gives an image the number that its class has where it is needed.
"""
import unicodedata
from collections import Counter
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import datasets
import numpy as np

from ..errors import DataError, counted

__all__ = ['Classes', 'Key', 'find_classes', 'is_label_feature', 'label_keys', 'match_classes', 'shortened', 'speller']

# What a label says: the name of a class, or a number where there are no names; None where there is no label.
Key = Union[str, int, None]


def shortened(names: Sequence[Any], most: int = 10) -> str:
    """List names for a message, the first ones where there are many.

    Examples:
        >>> shortened(['ant', 'bee', 'cat'], most=2)
        'ant, bee, ... (3)'
    """
    text = ', '.join(map(str, names[:most]))
    return text if len(names) <= most else f'{text}, ... ({len(names)})'


def is_label_feature(feature: Any) -> bool:
    """Return whether a column of this feature may hold labels; vectors may, so that one-hot labels can be refused."""
    if isinstance(feature, datasets.Value):
        return feature.dtype == 'bool' or feature.dtype.startswith(('int', 'uint', 'float', 'string', 'large_string'))
    if isinstance(feature, datasets.ClassLabel):
        return True
    inner = _inner(feature)
    return isinstance(inner, datasets.Value) and inner.dtype.startswith(('int', 'uint', 'float', 'bool'))


def _inner(feature: Any) -> Any:
    """Return what a list feature is a list of, None for any other feature."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, 'feature', None)


def speller(feature: Any, column: str, where: str) -> Callable[[Any], Key]:
    """Return a function that turns a value of a label column into what it says.

    Args:
        feature: The column's feature.
        column: Its name, for messages.
        where: What holds it, for messages.

    Raises:
        DataError: The column holds vectors, such as one-hot labels. The function raises it for fractions.
    """
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        return lambda value: names[value] if value is not None and 0 <= value < len(names) else value
    if not isinstance(feature, datasets.Value):
        raise DataError(
            f'Column {column} of {where} holds a list for each image, as one-hot and multiple labels do. Expected one '
            f'class for each image: its name or its number (for one-hot labels, argmax gives it).'
        )
    if feature.dtype == 'bool':
        return lambda value: None if value is None else str(bool(value))
    if feature.dtype.startswith(('string', 'large_string')):
        return lambda value: value or None

    def whole(value: Any) -> Key:
        if value is None or value != value:  # NaN
            return None
        if value != int(value):
            raise DataError(
                f'Column {column} of {where} holds {value:g}: expected whole numbers, as labels count classes.')
        return int(value)

    return whole


def label_keys(table: datasets.Dataset, column: str, split: str, where: str) -> List[Key]:
    """Return what the label of every image of a split says.

    Raises:
        DataError: The split has no such column, an image has no label, or see `speller`.
    """
    if column not in table.features:
        raise DataError(
            f'The {split} split of {where} has no column {column} for its labels; its columns are: '
            f'{", ".join(table.features)}. Give it labels, or remove the split from the data.'
        )
    spell = speller(table.features[column], column, f'{where} ({split})')
    keys = list(map(spell, table[column][:]))
    missing = next((row for row, key in enumerate(keys) if key is None), None)
    if missing is not None:
        raise DataError(f'There is no label in row {missing} of the {split} split.')
    return keys


class Classes:
    """Numbers that classes have.

    Args:
        names: Names of the classes in the order of their numbers; None where they have none.
        count: How many classes there are; as many as there are names when None.
        owner: Whose classes these are, for messages: `the train split`, `the network`.

    Attributes:
        names: The names.
        count: Their number.
    """

    def __init__(self, names: Optional[Sequence[str]], count: Optional[int] = None, owner: str = 'the train split'):
        self.names = None if names is None else list(names)
        self.count = len(self.names) if count is None else count
        self.owner = owner
        self._numbers = {_plain(name): number for number, name in enumerate(self.names or ())}
        self._numerals = bool(self.names) and all(_is_numeral(name) for name in self.names)

    def number(self, key: Key) -> Optional[int]:
        """Return the number of a class that a label names, or counts where one side has no names; None if unknown."""
        if self.names is None and isinstance(key, str) and _is_numeral(key):
            key = int(key)
        if isinstance(key, str) or self._numerals:
            return self._numbers.get(_plain(str(key)))
        return key if 0 <= key < self.count else None

    def counts(self, key: Key) -> bool:
        """Return whether a label says a number although the classes have names, which it is then taken to count."""
        return isinstance(key, int) and self.names is not None and not self._numerals

    def numbers(self, keys: Sequence[Key], split: str, where: str) -> np.ndarray:
        """Return the number of the class of every image of a split (N,).

        Args:
            keys: What their labels say, see `label_keys`.
            split: Name of the split.
            where: What it belongs to, for messages.

        Raises:
            DataError: Labels name or count classes that are not among these; the message lists them.
        """
        known = {key: self.number(key) for key in dict.fromkeys(keys)}
        unknown = sorted(key for key, number in known.items() if number is None and isinstance(key, str))
        if unknown:
            counts = Counter(keys)
            listed = shortened([f'{name} ({counted(counts[name], "image")})' for name in unknown])
            owned = 'no names of classes' if self.names is None else shortened(self.names)
            raise DataError(
                f'The {split} split of {where} has classes that {self.owner} does not know: {listed}. '
                f'It knows: {owned}.'
            )
        wrong = [row for row, key in enumerate(keys) if known[key] is None]
        if wrong:
            allowed = shortened(self.names) if self._numerals else f'0 to {self.count - 1}'
            raise DataError(
                f'Label {keys[wrong[0]]} in row {wrong[0]} of the {split} split is out of range: expected {allowed} '
                f'({len(wrong)} such rows).'
            )
        return np.array([known[key] for key in keys], dtype=np.int64)


def _plain(name: str) -> str:
    return unicodedata.normalize('NFC', name)  # systems store accents in different ways


def _is_numeral(name: str) -> bool:
    return name.isdecimal() and name.isascii() and name == str(int(name))


def find_classes(
        feature: Any,
        keys: Sequence[Key],
        column: str,
        num_classes: Optional[int] = None,
) -> Tuple[Classes, List[str]]:
    """Find the classes of a data set from the labels of its train split.

    Whole numbers count classes from 0. Where that would leave more classes without an image than with one, as for the
    labels 10, 20 and 30, the numbers are taken for names.

    Args:
        feature: The feature of the column.
        keys: What the labels say.
        column: Its name.
        num_classes: Classes that the network is to have, None where the data decide.

    Returns:
        The classes, and notes on how they were found.
    """
    if isinstance(feature, datasets.ClassLabel):
        unseen = sorted(set(feature.names).difference(keys))
        return Classes(feature.names), ([f'classes without a training image: {shortened(unseen)}'] if unseen else [])
    seen = sorted(set(keys))
    if isinstance(seen[0], str):
        return Classes(['False', 'True'] if feature.dtype == 'bool' else seen), []
    highest = seen[-1]
    spread = highest + 1 > 2 * len(seen) and not (num_classes is not None and highest < num_classes)
    if seen[0] >= 0 and spread:
        note = f'the numbers {shortened(seen)} in column {column} are taken for the names of {len(seen)} classes'
        return Classes(list(map(str, seen))), [note]
    missing = sorted(set(range(highest + 1)).difference(seen))
    notes = []
    if missing == [0]:
        notes = [f'warning: the labels in column {column} run from 1 to {highest}, so class 0 has no training image']
    elif missing:
        notes = [f'warning: classes without a training image: {shortened(missing)}']
    return Classes(None, highest + 1), notes


def match_classes(
        known: Optional[Sequence[str]],
        wanted: Optional[Sequence[str]],
        known_count: int,
        wanted_count: int,
        owner: str,
) -> Optional[List[int]]:
    """Find the classes of one network or data set among those of another network.

    Args:
        known: Names of the network's classes, None where it has none.
        wanted: Names of the classes to find, likewise.
        known_count: How many classes the network has.
        wanted_count: How many are to be found.
        owner: What to call the network in messages.

    Returns:
        For each class wanted its number in the network; None where all have the same numbers.

    Raises:
        DataError: The network does not know some, or, where one side has no names, the counts differ.
    """
    if known is None or wanted is None:
        if known_count != wanted_count:
            raise DataError(
                f'{owner} has {known_count} classes, expected {wanted_count}; they cannot be matched by name, as '
                f'{"it" if known is None else "the data"} names none.'
            )
        return None
    numbers = Classes(known).number
    unknown = [name for name in wanted if numbers(name) is None]
    if unknown:
        raise DataError(f'{owner} does not know the classes {shortened(unknown)}. It knows: {shortened(known)}.')
    found = [numbers(name) for name in wanted]
    return None if found == list(range(known_count)) else found
