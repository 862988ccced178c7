"""The scripts of `recipes/by_feature` do what they show."""
import asyncio
import base64
import importlib
import json
from pathlib import Path

import httpx
import psutil
import pytest
import timm
import torch
from helpers import RECIPES
from helpers.images import noise_images
from helpers.runs import untrained_run

from timm_selfdistill import EarlyExit


@pytest.fixture
def script(monkeypatch):
    """Import a script by name."""
    monkeypatch.syspath_prepend(str(RECIPES / 'by_feature'))
    return importlib.import_module


@pytest.mark.slow
def test_own_loop(script):
    torch.manual_seed(0)
    accuracies = script('own_loop').main()
    assert len(accuracies) == 3 and min(accuracies) > 0.5


@pytest.mark.slow
def test_hf_trainer(script):
    pytest.importorskip('transformers')
    assert script('hf_trainer').main(epochs=3) > 0.5


@pytest.mark.slow
def test_lightning(script):
    pytest.importorskip('lightning')
    torch.manual_seed(0)
    accuracies = script('lightning_module').main()
    assert len(accuracies) == 3 and min(accuracies) > 0.5


@pytest.mark.slow
def test_frozen_exits(script, tmp_path):
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'mine.pth')
    network, accuracies = script('frozen_exits').main(tmp_path / 'mine.pth')
    assert min(accuracies[:-1]) > 0.5 > accuracies[-1], 'the network itself was never trained'
    saved = torch.load(tmp_path / 'mine.pth', weights_only=True)
    assert all(torch.equal(t, saved[n]) for n, t in network.backbone.state_dict().items())
    assert len((RECIPES / 'by_feature/frozen_exits.py').read_text().splitlines()) <= 40


@pytest.mark.slow
def test_unlabelled_images(script, tmp_path, capsys):
    (tmp_path / 'photos').mkdir()
    for i, image in enumerate(noise_images(80)):
        image.save(tmp_path / 'photos' / f'{i}.png')
    run = untrained_run(tmp_path / 'run')
    folder = script('unlabelled_images').main(str(run), str(tmp_path / 'photos'), str(tmp_path / 'out'), epochs=1)
    assert json.loads((folder / 'results.json').read_text())['validation'][0]['agreement']
    assert 'exit0 agrees with the deepest exit on' in capsys.readouterr().out


def test_each_script_says_what_it_shows_and_is_tested():
    tests = (RECIPES.parent / 'tests/cli/test_by_feature.py').read_text()
    for path in (RECIPES / 'by_feature').glob('*.py'):
        assert path.read_text().splitlines()[1].startswith('"""') and f"script('{path.stem}')" in tests, path


@pytest.mark.slow
def test_drift(script, capsys):
    torch.manual_seed(0)
    same, noisy = script('drift').main()
    assert not same.drifted and noisy.drifted and sum(same.now) == sum(noisy.now) == 397
    assert 'noise 0.5: calibrate the thresholds again: exit0 ' in capsys.readouterr().out


@pytest.mark.slow
def test_serving_gives_what_the_predictor_gives(script, tmp_path, capsys):
    pytest.importorskip('litserve')
    run = untrained_run(tmp_path / 'run')
    load = script('serve_load')
    assert Path(script('serve').__file__) == Path(load.__file__).with_name('serve.py')  # which load.serving starts
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    size = model.pretrained_cfg['input_size']
    bodies = load.read_images(None, size, 20)
    checkpoint = f'local-dir:{run}'
    with load.serving(checkpoint, 'early', bodies[0]) as url:
        answers = asyncio.run(load.offer(url, bodies, 100, 0.4, 30))
        with pytest.raises(httpx.HTTPError):
            httpx.post(url, json=dict(pixels='AAAA')).raise_for_status()
    serving = [p for p in psutil.process_iter(['cmdline']) if checkpoint in (p.info['cmdline'] or [])]
    assert not serving, 'no process is left of it'
    pixels = [base64.b64decode(json.loads(body)['pixels']) for body in bodies]
    images = torch.stack([torch.frombuffer(bytearray(p), dtype=torch.uint8).view(*size[1:], 3) for p in pixels])
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    out = EarlyExit(model)((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    expected = [dict(label=a, exit=b) for a, b in zip(out.logits.argmax(-1).tolist(), out.exit_index.tolist())]
    assert len(answers) == 40 and all(taken > 0 for taken, _ in answers)
    assert [answer for _, answer in answers] == [expected[i % 20] for i in range(40)]


@pytest.mark.slow
def test_the_load_generator_compares_three_servers(script, tmp_path, capsys):
    pytest.importorskip('litserve')
    run = untrained_run(tmp_path / 'run')
    rows = script('serve_load').main([f'local-dir:{run}', '--rates', '5', '20', '--seconds', '1'])
    assert [(row['server'], row['rate']) for row in rows] == [
        (kind, rate) for kind in ('whole', 'exit0', 'early') for rate in (5., 20.)]
    assert all(row['failed'] == 0 and row['p50_ms'] <= row['p99_ms'] for row in rows)
    assert capsys.readouterr().out.count('| early |') == 2


def test_goodput_counts_what_came_in_time(script):
    pytest.importorskip('httpx')
    taken = [(0.05, {}), (0.2, {}), (None, None), (0.1, {})]
    row = script('serve_load').summarize(taken, seconds=2., deadline=0.1)
    assert row == dict(requests=4, failed=1, goodput=1., p50_ms=100., p99_ms=pytest.approx(198.))
