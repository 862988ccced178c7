"""The page where every exit answers, without a browser."""
import ast
import runpy
import sys

import pytest
import timm
import torch
from helpers import RECIPES
from helpers.images import noise_images

from timm_selfdistill.cli.demo import Exits, make_page
from timm_selfdistill.data.augment import eval_transform
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.inference.early_exit import EarlyExit

pytest.importorskip('gradio')


@pytest.fixture
def network(tmp_path):
    model = timm.create_model('test_resnet_sd', num_classes=6, exits=(2, 3)).eval()
    save_model(model, tmp_path / 'net', dict(input_size=(3, 32, 32)), list('abcdef'))
    return model, tmp_path / 'net'


def test_answers_are_those_of_the_network(network):
    _, folder = network
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    picture, = noise_images(1, 48)
    exits = Exits(str(folder), (0.2, 0.99))
    found = exits.ask(picture)
    images = eval_transform(exits.data_config)(picture)[None]
    with torch.no_grad():
        logits = model.forward_exits(images)
    for row, z in zip(found.rows, logits):
        confidence, answer = z.softmax(-1)[0].max(-1)
        assert row['answer'] == 'abcdef'[answer] and row['confidence'] == f'{100 * confidence.item():.1f} %'
    out = EarlyExit(model, (0.2, 0.99))(images)
    assert found.exit_index == out.exit_index.item()
    assert [row['exit'].startswith('▶') for row in found.rows].index(True) == found.exit_index
    assert max(found.scores, key=found.scores.get) in found.summary and found.whole_ms > 0
    assert [row['leaves from'] for row in found.rows] == ['20.0 %', '99.0 %', 'always']


def test_the_page_answers_a_picture(network):
    page = make_page(str(network[1]))
    assert page.analytics_enabled is False
    answer, = (f.fn for f in page.fns.values())
    summary, scores, table = answer(noise_images(1, 40)[0].convert('L'))
    assert 'the picture' in summary and len(scores) == 5 and len(table) == 3
    assert answer(None)[0] == 'Drop a picture.'


def test_thresholds_that_do_not_fit_are_an_error(network):
    with pytest.raises(ConfigError, match='`thresholds=2.0`'):
        make_page(str(network[1]), (2.,))


def publish(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['publish.py', *map(str, arguments)])
    runpy.run_path(str(RECIPES / 'publish.py'), run_name='__main__')


def test_a_spaces_folder_holds_the_page_and_the_weights(network, tmp_path, monkeypatch, capsys):
    publish(monkeypatch, '--checkpoint', network[1], '--space', tmp_path / 'space')
    names = sorted(str(p.relative_to(tmp_path / 'space')) for p in (tmp_path / 'space').rglob('*') if p.is_file())
    assert names == ['README.md', 'app.py', 'model/config.json', 'model/model.safetensors', 'requirements.txt']
    assert '--repo-type space' in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / 'space')
    launched = []
    monkeypatch.setattr('gradio.Blocks.launch', lambda page, **options: launched.append(page))
    runpy.run_path('app.py', run_name='__main__')
    assert len(launched) == 1
    text = (tmp_path / 'space/README.md').read_text()
    assert text.startswith('---\n') and 'sdk: gradio' in text and str(tmp_path) not in text
    with pytest.raises(SystemExit):
        publish(monkeypatch, '--checkpoint', network[1], '--space', tmp_path / 'space')
    assert 'exists and is not empty' in capsys.readouterr().err


def test_a_spaces_folder_may_load_a_repository(network, tmp_path, monkeypatch):
    publish(monkeypatch, '--checkpoint', network[1], '--repo', 'org/net', '--space', tmp_path / 'space')
    tree = ast.parse((tmp_path / 'space/app.py').read_text())
    assert "make_page('hf-hub:org/net')" in ast.unparse(tree) and not (tmp_path / 'space/model').exists()
