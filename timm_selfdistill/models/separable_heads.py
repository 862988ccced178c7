"""Exit heads of convolutions by channel, for networks made of such."""
import math
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import ConvNormAct, SeparableConvNormAct
from timm.models._efficientnet_blocks import InvertedResidual

from .exit_head import ExitHead, _init_convs, _norm_act

__all__ = ['InvertedHead', 'SeparableHead']


def _double_separable(in_chs: int, out_chs: int, stride: int = 1, **kwargs: Any) -> nn.Sequential:
    return nn.Sequential(
        SeparableConvNormAct(in_chs, in_chs, stride=stride, **kwargs),
        SeparableConvNormAct(in_chs, out_chs, **kwargs),
    )


class SeparableHead(ExitHead):
    """Attention and stacked separable convolutions, the head of the authors' later work.

    SCAN (Zhang et al., NeurIPS 2019, arXiv 1906.03951). A gate for every value of the map comes from a separable
    convolution of stride 2, norm, activation, upsampling and a sigmoid, and multiplies the map. Then separable
    convolutions of stride 2 follow, each with norm and activation, one for every halving on the way to the resolution
    of the network's last stage, but at least one convolution; average pooling; linear classifier. Channels double with
    every halving, as the trunk's do.

    The authors' code has `double`: behind each of these convolutions a second one, of stride 1, which is where the
    channels grow, and in the gate another norm and activation before the upsampling.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: Height of this map over the height of the network's last map. What is no power of two is left to the
            pooling.
        batch_norm: Normalise by batch, with ReLU, as the authors do; otherwise each position by itself, with GELU.
        drop_rate: Dropout before the classifier.
        deep_chs: Channels of the network's last map, where the doubling ends; None leaves it without end.
        double: Two separable convolutions in the place of each one, as in the authors' code.
        **unused: What other heads need to fit the network.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            stride: int = 1,
            batch_norm: bool = True,
            drop_rate: float = 0.,
            deep_chs: Optional[int] = None,
            double: bool = False,
            **unused: Any,
    ):
        halvings = int(math.log2(stride))
        chs = [min(in_chs * 2 ** i, max(in_chs, deep_chs or math.inf)) for i in range(halvings + 1)]
        super().__init__(chs[-1], drop_rate)
        norm_act = _norm_act(batch_norm)
        kwargs = dict(norm_act, kernel_size=3)
        conv = _double_separable if double else SeparableConvNormAct
        self.attend = conv(in_chs, in_chs, stride=2, **kwargs)
        if double:
            self.attend.extend([norm_act['norm_layer'](in_chs), norm_act['act_layer']()])
        self.down = nn.Sequential(
            *(conv(a, b, stride=2, **kwargs) for a, b in zip(chs, chs[1:])),
            *([] if halvings else [conv(in_chs, in_chs, **kwargs)]),
        )
        _init_convs(self, mode='fan_out' if double else 'fan_in')
        self.reset_classifier(num_classes)

    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.interpolate(self.attend(x), size=x.shape[-2:], mode='bilinear', align_corners=False)
        return self.down(x * gate.sigmoid())


class InvertedHead(ExitHead):
    """Inverted residual blocks, the head for mobile networks, whose first exits have few channels.

    One block (MobileNetV2, Sandler et al., CVPR 2018, arXiv 1801.04381) for every halving on the way to the resolution
    of the network's last stage, of stride 2 and expansion 3, with twice as many channels behind it as before; then a
    1×1 convolution to 512 channels, norm and activation; average pooling; linear classifier.

    Args:
        in_chs: Channels of the feature map.
        num_classes: Classes; 0 leaves the classifier out.
        stride: Height of this map over the height of the network's last map. What is no power of two is left to the
            pooling.
        batch_norm: Normalise by batch, with ReLU; otherwise each position by itself, with GELU.
        drop_rate: Dropout before the classifier.
        **unused: What other heads need to fit the network.
    """

    def __init__(
            self,
            in_chs: int,
            num_classes: int,
            stride: int = 1,
            batch_norm: bool = True,
            drop_rate: float = 0.,
            **unused: Any,
    ):
        width = 512
        super().__init__(width, drop_rate)
        norm_act = _norm_act(batch_norm)
        chs = [in_chs * 2 ** i for i in range(int(math.log2(stride)) + 1)]
        self.down = nn.Sequential(
            *(InvertedResidual(a, b, stride=2, exp_ratio=3., **norm_act) for a, b in zip(chs, chs[1:])))
        self.widen = ConvNormAct(chs[-1], width, kernel_size=1, **norm_act)
        _init_convs(self, mode='fan_in')
        self.reset_classifier(num_classes)

    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        return self.widen(self.down(x))
