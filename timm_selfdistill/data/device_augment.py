"""Augmentation of whole batches on the device; each image has the distribution of `augment.train_transform`.

Augmenting image by image in worker processes is slower than training a small network. Here a batch is shifted, mirrored
and put through a policy at once. timm's and torchvision's own code decides, for every image by itself, what a policy
does to it. Then one operation after the other is carried out, each on all images of the batch that undergo it, see
`pil_ops`. Ready-made transforms of batches (kornia, torchvision.transforms.v2) would draw the operations of a policy
once for the whole batch.
"""
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

from .augment import TORCHVISION_POLICIES, policy_operations
from .image_data import seeded
from .pil_ops import BLENDS, OPERATIONS, TABLES, WHOLE, Step, as_step, blend, transform_affine

__all__ = ['BatchAugment', 'normalize', 'supports', 'to_device']

GEOMETRY, POLICY = 1, 2  # streams of random numbers
GROUP = 64  # images that share a seed of the policy: seeding costs more than the draws of one image


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
    known = all(op.aug_fn.__name__ in OPERATIONS for op in policy_operations(policy))
    return known and not isinstance(policy, AugMixAugment)


def _record(name: str, size: Tuple[int, int], steps: List[Step], *level: float, **_: Any) -> List[Step]:
    """Stand in for an operation of timm's that would alter an image: note it down in the image's stead."""
    return [*steps, as_step(name, *(level or (0,)), size)]


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
            if timm_name in BLENDS:
                return as_step(timm_name, 1 + value, self.size)
            if timm_name.startswith('translate'):  # the image moves, in timm the place it is taken from
                return as_step(f'{timm_name}_abs', -int(value), self.size)
            return as_step(timm_name, value, self.size)

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
            self.tables = to_device(np.concatenate(list(TABLES.values())).astype(np.uint8), device)

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
            return transform_affine(images, arguments, self.fill, self.policy.interpolation)
        if name == 'look_up':
            return self.tables[arguments.long()[:, :, None, None], images.long()]
        if name in BLENDS:
            return blend(BLENDS[name](images), images, arguments)
        return WHOLE[name](images)
