"""Finds the splits, classes and files of images that lie in one folder a class.

The rules are those of torchvision's `ImageFolder`, whose finder does the work: a class is a folder directly below a
split and holds every image under it, however deep, through links too; the names of files mean nothing. A split is a
folder of one of the names in `split_names.SPLITS` that holds class folders. Where there is none, the folder itself is
the train split. What is left aside is noted; what cannot be read by these rules is an error that names it.
"""
import os
import re
from collections import Counter
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from ..errors import DataError, counted
from .split_names import allowed_names, choose_splits, split_of

__all__ = ['IMAGE_SUFFIXES', 'is_image', 'read_image_folder', 'walk']

IMAGE_SUFFIXES = frozenset((*ImageFolder.EXTENSIONS, *IMG_EXTENSIONS, '.avif', '.avifs', '.pfm', '.qoi'))


def walk(folder: Path) -> Iterator[Tuple[str, List[str]]]:
    """Yield every folder from `folder` down, through links too, with the names of its files.

    Unlike `os.walk` it does not pass over folders that cannot be read, nor go round in circles.

    Raises:
        DataError: A folder cannot be read, or a link leads back to a folder that holds it.
    """
    waiting = [(str(folder), (os.path.realpath(folder),))]
    while waiting:
        path, above = waiting.pop()
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as e:
            raise DataError(f'{path}: the folder cannot be read: {e.strerror}.') from e
        files = []
        for entry in entries:
            if not entry.is_dir():
                files.append(entry.name)
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if any(_is_above(real, folder) for folder in above):
                raise DataError(f'{entry.path}: the link leads back to {real}, which holds it. Remove the link.')
            waiting.append((entry.path, (*above, real)))
        yield path, files


def _is_above(folder: str, other: str) -> bool:
    return os.path.join(other, '').startswith(os.path.join(folder, ''))


def is_image(name: str) -> bool:
    """Return whether the name of a file ends as those of images do."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _folders(folder: Path) -> List[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _images_in(folder: Path) -> int:
    """Count the images directly in a folder."""
    return sum(is_image(entry.name) and not entry.is_dir() for entry in os.scandir(folder))


def _images_below(folder: Path) -> int:
    return sum(is_image(name) for _, files in walk(folder) for name in files)


def _holds_classes(folder: Path) -> bool:
    return any(_images_below(folder / name) for name in _folders(folder))


def _find_split_folders(folder: Path, notes: List[str]) -> Dict[str, Path]:
    """Find the folder of each split; notes are added of what is none."""
    names = _folders(folder)
    found, others = choose_splits(names, str(folder))
    with_classes = {split: folder / name for split, name in found.items() if _holds_classes(folder / name)}
    holding = {name: count for name in others if (count := _images_below(folder / name))}
    if found and not with_classes:
        name = next(iter(found.values()))
        images = counted(_images_in(folder / name), 'image')
        raise DataError(
            f'{folder / name} has the name of a split, but holds {images} and no class folders '
            f'with images. Expected one folder for each class in it. If {name} is a class itself, put all '
            f'class folders into a folder named train.'
        )
    if not with_classes:
        _check_class_folders(folder, names)
        return dict(train=folder)
    for split, name in found.items():
        if split in with_classes:
            continue
        if not _images_in(folder / name):
            raise DataError(
                f'{folder / name}: the {split} split holds no images. Add class folders with images, or remove it.')
        images = counted(_images_in(folder / name), 'image')
        notes.append(f'left aside: {name}/ holds {images} in no class folder, so without labels')
    notes += [f'left aside: {name}/ ({counted(n, "image")}) is not the name of a split' for name, n in holding.items()]
    return with_classes


def _check_class_folders(folder: Path, names: List[str]) -> None:
    """Check that the folders of a data set without split folders are classes, and not splits or their parents.

    Raises:
        DataError: Some look as if they were splits, or hold the splits.
    """
    for name in names:
        inner = [n for n in _folders(folder / name) if split_of(n) is not None and _images_below(folder / name / n)]
        if inner:
            raise DataError(
                f'{folder / name} holds the splits {", ".join(inner)}. Splits come first and class folders below them: '
                f'pass `data_dir={folder / name}` if these are the splits of one data set, else move them.'
            )
        first_word = re.match(r'[^\W\d_]*', name).group()
        if split_of(first_word) is not None and not _images_in(folder / name) and _holds_classes(folder / name):
            raise DataError(
                f'{folder / name} looks like the {split_of(first_word)} split but is not named so. '
                f'Expected one of the names {allowed_names()}.'
            )


def _read_split(folder: Path, aside: 'Counter[str]', notes: List[str]) -> List[Tuple[str, str]]:
    """Return path and class of every image of a split."""
    def keep(path: str) -> bool:
        if not is_image(path):
            aside[os.path.splitext(path)[1].lower() or 'no ending'] += 1
            return False
        if not os.path.isfile(path):
            notes.append(f'left aside: {path} is {"a broken link" if os.path.islink(path) else "no file"}')
            return False
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(f'{path!r}: the name is not UTF-8. Rename the file, or the folder it lies in.') from None
        return True

    names, numbers = find_classes(folder)
    samples = make_dataset(folder, numbers, is_valid_file=keep, allow_empty=True)
    images = Counter(names[number] for _, number in samples)
    hidden = next((name for name in images if name.startswith('.')), None)
    if hidden is not None:
        raise DataError(
            f'{folder / hidden}: a hidden folder with {counted(images[hidden], "image")} where classes are. Remove or '
            f'rename it.')
    empty = [f'{name}/' for name in names if not images[name]]
    if empty:
        notes.append(f'left aside: {", ".join(empty)} in {folder.name}/: no images, so no class')
    direct = _images_in(folder)
    if direct:
        notes.append(f'left aside: {counted(direct, "image")} directly in {folder.name}/, in no class folder')
    return [(path, names[number]) for path, number in samples]


def read_image_folder(folder: Path) -> Tuple[Dict[str, List[Tuple[str, str]]], List[str]]:
    """Find the images of a data set in one folder a class.

    Args:
        folder: With split folders (`train/cat/1.jpg`), or with class folders alone (`cat/1.jpg`).

    Returns:
        Path and name of the class of every image, by split, sorted by class and path; and notes on what was left aside.

    Raises:
        DataError: The folder cannot be read by the rules at the head of this module; the message names the culprit.
    """
    for _ in walk(folder):  # what cannot be read, and links in circles
        pass
    notes: List[str] = []
    aside: Counter = Counter()
    if not _folders(folder):
        raise DataError(
            f'{folder} holds {counted(_images_in(folder), "image")} and no class folders. Expected one folder for each '
            f'class, as in cat/1.jpg or train/cat/1.jpg.'
        )
    splits = {}
    folders = _find_split_folders(folder, notes)
    for split, where in folders.items():
        splits[split] = _read_split(where, aside, notes)
    if _images_in(folder) and folder not in folders.values():
        notes.append(f'left aside: {counted(_images_in(folder), "image")} directly in {folder.name}/, in no split')
    if not any(splits.values()):
        kinds = ', '.join(f'{suffix} {count}' for suffix, count in sorted(aside.items())) or 'none'
        raise DataError(f'{folder} holds no images in class folders; files found by their ending: {kinds}.')
    if aside:
        kinds = ', '.join(f'{suffix} {count}' for suffix, count in sorted(aside.items()))
        notes.append(f'left aside as no images by their ending: {counted(sum(aside.values()), "file")} ({kinds})')
    return splits, notes
