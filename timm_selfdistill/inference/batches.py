"""Images and labels, whatever form a loader gives them in."""
import hashlib
from reprlib import repr as shortened
from typing import Any, List, Mapping, Tuple

import numpy as np
import torch

__all__ = ['check_images', 'check_targets', 'digests', 'read_batch', 'read_images']

# What people call images and labels in batches that are dicts.
_IMAGES = ('pixel_values', 'image', 'images', 'img')

_LABELS = ('labels', 'label', 'targets', 'target')


def read_batch(batch: Any, num_classes: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Read images and labels from what a loader gives.

    Args:
        batch: Images and labels as a tuple or a list, or as a dict such as those of Hugging Face's data sets. Labels
            are whole numbers (N,) of any type, or one-hot (N, num_classes); both may be NumPy's.
        num_classes: Classes of the network.

    Returns:
        The images as they are, and labels (N,), int64.

    Raises:
        ValueError: The batch holds something else, or labels that the network does not know.
    """
    if isinstance(batch, Mapping):
        found = [[name for name in names if name in batch] for names in (_IMAGES, _LABELS)]
        if list(map(len, found)) != [1, 1]:
            raise ValueError(
                f'A batch with the keys {", ".join(map(repr, batch))}: expected one of {", ".join(_IMAGES)} and one of '
                f'{", ".join(_LABELS)}, or a pair of images and labels.'
            )
        batch = [batch[name] for name, in found]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''
        raise ValueError(f'A batch is a {type(batch).__name__}{count}: expected images and labels, or a dict of both.')
    images, labels = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch)
    if not isinstance(images, torch.Tensor):
        raise ValueError(f'Images in a {type(images).__name__}: expected a tensor (N, C, H, W).')
    try:
        target = torch.as_tensor(labels).double()  # which holds any class, and compares where uint16 does not
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'Labels {shortened(labels)}: expected whole numbers (N,): {error}') from error
    if target.shape == (len(images), num_classes) and num_classes > 1:
        if not (((target == 0) | (target == 1)).all() and (target.sum(1) == 1).all()):
            raise ValueError(
                f'Labels of shape {tuple(target.shape)} that are not one-hot: a calibration needs the one class of '
                f'each image. Give whole numbers (N,), and leave out Mixup and label smoothing.'
            )
        target = target.argmax(1)
    if target.shape != (len(images),):
        raise ValueError(
            f'{len(images)} images with labels of shape {tuple(target.shape)}: expected one label each, '
            f'({len(images)},), or one-hot, ({len(images)}, {num_classes}).'
        )
    odd = target[target != target.floor()]
    if len(odd):
        raise ValueError(f'Label {odd[0].item()!r}: expected whole numbers from 0 to {num_classes - 1}.')
    check_targets(target.long(), num_classes)
    return images, target.long()


def read_images(batch: Any) -> torch.Tensor:
    """Read the images (N, C, H, W) of a batch whose labels, if it has any, do not matter.

    Args:
        batch: A tensor of images, or anything that `read_batch` takes, with labels or without.

    Raises:
        ValueError: The batch holds something else.
    """
    if isinstance(batch, Mapping):
        found = [name for name in _IMAGES if name in batch]
        if len(found) != 1:
            keys = ', '.join(map(repr, batch))
            raise ValueError(f'A batch with the keys {keys}: expected one of {", ".join(_IMAGES)}.')
        batch = batch[found[0]]
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        batch = batch[0]
    images = torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch
    if not isinstance(images, torch.Tensor):
        raise ValueError(f'A batch is a {type(images).__name__}: expected images, a tensor (N, C, H, W).')
    return images


def check_targets(target: torch.Tensor, num_classes: int) -> None:
    """Check labels (N,) against the classes of a network.

    Raises:
        ValueError: There are none, or the network does not know one of them.
    """
    if not len(target):
        raise ValueError('There are no images.')
    wrong = target[(target < 0) | (target >= num_classes)]
    if len(wrong):
        raise ValueError(f'Label {wrong[0].item()} is unknown to the network, which has the classes 0 to '
                         f'{num_classes - 1} ({len(wrong)} such images).')


def check_images(images: torch.Tensor) -> torch.Tensor:
    """Return images if they are a floating point tensor (N, C, H, W) of one or more; raise ValueError otherwise."""
    if images.ndim != 4 or not len(images):
        raise ValueError(f'images of shape {tuple(images.shape)}: expected (N, C, H, W) with one image or more.')
    if not images.is_floating_point():
        raise ValueError(
            f'images of {images.dtype}: expected floating point, as timm.data.create_transform() makes them.')
    return images


def digests(images: torch.Tensor) -> List[bytes]:
    """Return a hash of the pixels of each image."""
    pixels = images.detach().cpu().float().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
