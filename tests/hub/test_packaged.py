"""The weights that come with the package."""
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import PAPER, ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import timm_selfdistill
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.evaluation.trained_network import EvaluationConfig, TrainedNetwork
from timm_selfdistill.metrics import evaluate_exits
from timm_selfdistill.training.trainer import train

README = (ROOT / 'README.md').read_text(encoding='utf-8')
NAME = 'resnet20_cifar_sd.byot_cifar100'
FOLDER = Path(timm_selfdistill.__file__).parent / 'weights' / NAME
LABELS = json.loads((FOLDER / 'config.json').read_text(encoding='utf-8'))['label_names']


def test_they_are_listed_and_small():
    assert timm.list_pretrained('*_sd') == [NAME]
    assert sum(path.stat().st_size for path in FOLDER.rglob('*')) < 3e6
    assert ModelCard.load(FOLDER / 'README.md').data.datasets == ['uoft-cs/cifar100']


def test_they_come_with_classes_thresholds_and_preprocessing():
    model = timm.create_model('resnet20_cifar_sd', pretrained=True)
    assert model.num_classes == 100 and len(set(model.pretrained_cfg['label_names'])) == 100
    assert list(model.pretrained_cfg['input_size']) == [3, 32, 32]
    rule = timm_selfdistill.EarlyExit(model).rule
    assert any(threshold is not None for threshold in rule.thresholds) and set(rule.temperatures) != {1.0}
    assert timm.create_model(NAME, pretrained=True, num_classes=7).get_classifier().out_features == 7


def examples(text):
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


def test_the_cards_example_runs_as_pasted(capsys):
    code, = examples((FOLDER / 'README.md').read_text(encoding='utf-8'))
    exec(code, {})
    assert capsys.readouterr().out.split('\n')[-2] in LABELS


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    return train(TrainConfig(model='test_resnet', exits=(2, 3), epochs=1, output=str(folder), experiment='digits'))


def package(monkeypatch, run, name, output):
    script = PAPER / 'package_weights.py'
    monkeypatch.setattr(sys, 'argv', [
        str(script), '--checkpoint', str(run), '--name', name, '--budget', '0.97', '--output', str(output / 'weights'),
        '--results', str(output / 'rows.jsonl')])
    runpy.run_path(str(script), run_name='__main__')


@pytest.mark.slow
def test_a_run_is_packaged_as_it_is_measured(run, monkeypatch, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    package(monkeypatch, run, 'test_resnet_sd.byot_digits', tmp_path)
    assert {path: path.read_bytes() for path in run.rglob('*') if path.is_file()} == before
    folder = tmp_path / 'weights' / 'test_resnet_sd.byot_digits'
    assert {t.dtype for t in load_file(folder / 'model.safetensors').values()} == {torch.float16, torch.int64}
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert set(timm_selfdistill.EarlyExit(model).rule.thresholds) != {None}
    row, = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    said = json.loads((folder / 'results.json').read_text())['test']
    assert row['top1'] == pytest.approx([exit['top1'] for exit in said[:-1]], abs=1e-3)
    assert str(tmp_path) not in (folder / 'README.md').read_text() + (folder / 'args.yaml').read_text()


@pytest.mark.parametrize('name', ['test_resnet_sd', 'resnet50_sd.byot', 'test_resnet_sd.a/../../b', '../weights'])
def test_a_name_that_is_not_the_networks_is_refused(run, name, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        package(monkeypatch, run, name, tmp_path)
    assert f'--name {name}: expected test_resnet_sd.<tag>' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def _cifar100():
    """Return the folder of CIFAR-100's files, if it stands beside the checkout: somewhere/data/cifar100."""
    return next((path for path in ROOT.parent.glob('*/data/cifar100') if any(path.glob('*.parquet'))), None)


@pytest.mark.slow
@pytest.mark.skipif(_cifar100() is None, reason='there is no CIFAR-100 beside the checkout')
def test_they_are_as_accurate_as_they_say():
    model = timm.create_model('resnet20_cifar_sd', pretrained=True).eval()
    data = load_image_data(DataSource(data_dir=str(_cifar100()), label_column='fine_label'))
    assert data.label_names == list(model.pretrained_cfg['label_names'])
    network = TrainedNetwork(model, data, timm.data.resolve_data_config(model=model), EvaluationConfig(device='cpu'))
    measured = evaluate_exits(model, network.batches(data.test))
    said = json.loads((FOLDER / 'results.json').read_text())['test']
    for row in said:
        assert row['count'] == 10_000
        # sums in another order may turn a few images of ten thousand
        assert measured[row['exit']]['top1'] == pytest.approx(row['top1'], abs=0.05)
    filed = [json.loads(line) for line in (PAPER / 'results' / 'cifar100.jsonl').read_text().splitlines()]
    row, = [row for row in filed if row['recipe'] == 'resnet20_packaged']
    assert row['top1'] == pytest.approx([exit['top1'] for exit in said[:-1]], abs=1e-3)
    early = json.loads((FOLDER / 'early_exit.json').read_text())['test']
    left = timm_selfdistill.EarlyExit(model).evaluate(network.batches(data.test))
    assert left['cost'] == pytest.approx(early['cost'], abs=1e-3) and left['cost'] < 0.9
    assert left['top1'] == pytest.approx(early['top1'], abs=0.05)
    assert left['leaving'] == pytest.approx(early['leaving'], abs=1e-3)
