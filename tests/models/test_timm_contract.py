"""A multi-exit network, whole or truncated, is a citizen of timm: the ideas of timm's own tests."""
import pytest
import timm
import torch
import torch.nn as nn
from timm.models import group_parameters

from timm_selfdistill.models.names import names_tuple

FAMILIES = ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet']


@pytest.fixture(params=[(name, cut) for name in FAMILIES for cut in (None, 1)], ids=str)
def create(request):
    """Creates one network, whole or truncated, from timm's arguments."""
    name, cut = request.param
    return lambda **kwargs: timm.create_model(f'{name}_sd', truncate=cut, **kwargs)


def all_logits(model, x):
    return model.forward_exits(x) if hasattr(model, 'forward_exits') else [model(x)]


def images_for(model, count=2):
    return torch.randn(count, model.in_chans, *model.pretrained_cfg['input_size'][1:])


def test_it_describes_itself(create):
    model = create().eval()
    x = images_for(model)
    assert model.num_classes == 1000
    assert model.in_chans == 3
    features = model.forward_features(x)
    vector = model.forward_head(features, pre_logits=True)
    assert vector.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(x))
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.default_cfg is model.pretrained_cfg
    names = model.state_dict()
    for layer in (*names_tuple(model.pretrained_cfg['classifier']), *names_tuple(model.pretrained_cfg['first_conv'])):
        assert f'{layer}.weight' in names


def test_its_backbone_has_the_plain_networks_keys():
    for name in FAMILIES:
        model = timm.create_model(f'{name}_sd')
        plain = timm.create_model(name).state_dict()
        assert [k[9:] for k in model.state_dict() if k.startswith('backbone.')] == list(plain)
        assert {k.split('.')[0] for k in model.state_dict()} == {'backbone', 'exit_heads'}
        cut = model.truncate(0).state_dict()
        assert {k[9:] for k in cut if k.startswith('backbone.')} < plain.keys()
        assert {k.split('.')[0] for k in cut} == {'backbone', 'head'}


def test_it_can_be_made_for_other_images_and_classes(create):
    model = create(num_classes=6, in_chans=2).eval()
    assert model.num_classes == 6
    assert model.in_chans == 2
    assert {z.shape for z in all_logits(model, images_for(model))} == {(2, 6)}


def test_it_can_do_without_a_classifier_and_get_one_again(create):
    for model in (create(num_classes=0), create()):
        model.eval().reset_classifier(0)
        assert model.num_classes == 0
        assert model(images_for(model)).shape == (2, model.head_hidden_size)
        model.reset_classifier(9)
        assert model.num_classes == 9
        assert all(z.shape == (2, 9) for z in all_logits(model, images_for(model)))


def test_the_deepest_exit_can_do_without_pooling():
    model = timm.create_model('test_resnet_sd', num_classes=0, global_pool='').eval()
    assert model(images_for(model)).shape == (2, 96, 5, 5)
    model = timm.create_model('test_resnet_sd').eval()
    model.reset_classifier(4, global_pool='max')
    assert model._model_args['global_pool'] == 'max'
    assert model(images_for(model)).shape == (2, 4)


def test_stochastic_depth_reaches_the_backbone():
    model = timm.create_model('test_vit_sd', drop_path_rate=0.3)
    plain = timm.create_model('test_vit', drop_path_rate=0.3)
    rates = [[m.drop_prob for m in net.modules() if hasattr(m, 'drop_prob')] for net in (model, plain)]
    assert rates[0] == rates[1]
    assert max(rates[0]) == pytest.approx(0.3)


@pytest.mark.parametrize('name', FAMILIES)
def test_features_only_is_the_plain_networks(name):
    model = timm.create_model(f'{name}_sd', features_only=True).eval()
    plain = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.channels() == plain.feature_info.channels()
    assert model.feature_info.reduction() == plain.feature_info.reduction()
    maps = model(torch.randn(2, *model.pretrained_cfg['input_size']))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert not any('exit_heads' in k for k in model.state_dict())
    one = timm.create_model(f'{name}_sd', features_only=True, out_indices=(1,))
    assert [m.shape[1] for m in one(torch.randn(2, *model.pretrained_cfg['input_size']))] == one.feature_info.channels()


@pytest.mark.parametrize('name', FAMILIES)
def test_pruning_takes_the_exits_with_it(name):
    model = timm.create_model(f'{name}_sd').eval()
    x = images_for(model)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], expected)
    assert model.num_exits == 1
    assert len(model.stages) == 2
    assert not any('exit_heads' in k for k in model.state_dict())


def test_checkpointing_changes_memory_not_results(create):
    torch.manual_seed(0)
    model = create(num_classes=3)
    x = images_for(model)
    model.eval()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(z.square().mean() for z in all_logits(model, x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_weight_decay_and_layer_decay_know_its_parameters(create):
    model = create()
    names = {n for n, _ in model.named_parameters()}
    plain = model.backbone
    exempt = plain.no_weight_decay() if hasattr(plain, 'no_weight_decay') else set()
    assert model.no_weight_decay() == {f'backbone.{n}' for n in exempt}
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == names
    heads = {layer for n, layer in groups.items() if not n.startswith('backbone.')}
    assert heads == {max(groups.values())}


def test_the_image_size_can_be_chosen_where_the_network_has_one():
    model = timm.create_model('test_vit_sd', img_size=96, num_classes=3).eval()
    assert {s.size for s in model.stages} == {(6, 6)}
    assert all(z.shape == (1, 3) for z in model.forward_exits(torch.randn(1, 3, 96, 96)))
    model.set_input_size(img_size=64)
    assert {s.size for s in model.stages} == {(4, 4)}
    assert all(z.shape == (1, 3) for z in model.forward_exits(torch.randn(1, 3, 64, 64)))
    assert model._model_args['img_size'] == (64, 64)
    cut = model.truncate(0)
    cut.set_input_size(img_size=96)
    assert cut(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    assert not hasattr(timm.create_model('test_resnet_sd'), 'set_input_size')


@pytest.mark.slow
def test_it_compiles_whole(create):
    model = create(num_classes=3).eval()
    x = images_for(model)
    assert torch.equal(torch.compile(model, fullgraph=True, backend='eager')(x), model(x))
    torch._dynamo.reset()
    if hasattr(model, 'forward_exits'):
        for upto in (0, None):
            compiled = torch.compile(model.forward_exits, fullgraph=True, backend='eager')(x, upto=upto)
            assert all(torch.equal(a, b) for a, b in zip(compiled, model.forward_exits(x, upto=upto)))
            torch._dynamo.reset()
        model.train().set_distilled_training(True)
        assert len(torch.compile(model, fullgraph=True, backend='eager')(x)) == model.num_exits
        torch._dynamo.reset()


class Exits(nn.Module):
    """All exits as what torch.export takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tuple(all_logits(self.model, x))


def test_it_exports(create):
    model = create(num_classes=3).eval()
    x = images_for(model)
    exported = torch.export.export(Exits(model), (x,)).module()
    for a, b in zip(exported(x), all_logits(model, x)):
        torch.testing.assert_close(a, b)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('size, message', [
    (dict(name='test_resnet_sd', img_size=96), r'img_size=96: test_resnet takes no img_size.*160×160'),
    (dict(name='swin_tiny_patch4_window7_224_sd', img_size=(3, 3, 3)), r'img_size=\(3, 3, 3\): swin_tiny\S+ cannot be'),
    (dict(name='test_vit_sd', img_size=0), r'img_size=0: test_vit cannot be built'),
    (dict(name='nest_tiny_sd', img_size=100), r'img_size=100: nest_tiny cannot be built for it \(its own is 224×224\)'),
    (dict(name='levit_128s_sd', img_size=100), r'levit_128s cannot run on images of 3×100×100.*weights is 3×224×224: '),
])
def test_an_image_size_that_the_backbone_refuses(size, message):
    size = dict(size)
    with pytest.raises(ValueError, match=message):
        timm.create_model(size.pop('name'), **size)


@pytest.mark.parametrize('name, shape, message', [
    ('vit_tiny_patch16_224_sd', (3, 99, 99), r'vit_tiny\S+_sd cannot take images of 3×99×99.*3×224×224: Input'),
    ('levit_128s_sd', (3, 160, 160), r'levit_128s_sd cannot take images of 3×160×160.*built for 3×224×224: '),
    ('test_resnet_sd', (1, 64, 64), r'test_resnet_sd cannot take images of 1×64×64.*built for 3×160×160: .*channels'),
])
def test_images_that_the_backbone_refuses(name, shape, message):
    model = timm.create_model(name).eval()
    x = torch.randn(1, *shape)
    for call in (model, model.forward_exits, lambda x: model.forward_exits(x, upto=0), model.truncate(0)):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_other_failures_are_left_as_they_are():
    model = timm.create_model('test_resnet_sd').eval()
    with pytest.raises(RuntimeError, match='dtype|type'):
        model(torch.zeros(1, 3, 160, 160, dtype=torch.float64))
