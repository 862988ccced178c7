"""Augmentation of whole batches on the device; each image has the distribution of `augment.train_transform`.

timm's and torchvision's own code decides, for every image by itself, what a policy does to it; what is done is done
here, one operation after the other, each to all images of the batch that undergo it. The results are those of PIL, to
the rounding. Ready-made transforms of batches (kornia, torchvision.transforms.v2) draw the operations of a policy once
for the whole batch.
"""
import math
import random
import re
from collections import defaultdict
from functools import partial, reduce
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms.v2 import functional

from .augment import TORCHVISION_POLICIES, policy_operations
from .image_data import seeded

__all__ = ['BatchAugment', 'normalize', 'supports', 'to_device']

GEOMETRY, POLICY = 1, 2  # streams of random numbers
GROUP = 64  # images that share a seed of the policy: seeding costs more than the draws of one image
Step = Tuple[str, Tuple[float, ...]]  # an operation and its arguments


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


def normalize(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels (B, H, W, C) as normalised images (B, C, H, W) in float32, channels last in memory.

    Args:
        pixels: Grey levels from 0 to 255.
        mean: What is subtracted after division by 255 (C, 1, 1).
        std: What the difference is divided by (C, 1, 1).
    """
    return (pixels.permute(0, 3, 1, 2) / 255).sub_(mean).div_(std)


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
_TABLES = dict(
    invert=[255 - _LEVELS],
    posterize=[_LEVELS & (256 - 2 ** (8 - bits)) for bits in range(9)],
    solarize=[np.where(_LEVELS < threshold, _LEVELS, 255 - _LEVELS) for threshold in range(257)],
    solarize_add=[np.where(_LEVELS < 128, np.minimum(_LEVELS + add, 255), _LEVELS) for add in range(129)],
)
_FIRST_TABLE = dict(zip(_TABLES, np.cumsum([0, *map(len, _TABLES.values())])))


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


def _blend(other: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (other + factor.float().view(-1, 1, 1, 1) * (images.int() - other.int())).clamp_(0, 255).to(torch.uint8)


_WHOLE = dict(auto_contrast=_auto_contrast, equalize=_equalize)
# What an image is blended with.
_BLENDS = dict(brightness=torch.zeros_like, color=_grey, contrast=_grey_mean, sharpness=_smooth)
_OPERATIONS = {*_AFFINE, *_TABLES, *_BLENDS, *_WHOLE}


def _step(name: str, value: float, size: Tuple[int, int]) -> Step:
    """Word timm's operation in those that are carried out here."""
    if name in _AFFINE:
        return 'affine', _AFFINE[name](value, *size)
    if name in _TABLES:
        return 'look_up', (_FIRST_TABLE[name] + min(max(math.ceil(value), 0), len(_TABLES[name]) - 1),)
    return name, (value,) if name in _BLENDS else ()


def _taps(d: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Return the weights of PIL's filter for the pixels around a point, `d` of a pixel from the one before it."""
    if interpolation == 'bilinear':
        return torch.stack([1 - d, d], 1)
    return torch.stack([d * (d * (2 - d) - 1), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)], 1)


def _transform(images: torch.Tensor, matrix: torch.Tensor, fill: torch.Tensor, interpolation: str) -> torch.Tensor:
    """Do PIL's `Image.transform` with affine coefficients (B, 6) to images (B, H, W, C)."""
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


def _timm_policy(auto_augment: str, **config: Any) -> Union[RandAugment, AutoAugment, AugMixAugment]:
    """Return the policy that timm's transform would have."""
    return create_transform(**config, is_training=True, separate=True, auto_augment=auto_augment)[1].transforms[0]


def supports(crop: str, color_jitter: float = 0., auto_augment: Optional[str] = None) -> bool:
    """Return whether `BatchAugment` can do what `augment.train_transform` does for these arguments.

    It can for `crop='pad'` without colour jitter, with any policy but AugMix and those that blur.
    """
    if crop != 'pad' or color_jitter:
        return False
    if auto_augment is None or auto_augment in TORCHVISION_POLICIES:
        return True
    policy = _timm_policy(auto_augment)
    known = all(op.aug_fn.__name__ in _OPERATIONS for op in policy_operations(policy))
    return known and not isinstance(policy, AugMixAugment)


def _record(name: str, size: Tuple[int, int], steps: List[Step], *level: float, **_: Any) -> List[Step]:
    """Stand in for an operation of timm's that would alter an image: note it down in the image's stead."""
    return [*steps, _step(name, *(level or (0,)), size)]


class _TimmPolicy:
    """Decides about images as timm's policy does."""

    def __init__(self, auto_augment: str, data_config: Dict[str, Any]):
        config = {k: v for k, v in data_config.items() if k not in ('crop_pct', 'crop_mode')}
        self.policy, self.interpolation = _timm_policy(auto_augment, **config), data_config['interpolation']
        if self.interpolation not in ('bicubic', 'bilinear', 'nearest'):
            raise ValueError(
                f'interpolation {self.interpolation}: expected bicubic, bilinear or nearest with {auto_augment}.')
        self.ops = policy_operations(self.policy)
        self.fill = self.ops[0].kwargs['fillcolor']
        for op in self.ops:
            op.aug_fn = partial(_record, op.aug_fn.__name__, data_config['input_size'][-2:])

    def __call__(self, count: int) -> List[List[Step]]:
        if isinstance(self.policy, AutoAugment) or self.policy.choice_weights is not None:
            return [self.policy([]) for _ in range(count)]
        # as RandAugment does, all choices at once: by far the slowest of its draws
        chosen = np.random.choice(len(self.ops), (count, self.policy.num_layers))  # noqa: NPY002
        return [reduce(lambda steps, i: self.ops[i](steps), row, []) for row in chosen.tolist()]


class _TorchvisionPolicy:
    """Decides about images as torchvision's `AutoAugment` does."""

    interpolation, fill = 'nearest', (0,)

    def __init__(self, auto_augment: str, data_config: Dict[str, Any]):
        self.size = tuple(data_config['input_size'][-2:])
        policy = transforms.AutoAugment(TORCHVISION_POLICIES[auto_augment])
        space = policy._augmentation_space(10, self.size)
        self.policies = [[self._signed(*op, *space[op[0]]) for op in sub_policy] for sub_policy in policy.policies]

    def _signed(
            self,
            name: str,
            prob: float,
            magnitude_id: Optional[int],
            magnitudes: torch.Tensor,
            signed: bool,
    ) -> Tuple[float, Tuple[Step, Step]]:
        """Return the probability of an operation and what it is with either sign."""
        magnitude = 0. if magnitude_id is None else magnitudes[magnitude_id].item()
        timm_name = re.sub('(?<=[a-z])(?=[A-Z])', '_', name).lower()

        def step(value: float) -> Step:
            if timm_name in _BLENDS:
                return _step(timm_name, 1 + value, self.size)
            if timm_name.startswith('translate'):  # the image moves, in timm the place it is taken from
                return _step(f'{timm_name}_abs', -int(value), self.size)
            return _step(timm_name, value, self.size)

        return prob, (step(-magnitude if signed else magnitude), step(magnitude))

    def __call__(self, count: int) -> List[List[Step]]:
        return [
            [
                steps[random.getrandbits(1)] for prob, steps in self.policies[random.randrange(len(self.policies))]
                if random.random() <= prob
            ]
            for _ in range(count)
        ]


class BatchAugment:
    """What `augment.train_transform` does with `crop='pad'`, for batches of pixels on the device.

    All draws are functions of seed, epoch and the place of an image in the epoch's order.

    Args:
        data_config: See `timm.data.resolve_data_config`.
        device: Where the pixels are.
        hflip: Probability of mirroring.
        auto_augment: Policy as for `train_transform`, see `supports`.
        re_prob: Probability of random erasing.
        cutout: Side in pixels of the square that is blotted out; 0 for none.

    Raises:
        ValueError: Unsupported policy, or one with an interpolation that PIL's transformations do not know.
    """

    def __init__(
            self,
            data_config: Dict[str, Any],
            device: torch.device,
            hflip: float = 0.5,
            auto_augment: Optional[str] = None,
            re_prob: float = 0.,
            cutout: int = 0,
    ):
        if not supports('pad', auto_augment=auto_augment):
            raise ValueError(f'auto_augment {auto_augment}: expected a policy without AugMix and blurring.')
        self.size = height, width = tuple(data_config['input_size'][-2:])
        self.device, self.hflip, self.cutout = device, hflip, cutout
        self.padding = (height // 8, width // 8)
        self.erasing = RandomErasing(re_prob, device='cpu') if re_prob > 0 else None
        self.mean, self.std = (torch.tensor(data_config[k], device=device).view(-1, 1, 1) for k in ('mean', 'std'))
        self.y, self.x = torch.arange(height, device=device), torch.arange(width, device=device)
        self.policy = None
        if auto_augment is not None:
            kind = _TorchvisionPolicy if auto_augment in TORCHVISION_POLICIES else _TimmPolicy
            self.policy = kind(auto_augment, data_config)
            self.fill = torch.tensor(self.policy.fill, dtype=torch.uint8, device=device)
            self.tables = to_device(np.concatenate(list(_TABLES.values())).astype(np.uint8), device)

    def pad(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pad pixels (N, H, W, C) with black by an eighth of the size on every side, as `__call__` wants them."""
        y, x = self.padding
        return torch.nn.functional.pad(pixels, (0, 0, x, x, y, y))

    def draw_geometry(self, seed: int, epoch: int, count: int) -> np.ndarray:
        """Draw for a whole epoch what needs no policy.

        Returns:
            For each place in the epoch's order top and left of the crop, whether to mirror, and of each box to blot out
            top, bottom, left and right (count, 3 + 4 * boxes), int64.
        """
        rng = np.random.default_rng((seed, epoch, GEOMETRY))
        height, width = self.size
        columns = [rng.integers(2 * p, size=count, endpoint=True) for p in self.padding]
        columns.append(rng.random(count) < self.hflip)
        if self.erasing is not None:
            erased = rng.random(count) <= self.erasing.probability
            area = rng.uniform(self.erasing.min_area, self.erasing.max_area, (count, 10)) * (height * width)
            aspect = np.exp(rng.uniform(*self.erasing.log_aspect_ratio, (count, 10)))
            sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(np.int64)
            fits = (sides < np.reshape(self.size, (2, 1, 1))).all(0)
            sides = sides[:, np.arange(count), fits.argmax(1)] * (erased & fits.any(1))  # the first that fits
            for side, length in zip(sides, self.size):
                begin = rng.integers(length - side, endpoint=True)
                columns += [begin, begin + side]
        if self.cutout > 0:
            for length in self.size:
                begin = rng.integers(length, size=count) - self.cutout // 2
                columns += [begin, begin + self.cutout]
        return np.stack(columns, 1).astype(np.int64)

    def draw_policy(self, seed: int, epoch: int, places: slice) -> List[List[Step]]:
        """Draw for places in the epoch's order what the policy does to each, one step after the other."""
        if self.policy is None:
            return []
        first, steps = places.start // GROUP, []
        for group in range(first, (places.stop - 1) // GROUP + 1):
            with seeded(seed, epoch, POLICY, group):
                steps += self.policy(GROUP)
        return steps[places.start - first * GROUP:places.stop - first * GROUP]

    def __call__(
            self,
            pixels: torch.Tensor,
            rows: torch.Tensor,
            geometry: torch.Tensor,
            steps: List[List[Step]],
    ) -> torch.Tensor:
        """Augment and normalise a batch; nothing waits for the device.

        Args:
            pixels: Padded pixels of the whole data set, uint8 (N, H + 2 * pad, W + 2 * pad, C).
            rows: Which of them make up the batch (B,).
            geometry: See `draw_geometry` (B, 3 + 4 * boxes), on the device.
            steps: See `draw_policy`.

        Returns:
            Images (B, C, H, W) in float32, channels last in memory.
        """
        top, left, flip = geometry[:, :3, None].unbind(1)
        columns = left + torch.where(flip > 0, self.x.flip(0), self.x)
        images = pixels[rows[:, None, None], (top + self.y)[:, :, None], columns[:, None, :]]
        images = normalize(self._follow(images, steps), self.mean, self.std)
        if geometry.shape[1] > 3:
            top, bottom, left, right = geometry[:, 3:].reshape(len(rows), -1, 4, 1).unbind(2)
            down, across = (self.y >= top) & (self.y < bottom), (self.x >= left) & (self.x < right)
            images.masked_fill_((down[..., :, None] & across[..., None, :]).any(1)[:, None], 0)
        return images

    def _follow(self, images: torch.Tensor, steps: List[List[Step]]) -> torch.Tensor:
        """Take every image (B, H, W, C) through its steps, all at once that are at the same operation."""
        names, groups = [], []
        for depth in range(max(map(len, steps), default=0)):
            members = defaultdict(list)
            for place, of_image in enumerate(steps):
                if depth < len(of_image):
                    name, arguments = of_image[depth]
                    members[name].append((place, *arguments))
            names += members
            groups += map(np.array, members.values())
        if not groups:
            return images
        sent = to_device(np.concatenate([group.ravel() for group in groups]).astype(np.float64), self.device)
        for name, group, part in zip(names, groups, sent.split([group.size for group in groups])):
            part = part.view(group.shape)
            index = part[:, 0].long()
            images.index_copy_(0, index, self._apply(name, images.index_select(0, index), part[:, 1:]))
        return images

    def _apply(self, name: str, images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        if name == 'affine':
            return _transform(images, arguments, self.fill, self.policy.interpolation)
        if name == 'look_up':
            return self.tables[arguments.long()[:, :, None, None], images.long()]
        if name in _BLENDS:
            return _blend(_BLENDS[name](images), images, arguments)
        return _WHOLE[name](images)
