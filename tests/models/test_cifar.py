"""The papers' networks for 32×32 images: their shapes, their sizes, timm's contract, exits."""
import functools
import re

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models.densenet import DenseNet
from timm.models.resnet import Bottleneck, ResNet

from timm_selfdistill.models import cifar
from timm_selfdistill.models.cifar.blocks import PyramidBottleneck, ZeroPadShortcut, preact_block

NAMES = timm.list_models('*_cifar')
ONE_OF_EACH_FAMILY = [
    'resnet20_cifar', 'resnet18_cifar', 'wide_resnet20_8_cifar', 'resnext29_8x64d_cifar', 'pyramidnet101_a240_cifar',
    'vgg19_bn_cifar', 'densenet100_12_cifar', 'densenetbc100_12_cifar',
]
SMALL = ['resnet20_cifar', 'wide_resnet20_8_cifar', 'vgg19_bn_cifar', 'densenetbc100_12_cifar']
RESIDUAL = [n for n in ONE_OF_EACH_FAMILY if not n.startswith(('vgg', 'densenet'))]


def on_meta(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs).eval()


def create(name):
    """Create a network of seven classes, in eval mode, whose norms do something: fresh ones hide what they are fed."""
    model = timm.create_model(name, num_classes=7).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
    return model


@pytest.fixture(scope='module', params=ONE_OF_EACH_FAMILY)
def built(request):
    """A network, small images, and its final features and feature maps; tests leave it as it is."""
    torch.manual_seed(0)
    model = create(request.param)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        return model, x, *model.forward_intermediates(x)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@functools.cache
def parameters_of(name, num_classes):
    return parameters(on_meta(name, num_classes=num_classes))


# -- what is registered ------------------------------------------------------------------------------------------------


def test_timm_knows_the_networks_and_gives_them_exits():
    assert len(NAMES) == 19
    assert timm.list_models(module='cifar') == NAMES
    assert {f'{n}_sd' for n in NAMES} <= set(timm.list_models())
    assert timm.list_pretrained('*_cifar*') == ['resnet20_cifar_sd.byot_cifar100']
    assert set(NAMES) <= set(cifar.__all__)


@pytest.mark.parametrize('name', NAMES)
def test_a_network_is_what_its_cfg_and_its_feature_info_say(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    assert (model.num_classes, cfg['num_classes'], cfg['input_size'], cfg['crop_pct']) == (100, 100, (3, 32, 32), 1.0)
    final, taps = model.forward_intermediates(torch.empty(2, 3, 32, 32, device='meta'))
    assert final.shape == (2, model.num_features, *cfg['pool_size'])
    assert [tuple(t.shape) for t in taps] == [
        (2, f['num_chs'], 32 // f['reduction'], 32 // f['reduction']) for f in model.feature_info
    ]
    assert model.get_submodule(cfg['first_conv']).in_channels == 3
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    assert model.get_classifier().out_features == 100


@pytest.mark.parametrize('name', NAMES)
def test_features_lie_at_the_ends_of_the_stages_and_in_their_middles(name):
    model = on_meta(name)
    depths = [len(stage) for stage in model.stages]
    places = [f['module'] for f in model.feature_info]
    ends = [f'stages.{s}' for s in range(len(depths))]
    if name.startswith('vgg'):
        assert places == ends
        assert [f['reduction'] for f in model.feature_info] == [1, 2, 4, 8, 16]
    else:
        middles = [f'stages.{s}.{-(-depth // 2) - 1}' for s, depth in enumerate(depths)]
        assert places == [place for pair in zip(middles, ends) for place in pair]
    features = on_meta(name, features_only=True)
    assert features.feature_info.module_name() == ends
    maps = features(torch.empty(1, 3, 32, 32, device='meta'))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()


@pytest.mark.parametrize('name', ONE_OF_EACH_FAMILY)
def test_images_of_other_sizes_and_channels_are_taken(name):
    model = on_meta(name, in_chans=1, num_classes=5)
    x = torch.empty(2, 1, 48, 33, device='meta')
    assert model(x).shape == (2, 5)


# -- sizes, by arithmetic ----------------------------------------------------------------------------------------------


def conv(size, *chs):
    """Weights of a convolution size×size from chs[0] to chs[1] channels."""
    return size * size * chs[0] * chs[1]


def thin_resnet(n, classes):
    first = conv(3, 3, 16) + 2 * 16
    same = sum(2 * n * (conv(3, w, w) + 2 * w) for w in (16, 32, 64))
    narrower_inputs = conv(3, 32, 32) // 2 + conv(3, 64, 64) // 2  # the first convolutions of the stages 2 and 3
    return first + same - narrower_inputs + 65 * classes


def wide_resnet(n, k, classes):
    total, before = conv(3, 3, 16), 16
    for w in (16 * k, 32 * k, 64 * k):
        for i in range(n):
            total += conv(3, before, w) + conv(3, w, w) + 2 * before + 2 * w + (conv(1, before, w) if i == 0 else 0)
            before = w
    return total + 2 * before + (before + 1) * classes


def densenet(depth, k, bc, classes):
    chs = 2 * k if bc else 16
    total = conv(3, 3, chs)
    for block in range(3):
        for _ in range((depth - 4) // (6 if bc else 3)):
            total += 2 * chs + (conv(1, chs, 4 * k) + 2 * 4 * k + conv(3, 4 * k, k) if bc else conv(3, chs, k))
            chs += k
        if block < 2:
            out = chs // 2 if bc else chs
            total += 2 * chs + conv(1, chs, out)
            chs = out
    return total + 2 * chs + (chs + 1) * classes


def vgg19(classes):
    chs = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
    return sum(conv(3, a, b) + 2 * b for a, b in zip(chs, chs[1:])) + 513 * classes


def pyramidnet(n, alpha, classes):
    total, before = conv(3, 3, 16) + 2 * 16, 16
    for i in range(1, 3 * n + 1):
        w = int(16 + alpha * i / (3 * n) + 0.5)
        total += 2 * before + conv(1, before, w) + 2 * w + conv(3, w, w) + 2 * w + conv(1, w, 4 * w) + 2 * 4 * w
        before = 4 * w
    return total + 2 * before + (before + 1) * classes


@pytest.mark.parametrize('name, count', [
    ('resnet20_cifar', lambda c: thin_resnet(3, c)),
    ('resnet32_cifar', lambda c: thin_resnet(5, c)),
    ('resnet56_cifar', lambda c: thin_resnet(9, c)),
    ('resnet110_cifar', lambda c: thin_resnet(18, c)),
    ('wide_resnet20_8_cifar', lambda c: wide_resnet(3, 8, c)),
    ('wide_resnet44_8_cifar', lambda c: wide_resnet(7, 8, c)),
    ('wide_resnet28_10_cifar', lambda c: wide_resnet(4, 10, c)),
    ('wide_resnet28_12_cifar', lambda c: wide_resnet(4, 12, c)),
    ('pyramidnet101_a240_cifar', lambda c: pyramidnet(11, 240, c)),
    ('vgg19_bn_cifar', vgg19),
    ('densenet100_12_cifar', lambda c: densenet(100, 12, False, c)),
    ('densenet190_40_cifar', lambda c: densenet(190, 40, False, c)),
    ('densenetbc100_12_cifar', lambda c: densenet(100, 12, True, c)),
    ('densenetbc190_40_cifar', lambda c: densenet(190, 40, True, c)),
])
def test_parameters_are_those_of_the_papers_arithmetic(name, count):
    assert parameters_of(name, 100) == count(100)
    assert parameters_of(name, 10) == count(10)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet101', 'resnet152'])
def test_imagenet_resnets_differ_in_nothing_but_the_stem_and_the_classes(name):
    stem = conv(7, 3, 64) - conv(3, 3, 64)
    assert parameters_of(f'{name}_cifar', 100) == parameters_of(name, 100) - stem


# Tables of the papers that the networks come from, parameters in millions for 10 classes.
@pytest.mark.parametrize('name, millions', [
    ('resnet20_cifar', '0.27'), ('resnet32_cifar', '0.46'), ('resnet56_cifar', '0.85'), ('resnet110_cifar', '1.7'),
    ('wide_resnet28_10_cifar', '36.5'), ('resnext29_8x64d_cifar', '34.4'), ('densenet100_12_cifar', '7.0'),
    ('densenetbc100_12_cifar', '0.8'), ('densenetbc190_40_cifar', '25.6'),
])
def test_parameters_round_to_the_papers_figures(name, millions):
    digits = len(millions.split('.')[1])
    assert f'{parameters_of(name, 10) / 1e6:.{digits}f}' == millions


def test_the_table_of_parameters_is_right():
    rows = re.findall(r'^\| (\w+_cifar) \| ([\d,]+) \| ([\d,]+) \|', cifar.__doc__, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(NAMES)
    for name, *counts in rows:
        assert [f'{parameters_of(name, n):,}' for n in (100, 10)] == counts


# -- the same networks made in another way -----------------------------------------------------------------------------


def same_weights(model, other):
    """Give `other` the weights of `model`, in their order; both in eval mode."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    other.load_state_dict(dict(zip(theirs, ours.values())))
    return other.eval()


def small_stem(width):
    return nn.Conv2d(3, width, 3, padding=1, bias=False)


def timm_resnet18():
    model = timm.create_model('resnet18', num_classes=7)
    model.conv1, model.maxpool = small_stem(64), nn.Identity()
    return model


def timm_resnext29():
    model = ResNet(Bottleneck, (3, 3, 3), channels=(64, 128, 256), cardinality=8, base_width=64, num_classes=7)
    model.conv1, model.maxpool, model.layer4 = small_stem(64), nn.Identity(), nn.Identity()
    return model


def timm_densenetbc():
    model = DenseNet(growth_rate=12, block_config=(16, 16, 16), num_classes=7)
    model.features.conv0, model.features.norm0, model.features.pool0 = small_stem(24), nn.Identity(), nn.Identity()
    return model


@pytest.mark.parametrize('name, other', [
    ('resnet18_cifar', timm_resnet18),
    ('resnext29_8x64d_cifar', timm_resnext29),
    ('densenetbc100_12_cifar', timm_densenetbc),
])
def test_timms_own_network_with_a_small_stem_gives_the_same(name, other):
    model = create(name)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(same_weights(model, other())(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_shortcuts_of_the_thin_resnets_have_no_parameters():
    model = on_meta('resnet32_cifar')
    assert all(m.kernel_size == (3, 3) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_a_shortcut_without_parameters_subsamples_or_averages_and_pads_with_zeros():
    x = torch.randn(2, 3, 6, 6)
    plain, mean = ZeroPadShortcut(3, 5, 2)(x), ZeroPadShortcut(3, 5, 2, average=True)(x)
    assert torch.equal(plain[:, :3], x[:, :, ::2, ::2])
    torch.testing.assert_close(mean[:, :3], x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))
    assert not plain[:, 3:].any() and not mean[:, 3:].any()
    assert plain.shape == mean.shape == (2, 5, 3, 3)
    assert torch.equal(ZeroPadShortcut(3, 3)(x), x)


def test_the_pyramid_widens_by_the_same_step_all_the_way():
    model = on_meta('pyramidnet101_a240_cifar')
    widths = [16] + [block.conv2.conv.out_channels for stage in model.stages for block in stage]
    assert (len(widths), widths[-1]) == (34, 256)
    assert {b - a for a, b in zip(widths, widths[1:])} == {7, 8}
    assert widths == sorted(round(16 + i * 240 / 33) for i in range(34))


def test_a_wide_block_projects_what_its_first_norm_and_activation_give():
    block = preact_block(4, 8, 2).eval()
    nn.init.normal_(block.norm1.bias)
    nn.init.normal_(block.norm2.bias)

    def activated(norm, x):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).relu()

    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        a = activated(block.norm1, x)
        b = activated(block.norm2, F.conv2d(a, block.conv1.weight, stride=2, padding=1))
        expected = F.conv2d(b, block.conv2.weight, padding=1) + F.conv2d(a, block.downsample.conv.weight, stride=2)
        torch.testing.assert_close(block(x), expected)


def test_nothing_is_activated_at_the_ends_of_a_pyramids_block():
    block = PyramidBottleneck(8, 16, 2).eval()
    nn.init.constant_(block.norm.bias, -10.)  # an activation right behind it would leave nothing
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.weight, -1. if m is block.conv1.conv or m is block.conv3.conv else 1.)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert ((block(x) - block.shortcut(x)) < -10).all()
    assert sum(isinstance(m, nn.ReLU) for m in block.modules()) == 2


@pytest.mark.parametrize('name', ['wide_resnet28_10_cifar', 'pyramidnet101_a240_cifar', 'densenet100_12_cifar'])
def test_pre_activation_networks_normalise_last(name):
    model = on_meta(name)
    assert isinstance(model.norm, nn.BatchNorm2d) and isinstance(model.norm.act, nn.ReLU)
    assert not any(isinstance(m, nn.ReLU) for m in model.stem.modules())


# -- timm's contract ---------------------------------------------------------------------------------------------------


def test_head_of_the_final_features_is_the_forward_pass(built):
    model, x, final, taps = built
    with torch.no_grad():
        assert torch.equal(model.forward_head(final), model(x))
        assert torch.equal(model.forward_features(x), final)
        vector = model.forward_head(final, pre_logits=True)
        assert vector.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(vector), model(x))


def test_a_map_taken_alone_is_that_of_the_full_pass_and_of_its_module(built):
    model, x, final, taps = built
    seen = {}
    hooks = [
        model.get_submodule(f['module']).register_forward_hook(lambda m, args, out, i=i: seen.update({i: out.clone()}))
        for i, f in enumerate(model.feature_info) if f['module'].count('.') == 2
    ]
    with torch.no_grad():
        for i, tap in enumerate(taps):
            alone = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
            assert len(alone) == 1
            assert torch.equal(alone[0], tap)  # nothing that ran later has written into it
            assert torch.equal(seen.get(i, tap), tap)
    assert len(seen) == len(hooks)
    for hook in hooks:
        hook.remove()
    two = model.forward_intermediates(x, indices=[2, 0], intermediates_only=True)
    assert [t.shape for t in two] == [taps[0].shape, taps[2].shape]
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2


def test_stopping_early_runs_nothing_behind_the_map(built):
    model, x, *_ = built
    ran = []
    hooks = [
        module.register_forward_hook(lambda *args, name=name: ran.append(name))
        for name, module in model.named_modules() if re.fullmatch(r'stages\.\d+\.\d+|norm|head', name)
    ]
    model.forward_intermediates(x, indices=[0], stop_early=True)
    for hook in hooks:
        hook.remove()
    assert ran == [f'stages.0.{i}' for i in range(len(ran))]
    assert len(ran) == model.feature_ends[0]


def test_the_final_norm_is_for_the_last_map_alone(built):
    model, x, final, taps = built
    with torch.no_grad():
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed[:-1], taps[:-1]))
    assert torch.equal(normed[-1], final)
    assert torch.equal(taps[-1], final) == isinstance(model.norm, nn.Identity)


@pytest.mark.parametrize('name', SMALL)
def test_a_pruned_network_is_the_beginning_of_the_whole(name):
    torch.manual_seed(0)
    model, whole = (create(name) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        taps = whole.forward_intermediates(x, intermediates_only=True)
        for k in range(len(taps) - 1, -1, -1):  # each time a piece more goes
            assert model.prune_intermediate_layers([k], prune_norm=True) == [k]
            assert torch.equal(model(x), taps[k])
            assert torch.equal(model.forward_intermediates(x, [k])[0], taps[k])
            assert len(model.forward_intermediates(x)[1]) == len(model.feature_info) == k + 1
            assert model.num_features == taps[k].shape[1]
            kept = model.state_dict()
            assert kept.keys() < whole.state_dict().keys()
        model.reset_classifier(5, 'avg')
        assert model(x).shape == (1, 5)
    model.reset_classifier(0)
    last = sum(p.numel() for p in whole.stages[0][:whole.feature_ends[0]].parameters())
    assert parameters(model) == last + parameters(whole.stem)


def test_pruning_nothing_but_the_head_leaves_the_norm(built):
    model, x, final, taps = built
    kept = timm.create_model(model.pretrained_cfg['architecture'], num_classes=7).eval()
    kept.load_state_dict(model.state_dict())
    kept.prune_intermediate_layers(1)
    with torch.no_grad():
        assert torch.equal(kept(x), final)
    assert kept.num_classes == 0


@pytest.mark.parametrize('name', ONE_OF_EACH_FAMILY)
def test_the_classifier_can_go_and_come_back(name):
    model = on_meta(name, num_classes=0)
    x = torch.empty(2, 3, 32, 32, device='meta')
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(9, 'catavgmax')
    assert model(x).shape == (2, 9)
    assert model.head_hidden_size == 2 * model.num_features
    assert model.get_classifier().weight.is_meta
    model.reset_classifier(0, '')
    assert model(x).shape[1:] == (model.num_features, *model.pretrained_cfg['pool_size'])


@pytest.mark.parametrize('name', ONE_OF_EACH_FAMILY)
def test_layer_decay_goes_by_blocks_and_by_stages(name):
    model = on_meta(name)
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        count = len(model.stages) if coarse else sum(len(stage) for stage in model.stages)
        assert list(layers.values()) == sorted(layers.values())
        assert layers['stem.conv.weight'] == 0
        assert layers['head.fc.weight'] == max(layers.values()) == count + 1
        assert layers.get('norm.weight', count) == count


@pytest.mark.parametrize('name', RESIDUAL)
def test_stochastic_depth_rises_to_its_rate(name):
    model = on_meta(name, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])


@pytest.mark.parametrize('name', ['resnet20_cifar', 'pyramidnet101_a240_cifar'])
def test_stochastic_depth_drops_branches_in_training_only(name):
    model = timm.create_model(name, drop_path_rate=0.9, num_classes=7)
    x = torch.randn(1, 3, 16, 16).expand(8, -1, -1, -1)
    with torch.no_grad():
        assert not torch.allclose(*model(x)[:2])
        model.eval()
        torch.testing.assert_close(*model(x)[:2])


@pytest.mark.parametrize('name', ['vgg19_bn_cifar', 'densenetbc100_12_cifar'])
def test_networks_without_residual_branches_refuse_stochastic_depth(name):
    with pytest.raises(ValueError, match=r'drop_path_rate=0.3: .*no residual branches.*only 0'):
        on_meta(name, drop_path_rate=0.3)


def test_dropout_is_before_the_classifier():
    model = timm.create_model('resnet20_cifar', drop_rate=0.5)
    features = torch.ones(1, 64, 8, 8)
    assert not model.forward_head(features, pre_logits=True).all()
    assert model.eval().forward_head(features, pre_logits=True).all()


@pytest.mark.parametrize('name', SMALL)
def test_checkpointing_changes_memory_not_results(name):
    model, x = timm.create_model(name, num_classes=7).eval(), torch.randn(2, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        final, taps = model.forward_intermediates(x)
        (model.forward_head(final).square().mean() + taps[0].square().mean()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_there_are_no_weights_to_load():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for resnet20_cifar'):
        timm.create_model('resnet20_cifar', pretrained=True)


def test_convolutions_start_with_the_variance_of_the_papers():
    model = timm.create_model('resnet20_cifar')
    for m in model.stages.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.std().item() == pytest.approx((2 / (9 * m.out_channels)) ** 0.5, rel=0.1)


# -- exits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [
    'resnet20_cifar', 'resnet18_cifar', 'wide_resnet28_10_cifar', 'pyramidnet101_a240_cifar', 'vgg19_bn_cifar',
])
def test_networks_get_three_auxiliary_exits(name):
    model = on_meta(f'{name}_sd', num_classes=7)
    assert model.num_exits == 4
    shares = [model.stages[i].share for i in model.exits]
    assert 0.04 < shares[0] < shares[1] < shares[2] < 0.95
    ends = [s.index for s, after in zip(model.stages, model.stages[1:]) if s.size != after.size]
    assert set(ends[-3:]) <= set(model.exits)  # where the resolution changes, and a middle where that is not enough
    assert [z.shape for z in model.forward_exits(torch.empty(2, 3, 32, 32, device='meta'))] == [(2, 7)] * 4


@pytest.mark.parametrize('name', ['resnet20_cifar', 'vgg19_bn_cifar', 'densenetbc100_12_cifar'])
def test_a_truncated_network_gives_what_its_exit_gives(name):
    model = timm.create_model(f'{name}_sd', num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model.forward_exits(x)
        assert torch.equal(logits[-1], model.backbone(x))
        sizes = []
        for k, expected in enumerate(logits):
            network = model.truncate(k)
            assert torch.equal(network(x), expected)
            sizes.append(parameters(network.backbone) if k < 3 else parameters(network))
    assert sizes == sorted(sizes)
