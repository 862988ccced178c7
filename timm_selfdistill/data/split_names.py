"""Which split of a data set a name means; the same names for folders, files, saved data sets and the Hub."""
import re
from typing import Dict, Iterable, List, Optional, Set, Tuple

from ..errors import DataError

__all__ = ['SPLITS', 'allowed_names', 'choose_splits', 'split_of', 'splits_in']

# The names that people give the splits, whatever their case.
SPLITS = dict(
    train=('train', 'training'),
    validation=('val', 'valid', 'validation', 'dev', 'eval'),
    test=('test', 'testing'),
)
_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}


def split_of(name: str) -> Optional[str]:
    """Return `train`, `validation` or `test` if the whole name means that split, else None.

    Examples:
        >>> split_of('Training'), split_of('dev'), split_of('train_old')
        ('train', 'validation', None)
    """
    return _SPLIT_OF.get(name.casefold())


def splits_in(name: str) -> Set[str]:
    """Return the splits that words of a file's name mean.

    Examples:
        >>> splits_in('Test-00000-of-00001.parquet'), splits_in('latest.parquet')
        ({'test'}, set())
    """
    return {split for split in map(split_of, re.split(r'[\W\d_]+', name)) if split is not None}


def allowed_names() -> str:
    """Return the names of the splits for a message."""
    return '; '.join(f'{split}: {", ".join(names)}' for split, names in SPLITS.items())


def choose_splits(names: Iterable[str], where: str) -> Tuple[Dict[str, str], List[str]]:
    """Choose which of some names are splits.

    Args:
        names: The names found.
        where: What holds them, for messages.

    Returns:
        The name found of each split, in the order train, validation, test; and the names that mean none.

    Raises:
        DataError: Two names mean the same split.
    """
    names = list(names)
    found: Dict[str, str] = {}
    for split in SPLITS:
        same = [name for name in names if split_of(name) == split]
        if len(same) > 1:
            raise DataError(
                f'{where}: {" and ".join(same)} both mean the {split} split. Keep one of them, or rename the other.')
        if same:
            found[split] = same[0]
    return found, [name for name in names if split_of(name) is None]
