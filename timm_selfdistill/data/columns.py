"""Which columns of a data set hold the images and the labels."""
from typing import Any, List, Optional, Tuple

import datasets

from ..errors import DataError
from .labels import is_label_feature

__all__ = ['choose_columns', 'is_image_feature', 'with_images']

# Of several columns that may hold labels, the one of such a name does.
_LABEL_NAMES = ('label', 'labels', 'class', 'target', 'category')


def is_image_feature(feature: Any) -> bool:
    """Return whether a column of this feature may hold encoded images: marked so, or bytes, alone or with a path."""
    if isinstance(feature, dict):
        feature = feature.get('bytes')
    return isinstance(feature, datasets.Image) or isinstance(feature, datasets.Value) and 'binary' in feature.dtype


def with_images(table: datasets.Dataset, column: str, split: str, where: str) -> datasets.Dataset:
    """Return a table whose bytes are read as images.

    Raises:
        DataError: It has no such column, or no images in it.
    """
    if column not in table.features:
        raise DataError(
            f'The {split} split of {where} has no column {column} for its images; its columns are: '
            f'{", ".join(table.features)}.'
        )
    if isinstance(table.features[column], datasets.Image):
        return table
    try:
        return table.cast_column(column, datasets.Image())
    except (TypeError, ValueError) as e:
        reason = ' '.join(str(e).split())
        raise DataError(f'Column {column} of the {split} split of {where} holds no images: {reason}') from e


def _choose(kind: str, candidates: List[str], columns: List[str], chosen: Optional[str], name: str) -> str:
    """Choose the column of one kind (image or label), or say which there are and how to choose."""
    setting = f'{kind}_column'
    if chosen is not None:
        if chosen not in candidates:
            raise DataError(
                f'`{setting}={chosen}`: {name} has no {kind} column of that name; '
                f'its {kind} columns are: {", ".join(candidates) or "none"} (all columns: {", ".join(columns)}).'
            )
        return chosen
    if not candidates:
        wanted = 'images' if kind == 'image' else 'class labels, whole numbers or texts'
        raise DataError(f'{name} has no {kind} column, which holds {wanted}; its columns are: {", ".join(columns)}.')
    if len(candidates) > 1:
        raise DataError(
            f'{name} has several {kind} columns: {", ".join(candidates)}. Pick one, for example '
            f'`{setting}={candidates[0]}`.'
        )
    return candidates[0]


def choose_columns(
        features: datasets.Features,
        image_column: Optional[str],
        label_column: Optional[str],
        name: str,
        notes: List[str],
) -> Tuple[str, str]:
    """Choose the columns of images and labels by their features, or take those that were named.

    Columns marked as images and class labels come before all others. Of several others that may hold labels the one
    with a name such as `label` does, which is noted.

    Raises:
        DataError: There is none, there are several, or there is none of the name asked for.
    """
    columns = list(features)
    images = [c for c in columns if isinstance(features[c], datasets.Image)]
    if not images or image_column is not None:
        images += [c for c in columns if c not in images and is_image_feature(features[c])]
    image = _choose('image', images, columns, image_column, name)
    labels = [c for c in columns if isinstance(features[c], datasets.ClassLabel)]
    if not labels or label_column is not None:
        labels += [c for c in columns if c not in labels and is_label_feature(features[c])]
        usual = [c for c in labels if c.casefold() in _LABEL_NAMES]
        if label_column is None and len(labels) > 1 and len(usual) == 1:
            others = ', '.join(c for c in labels if c not in usual)
            notes.append(f'labels are read from column {usual[0]}, not from {others}')
            labels = usual
    return image, _choose('label', labels, columns, label_column, name)
