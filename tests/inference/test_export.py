"""Exported networks give torch's logits, whole, cut off and in stages, and run without this package."""
import json
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from helpers import RECIPES

import timm_selfdistill
from timm_selfdistill.errors import ConfigError, ExportError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.inference import export
from timm_selfdistill.inference.export import export_network
from timm_selfdistill.inference.staged_session import StagedSession
from timm_selfdistill.models.exit_rule import ExitRule, follow_rule

SIZE = (3, 64, 64)
NETWORKS = ('test_resnet_sd', 'test_vit_sd', 'test_convnext_sd', 'test_efficientnet_sd')


def images(count, seed=1):
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def create(name='test_resnet_sd', num_classes=5, **kwargs):
    """Create a network whose exits give different images different logits; with random weights they hardly do."""
    torch.manual_seed(0)
    if 'vit' in name:
        kwargs['img_size'] = SIZE[1:]
    model = timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=dict(input_size=SIZE), **kwargs)
    for number in range(model.eval().num_exits):
        logits = model.forward_exits(images(32, seed=0), upto=number)[-1]  # anew, heads may see the exit before
        classifier = model.get_submodule(model.classifiers()[number])
        scale = 2 / logits.std(0)
        classifier.weight *= scale[:, None]
        classifier.bias.copy_((classifier.bias - logits.mean(0)) * scale)
    return model


@torch.no_grad()
def median_levels(model, rule, x):
    """Return levels at which about half of the images that come to an exit leave there, far from any of them."""
    levels, memory, here = [], {}, torch.ones(len(x), dtype=torch.bool)
    for number, logits in enumerate(model.forward_exits(x)[:-1]):
        _, sure, memory = rule.judge(number, logits, memory)
        if rule.criterion == 'patience':
            levels.append(1.)
        else:
            ordered = sure[here].sort().values
            levels.append(ordered[len(ordered) // 2 - 1:len(ordered) // 2 + 1].mean().item())
        here &= sure < levels[-1]
    return levels


@torch.no_grad()
def assert_stages_follow_the_rule(model, session, criterion='confidence', temperatures=None, ensemble=False):
    x = images(24)
    rule = ExitRule(model.num_exits, model.num_classes, None, criterion, temperatures, ensemble)
    levels = median_levels(model, rule, x)
    rule = ExitRule(
        model.num_exits, model.num_classes, [abs(v) for v in levels], criterion, temperatures, ensemble)
    session.levels = levels
    logits, exit_index = session.run(x.numpy())
    wanted, wanted_index = follow_rule(rule, model.forward_exits(x))
    assert exit_index.tolist() == wanted_index.tolist()
    # nothing has been agreed on yet at the first exit
    assert set(exit_index) == set(range(criterion == 'patience', model.num_exits))
    np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-3, atol=1e-3)
    assert logits.dtype == np.float32


@pytest.fixture(scope='module')
def network():
    return create(exits=(2, 3))


@pytest.fixture(scope='module')
def staged(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp('export') / 'staged'
    export_network(network, folder, staged=True)
    return folder


# -- what the graphs compute ------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('name', [*NETWORKS, 'resnet20_cifar_sd'])
def test_onnx_graphs_of_all_exits_and_of_one_give_torchs_logits(name, tmp_path):
    model = create(name)
    for number, names in ((None, [f'exit{i}' for i in range(model.num_exits)]), (1, ['logits'])):
        manifest = export_network(model, tmp_path / str(number), number)
        graph, = manifest['graphs']
        session = onnxruntime.InferenceSession(tmp_path / str(number) / graph['file'])
        for count in (1, 2, 7):
            found = session.run(graph['outputs'], dict(images=images(count).numpy()))
            wanted = model.forward_exits(images(count)) if number is None else [model.truncate(1)(images(count))]
            assert graph['outputs'] == names and len(found) == len(wanted)
            for a, b in zip(found, wanted):
                np.testing.assert_allclose(a, b.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS[1:])
def test_stages_let_images_leave_where_the_rule_does(name, tmp_path):
    model = create(name)
    export_network(model, tmp_path / 'staged', staged=True)
    assert_stages_follow_the_rule(model, StagedSession(tmp_path / 'staged'))


@pytest.mark.slow
@pytest.mark.parametrize('criterion, ensemble, temperatures', [
    ('margin', False, [0.7, 1.5, 1.]),
    ('entropy', True, [2., 0.5, 1.]),
    ('patience', False, None),
    ('patience', True, None),
])
def test_stages_decide_by_every_criterion(network, criterion, ensemble, temperatures, tmp_path, monkeypatch):
    rule = ExitRule(network.num_exits, network.num_classes, 1., criterion, temperatures, ensemble)
    monkeypatch.setattr(network, 'exit_rule', rule)
    manifest = export_network(network, tmp_path / 'staged', staged=True)
    session = StagedSession(tmp_path / 'staged')
    assert session.levels == ((-1., -1.) if criterion == 'entropy' else (1., 1.))
    assert manifest['early_exit']['criterion'] == criterion
    assert_stages_follow_the_rule(network, session, criterion, temperatures, ensemble)


def test_stages_of_a_resnet_decide_by_confidence(network, staged):
    assert_stages_follow_the_rule(network, StagedSession(staged))


@pytest.mark.slow
def test_a_cascade_passes_the_logits_of_an_exit_on(tmp_path):
    model = create(exits=(1, 2, 3), exit_head='cascade')
    export_network(model, tmp_path / 'staged', staged=True)
    assert_stages_follow_the_rule(model, StagedSession(tmp_path / 'staged'))


@pytest.mark.slow
@torch.no_grad()
def test_a_torch_export_needs_nothing_but_torch(network, tmp_path):
    manifest = export_network(network, tmp_path / 'network', format='torch-export')
    module = torch.export.load(tmp_path / 'network' / manifest['graphs'][0]['file']).module()
    for count in (1, 2, 7):
        for a, b in zip(module(images(count)), network.forward_exits(images(count)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@torch.no_grad()
def test_stages_as_torch_exports_pass_on_what_the_manifest_names(network, tmp_path):
    manifest = export_network(network, tmp_path / 'staged', staged=True, format='torch-export')
    tensors = dict(images=images(4))
    wanted = network.forward_exits(tensors['images'])
    for graph, of_exit in zip(manifest['graphs'], wanted, strict=True):
        module = torch.export.load(tmp_path / 'staged' / graph['file']).module()
        tensors['level'] = torch.tensor(0.)
        found = module(*(tensors[name] for name in graph['inputs']))
        tensors = dict(zip(graph['outputs'], found, strict=True))
        torch.testing.assert_close(tensors['logits'], of_exit)
        assert 'leaves' not in tensors or tensors['leaves'].all()
    assert 'leaves' not in tensors  # at the deepest exit nothing is left to decide


def test_a_network_in_training_is_exported_as_it_is_used_and_goes_on_training(network, tmp_path):
    network.train()
    try:
        export_network(network, tmp_path / 'network', 0, format='torch-export')  # compares with eval mode
        assert all(module.training for module in network.modules())
    finally:
        network.eval()


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_manifest_says_all_that_is_needed_and_nothing_says_where_it_was_made(network, staged):
    manifest = json.loads((staged / 'export.json').read_text())
    assert {graph['file'] for graph in manifest['graphs']} | {'export.json', 'staged_session.py'} == {
        path.name for path in staged.iterdir()}
    assert [graph['inputs'][0] for graph in manifest['graphs']] == ['level', 'level', 'passed1_0']
    assert (manifest['architecture'], manifest['num_classes'], manifest['num_exits']) == ('test_resnet_sd', 5, 3)
    assert tuple(manifest['input_size']) == SIZE and len(manifest['mean']) == len(manifest['std']) == 3
    assert manifest['early_exit'] == dict(
        criterion='confidence', ensemble=False, temperatures=[1., 1., 1.], levels=[None, None])
    assert 0 < manifest['parity']['largest_difference'] < 1e-4
    assert torch.__version__.startswith(manifest['versions']['torch'])
    places = [str(Path(timm_selfdistill.__file__).parent), str(Path(torch.__file__).parent), str(staged.parent)]
    for path in staged.iterdir():
        for place in places:
            assert place.encode() not in path.read_bytes(), path.name


def test_a_torch_export_does_not_say_where_it_was_made(network, tmp_path):
    export_network(network, tmp_path / 'network', 0, format='torch-export')
    with zipfile.ZipFile(tmp_path / 'network' / 'network.pt2') as archive:
        for name in archive.namelist():
            for place in (Path(timm_selfdistill.__file__).parent, Path(torch.__file__).parent):
                assert str(place).encode() not in archive.read(name), name


@pytest.mark.slow
def test_weights_too_large_for_an_onnx_file_stand_beside_it(network, tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_LARGEST_FILE', 2 ** 16)
    export_network(network, tmp_path / 'network', 0)
    (tmp_path / 'network').rename(tmp_path / 'moved')
    sizes = {path.name: path.stat().st_size for path in (tmp_path / 'moved').iterdir()}
    assert sizes.pop('network.onnx.data') > 2 ** 18 > sizes['network.onnx']
    found, = onnxruntime.InferenceSession(tmp_path / 'moved' / 'network.onnx').run(None, {'images': images(2).numpy()})
    assert found.shape == (2, 5)


class SubtractMean(nn.Module):
    """Makes what an image gives depend on the others."""

    def forward(self, x):
        return x - x.mean()


@pytest.mark.slow
def test_graphs_that_compute_something_else_are_not_kept(tmp_path):
    model = create(exits=(2, 3))
    model.backbone.layer4 = nn.Sequential(model.backbone.layer4, SubtractMean())
    with pytest.raises(ExportError, match='logits differ from torch'):
        export_network(model, tmp_path / 'staged', staged=True, format='torch-export')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('settings, message', [
    (dict(number=3), 'exit 3: test_resnet_sd has the exits 0 to 2'),
    (dict(number=-1), 'exit -1'),
    (dict(number=1, staged=True), '`staged`, `exit=1`'),
    (dict(format='tflite'), 'tflite`: expected one of onnx, torch-export'),
])
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(network, settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_network(network, tmp_path / 'network', **settings)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(network, tmp_path):
    (tmp_path / 'mine').write_text('mine')
    for folder in (tmp_path, tmp_path / 'mine'):
        with pytest.raises(ConfigError, match='exists already'):
            export_network(network, folder)
    assert (tmp_path / 'mine').read_text() == 'mine'


def test_missing_packages_are_named_with_the_command_that_installs_them(network, tmp_path, monkeypatch):
    found = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else found(name))
    with pytest.raises(ConfigError, match='onnxscript not installed; pip install onnx onnxscript onnxruntime'):
        export_network(network, tmp_path / 'network')
    export_network(network, tmp_path / 'network', 0, format='torch-export')


# -- running in stages ------------------------------------------------------------------------------------------------


def test_the_exported_folder_runs_where_there_is_no_torch(staged, tmp_path):
    shutil.move(shutil.copytree(staged, tmp_path / 'copy'), tmp_path / 'device')
    np.save(tmp_path / 'images.npy', images(5).numpy())
    code = (
        'import sys; sys.modules.update(torch=None, timm=None, timm_selfdistill=None)\n'
        'import numpy as np\n'
        'from staged_session import StagedSession\n'
        'logits, exits = StagedSession(".", levels=[0.5, 0.5], threads=1).run(np.load("../images.npy"))\n'
        'np.savez("../found.npz", logits=logits, exits=exits)\n'
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'device', check=True)
    logits, exits = StagedSession(staged, levels=[0.5, 0.5]).run(images(5).numpy())
    with np.load(tmp_path / 'found.npz') as found:
        np.testing.assert_array_equal(found['exits'], exits)
        np.testing.assert_allclose(found['logits'], logits, rtol=1e-4, atol=1e-4)


def test_nothing_runs_once_no_image_is_left(staged):
    session = StagedSession(staged, levels=[0., None])
    session._sessions[1:] = [None, None]
    _, exit_index = session.run(images(3).numpy())
    assert exit_index.tolist() == [0, 0, 0]
    session.levels = [1.1, 0.]
    with pytest.raises(AttributeError):
        session.run(images(3).numpy())


@torch.no_grad()
def test_levels_may_be_changed_between_batches(network, staged):
    session, x = StagedSession(staged), images(3)
    wanted = network.forward_exits(x)
    for levels, number in (([None, None], 2), ([None, 0.], 1), ((0., 0.), 0), ([float('inf'), 1e9], 2)):
        session.levels = levels
        logits, exit_index = session.run(x.numpy())
        assert exit_index.tolist() == [number] * 3
        np.testing.assert_allclose(logits, wanted[number].numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('levels, message', [
    ([0.5], '1 given, expected 2'),
    ([0.5, 0.5, 0.5], '3 given, expected 2'),
    ([0.5, 'high'], "'high' is no level"),
    ([float('nan'), 0.5], 'nan is no level'),
    ([True, 0.5], 'True is no level'),
])
def test_levels_that_do_not_fit_are_refused_and_the_old_ones_stay(staged, levels, message):
    session = StagedSession(staged)
    with pytest.raises(ValueError, match=message):
        session.levels = levels
    assert session.levels == (None, None)


def test_images_that_do_not_fit_are_refused_with_what_is_expected(staged):
    session = StagedSession(staged)
    good = images(3).numpy()
    for bad, message in (
        (good[:0], r'shape \(0, 3, 64, 64\): expected \(N, 3, 64, 64\) with one image or more'),
        (good[0], r'shape \(3, 64, 64\): expected'),
        (good[:, :, :32], r'shape \(3, 3, 32, 64\): expected'),
        (good.astype(np.float64), r'float64: expected an array of float32 \(N, 3, 64, 64\)'),
        (images(3), 'Tensor: expected an array of float32'),
    ):
        with pytest.raises(ValueError, match=message):
            session.run(bad)
    good[1, 0, 3, 3], good[2, 2, 5, 5] = np.nan, np.inf
    with pytest.raises(ValueError, match='images 1, 2 of 3: not finite'):
        session.run(good)


@pytest.mark.parametrize('change, message', [
    (lambda m: m.pop('graphs'), "'graphs' is missing"),
    (lambda m: m.pop('early_exit'), "'early_exit' is missing"),
    (lambda m: m.update(format_version=2), "'format_version': 2"),
    (lambda m: m.update(kind='exits'), "'kind': 'exits'"),
    (lambda m: m.update(input_size=5), 'export.json'),
    (lambda m: m.update(graphs=[1]), 'export.json'),
    (lambda m: m['graphs'][1].update(file='../section1.onnx'), 'is not the name of a file in this folder'),
    (lambda m: m['graphs'][1].update(file='..'), 'is not the name of a file in this folder'),
    (lambda m: m['graphs'][1].update(file='/section1.onnx'), 'is not the name of a file in this folder'),
    (lambda m: m['graphs'][1].update(file='gone.onnx'), 'gone.onnx'),
    (lambda m: m['early_exit'].update(levels=[0.5]), '1 given, expected 2'),
])
def test_a_broken_manifest_is_refused(staged, change, message, tmp_path):
    shutil.copytree(staged, tmp_path / 'parent' / 'broken')
    shutil.copy(staged / 'section1.onnx', tmp_path / 'parent')
    path = tmp_path / 'parent' / 'broken' / 'export.json'
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        StagedSession(path.parent)


@pytest.mark.parametrize('text', ['{', '[]', 'null', None])
def test_a_folder_without_a_manifest_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / 'export.json').write_text(text)
    with pytest.raises(ValueError, match='not of a network exported in stages'):
        StagedSession(tmp_path)


# -- the recipe -------------------------------------------------------------------------------------------------------


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
    runpy.run_path(str(RECIPES / 'export.py'), run_name='__main__')


@pytest.mark.slow
def test_the_recipe_exports_a_run(network, tmp_path, monkeypatch, capsys):
    save_model(network, tmp_path / 'run', dict(input_size=SIZE, crop_pct=0.9), list('abcde'))
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, '--checkpoint', 'run', '--exit', 0)
    folder = tmp_path / 'output' / 'export' / 'run-exit0-onnx'
    manifest = json.loads((folder / 'export.json').read_text())
    assert (manifest['kind'], manifest['exit'], manifest['crop_pct']) == ('exit', 0, 0.9)
    assert manifest['label_names'] == list('abcde')
    assert 'early_exit' not in manifest  # a network with one exit has none to choose
    found, = onnxruntime.InferenceSession(folder / 'network.onnx').run(None, dict(images=images(2).numpy()))
    with torch.no_grad():
        np.testing.assert_allclose(found, network.forward_exits(images(2))[0].numpy(), rtol=1e-3, atol=1e-3)
    out = capsys.readouterr().out
    assert 'network.onnx' in out and 'of the largest logit' in out
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, '--checkpoint', 'run', '--exit', 0)
    assert ended.value.code == 2 and 'exists already' in capsys.readouterr().err
