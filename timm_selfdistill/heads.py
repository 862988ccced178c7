"""Exit heads: from a feature map inside the network to logits."""
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm2d, SelectAdaptivePool2d, SeparableConvNormAct

from .stages import Stage

__all__ = ['EXIT_HEADS', 'BottleneckHead', 'ExitHead', 'LinearHead', 'create_exit_head', 'head_settings']


class ExitHead(nn.Module):
    """Base of the exit heads: a map to a pooled vector, then dropout and a linear classifier.

    A kind of head says in `forward_features` how it gets from the map (N, in_chs, H, W) to the vector (N, width).

    Its constructor ends with `reset_classifier`.

    Args:
        width: Length of the pooled vector.
        drop_rate: Dropout before the classifier.
    """

    def __init__(self, width: int, drop_rate: float = 0.):
        super().__init__()
        self.num_features = width
        self.drop_rate = drop_rate
        self.pool = SelectAdaptivePool2d(pool_type='avg', flatten=True)

    def reset_classifier(
            self,
            num_classes: int,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Replace the classifier by a fresh one; 0 classes leave it out."""
        self.num_classes = num_classes
        self.fc = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to the pooled vector (N, width)."""
        raise NotImplementedError

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """Map the pooled vector (N, width) to logits (N, num_classes)."""
        return self.fc(F.dropout(features, self.drop_rate, self.training))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class BottleneckHead(ExitHead):
    """The bottleneck and classifier of Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094).

    1×1 convolution to a narrow width, then a k×k convolution of stride k that brings the map to the resolution of the
    network's last stage, each with norm and activation; average pooling; linear classifier. The authors widen once
    more to the deepest stage's channels before the classifier. Here that widening is the hint's projection, which
    belongs to the training task, so that inference does not pay for it.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: Height of this map over the height of the network's last map. More than 8 is left to the pooling: it
            would cost as many multiply-adds and far more parameters.
        width: Channels inside the head, and length of its feature vector.
        batch_norm: Normalise by batch, with ReLU, as the authors do; otherwise each position by itself, with GELU.
        depthwise: Split the k×k convolution into a depthwise and a 1×1 one.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            stride: int = 1,
            width: int = 128,
            batch_norm: bool = True,
            depthwise: bool = False,
            drop_rate: float = 0.,
    ):
        super().__init__(width, drop_rate)
        stride = min(stride, 8)
        kwargs = dict(
            norm_layer=nn.BatchNorm2d if batch_norm else LayerNorm2d,
            act_layer=nn.ReLU if batch_norm else nn.GELU,
        )
        conv = SeparableConvNormAct if depthwise and stride > 1 else ConvNormAct
        self.stride = stride
        self.reduce = ConvNormAct(in_chs, width, kernel_size=1, **kwargs)
        self.down = conv(width, width, kernel_size=stride, stride=stride, padding=0, **kwargs)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        self.reset_classifier(num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to the pooled vector (N, width) that the classifier sees."""
        x = self.reduce(x)
        right, below = -x.shape[-1] % self.stride, -x.shape[-2] % self.stride
        if right or below:  # a map that the stride does not divide would lose its edge
            x = F.pad(x, (0, right, 0, below))
        return self.pool(self.down(x))


class LinearHead(ExitHead):
    """Average pooling and a linear classifier: for probing or fine-tuning over a frozen backbone.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        batch_norm: The network normalises its maps by batch, so they are taken as they are. Otherwise each position is
            normalised first, as such networks do before their own classifier.
        drop_rate: Dropout before the classifier.
        **unused: What other heads need to fit the network.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            batch_norm: bool = True,
            drop_rate: float = 0.,
            **unused: Any,
    ):
        super().__init__(in_chs, drop_rate)
        self.norm = nn.Identity() if batch_norm else LayerNorm2d(in_chs)
        self.reset_classifier(num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to the pooled vector (N, in_chs) that the classifier sees."""
        return self.pool(self.norm(x))


EXIT_HEADS = dict(
    bottleneck=BottleneckHead,
    linear=LinearHead,
)


def create_exit_head(name: str, **kwargs: Any) -> ExitHead:
    """Create an exit head by name.

    Raises:
        ValueError: The name is unknown; the message lists those that exist.
    """
    if name not in EXIT_HEADS:
        raise ValueError(f'exit_head={name!r}: unknown, expected one of {", ".join(sorted(EXIT_HEADS))}.')
    return EXIT_HEADS[name](**kwargs)


def head_settings(backbone: nn.Module, stages: Sequence[Stage]) -> List[Dict[str, Any]]:
    """Say what an exit head after each stage has to be like to suit its network.

    Args:
        backbone: A timm model. A head normalises as it does, and convolves by channel where it does.
        stages: What `find_stages` found in it.

    Returns:
        Arguments of `create_exit_head` for each stage, all but the number of classes.
    """
    modules = list(backbone.modules())
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
    depthwise = any(
        isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 and max(m.kernel_size) > 1 for m in modules
    )
    drop_rate = getattr(backbone, '_model_args', {}).get('drop_rate', getattr(backbone, 'drop_rate', 0.))
    return [
        dict(
            in_chs=stage.num_chs,
            stride=max(1, stage.size[0] // stages[-1].size[0]),
            width=min(128, 2 * stage.num_chs),  # the authors' 128, unless the whole map is much narrower
            batch_norm=batch_norm,
            depthwise=depthwise,
            drop_rate=drop_rate,
        ) for stage in stages
    ]
