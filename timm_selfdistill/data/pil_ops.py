"""Operations of PIL on batches of pixels on a device: affine maps, tables of grey levels, and blends.

Policies such as RandAugment are defined by what PIL does to an image, down to its rounding. Each operation here takes
uint8 pixels (B, H, W, C) and gives what PIL gives, whatever the device. timm's operations are first turned into steps:
`affine` with six coefficients, `look_up` with the row of a table, or the name of a blend with its factor.
"""
import math
from typing import Tuple

import numpy as np
import torch
from torchvision.transforms.v2 import functional

__all__ = ['BLENDS', 'OPERATIONS', 'TABLES', 'WHOLE', 'Step', 'as_step', 'blend', 'transform_affine']

Step = Tuple[str, Tuple[float, ...]]  # an operation and its arguments


def _rotation(degrees: float, height: int, width: int) -> Tuple[float, ...]:
    """Return the coefficients that PIL's `Image.rotate` computes."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    y, x = height / 2, width / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# From an argument and the size to (a, b, c, d, e, f): the pixel at x, y is taken from ax + by + c, dx + ey + f.
_AFFINE = dict(
    rotate=_rotation,
    shear_x=lambda v, height, width: (1, v, 0, 0, 1, 0),
    shear_y=lambda v, height, width: (1, 0, 0, v, 1, 0),
    translate_x_abs=lambda v, height, width: (1, 0, v, 0, 1, 0),
    translate_y_abs=lambda v, height, width: (1, 0, 0, 0, 1, v),
    translate_x_rel=lambda v, height, width: (1, 0, v * width, 0, 1, 0),
    translate_y_rel=lambda v, height, width: (1, 0, 0, 0, 1, v * height),
)
_LEVELS = np.arange(256)
# What becomes of each grey level, for every argument from 0.
TABLES = dict(
    invert=[255 - _LEVELS],
    posterize=[_LEVELS & (256 - 2 ** (8 - bits)) for bits in range(9)],
    solarize=[np.where(_LEVELS < threshold, _LEVELS, 255 - _LEVELS) for threshold in range(257)],
    solarize_add=[np.where(_LEVELS < 128, np.minimum(_LEVELS + add, 255), _LEVELS) for add in range(129)],
)
_FIRST_TABLE = dict(zip(TABLES, np.cumsum([0, *map(len, TABLES.values())])))


def _auto_contrast(images: torch.Tensor) -> torch.Tensor:
    low, high = images.amin((1, 2), keepdim=True).double(), images.amax((1, 2), keepdim=True).double()
    scale = torch.full_like(high, 255) / (high - low)
    stretched = (images * scale + -low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def _equalize(images: torch.Tensor) -> torch.Tensor:
    return functional.equalize_image(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Return the luma (B, H, W, 1) as PIL computes it, int32."""
    images = images.int()
    if images.shape[-1] == 1:
        return images
    red, green, blue = images.split(1, -1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _grey_mean(images: torch.Tensor) -> torch.Tensor:
    count = images[0, ..., 0].numel()
    return (2 * _grey(images).sum((1, 2), keepdim=True) + count) // (2 * count)


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Return PIL's `ImageFilter.SMOOTH` of images, which leaves their edges as they are."""
    smooth = images.int()
    inner = smooth[:, 1:-1, 1:-1]
    rows = smooth[:, :-2] + smooth[:, 1:-1] + smooth[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smoothed = (2 * (around + 4 * inner) + 13) // 26
    inner.copy_(smoothed)
    return smooth


def blend(other: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (other + factor.float().view(-1, 1, 1, 1) * (images.int() - other.int())).clamp_(0, 255).to(torch.uint8)


WHOLE = dict(auto_contrast=_auto_contrast, equalize=_equalize)
# What an image is blended with.
BLENDS = dict(brightness=torch.zeros_like, color=_grey, contrast=_grey_mean, sharpness=_smooth)
OPERATIONS = {*_AFFINE, *TABLES, *BLENDS, *WHOLE}


def as_step(name: str, value: float, size: Tuple[int, int]) -> Step:
    """Return what is carried out here for one of timm's operations.

    Examples:
        >>> as_step('translate_x_abs', 2, (32, 32))
        ('affine', (1, 0, 2, 0, 1, 0))
    """
    if name in _AFFINE:
        return 'affine', _AFFINE[name](value, *size)
    if name in TABLES:
        return 'look_up', (_FIRST_TABLE[name] + min(max(math.ceil(value), 0), len(TABLES[name]) - 1),)
    return name, (value,) if name in BLENDS else ()


def _taps(d: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Return the weights of PIL's filter for the pixels around a point, `d` of a pixel from the one before it."""
    if interpolation == 'bilinear':
        return torch.stack([1 - d, d], 1)
    return torch.stack([d * (d * (2 - d) - 1), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)], 1)


def transform_affine(
        images: torch.Tensor,
        matrix: torch.Tensor,
        fill: torch.Tensor,
        interpolation: str,
) -> torch.Tensor:
    """Return what PIL's `Image.transform` makes of images (B, H, W, C) with affine coefficients (B, 6)."""
    count, height, width, channels = images.shape
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    image = torch.arange(count, device=images.device)[:, None, None]
    a, b, c, d, e, f = matrix.view(-1, 6, 1, 1).unbind(1)
    if interpolation == 'nearest':  # in PIL's fixed point numbers, or ties would fall elsewhere
        a, b, c, d, e, f = (
            (v * 65536 + 0.5).floor().long() for v in (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5))
        column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        out = images[image, row.clamp(0, height - 1), column.clamp(0, width - 1)]
        return torch.where(inside[..., None], out, fill)
    x, y = x + 0.5, y + 0.5
    column, row = a * x + b * y + c, d * x + e * y + f
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column - 0.5, row - 0.5
    left, top = column.floor(), row.floor()
    across, down = _taps(column - left, interpolation), _taps(row - top, interpolation)  # (B, taps, H, W)
    offset = torch.arange(across.shape[1], device=images.device).view(1, -1, 1, 1) + (1 - across.shape[1] // 2)
    columns = (left.long()[:, None] + offset).clamp(0, width - 1)
    rows = (top.long()[:, None] + offset).clamp(0, height - 1)
    planes = images.permute(0, 3, 1, 2).flatten(2).double()
    out = torch.zeros_like(planes).view(count, channels, height, width)
    for tap in range(across.shape[1]):
        index = (rows[:, tap, None] * width + columns).view(count, 1, -1).expand(-1, channels, -1)
        values = planes.gather(2, index).view(count, channels, *columns.shape[1:])
        out += (values * across[:, None]).sum(2) * down[:, None, tap]
    out = out.permute(0, 2, 3, 1)
    # the sums may end a rounding error below a whole number, and PIL cuts off
    return torch.where(inside[..., None], (out + 1e-6).clamp_(0, 255).to(torch.uint8), fill)
