"""The papers' networks for 32×32 images that timm lacks. Importing the package registers them with timm.

All are `CifarNet`s of 100 classes by default. Their parameters, and what the papers' tables say (for CIFAR-10 where it
makes a difference):

| name | 100 classes | 10 classes | in the tables |
|---|---|---|---|
| resnet18_cifar | 11,220,132 | 11,173,962 | |
| resnet50_cifar | 23,705,252 | 23,520,842 | |
| resnet101_cifar | 42,697,380 | 42,512,970 | |
| resnet152_cifar | 58,341,028 | 58,156,618 | |
| resnet20_cifar | 275,572 | 269,722 | 0.27 M, He et al., arXiv 1512.03385 |
| resnet32_cifar | 470,004 | 464,154 | 0.46 M, the same |
| resnet56_cifar | 858,868 | 853,018 | 0.85 M, the same |
| resnet110_cifar | 1,733,812 | 1,727,962 | 1.7 M, the same |
| wide_resnet20_8_cifar | 17,204,276 | 17,158,106 | |
| wide_resnet44_8_cifar | 41,991,220 | 41,945,050 | |
| wide_resnet28_10_cifar | 36,536,884 | 36,479,194 | 36.5 M, Zagoruyko and Komodakis, arXiv 1605.07146 |
| wide_resnet28_12_cifar | 52,587,060 | 52,517,850 | |
| resnext29_8x64d_cifar | 34,518,948 | 34,426,698 | 34.4 M, Xie et al., arXiv 1611.05431 |
| pyramidnet101_a240_cifar | 13,688,174 | 13,595,924 | |
| vgg19_bn_cifar | 20,081,188 | 20,035,018 | |
| densenet100_12_cifar | 7,084,852 | 6,979,642 | 7.0 M, Huang et al., arXiv 1608.06993 |
| densenet190_40_cifar | 281,972,292 | 281,301,162 | |
| densenetbc100_12_cifar | 800,032 | 769,162 | 0.8 M, the same |
| densenetbc190_40_cifar | 25,821,620 | 25,624,430 | 25.6 M, the same |
"""
from functools import partial
from typing import Any, Dict, List, Tuple, Type

import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck

from .blocks import DenseLayer, PyramidBottleneck, preact_block, residual_block, vgg_block
from .trunk import CifarNet, feature_places


def _cfg(pool_size: Tuple[int, int] = (8, 8), **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': pool_size,
        'crop_pct': 1.0, 'interpolation': 'bilinear',
        'mean': (0.5071, 0.4865, 0.4409), 'std': (0.2673, 0.2564, 0.2762),  # of CIFAR-100's training images
        'first_conv': 'stem.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0',
        **kwargs,
    }


_resnet_cfg = partial(_cfg, paper_ids='arXiv:1512.03385')
_wide_resnet_cfg = partial(_cfg, paper_ids='arXiv:1605.07146')
_densenet_cfg = partial(_cfg, paper_ids='arXiv:1608.06993')

default_cfgs = generate_default_cfgs({
    'resnet18_cifar': _resnet_cfg(pool_size=(4, 4)),
    'resnet50_cifar': _resnet_cfg(pool_size=(4, 4)),
    'resnet101_cifar': _resnet_cfg(pool_size=(4, 4)),
    'resnet152_cifar': _resnet_cfg(pool_size=(4, 4)),
    'resnet20_cifar': _resnet_cfg(),
    'resnet32_cifar': _resnet_cfg(),
    'resnet56_cifar': _resnet_cfg(),
    'resnet110_cifar': _resnet_cfg(),
    'wide_resnet20_8_cifar': _wide_resnet_cfg(),
    'wide_resnet44_8_cifar': _wide_resnet_cfg(),
    'wide_resnet28_10_cifar': _wide_resnet_cfg(),
    'wide_resnet28_12_cifar': _wide_resnet_cfg(),
    'resnext29_8x64d_cifar': _cfg(paper_ids='arXiv:1611.05431'),
    'pyramidnet101_a240_cifar': _cfg(paper_ids='arXiv:1610.02915'),
    'vgg19_bn_cifar': _cfg(pool_size=(2, 2), paper_ids='arXiv:1409.1556'),
    'densenet100_12_cifar': _densenet_cfg(),
    'densenet190_40_cifar': _densenet_cfg(),
    'densenetbc100_12_cifar': _densenet_cfg(),
    'densenetbc190_40_cifar': _densenet_cfg(),
})


def _create(variant: str, pretrained: bool, network: Dict[str, Any], **kwargs: Any) -> nn.Module:
    """Build a network from the arguments of `CifarNet` that make it; by default its features are the stages' ends."""
    middle = network.get('middles', True)
    places = [len(feature_places(len(stage), middle)) for stage in network['widths']]
    ends = tuple(sum(places[:i + 1]) - 1 for i in range(len(places)))
    feature_cfg = dict(feature_cls='getter', out_indices=ends)
    return build_model_with_cfg(CifarNet, variant, pretrained, feature_cfg=feature_cfg, **dict(network, **kwargs))


# -- ResNet (He et al., CVPR 2016, arXiv 1512.03385) and ResNeXt (Xie et al., CVPR 2017, arXiv 1611.05431) -------------


def _resnet(block: Type[nn.Module], depths: Tuple[int, ...]) -> Dict[str, Any]:
    """An ImageNet ResNet whose stem keeps the resolution: 3×3 of stride 1 and no pooling."""
    widths = [[64 * 2 ** s * block.expansion] * depth for s, depth in enumerate(depths)]
    return dict(block=partial(residual_block, block=block), widths=widths, stem_width=64)


def _thin_resnet(depth: int) -> Dict[str, Any]:
    """The authors' own ResNet for CIFAR of 6n + 2 layers."""
    widths = [[width] * ((depth - 2) // 6) for width in (16, 32, 64)]
    return dict(block=partial(residual_block, zero_pad=True), widths=widths, stem_width=16)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-18 with a 3×3 stem of stride 1 and no pooling before the stages."""
    return _create('resnet18_cifar', pretrained, _resnet(BasicBlock, (2, 2, 2, 2)), **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-50 with a 3×3 stem of stride 1 and no pooling before the stages."""
    return _create('resnet50_cifar', pretrained, _resnet(Bottleneck, (3, 4, 6, 3)), **kwargs)


@register_model
def resnet101_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-101 with a 3×3 stem of stride 1 and no pooling before the stages."""
    return _create('resnet101_cifar', pretrained, _resnet(Bottleneck, (3, 4, 23, 3)), **kwargs)


@register_model
def resnet152_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-152 with a 3×3 stem of stride 1 and no pooling before the stages."""
    return _create('resnet152_cifar', pretrained, _resnet(Bottleneck, (3, 8, 36, 3)), **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-20 for CIFAR: three stages of 16, 32 and 64 channels, shortcuts without parameters."""
    return _create('resnet20_cifar', pretrained, _thin_resnet(20), **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-32 for CIFAR: three stages of 16, 32 and 64 channels, shortcuts without parameters."""
    return _create('resnet32_cifar', pretrained, _thin_resnet(32), **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-56 for CIFAR: three stages of 16, 32 and 64 channels, shortcuts without parameters."""
    return _create('resnet56_cifar', pretrained, _thin_resnet(56), **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-110 for CIFAR: three stages of 16, 32 and 64 channels, shortcuts without parameters."""
    return _create('resnet110_cifar', pretrained, _thin_resnet(110), **kwargs)


@register_model
def resnext29_8x64d_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNeXt-29 for CIFAR: three stages of three bottlenecks, 8 groups of 64 channels in the first."""
    network = dict(_resnet(Bottleneck, (3, 3, 3)), block=partial(residual_block, block=Bottleneck, cardinality=8))
    return _create('resnext29_8x64d_cifar', pretrained, network, **kwargs)


# -- Wide ResNet (Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146) ------------------------------------------------


def _wide_resnet(depth: int, factor: int) -> Dict[str, Any]:
    """Three stages of `depth` blocks, `factor` times as wide as in the ResNets for CIFAR, without dropout inside."""
    widths = [[width * factor] * depth for width in (16, 32, 64)]
    return dict(block=preact_block, widths=widths, stem_width=16, pre_activation=True, stem_norm=False)


@register_model
def wide_resnet20_8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """Wide ResNet of three blocks a stage, 8 times as wide.

    The name is that of Be Your Own Teacher (arXiv 1905.08094), which counts 6n + 2 layers; by the 6n + 4 of the
    Wide ResNet paper it is a WRN-22-8.
    """
    return _create('wide_resnet20_8_cifar', pretrained, _wide_resnet(3, 8), **kwargs)


@register_model
def wide_resnet44_8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """Wide ResNet of seven blocks a stage, 8 times as wide.

    The name is that of Be Your Own Teacher (arXiv 1905.08094), which counts 6n + 2 layers; by the 6n + 4 of the
    Wide ResNet paper it is a WRN-46-8.
    """
    return _create('wide_resnet44_8_cifar', pretrained, _wide_resnet(7, 8), **kwargs)


@register_model
def wide_resnet28_10_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """WRN-28-10: four blocks a stage, 10 times as wide."""
    return _create('wide_resnet28_10_cifar', pretrained, _wide_resnet(4, 10), **kwargs)


@register_model
def wide_resnet28_12_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """WRN-28-12: four blocks a stage, 12 times as wide."""
    return _create('wide_resnet28_12_cifar', pretrained, _wide_resnet(4, 12), **kwargs)


# -- PyramidNet (Han et al., CVPR 2017, arXiv 1610.02915) --------------------------------------------------------------


def _pyramidnet(depth: int, alpha: int) -> Dict[str, Any]:
    """Bottlenecks, 9n + 2 layers; every block is wider than the one before by the same step, `alpha` in all."""
    n = (depth - 2) // 9
    # rounded only after adding up, as in the authors' code
    widths = [[4 * round(16 + alpha * (s * n + i + 1) / (3 * n)) for i in range(n)] for s in range(3)]
    return dict(block=PyramidBottleneck, widths=widths, stem_width=16, pre_activation=True)


@register_model
def pyramidnet101_a240_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """PyramidNet-101 with bottlenecks and α = 240, widened by addition."""
    return _create('pyramidnet101_a240_cifar', pretrained, _pyramidnet(101, 240), **kwargs)


# -- VGG (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556) ----------------------------------------------------------


@register_model
def vgg19_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """VGG-19 with batch norm, global average pooling and one linear layer.

    The convolutions are the original's, without the bias that their norm makes useless; pooling starts a stage, and
    there is none after the last. The head is one linear layer on 512 channels, not the original's three on 4,096. Which
    head the VGG-19 of Be Your Own Teacher's table has (baseline 64.47 %), is not known here.
    """
    widths = [[64], [128] * 2, [256] * 4, [512] * 4, [512] * 4]  # the stem is the first stage's other convolution
    network = dict(block=vgg_block, widths=widths, stem_width=64, middles=False)
    return _create('vgg19_bn_cifar', pretrained, network, **kwargs)


# -- DenseNet (Huang et al., CVPR 2017, arXiv 1608.06993) --------------------------------------------------------------


def _densenet(depth: int, growth: int, bc: bool = False) -> Dict[str, Any]:
    """Three dense blocks. `bc`: with bottlenecks, and transitions that halve the channels."""
    layers = (depth - 4) // (6 if bc else 3)
    stem_width = chs = 2 * growth if bc else 16
    widths: List[List[int]] = []
    for s in range(3):
        if s and bc:
            chs //= 2
        widths.append([chs + growth * (i + 1) for i in range(layers)])
        chs = widths[-1][-1]
    block = partial(DenseLayer, growth=growth, bottleneck=bc)
    return dict(block=block, widths=widths, stem_width=stem_width, pre_activation=True, stem_norm=False)


@register_model
def densenet100_12_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """DenseNet of 100 layers that add 12 channels each."""
    return _create('densenet100_12_cifar', pretrained, _densenet(100, 12), **kwargs)


@register_model
def densenet190_40_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """DenseNet of 190 layers that add 40 channels each, without bottlenecks: 282 million parameters."""
    return _create('densenet190_40_cifar', pretrained, _densenet(190, 40), **kwargs)


@register_model
def densenetbc100_12_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """DenseNet-BC of 100 layers with growth 12."""
    return _create('densenetbc100_12_cifar', pretrained, _densenet(100, 12, bc=True), **kwargs)


@register_model
def densenetbc190_40_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """DenseNet-BC of 190 layers with growth 40."""
    return _create('densenetbc190_40_cifar', pretrained, _densenet(190, 40, bc=True), **kwargs)
