"""The scripts of `recipes/by_feature` do what they show."""
import importlib
import json

import pytest
import timm
import torch
from helpers import RECIPES
from helpers.images import noise_images
from helpers.runs import untrained_run


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
