"""int8: what quantized stages decide, what is refused, and the command that calibrates them again."""
import json
import runpy
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.images import write_two_colours

import timm_selfdistill
from timm_selfdistill.errors import ConfigError, ExportError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.inference.export import export_network
from timm_selfdistill.inference.quantize import quantize_staged
from timm_selfdistill.inference.staged_session import StagedSession

SIZE = (3, 64, 64)


def images(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *SIZE)).astype(np.float32)


@pytest.fixture(scope='module')
def exact(tmp_path_factory):
    """A network exported in stages in float32."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_sd', num_classes=5, pretrained_cfg_overlay=dict(input_size=SIZE)).eval()
    folder = tmp_path_factory.mktemp('exported') / 'float32'
    export_network(model, folder, staged=True)
    return folder


@pytest.fixture(scope='module')
def rounded(exact):
    folder = exact.with_name('int8')
    quantize_staged(exact, folder, images(40))
    return folder


def test_stages_compute_in_int8_and_give_nearly_the_same_logits(exact, rounded):
    import onnx

    for path in sorted(rounded.glob('*.onnx')):
        graph = onnx.load(path).graph
        kinds = {node.op_type for node in graph.node}
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == 3]
        assert max(int(abs(w.astype(int)).max()) for w in weights if w.ndim > 1) == 64  # 127 overflows without VNNI
        assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds
        assert path.stat().st_size < 0.75 * (exact / path.name).stat().st_size
    x = images(9, seed=2)
    for a, b in zip(StagedSession(exact).run_exits(x), StagedSession(rounded).run_exits(x)):
        assert 0 < np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a)
    manifest = json.loads((rounded / 'export.json').read_text())
    assert manifest['precision']['graphs'] == 'int8' and manifest['int8']['images'] == 40
    assert all(ratio > 20 for ratio in manifest['int8']['signal_to_noise_db'])
    assert {path.name for path in rounded.iterdir()} == {path.name for path in exact.iterdir()}


def test_images_leave_where_the_quantized_logits_say(rounded):
    session, x = StagedSession(rounded), images(24, seed=3)
    by_exit = session.run_exits(x)
    sure = [torch.from_numpy(z).softmax(-1).amax(-1).numpy() for z in by_exit]
    session.levels = [float(np.median(s)) + 1e-6 for s in sure[:-1]]
    logits, exits = session.run(x)
    expected = np.stack([*(s >= level for s, level in zip(sure, session.levels)), np.ones(len(x), bool)]).argmax(0)
    assert (exits == expected).all() and len(set(exits.tolist())) > 1
    assert np.allclose(logits, np.stack(by_exit)[exits, np.arange(len(x))], atol=1e-4)


def test_stages_that_lose_their_logits_are_refused_with_the_figures(exact, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_selfdistill.inference.quantize.LEAST_DB', 100.)
    with pytest.raises(ExportError, match=r'in decibels is exit 0: \d+\.\d, exit 1: .*; 100 at least is expected'):
        quantize_staged(exact, tmp_path / 'out', images(8))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(exact, rounded, tmp_path):
    with pytest.raises(ConfigError, match='staged, onnx, int8: expected a network exported in stages'):
        quantize_staged(rounded, tmp_path / 'out', images(8))
    with pytest.raises(ConfigError, match='exists already, and nothing is overwritten'):
        quantize_staged(exact, rounded, images(8))
    with pytest.raises(ConfigError, match='not of a network exported in stages'):
        quantize_staged(tmp_path, tmp_path / 'out', images(8))
    with pytest.raises(ExportError, match='exit 0 cannot be quantized: '):
        quantize_staged(exact, tmp_path / 'out', images(8)[:, :2])
    assert list(tmp_path.iterdir()) == []


def test_logits_of_all_exits_are_checked_as_those_of_one_are(rounded):
    session = StagedSession(rounded)
    with pytest.raises(ValueError, match='images of float64'):
        session.run_exits(images(2).astype(float))
    bad = images(3)
    bad[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match='images 1 of 3: not finite'):
        session.run_exits(bad)


def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
    runpy.run_path(str(RECIPES / 'export.py'), run_name='__main__')


@pytest.mark.slow
def test_the_command_calibrates_anew_and_measures_beside_float32(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_sd', num_classes=8, pretrained_cfg_overlay=dict(input_size=SIZE)).eval()
    model.exit_rule = timm_selfdistill.EarlyExit(model, thresholds=[None, 0.2], ensemble=True).rule
    save_model(model, tmp_path / 'run')
    (tmp_path / 'data').mkdir()
    write_two_colours(tmp_path / 'data', 160)
    settings = dict(data_dir=str(tmp_path / 'data'), label_column='fine', val_fraction=0.5)
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(settings))
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    export(monkeypatch, '--checkpoint', tmp_path / 'run', '--staged', '--int8', '--output', tmp_path / 'out')
    out = capsys.readouterr().out
    assert 'int8 runs' in out and 'signal over quantization noise' in out
    manifest = json.loads((tmp_path / 'out' / 'export.json').read_text())
    measured = manifest['int8']['measured']
    assert len(measured['int8']['top1']) == len(measured['float32']['top1']) == 3
    assert any(level is not None for level in manifest['early_exit']['levels'])
    costs = [measured[kind]['early_exit']['cost'] for kind in ('float32', 'int8')]
    assert costs[1] < costs[0] + 0.1 and manifest['early_exit']['temperatures'] != [1.] * 3
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    StagedSession(tmp_path / 'out').run(images(3))


@pytest.mark.parametrize('options', [[], ['--exit', 1], ['--staged', '--format', 'torch-export']])
def test_int8_is_for_stages_as_onnx(options, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        export(monkeypatch, '--checkpoint', tmp_path, '--int8', *options)
    assert '--int8: goes with --staged and --format onnx' in capsys.readouterr().err
