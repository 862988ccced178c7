"""From a PIL image to a tensor: timm's transforms, and those of the CIFAR recipes that timm lacks."""
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from torchvision import transforms

__all__ = ['Cutout', 'eval_transform', 'policy_operations', 'train_transform']

TORCHVISION_POLICIES = dict(
    cifar10=transforms.AutoAugmentPolicy.CIFAR10,
    svhn=transforms.AutoAugmentPolicy.SVHN,
)


class Cutout:
    """Blots out a square around a random pixel (DeVries & Taylor, 2017, arXiv 1708.04552).

    What of the square lies outside is cut off. It is filled with 0, the mean colour of normalised images.

    Args:
        side: Side of the square in pixels.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return a copy of the image (C, H, W) with the square blotted out."""
        height, width = image.shape[-2:]
        top = int(torch.randint(height, ())) - self.side // 2
        left = int(torch.randint(width, ())) - self.side // 2
        image = image.clone()
        image[..., max(top, 0):max(top + self.side, 0), max(left, 0):max(left + self.side, 0)] = 0
        return image


def policy_operations(policy: Any) -> List[AugmentOp]:
    """Return the operations that a policy of timm's chooses from; none for any other transform."""
    if isinstance(policy, AutoAugment):
        return [op for group in policy.policy for op in group]
    return list(policy.ops) if isinstance(policy, (AugMixAugment, RandAugment)) else []


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    # timm asks for 0 bits at high magnitudes, which Pillow refuses from version 13 on; it used to give black
    return posterize(image, bits, **kwargs) if bits else Image.new(image.mode, image.size)


def eval_transform(data_config: Dict[str, Any]) -> Callable:
    """Return timm's evaluation transform for a data config (see `timm.data.resolve_data_config`)."""
    return create_transform(**data_config, is_training=False)


def train_transform(
        data_config: Dict[str, Any],
        crop: str = 'rrc',
        hflip: float = 0.5,
        scale: Tuple[float, float] = (0.08, 1.0),
        color_jitter: float = 0.,
        auto_augment: Optional[str] = None,
        re_prob: float = 0.,
        cutout: int = 0,
) -> Callable:
    """Return timm's training transform, or with `crop='pad'` one for small images.

    Args:
        data_config: See `timm.data.resolve_data_config`.
        crop: `rrc` cuts a random part out and resizes it; `pad` resizes, pads an eighth of the size on every side with
            black and cuts out the size again, as is usual on CIFAR.
        hflip: Probability of mirroring.
        scale: Range of the area that `rrc` cuts out.
        color_jitter: Strength of timm's colour jitter.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5` or `original`, or the policy that AutoAugment
            (Cubuk et al., CVPR 2019, arXiv 1805.09501) found on `cifar10` or `svhn`.
        re_prob: Probability of random erasing.
        cutout: Side in pixels of the square that `Cutout` blots out; 0 for none.
    """
    policy = TORCHVISION_POLICIES.get(auto_augment)
    config = {k: v for k, v in data_config.items() if k not in ('crop_pct', 'crop_mode')}
    spatial, colour, final = create_transform(
        **config,
        is_training=True,
        separate=True,
        hflip=hflip,
        scale=tuple(scale),
        color_jitter=color_jitter or None,
        auto_augment=auto_augment if policy is None else None,
        re_prob=re_prob,
    )
    if crop == 'pad':
        size = data_config['input_size'][-2:]
        resize = eval_transform(dict(data_config, crop_pct=1.0)).transforms[:2]  # shorter side to size, centre crop
        pad_crop = transforms.RandomCrop(size, padding=(size[1] // 8, size[0] // 8))
        flip = [transforms.RandomHorizontalFlip(hflip)] if hflip > 0 else []
        spatial = transforms.Compose([*resize, pad_crop, *flip])
    if policy is not None:
        spatial = transforms.Compose([spatial, transforms.AutoAugment(policy)])
    for part in colour.transforms:
        for op in policy_operations(part):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    blot = [Cutout(cutout)] if cutout > 0 else []
    return transforms.Compose([spatial, colour, final, *blot])
