import pytest
import timm
import torch
import torch.nn as nn

from timm_selfdistill.models.heads import EXIT_HEADS, BottleneckHead, exit_head_kind, head_settings
from timm_selfdistill.models.probe import count_macs, meta_copy
from timm_selfdistill.models.stages import find_stages
from timm_selfdistill.tasks import SelfDistillationModule


@pytest.mark.parametrize('kind', sorted(EXIT_HEADS))
@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('depthwise', [True, False])
def test_heads_take_maps_to_logits(kind, batch_norm, depthwise):
    head = exit_head_kind(kind)(
        in_chs=12, num_classes=5, stride=4, width=16, batch_norm=batch_norm, depthwise=depthwise)
    maps = torch.randn(3, 12, 9, 14)
    features = head.forward_features(maps)
    assert features.shape == (3, head.num_features)
    assert head(maps).shape == (3, 5)
    head.reset_classifier(0)
    assert torch.equal(head.eval()(maps), head.forward_features(maps))
    head.reset_classifier(8)
    head(maps).sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize('kind', sorted(EXIT_HEADS))
@pytest.mark.parametrize('batch_norm', [True, False])
def test_features_are_the_pooled_map_in_any_precision(kind, batch_norm):
    head = exit_head_kind(kind)(in_chs=12, num_classes=5, stride=2, batch_norm=batch_norm).eval()
    maps = torch.randn(2, 12, 9, 14)
    before = head.forward_map(maps)
    assert before.ndim == 4
    assert before.shape[:2] == (2, head.map_chs)
    assert torch.equal(head.pool(before), head.forward_features(maps))
    assert head.forward_features(maps).shape == (2, head.num_features)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(head(maps).float(), head.float()(maps).float(), atol=0.05, rtol=0.05)
    assert head.to(torch.bfloat16)(maps.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_wide_bottleneck_is_as_wide_as_the_deepest_exit():
    head = exit_head_kind('bottleneck-wide')(in_chs=12, num_classes=5, stride=4, width=16, deep_features=72)
    narrow = exit_head_kind('bottleneck')(in_chs=12, num_classes=5, stride=4, width=16, deep_features=72)
    assert (head.num_features, head.map_chs, narrow.num_features) == (72, 72, 16)
    assert head.forward_map(torch.randn(2, 12, 16, 16)).shape == (2, 72, 4, 4)
    assert [k for k in head.state_dict() if not k.startswith('widen.')] == list(narrow.state_dict())
    kernels = [m.kernel_size for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(1, 1), (4, 4), (1, 1)]
    for model in (timm.create_model(f'{n}_sd', exit_head='bottleneck-wide') for n in ('test_resnet', 'test_vit')):
        assert {h.num_features for h in model.exit_heads} == {model.head_hidden_size}


@pytest.mark.parametrize('stride, halvings', [(1, 0), (2, 1), (4, 2), (6, 2), (8, 3)])
def test_separable_heads_halve_the_map_and_double_the_channels(stride, halvings):
    head = exit_head_kind('separable')(in_chs=8, num_classes=5, stride=stride, deep_chs=24)
    assert head.num_features == min(8 * 2 ** halvings, 24)
    assert head.forward_map(torch.randn(2, 8, 24, 32)).shape == (
        2, head.num_features, 24 // 2 ** halvings, 32 // 2 ** halvings)
    assert len(head.down) == max(1, halvings)
    assert exit_head_kind('separable')(in_chs=32, num_classes=5, stride=2, deep_chs=24).num_features == 32


def test_attention_damps_what_the_separable_convolutions_see():
    head = exit_head_kind('separable')(in_chs=8, num_classes=5, stride=4)
    seen = []
    head.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    maps = torch.randn(2, 8, 9, 14)
    head.forward_map(maps)
    gate = seen[0] / maps
    assert 0 < gate.min() < gate.max() < 1
    assert gate.std() > 0.01
    assert head.attend(maps).shape[-2:] == (5, 7)


def test_mixed_pooling_runs_from_mean_to_maximum():
    head = exit_head_kind('pooled')(in_chs=3, num_classes=5)
    maps = torch.randn(2, 3, 8, 12)
    mean, peak = nn.functional.avg_pool2d(maps, (2, 3)).flatten(1), nn.functional.max_pool2d(maps, (2, 3)).flatten(1)
    torch.testing.assert_close(head.forward_features(maps), (mean + peak) / 2)
    for mix, expected in ((-40, mean), (40, peak)):
        nn.init.constant_(head.pool.mix, mix)
        torch.testing.assert_close(head.forward_features(maps), expected)


@pytest.mark.parametrize('in_chs, deep_size, grid', [
    (64, (8, 8), 4), (64, (2, 3), 2), (256, (8, 8), 4), (257, (8, 8), 3), (1024, (8, 8), 2), (2048, (8, 8), 1),
    (6000, (8, 8), 1),
])
def test_pooled_vectors_stay_modest(in_chs, deep_size, grid):
    with torch.device('meta'):
        assert exit_head_kind('pooled')(in_chs=in_chs, num_classes=0, deep_size=deep_size).num_features \
            == in_chs * grid ** 2


def test_a_cascade_takes_the_logits_before_but_teaches_them_nothing():
    head = exit_head_kind('cascade')(in_chs=8, num_classes=5, first=False).eval()
    features, previous = torch.randn(3, head.num_features), torch.randn(3, 5, requires_grad=True)
    logits = head.forward_head(features, previous)
    assert not torch.allclose(logits, head.forward_head(features, previous.flip(1)))
    torch.testing.assert_close(logits, head.forward_head(features, 3 * previous + 1), atol=1e-4, rtol=1e-4)
    logits.sum().backward()
    assert previous.grad is None
    assert head.fc.weight.grad[:, -5:].abs().max() > 0
    head.reset_classifier(7)
    assert head.fc.in_features == head.num_features + 7
    head.reset_classifier(0)
    assert torch.equal(head.forward_head(features, previous), features)
    first = exit_head_kind('cascade')(in_chs=8, num_classes=5)
    assert first.fc.in_features == first.num_features


def test_without_batch_norm_an_image_is_classified_by_itself():
    head = BottleneckHead(8, 5, stride=2, batch_norm=False).train()
    maps = torch.randn(4, 8, 6, 6)
    torch.testing.assert_close(head(maps)[:1], head(maps[:1]))
    assert not torch.allclose(*(BottleneckHead(8, 5, stride=2).train()(m)[:1] for m in (maps, maps[:2])))


def test_dropout_is_the_networks():
    for name in ('test_resnet', 'test_vit'):
        model = timm.create_model(f'{name}_sd', drop_rate=0.4, exits=(1, 2))
        assert [head.drop_rate for head in model.exit_heads] == [0.4, 0.4]
        assert timm.create_model(f'{name}_sd', exits=(1,)).exit_heads[0].drop_rate == 0
    features = torch.ones(1, 1000)
    head = exit_head_kind('linear')(in_chs=1000, num_classes=0, drop_rate=0.4)
    assert 0.3 < (head.train().forward_head(features) == 0).float().mean() < 0.5
    assert torch.equal(head.eval().forward_head(features), features)


@pytest.mark.parametrize('kind', sorted(EXIT_HEADS))
def test_no_head_normalises_otherwise_than_its_network(kind):
    for name, foreign in (('test_resnet', (nn.LayerNorm, nn.GELU)), ('test_vit', (nn.BatchNorm2d, nn.ReLU))):
        model = timm.create_model(f'{name}_sd', exit_head=kind)
        assert not any(isinstance(m, foreign) for m in model.exit_heads.modules())


@pytest.mark.parametrize('name, share', [('resnet18', 0.036), ('resnet50', 0.236)])
def test_separable_heads_are_no_dearer_than_known_ones(name, share):
    with torch.device('meta'):
        model = timm.create_model(f'{name}_sd', exit_head='separable', num_classes=100).eval()
        x = torch.empty(1, 3, 128, 128)
    assert 1 < count_macs(model.forward_exits, x)[0] / count_macs(model, x)[0] < 1 + share


@pytest.mark.parametrize('name, batch_norm, depthwise', [
    ('resnet18', True, False),
    ('efficientnet_b0', True, True),
    ('convnext_atto', False, True),
    ('vit_tiny_patch16_224', False, False),
])
def test_heads_are_like_their_network(name, batch_norm, depthwise):
    with torch.device('meta'):
        model = timm.create_model(f'{name}_sd')
    kinds = {type(m) for m in model.exit_heads.modules()}
    assert any(issubclass(kind, nn.BatchNorm2d) for kind in kinds) == batch_norm
    convs = [m for m in model.exit_heads.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.groups > 1 for m in convs) == depthwise


def test_the_exits_of_resnet50_cost_less_than_a_tenth_of_it():
    with torch.device('meta'):
        model = timm.create_model('resnet50_sd')
    probe = meta_copy(SelfDistillationModule(model))
    x = torch.empty(1, 3, 224, 224, device='meta')
    plain, _ = count_macs(probe.model, x)
    training, _ = count_macs(probe, x)
    inference, _ = count_macs(probe.model.forward_exits, x)
    assert model.num_exits == 4
    assert plain < inference < training < 1.1 * plain


def test_large_strides_are_left_to_the_pooling():
    stages = find_stages(timm.create_model('vgg11', num_classes=0))
    settings = head_settings(nn.Conv2d(3, 3, 3), stages)
    assert max(s['stride'] for s in settings) > 8
    sizes = [sum(p.numel() for p in BottleneckHead(num_classes=0, **s).parameters()) for s in settings]
    assert max(sizes) < 1.2e6


def test_linear_heads_fit_a_frozen_backbone():
    model = timm.create_model('test_vit_sd', exit_head='linear', exits=(1, 3), num_classes=3)
    model.backbone.requires_grad_(False)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    x, y = torch.randn(12, 3, 160, 160), torch.arange(12) % 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(nn.functional.cross_entropy(z, y) for z in model.forward_exits(x)[:-1])
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert [head.num_features for head in model.exit_heads] == [64, 64]
