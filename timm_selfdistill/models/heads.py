"""Exit heads: from a feature map inside the network to logits."""
import math
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm2d, SeparableConvNormAct

from .exit_head import ExitHead, _init_convs, _norm_act
from .separable_heads import InvertedHead, SeparableHead
from .stages import Stage

__all__ = [
    'EXIT_HEADS', 'PLACED_LIKE', 'AttentionBottleneckHead', 'BottleneckHead', 'CascadeHead', 'LinearHead',
    'PooledHead', 'exit_head_kind', 'head_settings',
]

MAX_POOLED = 4096  # longest vector of a PooledHead; for 1,000 classes that is 4 M weights already


class BottleneckHead(ExitHead):
    """The bottleneck and classifier of Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094).

    1×1 convolution to a narrow width, then a k×k convolution of stride k that brings the map to the resolution of the
    network's last stage, each with norm and activation; average pooling; linear classifier. The authors widen once
    more to the deepest stage's channels before the classifier, which `widen_to` does. Without it that widening is the
    hint's projection, which belongs to the training task, so that inference does not pay for it.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: Height of this map over the height of the network's last map. More than 8 is left to the pooling: it
            would cost as many MACs and far more parameters.
        width: Channels inside the head, and length of its feature vector unless it widens.
        batch_norm: Normalise by batch, with ReLU, as the authors do; otherwise each position by itself, with GELU.
        depthwise: Split the k×k convolution into a depthwise and a 1×1 one.
        drop_rate: Dropout before the classifier.
        widen_to: Length of the feature vector, reached by a last 1×1 convolution; None leaves it out.
        bias: Give the convolutions biases, as the authors do. The norm behind each of them takes them out again.
        **unused: What other heads need to fit the network.
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
            widen_to: Optional[int] = None,
            bias: bool = False,
            **unused: Any,
    ):
        super().__init__(width if widen_to is None else widen_to, drop_rate)
        stride = min(stride, 8)
        kwargs = dict(_norm_act(batch_norm), bias=bias)
        conv = SeparableConvNormAct if depthwise and stride > 1 else ConvNormAct
        self.stride = stride
        self.reduce = ConvNormAct(in_chs, width, kernel_size=1, **kwargs)
        self.down = conv(width, width, kernel_size=stride, stride=stride, padding=0, **kwargs)
        self.widen = nn.Identity() if widen_to is None else ConvNormAct(width, widen_to, kernel_size=1, **kwargs)
        _init_convs(self)
        self.reset_classifier(num_classes)

    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reduce(x)
        right, below = -x.shape[-1] % self.stride, -x.shape[-2] % self.stride
        if right or below:  # a map that the stride does not divide would lose its edge
            x = F.pad(x, (0, right, 0, below))
        return self.widen(self.down(x))


class CascadeHead(BottleneckHead):
    """A bottleneck whose classifier also sees the logits of the exit before.

    The cascade connection of Zero Time Waste (Wołczyk et al., NeurIPS 2021, arXiv 2106.05409): what an exit has found
    is not thrown away when an image goes on. The logits are normalised by layer norm and detached: no exit learns to
    serve those behind it.

    Args:
        *args: See `BottleneckHead`.
        first: There is no exit before this one.
        **kwargs: See `BottleneckHead`.
    """

    def __init__(self, *args: Any, first: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.takes_logits = not first
        self.reset_classifier(self.num_classes)


class AttentionBottleneckHead(BottleneckHead):
    """An attention block and the bottleneck that widens, the head of the authors' code for SCAN.

    SCAN (Zhang et al., NeurIPS 2019, arXiv 1906.03951). A gate for every value of the map comes from a 3×3 convolution
    of stride 2, norm, activation, a 4×4 transposed convolution of stride 2, norm and a sigmoid, and multiplies the map.
    The bottleneck of Be Your Own Teacher follows, up to as many features as the deepest exit has.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: See `BottleneckHead`.
        batch_norm: See `BottleneckHead`.
        deep_features: Length of the deepest exit's feature vector; channels are taken to double with every halving
            when None.
        **kwargs: See `BottleneckHead`.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            stride: int = 1,
            batch_norm: bool = True,
            deep_features: Optional[int] = None,
            **kwargs: Any,
    ):
        widen_to = deep_features or in_chs * stride
        super().__init__(
            in_chs, num_classes, stride, batch_norm=batch_norm, widen_to=widen_to, bias=True, **kwargs)
        norm_act = _norm_act(batch_norm)
        self.attend = nn.Sequential(
            ConvNormAct(in_chs, in_chs, kernel_size=3, stride=2, bias=True, **norm_act),
            nn.ConvTranspose2d(in_chs, in_chs, kernel_size=4, stride=2, padding=1),
            norm_act['norm_layer'](in_chs),
        )
        _init_convs(self.attend)

    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.attend(x)[..., :x.shape[-2], :x.shape[-1]]  # of an odd side it comes one longer
        return super().forward_map(x * gate.sigmoid())


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

    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class MixedPool2d(nn.Module):
    """Learned mix of max and average pooling to a small grid, flattened (Lee et al., AISTATS 2016, arXiv 1509.08985).

    Args:
        size: Height and width of the grid.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.mix = nn.Parameter(torch.zeros(1))  # a sigmoid makes it the share of the maximum, at first one half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C·size²)."""
        mean, peak = F.adaptive_avg_pool2d(x, self.size), F.adaptive_max_pool2d(x, self.size)
        return (mean + self.mix.sigmoid() * (peak - mean)).flatten(1)  # lerp() refuses autocast's mixed dtypes


class PooledHead(LinearHead):
    """The internal classifier of Shallow-Deep Networks (Kaya et al., ICML 2019, arXiv 1810.07052).

    A learned mix of max and average pooling brings the map to a small grid, which a linear classifier takes as one
    vector: it still sees where in the image something is, and needs no MACs but its own. The grid is 4×4 or
    smaller: no larger than the network's last map, and such that the vector has at most 4,096 entries.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        batch_norm: See `LinearHead`.
        drop_rate: Dropout before the classifier.
        deep_size: Height and width of the network's last map.
        **unused: What other heads need to fit the network.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            batch_norm: bool = True,
            drop_rate: float = 0.,
            deep_size: Sequence[int] = (4, 4),
            **unused: Any,
    ):
        super().__init__(in_chs, 0, batch_norm, drop_rate)
        size = max(1, min(4, *deep_size, math.isqrt(MAX_POOLED // in_chs)))
        self.num_features = in_chs * size ** 2
        self.pool = MixedPool2d(size)
        self.reset_classifier(num_classes)


def wide_bottleneck_head(
        in_chs: int,
        num_classes: int,
        stride: int = 1,
        deep_features: Optional[int] = None,
        **kwargs: Any,
) -> BottleneckHead:
    """Create the head of the paper Be Your Own Teacher: a bottleneck that widens to the deepest exit's features.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: Height of this map over the height of the network's last map.
        deep_features: Length of the deepest exit's feature vector; channels are taken to double with every halving
            when None.
        **kwargs: See `BottleneckHead`.
    """
    return BottleneckHead(in_chs, num_classes, stride, widen_to=deep_features or in_chs * stride, **kwargs)


EXIT_HEADS: Dict[str, Callable[..., ExitHead]] = {
    'bottleneck': BottleneckHead,
    'bottleneck-attention': AttentionBottleneckHead,
    'bottleneck-wide': wide_bottleneck_head,
    'cascade': CascadeHead,
    'inverted': InvertedHead,
    'linear': LinearHead,
    'pooled': PooledHead,
    'separable': SeparableHead,
    'separable-double': partial(SeparableHead, double=True),
}

# The heads of the authors' code stand where lighter ones of their kind would. In some networks one of them costs more
# than all that comes behind it, and the authors have it there all the same.
PLACED_LIKE = {'bottleneck-attention': 'bottleneck-wide', 'separable-double': 'separable'}


def exit_head_kind(name: str) -> Callable[..., ExitHead]:
    """Look up what creates exit heads of a kind.

    Raises:
        ValueError: The name is unknown; the message lists those that exist.
    """
    if name not in EXIT_HEADS:
        raise ValueError(f'exit_head={name!r}: unknown, expected one of {", ".join(sorted(EXIT_HEADS))}.')
    return EXIT_HEADS[name]


def head_settings(backbone: nn.Module, stages: Sequence[Stage]) -> List[Dict[str, Any]]:
    """Report what an exit head after each stage has to be like to suit its network.

    Args:
        backbone: A timm model. A head normalises as it does, and convolves by channel where it does.
        stages: What `find_stages` found in it.

    Returns:
        Arguments of the exit head after each stage, all but the number of classes.
    """
    modules = list(backbone.modules())
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
    depthwise = any(
        isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 and max(m.kernel_size) > 1 for m in modules
    )
    drop_rate = getattr(backbone, '_model_args', {}).get('drop_rate', getattr(backbone, 'drop_rate', 0.))
    last = stages[-1]
    num_features = getattr(backbone, 'num_features', last.num_chs)
    return [
        dict(
            in_chs=stage.num_chs,
            stride=max(1, stage.size[0] // last.size[0]),
            width=min(128, 2 * stage.num_chs),  # the authors' 128, unless the whole map is much narrower
            batch_norm=batch_norm,
            depthwise=depthwise,
            drop_rate=drop_rate,
            deep_chs=last.num_chs,
            deep_size=last.size,
            deep_features=getattr(backbone, 'head_hidden_size', num_features),
        ) for stage in stages
    ]
