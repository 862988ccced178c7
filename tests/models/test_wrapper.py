import dataclasses

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint

from timm_selfdistill import checkpoint_filter_fn
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.models.truncated import ExitNetwork

FAMILIES = ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet']


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def images(name):
    return torch.randn(2, *timm.get_pretrained_cfg(name).input_size)


@pytest.fixture
def plain(name, tmp_path):
    """A plain network and the path of its checkpoint."""
    model = timm.create_model(name, num_classes=4).eval()
    path = str(tmp_path / 'plain.safetensors')
    save_file(model.state_dict(), path)
    return model, path


def test_a_plain_checkpoint_becomes_the_backbone(name, images, plain):
    network, path = plain
    created = timm.create_model(f'{name}_sd', num_classes=4, checkpoint_path=path).eval()
    loaded = timm.create_model(f'{name}_sd', num_classes=4).eval()
    exits = {k: v.clone() for k, v in loaded.exit_heads.state_dict().items()}
    load_checkpoint(loaded, path)
    given = timm.create_model(f'{name}_sd', num_classes=4).eval()
    given.load_state_dict(network.state_dict())
    for model in (created, loaded, given):
        assert torch.equal(model(images), network(images))
    assert all(torch.equal(v, exits[k]) for k, v in loaded.exit_heads.state_dict().items())


def test_a_plain_checkpoint_is_adapted_to_other_classes_and_channels(name, plain):
    network, path = plain
    model = timm.create_model(
        f'{name}_sd', pretrained=True, num_classes=3, in_chans=1,
        pretrained_cfg_overlay=dict(file=path, num_classes=4),
    ).eval()
    assert [z.shape for z in model.forward_exits(torch.randn(2, 1, *model.pretrained_cfg['input_size'][1:]))] \
        == [(2, 3)] * model.num_exits
    adapted = (*model.pretrained_cfg['classifier'], *model.pretrained_cfg['first_conv'])
    for key, value in network.state_dict().items():
        if not f'backbone.{key}'.startswith(adapted):
            assert torch.equal(model.state_dict()[f'backbone.{key}'], value), key


def test_an_incomplete_plain_checkpoint_is_refused(name, plain):
    network, _ = plain
    state_dict = network.state_dict()
    state_dict.popitem()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "backbone\.'):
        timm.create_model(f'{name}_sd', num_classes=4).load_state_dict(state_dict)


def test_the_backbone_of_a_multi_exit_checkpoint_fits_the_plain_network(name, images, tmp_path):
    model = timm.create_model(f'{name}_sd', num_classes=4).eval()
    save_model(model, tmp_path)
    network = timm.create_model(name, num_classes=4).eval()
    load_checkpoint(network, str(tmp_path / 'model.safetensors'), filter_fn=checkpoint_filter_fn)
    assert torch.equal(network(images), model(images))
    before = network.state_dict()
    assert checkpoint_filter_fn(before, network) is before, 'its own checkpoint stays as it is'


def test_truncated_networks_are_saved_and_loaded(name, images, tmp_path):
    model = timm.create_model(f'{name}_sd', num_classes=4, in_chans=3).eval()
    for k in range(model.num_exits):
        network = model.truncate(k)
        folder = tmp_path / str(k)
        save_model(network, folder)
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert type(loaded) is type(network)
        assert isinstance(loaded, ExitNetwork) == (k < model.num_exits - 1)
        assert loaded.state_dict().keys() == network.state_dict().keys()
        assert torch.equal(loaded(images), model.forward_exits(images)[k])


def test_truncated_networks_load_from_whole_checkpoints(name, images, plain, tmp_path):
    model = timm.create_model(f'{name}_sd', num_classes=4).eval()
    save_model(model, tmp_path / 'whole')
    network = timm.create_model(f'local-dir:{tmp_path / "whole"}', pretrained=True, truncate=1).eval()
    assert torch.equal(network(images), model.forward_exits(images)[1])
    network, path = plain
    cut = timm.create_model(f'{name}_sd', num_classes=4, truncate=0, checkpoint_path=path)
    keys = [k for k in cut.state_dict() if k.startswith('backbone.')]
    assert len(keys) > 2
    assert all(torch.equal(cut.state_dict()[k], network.state_dict()[k.removeprefix('backbone.')]) for k in keys)


def test_truncated_networks_adapt_to_other_classes_and_channels(name, tmp_path):
    network = timm.create_model(f'{name}_sd', num_classes=4, truncate=0)
    save_model(network, tmp_path)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=6, in_chans=1)
    size = other.pretrained_cfg['input_size'][1:]
    assert other(torch.randn(2, 1, *size)).shape == (2, 6)
    assert torch.equal(other.head.reduce.conv.weight, network.head.reduce.conv.weight)


@pytest.mark.parametrize('wanted, key', [(True, 'test_resnet'), ('r160_in1k', 'test_resnet.r160_in1k')])
def test_the_backbone_starts_from_timms_weights(wanted, key, monkeypatch, tmp_path):
    plain = timm.create_model('test_resnet').eval()
    save_file(plain.state_dict(), tmp_path / 'weights.safetensors')
    cfg = dataclasses.replace(timm.get_pretrained_cfg(key), file=str(tmp_path / 'weights.safetensors'))
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, key, cfg)
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model('test_resnet_sd', backbone_pretrained=wanted).eval()
    assert torch.equal(model(x), plain(x))
    other = timm.create_model('test_resnet_sd', backbone_pretrained=wanted, num_classes=3, in_chans=1)
    assert torch.equal(other.backbone.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
    save_model(model, tmp_path / 'run')
    assert 'backbone_pretrained' not in (tmp_path / 'run' / 'config.json').read_text()


def test_a_tag_that_timm_does_not_have_is_refused():
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(nowhere\) for test_resnet'):
        timm.create_model('test_resnet_sd', backbone_pretrained='nowhere')
