"""What a run starts from: names of timm, folders, repositories, and files of weights in any wrapping."""
import pickle

import pytest
import timm
import torch
from helpers.runs import untrained_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.training.build import build_model
from timm_selfdistill.training.initial import find_network, load_weights, read_weights


def multi_exit(name='test_resnet', num_classes=5, exits=(2, 3), **more):
    return timm.create_model(f'{name}_sd', num_classes=num_classes, exits=exits, **more)


def load(model, weights, **more):
    return load_weights(model, weights, 'mine.pth', '`initial_checkpoint=mine.pth`', **more)


def differing(model, weights):
    own = model.state_dict()
    return {name for name, tensor in weights.items() if name not in own or not torch.equal(own[name], tensor)}


def test_weights_of_the_plain_network_go_to_the_backbone():
    plain, model = timm.create_model('test_resnet', num_classes=5), multi_exit()
    loaded = load(model, plain.state_dict())
    count = len(plain.state_dict())
    assert loaded.line == f'loaded {count} of {count} tensors from mine.pth; fresh: heads of exits 0, 1'
    assert not loaded.fresh_classifier and not differing(model.backbone, plain.state_dict())


def test_weights_of_a_multi_exit_network_bring_their_exits():
    other, model = multi_exit(), multi_exit()
    loaded = load(model, other.state_dict())
    count = len(other.state_dict())
    assert loaded.line == f'loaded {count} of {count} tensors from mine.pth'
    assert not differing(model, other.state_dict())


def test_another_number_of_classes_replaces_the_classifiers_alone():
    other, model = timm.create_model('test_resnet', num_classes=37), multi_exit(num_classes=10)
    fresh = model.get_classifier().weight.clone()
    loaded = load(model, other.state_dict())
    count = len(other.state_dict())
    assert loaded.line.startswith(
        f'loaded {count - 2} of {count} tensors from mine.pth; fresh: classifier (37 → 10 classes)')
    assert loaded.fresh_classifier and torch.equal(model.get_classifier().weight, fresh)
    assert differing(model.backbone, other.state_dict()) == {'fc.weight', 'fc.bias'}
    other = multi_exit(num_classes=7)
    loaded = load(model, other.state_dict())
    assert 'fresh: classifier (7 → 10 classes)' in loaded.line and 'heads' not in loaded.line
    assert all(name.rpartition('.')[0] in model.classifiers() for name in differing(model, other.state_dict()))


def test_other_classes_of_the_same_number_are_no_classes_of_the_network():
    model = multi_exit()
    loaded = load(model, multi_exit().state_dict(), same_classes=False)
    assert 'fresh: classifier (5 other classes)' in loaded.line and loaded.fresh_classifier


@pytest.mark.parametrize('before, now', [(3, 1), (1, 3)])
def test_other_channels_adapt_the_stem_as_timm_does(before, now):
    other = timm.create_model('test_resnet', num_classes=5, in_chans=before)
    model = multi_exit(in_chans=now)
    loaded = load(model, other.state_dict())
    assert f'adapted: stem ({before} → {now} channels)' in loaded.line
    overlay = dict(state_dict=other.state_dict(), num_classes=5, input_size=(before, 160, 160))
    expected = timm.create_model(
        'test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=now)
    assert not differing(model.backbone, expected.state_dict())


def test_heads_stay_with_the_exits_they_belong_to():
    other, model = multi_exit('test_vit', exits=(0, 1, 3)), multi_exit('test_vit', exits=(1, 2, 3))
    fresh = {n: t.clone() for n, t in model.state_dict().items() if n.startswith('exit_heads.1.')}
    loaded = load(model, other.state_dict(), exits=(0, 1, 3))
    assert loaded.line.endswith('fresh: head of exit 1')
    assert not differing(model, fresh)
    for new, old in ((0, 1), (2, 2)):
        weights = other.exit_heads[old].state_dict()
        assert not differing(model.exit_heads[new], weights)


def test_heads_of_another_kind_or_number_are_left_aside():
    for other in (multi_exit(exit_head='linear'), multi_exit(exits=(1, 2, 3))):
        model = multi_exit()
        assert 'fresh: heads of exits 0, 1' in load(model, other.state_dict()).line
        backbone = {n: t for n, t in other.state_dict().items() if n.startswith('backbone.')}
        assert not differing(model, backbone)


def test_what_belongs_to_no_module_of_the_network_is_left_aside():
    weights = dict(timm.create_model('test_resnet', num_classes=5).state_dict(), **{'aux.fc.weight': torch.ones(3)})
    assert load(multi_exit(), weights).line.endswith('left aside: aux.fc.weight')


@pytest.mark.parametrize('weights, problem', [
    (lambda: timm.create_model('test_vit', num_classes=5).state_dict(), 'tensors missing'),
    (lambda: timm.create_model('resnet34', num_classes=5).state_dict(), 'without a place'),
    (lambda: timm.create_model('resnet50', num_classes=5).state_dict(), 'of another shape'),
    (lambda: {'conv1.weight': torch.ones(2)}, 'conv1.weight 2 instead of'),
])
def test_what_does_not_fit_is_an_error_with_names_and_shapes(weights, problem):
    name = 'test_resnet' if 'missing' in problem else 'resnet18'
    model = multi_exit(name, exits=(1, 2))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f'initial_checkpoint=mine.pth.*these are no weights of {name}.*{problem}'):
        load(model, weights())
    assert not differing(model, before), 'nothing is half loaded'


def test_weights_in_another_format_of_the_family_are_converted_by_timm():
    """A vision transformer of another image size: timm resizes its position embedding."""
    other = timm.create_model('test_vit', num_classes=5, img_size=96)
    model = multi_exit('test_vit', exits=(1,), img_size=160)
    load(model, other.state_dict())
    expected = timm.create_model('test_vit', pretrained=True, num_classes=5, img_size=160, pretrained_cfg_overlay=dict(
        state_dict=other.state_dict(), num_classes=5))
    assert not differing(model.backbone, expected.state_dict())


wrappings = st.sampled_from([
    lambda s: s, lambda s: dict(state_dict=s), lambda s: dict(model=s, epoch=3),
    lambda s: dict(state_dict={n: t + 1 for n, t in s.items()}, state_dict_ema=s, arch='test_resnet'),
])
prefixes = st.sampled_from(['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])


@settings(max_examples=25, deadline=None)
@given(wrap=wrappings, prefix=prefixes, exits=st.booleans(), as_safetensors=st.booleans())
def test_wrappings_are_taken_off_as_timm_does(tmp_path_factory, wrap, prefix, exits, as_safetensors):
    network = multi_exit() if exits else timm.create_model('test_resnet', num_classes=5)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    file = tmp_path_factory.mktemp('weights') / ('mine.safetensors' if as_safetensors else 'mine.pth')
    save_file(state, file) if as_safetensors else torch.save(wrap(state), file)
    weights = read_weights(str(file))
    assert {*weights} == {*network.state_dict()}
    model = multi_exit()
    load(model, weights)
    assert not differing(model if exits else model.backbone, network.state_dict())


class Harmful:
    def __reduce__(self):
        return print, ('this ran',)


def write_pickle(path):
    torch.save(dict(state_dict={}, extra=Harmful()), path)


@pytest.mark.parametrize('write, problem', [
    (None, 'there is no such file'),
    (lambda path: path.mkdir(), 'this is a folder'),
    (write_pickle, 'reading that could run code'),
    (lambda path: path.write_bytes(pickle.dumps(Harmful())), 'reading that could run code|cannot be read'),
    (lambda path: path.write_bytes(b'not weights at all'), 'cannot be read|run code'),
    (lambda path: path.write_bytes(b''), 'cannot be read'),
    (lambda path: torch.save(torch.ones(3), path), 'cannot be read|holds no tensors'),
    (lambda path: torch.save(dict(epoch=3), path), 'it holds no tensors by name'),
    (lambda path: torch.save([1, 2], path), 'cannot be read'),
], ids=['missing', 'folder', 'code', 'bare pickle', 'text', 'empty', 'tensor', 'numbers', 'list'])
def test_a_file_that_holds_no_weights_is_an_error_and_nothing_in_it_runs(tmp_path, capsys, write, problem):
    file = tmp_path / 'mine.pth'
    if write is not None:
        write(file)
    with pytest.raises(ConfigError, match=f'`initial_checkpoint={file}`: .*({problem})'):
        read_weights(str(file))
    assert 'this ran' not in capsys.readouterr().out


def test_a_cut_safetensors_file_is_an_error(tmp_path):
    file = tmp_path / 'mine.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigError, match='cannot be read as safetensors'):
        read_weights(str(file))


# -- what --model names --


@pytest.mark.parametrize('model', ['resnet18', 'resnet18_sd', 'resnet18.a1_in1k', 'resnet18_sd.a1_in1k'])
def test_names_of_timm(model):
    network = find_network(model)
    assert (network.name, network.where) == ('resnet18_sd', None)
    assert network.tag == ('a1_in1k' if '.' in model else '')


def test_folders_plain_and_multi_exit(tmp_path):
    save_model(timm.create_model('test_resnet', num_classes=5), tmp_path / 'plain', label_names=list('abcde'))
    untrained_run(tmp_path / 'run', exits=(1, 3))
    for place in (tmp_path / 'plain', f'local-dir:{tmp_path / "plain"}'):
        network = find_network(str(place))
        assert network.name == 'test_resnet_sd' and network.class_names == list('abcde')
    network = find_network(str(tmp_path / 'run'))
    assert list(network.arguments['exits']) == [1, 3] and 'not complete' in network.notes[0]


def test_a_name_of_timm_is_one_whatever_lies_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'resnet18').mkdir()
    assert find_network('resnet18').where is None


def cut_off(folder):
    save_model(multi_exit().truncate(0), folder)


def without_weights(folder):
    untrained_run(folder)
    (folder / 'model.safetensors').unlink()


def foreign(folder):
    untrained_run(folder)
    text = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(text.replace('"test_resnet_sd"', '"no_such_net"'))


@pytest.mark.parametrize('write, problem', [
    (lambda folder: None, 'there is no such folder'),
    (lambda folder: folder.mkdir(), 'there is no config.json'),
    (without_weights, 'there is no model.safetensors'),
    (cut_off, 'it was cut off at exit 0'),
    (lambda folder: folder.write_bytes(b''), 'this is a file; `initial_checkpoint` takes one'),
    (foreign, 'no_such_net'),
], ids=['missing', 'empty', 'incomplete', 'cut', 'file', 'foreign'])
def test_a_folder_without_a_whole_network_is_an_error(tmp_path, write, problem):
    write(tmp_path / 'net')
    with pytest.raises(ConfigError, match=f'`model={tmp_path / "net"}`: .*{problem}'):
        find_network(str(tmp_path / 'net'))


def test_a_mistyped_name_offers_the_nearest():
    with pytest.raises(ConfigError, match='timm has no such model; the nearest names are .*resnet50'):
        find_network('resnet5O')


# -- the network of a run --


def build(**settings):
    return build_model(TrainConfig(**settings), load_image_data())


def test_a_runs_network_keeps_its_exits_heads_and_view(tmp_path):
    run = untrained_run(tmp_path / 'run', exits=(1, 3))
    built = build(model=str(run))
    assert built.model.exits == (1, 3) and built.trained and not built.fresh_classifier
    assert tuple(built.data_config['mean']) == (0.5, 0.5, 0.5) and built.data_config['input_size'] == (3, 32, 32)
    built = build(model=str(run), exits=(2,), exit_head='linear')
    assert built.model.exits == (2,) and built.model.exit_head == 'linear'
    assert 'fresh: head of exit 0' in built.notes[1]
    built = build(model=str(run), method='plain')
    assert built.model.exits == ()


def test_a_file_of_weights_brings_the_networks_own_size(tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'mine.pth')
    built = build(model='test_resnet', initial_checkpoint=str(tmp_path / 'mine.pth'))
    assert built.data_config['input_size'] == (3, 160, 160) and built.fresh_classifier
    assert 'fresh: classifier (1000 → 10 classes)' in built.notes[0]
    assert built.notes[1].startswith('images of 3×160×160: what the weights were trained at')


def test_notes_say_why_images_have_their_size():
    assert build(model='test_resnet').notes == [
        'images of 3×32×32: the smallest that the network takes; the first image has 8×8']
    assert build(model='test_resnet', img_size=48).notes == ['images of 3×48×48: as asked for']
    assert 'the one size that the network takes' in build(model='test_vit').notes[0]


def test_two_weights_at_once_are_refused(tmp_path):
    run = untrained_run(tmp_path / 'run')
    with pytest.raises(ConfigError, match='has weights of its own; pass a timm name'):
        build(model=str(run), initial_checkpoint='mine.pth')
    with pytest.raises(ConfigError, match='leave out one of them'):
        TrainConfig(initial_checkpoint='mine.pth', backbone_pretrained=True).check()
