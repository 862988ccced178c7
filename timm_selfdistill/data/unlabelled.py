"""Images without labels: any below a folder."""
import os
from pathlib import Path
from typing import Dict, List

import datasets
import numpy as np

from ..errors import DataError, counted
from .image_data import ImageData, ImageSplit, first_image, hold_out
from .image_folder import is_image, walk
from .source import DataSource
from .split_names import choose_splits

__all__ = ['find_images', 'image_split', 'load_unlabelled_data']


def find_images(folder: Path) -> List[str]:
    """Return the paths of all images below a folder, through links too, sorted.

    Raises:
        DataError: A folder cannot be read, or links go round in circles.
    """
    return sorted(os.path.join(path, name) for path, names in walk(folder) for name in names if is_image(name))


def image_split(paths: List[str], name: str, mode: str = 'RGB') -> ImageSplit:
    """Return files as a split of data, with the label 0 for all of them."""
    table = datasets.Dataset.from_dict(
        dict(image=[os.path.abspath(path) for path in paths]), features=datasets.Features(image=datasets.Image()))
    return ImageSplit(table, name, 'image', np.zeros(len(paths), dtype=int), mode)


def load_unlabelled_data(source: DataSource) -> ImageData:
    """Open the images below a folder as data without labels, for `train.py --unlabelled`.

    Folders directly in it that have the name of a split are this split, and what lies elsewhere is left aside. Without
    such all are the train split. How they lie below that, in class folders or not, means nothing.

    Args:
        source: Where they are, what share of them is held out for validation, and how to read them.

    Raises:
        DataError: There are none, or the folder cannot be read.
    """
    folder = Path(source.data_dir).expanduser()
    if not folder.is_dir():
        problem = 'is a file, expected a folder' if folder.exists() else 'no such folder'
        raise DataError(f'`data_dir={source.data_dir}`: {problem}.')
    found = find_images(folder)
    if not found:
        raise DataError(f'`data_dir={source.data_dir}`: there are no images below it.')
    names, _ = choose_splits(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()), str(folder))
    of_split: Dict[str, List[str]] = {
        split: [path for path in found if Path(path).relative_to(folder).parts[0] == name]
        for split, name in names.items()
    }
    of_split = {split: paths for split, paths in of_split.items() if paths} or dict(train=found)
    notes = ['labels are not read: the exits learn from the deepest one, and are judged by their agreement with it']
    left = len(found) - sum(map(len, of_split.values()))
    if left:
        notes.append(f'left aside: {counted(left, "image")} in no folder with the name of a split')
    if 'train' not in of_split:
        raise DataError(f'{source.name} has no split named train; its splits are: {", ".join(of_split)}.')
    mode = 'L' if source.in_chans == 1 else 'RGB'
    splits = {split: image_split(paths, split, mode) for split, paths in of_split.items()}
    if 'validation' not in splits and source.val_fraction > 0 and len(found) > 1:
        splits['train'], splits['validation'] = hold_out(splits['train'], source.val_fraction)
        notes.append(f'{len(splits["validation"]):,} images are held out of the train split for validation')
    train = splits['train']
    width, height = first_image(train.image, range(len(train)), source.skip_unreadable).size
    return ImageData(
        name=source.name,
        train=train,
        validation=splits.get('validation'),
        test=splits.get('test'),
        num_classes=0,
        label_names=None,
        image_size=(height, width),
        notes=notes,
    )
