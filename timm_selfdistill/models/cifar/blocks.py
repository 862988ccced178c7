"""Blocks of the papers' networks for 32×32 images, as far as timm has none.

Every block, and every function that makes one, takes its input channels, its output channels and its stride.
"""
from typing import Any, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, create_conv2d
from timm.models.densenet import DenseTransition
from timm.models.resnet import BasicBlock, downsample_conv
from timm.models.resnetv2 import DownsampleConv, PreActBasic

__all__ = ['DenseLayer', 'PyramidBottleneck', 'ZeroPadShortcut', 'preact_block', 'residual_block', 'vgg_block']


class ZeroPadShortcut(nn.Module):
    """A shortcut without parameters: new channels are zero (option A of He et al., CVPR 2016, arXiv 1512.03385).

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output, at least as many.
        stride: Height of the input over the height of the output.
        average: Average over the stride, as PyramidNet does, instead of taking every so many pixels.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, average: bool = False):
        super().__init__()
        self.extra = out_chs - in_chs
        # An incomplete window at the edge counts, so that odd sizes come out as from a padded 3×3 convolution. That of
        # one pixel is never incomplete, and onnxruntime would take the size of its map, rounded up, for another.
        self.pool = nn.AvgPool2d(stride if average else 1, stride, ceil_mode=average) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra))


def residual_block(
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        block: Type[nn.Module] = BasicBlock,
        zero_pad: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """Make one of timm's residual blocks.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Stride of its 3×3 convolution.
        block: Class of timm's ResNet.
        zero_pad: Where shapes change take a shortcut without parameters instead of a 1×1 convolution.
        **kwargs: What the block takes.
    """
    shortcut = None
    if zero_pad and (stride > 1 or in_chs != out_chs):
        shortcut = ZeroPadShortcut(in_chs, out_chs, stride)
    elif stride > 1 or in_chs != out_chs:
        dd = {k: kwargs[k] for k in ('device', 'dtype') if k in kwargs}
        shortcut = downsample_conv(in_chs, out_chs, kernel_size=1, stride=stride, **dd)
    return block(in_chs, out_chs // block.expansion, stride, shortcut, **kwargs)


def preact_block(in_chs: int, out_chs: int, stride: int = 1, **kwargs: Any) -> PreActBasic:
    """Make the basic block of Wide ResNet (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146).

    Where shapes change, the 1×1 convolution of the shortcut sees the activated input, as in the authors' code.
    """
    return PreActBasic(
        in_chs,
        out_chs,
        stride=stride,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        proj_layer=DownsampleConv,
        **kwargs,
    )


class PyramidBottleneck(nn.Module):
    """The bottleneck block of PyramidNet (Han et al., CVPR 2017, arXiv 1610.02915).

    Norm, 1×1, norm, activation, 3×3, norm, activation, 1×1, norm; nothing is activated before the first or after the
    last convolution. The shortcut has no parameters.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output, four times those inside.
        stride: Stride of the 3×3 convolution.
        **kwargs: Device and type of the weights.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, **kwargs: Any):
        super().__init__()
        width = out_chs // 4
        self.norm = nn.BatchNorm2d(in_chs, **kwargs)
        self.conv1 = ConvNormAct(in_chs, width, kernel_size=1, **kwargs)
        self.conv2 = ConvNormAct(width, width, kernel_size=3, stride=stride, **kwargs)
        self.conv3 = ConvNormAct(width, out_chs, kernel_size=1, apply_act=False, **kwargs)
        self.drop_path = nn.Identity()
        self.shortcut = ZeroPadShortcut(in_chs, out_chs, stride, average=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path(self.conv3(self.conv2(self.conv1(self.norm(x))))) + self.shortcut(x)


class DenseLayer(nn.Module):
    """A layer of DenseNet (Huang et al., CVPR 2017, arXiv 1608.06993) that returns its input with the new channels.

    timm's own layer returns the new channels alone and has no form without a bottleneck.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: 2 puts a transition before the layer, which leaves `out_chs - growth` channels.
        growth: Channels that the layer adds.
        bottleneck: Reduce to four times the growth by a 1×1 convolution first.
        **kwargs: Device and type of the weights.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            growth: int = 12,
            bottleneck: bool = False,
            **kwargs: Any,
    ):
        super().__init__()
        chs = out_chs - growth
        self.transition = DenseTransition(in_chs, chs, **kwargs) if stride > 1 else nn.Identity()
        self.layer = nn.Sequential()
        if bottleneck:
            self.layer.extend((BatchNormAct2d(chs, **kwargs), create_conv2d(chs, 4 * growth, 1, **kwargs)))
            chs = 4 * growth
        self.layer.extend((BatchNormAct2d(chs, **kwargs), create_conv2d(chs, growth, 3, **kwargs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.transition(x)
        return torch.cat((x, self.layer(x)), 1)


def vgg_block(in_chs: int, out_chs: int, stride: int = 1, **kwargs: Any) -> nn.Module:
    """Make a 3×3 convolution with norm and activation, for stride 2 after max pooling.

    Pooling first lets a stage end with the resolution it worked on.
    """
    conv = ConvNormAct(in_chs, out_chs, kernel_size=3, **kwargs)
    return nn.Sequential(nn.MaxPool2d(stride), conv) if stride > 1 else conv
