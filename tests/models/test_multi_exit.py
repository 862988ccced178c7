import copy
import functools
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_selfdistill import MultiExit, add_exits
from timm_selfdistill.costs import exit_costs
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.models.heads import EXIT_HEADS

FAMILIES = ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet']


@pytest.fixture(params=FAMILIES)
def model(request):
    return timm.create_model(f'{request.param}_sd', num_classes=7).eval()


@pytest.fixture
def images(model):
    return torch.randn(2, *model.pretrained_cfg['input_size'])


def test_forward_is_the_plain_network_bit_for_bit(model, images):
    arch = model.pretrained_cfg['architecture'].removesuffix('_sd')
    plain = timm.create_model(arch, num_classes=7).eval()
    plain.load_state_dict({k[9:]: v for k, v in model.state_dict().items() if k.startswith('backbone.')})
    assert torch.equal(model(images), plain(images))
    assert torch.equal(model.forward_exits(images)[-1], plain(images))


def test_every_exit_gives_logits(model, images):
    logits = model.forward_exits(images)
    assert model.num_exits == len(logits) == len(model.exits) + 1 > 2
    assert all(z.shape == (2, 7) for z in logits)
    for k in range(model.num_exits):
        shorter = model.forward_exits(images, upto=k)
        assert len(shorter) == k + 1
        assert all(torch.equal(a, b) for a, b in zip(shorter, logits))


def test_features_are_what_the_classifiers_see(model, images):
    logits, features = model.forward_exits(images, return_features=True)
    for head, z, f in zip(model.exit_heads, logits, features):
        assert torch.equal(head.forward_head(f), z)
    assert features[-1].shape == (2, model.head_hidden_size)
    assert not features[-1].requires_grad
    assert features[0].requires_grad


@functools.cache
def create_once(name, kind):
    exits = (2, 3) if kind == 'inverted' and name == 'test_resnet' else None  # it is too dear there to be placed
    return timm.create_model(f'{name}_sd', num_classes=7, exit_head=kind, exits=exits).eval()


@pytest.fixture(params=[(name, kind) for name in FAMILIES[:3] for kind in sorted(EXIT_HEADS)], ids='-'.join)
def any_head(request):
    """A network with each kind of exit head."""
    return copy.deepcopy(create_once(*request.param))


def images_for(model, count=2):
    return torch.randn(count, *model.pretrained_cfg['input_size'])


def test_every_kind_of_head_ends_a_network(any_head):
    model = any_head
    x = images_for(model)
    logits, features = model.forward_exits(x, return_features=True)
    assert [z.shape for z in logits] == [(2, 7)] * model.num_exits
    assert [f.shape for f in features[:-1]] == [(2, head.num_features) for head in model.exit_heads]
    assert torch.equal(logits[-1], model(x))
    assert torch.equal(logits[-1], model.backbone(x))
    for k in range(model.num_exits):
        cut = model.truncate(k)
        assert torch.equal(cut(x), logits[k])
        assert torch.equal(cut.forward_head(cut.forward_features(x)), logits[k])
        assert torch.equal(cut.forward_head(cut.forward_features(x), pre_logits=True), features[k])
        assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x, upto=k), logits))
        cut.reset_classifier(0)
        assert torch.equal(cut(x), features[k])
        cut.reset_classifier(3)
        assert cut(x).shape == (2, 3)
    model.reset_classifier(4)
    assert [z.shape for z in model.forward_exits(x)] == [(2, 4)] * model.num_exits


@pytest.mark.parametrize('name', FAMILIES)
def test_the_plain_network_cut_out_of_saved_weights_is_one_like_any_other(name, tmp_path):
    model = timm.create_model(f'{name}_sd', num_classes=7).eval()
    x = images_for(model)
    whole, end = (f'local-dir:{tmp_path / part}' for part in ('whole', 'end'))
    save_model(model, tmp_path / 'whole')
    deepest = model.num_exits - 1
    plain = timm.create_model(whole, pretrained=True, truncate=deepest).eval()
    assert torch.equal(plain(x), model(x))
    own = timm.get_pretrained_cfg(name)
    assert all(plain.pretrained_cfg[k] == getattr(own, k) for k in ('classifier', 'first_conv'))
    save_model(plain, tmp_path / 'end')
    assert torch.equal(timm.create_model(end, pretrained=True).eval()(x), model(x))
    for source, kwargs in ((whole, dict(truncate=deepest)), (end, {})):
        assert timm.create_model(source, pretrained=True, num_classes=3, **kwargs).eval()(x).shape == (2, 3)
        assert timm.create_model(source, pretrained=True, in_chans=1, **kwargs).eval()(x[:, :1]).shape == (2, 7)


@pytest.mark.slow
def test_every_kind_of_head_is_saved_and_loaded(any_head, tmp_path):
    model = any_head
    x = images_for(model)
    logits = model.forward_exits(x)
    whole, end = (f'local-dir:{tmp_path / name}' for name in ('whole', 'end'))
    save_model(model, tmp_path / 'whole')
    loaded = timm.create_model(whole, pretrained=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(loaded.forward_exits(x), logits))
    cut = timm.create_model(whole, pretrained=True, truncate=1).eval()
    assert torch.equal(cut(x), logits[1])
    save_model(cut, tmp_path / 'end')
    assert torch.equal(timm.create_model(end, pretrained=True).eval()(x), logits[1])
    other = timm.create_model(end, pretrained=True, num_classes=3).eval()
    assert other(x).shape == (2, 3)
    kept = {k: v for k, v in other.state_dict().items() if not k.startswith(other.pretrained_cfg['classifier'])}
    assert {k.split('.')[0] for k in cut.state_dict().keys() - kept.keys()} <= {'head', 'exit_heads'}
    assert all(torch.equal(v, cut.state_dict()[k]) for k, v in kept.items())


def test_every_parameter_of_every_kind_of_head_learns(any_head):
    model = any_head
    x = images_for(model)
    model.train()
    sum(z.square().mean() for z in model.forward_exits(x)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert [n for n, p in model.exit_heads.named_parameters() if not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize('kind', sorted(EXIT_HEADS))
def test_every_kind_of_head_follows_the_backbones_dtype_and_device(kind):
    plain = timm.create_model('test_resnet', num_classes=7)
    x = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    model = add_exits(plain.to(torch.bfloat16), exit_head=kind, exits=(1, 2)).eval()
    cut = model.truncate(1)
    for network in (model, cut):
        network.reset_classifier(5)
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        assert network(x).dtype == torch.bfloat16
    assert [z.dtype for z in model.forward_exits(x)] == [torch.bfloat16] * 3
    meta = add_exits(plain.to('meta'), exit_head=kind, exits=(1, 2))
    meta.reset_classifier(5)
    assert {p.device.type for p in (*meta.parameters(), *meta.truncate(1).parameters())} == {'meta'}


def test_maps_are_what_the_exits_pool(any_head):
    model = any_head
    x = images_for(model)
    expected, features = model.forward_exits(x, return_features=True)
    logits, maps = model.forward_exits(x, return_maps=True)
    assert all(torch.equal(a, b) for a, b in zip(logits, expected))
    assert len(logits) == len(maps) == model.num_exits
    for head, m, f in zip(model.exit_heads, maps, features):
        assert m.shape[:2] == (2, head.map_chs)
        assert torch.equal(head.pool(m), f)
        assert m.requires_grad
    last = model.stages[-1]
    assert maps[-1].shape == (2, last.num_chs, *last.size)
    assert torch.equal(
        maps[-1], model.backbone.forward_intermediates(x, indices=[last.index], intermediates_only=True)[0])
    assert not maps[-1].requires_grad
    assert len(model.forward_exits(x, upto=0, return_maps=True)[1]) == 1
    cut, (only,) = model.forward_exits(x, upto=0, return_maps=True, detach_taps=True)
    assert torch.equal(only, maps[0])
    assert torch.equal(cut[0], logits[0])


def test_without_auxiliary_exits_there_are_still_features_and_maps():
    model = timm.create_model('test_resnet_sd', exits=()).eval()
    x = torch.randn(2, 3, 64, 64)
    for kind, shape in (('return_features', (2, 96)), ('return_maps', (2, 96, 2, 2))):
        (logits,), (seen,) = model.forward_exits(x, **{kind: True})
        assert torch.equal(logits, model(x))
        assert seen.shape == shape
        assert not seen.requires_grad
    with pytest.raises(ValueError, match='return_features=True, return_maps=True: expected one'):
        model.forward_exits(x, return_features=True, return_maps=True)


def test_detached_exits_leave_the_backbone_to_the_deepest_one(any_head):
    model = any_head
    x, y = images_for(model), torch.tensor([1, 4])
    cross_entropy = torch.nn.functional.cross_entropy
    cross_entropy(model.backbone(x), y).backward()
    plain = {n: p.grad.clone() for n, p in model.backbone.named_parameters()}
    for detach in (False, True):
        model.zero_grad()
        logits = model.forward_exits(x, detach_taps=detach)
        sum(cross_entropy(z, y) for z in logits).backward()
        assert all(p.grad is not None for p in model.exit_heads.parameters())
        same = [torch.allclose(p.grad, plain[n], rtol=1e-4, atol=1e-6) for n, p in model.backbone.named_parameters()]
        assert all(same) == detach
    assert all(torch.equal(a, b) for a, b in zip(logits, model.forward_exits(x)))


def test_a_cascade_hands_logits_on_one_way_only():
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2, 3), exit_head='cascade').eval()
    x = torch.randn(2, 3, 64, 64)
    before = model.forward_exits(x)
    torch.nn.init.normal_(model.exit_heads[0].fc.bias, std=9)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.forward_exits(x))]
    assert changed == [True, True, True, False]
    model.forward_exits(x)[2].sum().backward()
    assert all(p.grad is None for head in model.exit_heads[:2] for p in head.parameters())
    # the network that ends at an exit pays for the heads before it
    plain = exit_costs(timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2, 3)))
    costs = exit_costs(model)
    assert costs['exit0'] == plain['exit0']
    assert costs['exit3'] == plain['exit3']
    heads = sum(p.numel() for head in model.exit_heads[:2] for p in head.parameters())
    assert costs['exit2'].params == plain['exit2'].params + heads + 5 * 5
    assert costs['exit2'].macs > plain['exit2'].macs
    assert {k.split('.')[0] for k in model.truncate(0).state_dict()} == {'backbone', 'head'}
    kept = {k.partition('.')[0] for k in model.truncate(2).exit_heads.state_dict()}
    assert kept == {'0', '1'}


@pytest.mark.parametrize('exits', [None, (), (2,)])
def test_an_unknown_kind_of_head_is_refused(exits):
    with pytest.raises(ValueError, match="exit_head='conv': unknown, expected one of bottleneck, bottleneck-attention"):
        timm.create_model('test_resnet_sd', exit_head='conv', exits=exits)


def test_upto_runs_no_further(tiny):
    ran = []
    tiny.backbone.layer3.register_forward_hook(lambda *_: ran.append('layer3'))
    tiny.backbone.layer4.register_forward_hook(lambda *_: ran.append('layer4'))
    tiny.eval().forward_exits(torch.randn(1, 3, 64, 64), upto=0)
    assert ran == []
    tiny.forward_exits(torch.randn(1, 3, 64, 64), upto=1)
    assert ran == ['layer3']


def test_truncated_networks_equal_the_exits_and_hold_nothing_else(model, images):
    logits = model.forward_exits(images)
    sizes = []
    for k, expected in enumerate(logits):
        network = model.truncate(k)
        assert torch.equal(network(images), expected)
        needed = {p for p in network.parameters()}
        network(images).sum().backward()
        assert all(p.grad is not None for p in needed), 'a parameter that the exit does not use'
        sizes.append(sum(p.numel() for p in network.backbone.parameters()) if k < len(logits) - 1 else None)
    assert sizes[:-1] == sorted(sizes[:-1])


@pytest.mark.parametrize('k', [-1, 3, 1.0, '1', True])
def test_an_exit_that_does_not_exist_is_refused(tiny, k):
    for call in (tiny.truncate, lambda k: tiny.forward_exits(torch.randn(1, 3, 64, 64), upto=k)):
        with pytest.raises(ValueError, match='test_resnet_sd has the exits 0 to 2'):
            call(k)


def test_all_exits_come_only_in_training_and_only_on_request(tiny):
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(tiny.train()(x), torch.Tensor)
    tiny.set_distilled_training(True)
    assert [z.shape for z in tiny(x)] == [(2, 5)] * 3
    assert isinstance(tiny.eval()(x), torch.Tensor)
    tiny.set_distilled_training(False)
    assert isinstance(tiny.train()(x), torch.Tensor)


def test_backward_through_all_exits_reaches_every_parameter(model, images):
    model.train()
    sum(z.square().mean() for z in model.forward_exits(images)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_no_auxiliary_exits_is_a_plain_network():
    model = timm.create_model('test_resnet_sd', exits=()).eval()
    x = torch.randn(1, 3, 64, 64)
    assert model.num_exits == 1
    assert torch.equal(model.forward_exits(x)[0], model(x))


@pytest.mark.slow
def test_an_encoder_gets_a_classifier():
    encoder = timm.create_model('mobilenetv5_300m_enc', device='meta')
    model = add_exits(encoder, num_classes=6)
    assert model.backbone is encoder
    assert model.num_classes == 6
    x = torch.empty(2, 3, 256, 256, device='meta')
    assert [z.shape for z in model.forward_exits(x)] == [(2, 6)] * 4
    assert model(x).shape == (2, 6)
    assert model.get_classifier() is model.head.fc
    assert model.pretrained_cfg['classifier'][-1] == 'head.fc'
    assert model.truncate(3)(x).shape == (2, 6)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    without = add_exits(timm.create_model('mobilenetv5_300m_enc', device='meta'), exits=(2,))
    assert without.num_classes == 0
    assert [z.shape for z in without.forward_exits(x)] == [(2, 128), (2, without.num_features)]


def test_maps_that_the_stride_does_not_divide():
    model = timm.create_model('test_resnet_sd', exits=(1, 2, 3)).eval()
    for size in (33, 50, 71):
        assert [z.shape for z in model.forward_exits(torch.randn(1, 3, size, size + 8))] == [(1, 1000)] * 4


def test_add_exits_keeps_weights_and_describes_itself():
    plain = timm.create_model('test_resnet', num_classes=4).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = plain(x)
    model = add_exits(plain, exits=(2,))
    assert model.backbone is plain
    assert torch.equal(model(x), expected)
    assert model.num_classes == 4
    assert model.num_features == plain.num_features
    assert model.feature_info is plain.feature_info
    assert model.pretrained_cfg['architecture'] == 'test_resnet_sd'
    assert not any(model.pretrained_cfg.get(key) for key in ('hf_hub_id', 'url', 'file'))
    assert plain.pretrained_cfg['architecture'] == 'test_resnet'
    with pytest.raises(ValueError, match='already has exits'):
        add_exits(model)
    with pytest.raises(ValueError, match="exit_head='conv': unknown, expected one of bottleneck"):
        add_exits(plain, exit_head='conv')


def test_reset_classifier_reaches_every_exit(tiny):
    tiny.reset_classifier(9)
    assert tiny.num_classes == 9
    assert [z.shape for z in tiny.eval().forward_exits(torch.randn(1, 3, 64, 64))] == [(1, 9)] * 3


def test_copies_and_pickles(tiny):
    x = torch.randn(1, 3, 64, 64)
    tiny.eval()
    for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert all(torch.equal(a, b) for a, b in zip(twin.forward_exits(x), tiny.forward_exits(x)))
    entry = timm.models.model_entrypoint('test_resnet_sd')
    assert pickle.loads(pickle.dumps(entry)) is entry


def test_round_trip_through_a_folder_is_exact(model, images, tmp_path):
    save_model(model, tmp_path, label_names=[f'class {i}' for i in range(7)])
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert isinstance(loaded, MultiExit)
    assert loaded.exits == model.exits
    assert all(torch.equal(a, b) for a, b in zip(loaded.forward_exits(images), model.forward_exits(images)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']


def test_loading_with_other_classes_or_channels_adapts_every_exit(tiny, tmp_path):
    save_model(tiny, tmp_path)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3, in_chans=1).eval()
    assert [z.shape for z in other.forward_exits(torch.randn(1, 1, 64, 64))] == [(1, 3)] * 3
    assert torch.equal(other.exit_heads[0].reduce.conv.weight, tiny.exit_heads[0].reduce.conv.weight)
    assert torch.equal(other.backbone.layer4[0].conv1.weight, tiny.backbone.layer4[0].conv1.weight)


def test_saved_config_never_asks_for_the_backbones_weights(tiny, tmp_path):
    tiny._model_args = dict(tiny._model_args, backbone_pretrained=True)
    save_model(tiny, tmp_path)
    assert 'backbone_pretrained' not in (tmp_path / 'config.json').read_text()


def test_layer_decay_groups_name_every_parameter(tiny):
    optimizer = create_optimizer_v2(tiny, 'sgd', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    grouped = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert grouped == {id(p) for p in tiny.parameters()}
    scale = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert scale[id(tiny.backbone.conv1[0].weight)] < scale[id(tiny.backbone.fc.weight)] == 1.0
    assert all(scale[id(p)] == 1.0 for p in tiny.exit_heads.parameters())


def test_pretrained_without_published_weights_says_what_to_do():
    with pytest.raises(RuntimeError, match=r'No multi-exit weights are published for resnet50_sd.*backbone_pretrained'):
        timm.create_model('resnet50_sd', pretrained=True)


def test_every_name_of_timm_is_registered():
    names = timm.list_models()
    plain = [n for n in names if not n.endswith('_sd')]
    assert len(plain) >= 1371
    assert {f'{n}_sd' for n in plain} == {n for n in names if n.endswith('_sd')}


@pytest.mark.slow
def test_importing_is_cheap():
    heavy = ('accelerate', 'datasets', 'sklearn', 'matplotlib', 'rich', 'timm.task', 'tyro', 'yaml')
    code = (
        'import sys, timm\nbefore = set(sys.modules)\nimport timm_selfdistill\n'
        f'print([m for m in {heavy} if m in sys.modules and m not in before])'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '[]'
