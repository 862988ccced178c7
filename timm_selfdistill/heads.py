"""Exit heads: from a feature map inside the network to logits."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, SelectAdaptivePool2d

__all__ = ['BottleneckHead', 'EXIT_HEADS', 'create_exit_head']


class BottleneckHead(nn.Module):
    """The bottleneck and classifier of Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094).

    1×1 convolution to a narrow width, then a k×k convolution of stride k that brings the map to the resolution of the
    network's last stage, each with batch norm and ReLU; average pooling; linear classifier. The authors widen once
    more to the deepest stage's channels before the classifier. Here that widening is the hint's projection, which
    belongs to the training task, so that inference does not pay for it.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: Height of this map over the height of the network's last map.
        width: Channels inside the head, and length of its feature vector.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            stride: int = 1,
            width: int = 128,
            drop_rate: float = 0.,
    ):
        super().__init__()
        self.stride = stride
        self.num_features = width
        self.drop_rate = drop_rate
        self.reduce = ConvNormAct(in_chs, width, kernel_size=1)
        self.down = ConvNormAct(width, width, kernel_size=stride, stride=stride, padding=0)
        self.pool = SelectAdaptivePool2d(pool_type='avg', flatten=True)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one."""
        like = self.reduce.conv.weight
        self.fc = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to the pooled vector (N, width) that the classifier sees."""
        x = self.reduce(x)
        right, below = -x.shape[-1] % self.stride, -x.shape[-2] % self.stride
        if right or below:  # a map that the stride does not divide would lose its edge
            x = F.pad(x, (0, right, 0, below))
        return self.pool(self.down(x))

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """Map the pooled vector (N, width) to logits (N, num_classes)."""
        return self.fc(F.dropout(features, self.drop_rate, self.training))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


EXIT_HEADS = dict(
    bottleneck=BottleneckHead,
)


def create_exit_head(name: str, **kwargs) -> nn.Module:
    """Create an exit head by name.

    Raises:
        ValueError: The name is unknown; the message lists those that exist.
    """
    if name not in EXIT_HEADS:
        raise ValueError(f'exit_head={name!r}: unknown, expected one of {", ".join(sorted(EXIT_HEADS))}.')
    return EXIT_HEADS[name](**kwargs)
