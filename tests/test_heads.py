import pytest
import timm
import torch
import torch.nn as nn

from timm_selfdistill.heads import EXIT_HEADS, BottleneckHead, create_exit_head, head_settings
from timm_selfdistill.stages import count_macs, find_stages, meta_copy
from timm_selfdistill.tasks import SelfDistillationModule


@pytest.mark.parametrize('kind', sorted(EXIT_HEADS))
@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('depthwise', [True, False])
def test_heads_take_maps_to_logits(kind, batch_norm, depthwise):
    head = create_exit_head(
        kind, in_chs=12, num_classes=5, stride=4, width=16, batch_norm=batch_norm, depthwise=depthwise)
    maps = torch.randn(3, 12, 9, 14)
    features = head.forward_features(maps)
    assert features.shape == (3, head.num_features)
    assert head(maps).shape == (3, 5)
    head.reset_classifier(0)
    assert torch.equal(head.eval()(maps), head.forward_features(maps))
    head.reset_classifier(8)
    head(maps).sum().backward()
    assert all(p.grad is not None for p in head.parameters())


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
    head = create_exit_head('linear', in_chs=1000, num_classes=0, drop_rate=0.4)
    assert 0.3 < (head.train().forward_head(features) == 0).float().mean() < 0.5
    assert torch.equal(head.eval().forward_head(features), features)


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
