"""The weights that come with the package."""
import json
import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard

import timm_selfdistill
from timm_selfdistill.data import load_image_data
from timm_selfdistill.evaluation import EvaluationConfig, TrainedNetwork
from timm_selfdistill.metrics import evaluate_exits

ROOT = Path(__file__).parent.parent
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


def test_readmes_examples_run_as_pasted(capsys):
    # all but those with a repository of the reader's own, or in a folder that was exported
    own = [code for code in examples(README) if 'hf-hub:' not in code and 'staged_session' not in code]
    assert sum('EarlyExit' in code for code in own) >= 2
    namespace = {}
    for code in own:
        exec(code, namespace)
    said = capsys.readouterr().out
    assert [line.split(',')[0] in LABELS for line in said.splitlines()] == [True] * 4 + [False]
    # to the percent it depends on how this machine decodes and adds
    assert re.sub(r'\d+%', '', said) in re.sub(r'\d+%', '', README), 'what it prints stands below it'


def test_the_cards_example_runs_as_pasted(capsys):
    code, = examples((FOLDER / 'README.md').read_text(encoding='utf-8'))
    exec(code, {})
    assert capsys.readouterr().out.split('\n')[-2] in LABELS


def _cifar100():
    """Return the folder of CIFAR-100's files, if it stands beside the checkout: somewhere/data/cifar100."""
    return next((path for path in ROOT.parent.glob('*/data/cifar100') if any(path.glob('*.parquet'))), None)


@pytest.mark.slow
@pytest.mark.skipif(_cifar100() is None, reason='there is no CIFAR-100 beside the checkout')
def test_they_are_as_accurate_as_they_say():
    model = timm.create_model('resnet20_cifar_sd', pretrained=True).eval()
    data = load_image_data(data_dir=str(_cifar100()), label_column='fine_label')
    assert data.label_names == list(model.pretrained_cfg['label_names'])
    network = TrainedNetwork(model, data, timm.data.resolve_data_config(model=model), EvaluationConfig(device='cpu'))
    measured = evaluate_exits(model, network.batches(data.test))
    said = json.loads((FOLDER / 'results.json').read_text())['test']
    for row in said:
        assert row['count'] == 10_000
        # sums in another order may turn a few images of ten thousand
        assert measured[row['exit']]['top1'] == pytest.approx(row['top1'], abs=0.05)
    filed = [json.loads(line) for line in (ROOT / 'recipes' / 'results' / 'cifar100.jsonl').read_text().splitlines()]
    row, = [row for row in filed if row['recipe'] == 'resnet20_packaged']
    assert row['top1'] == pytest.approx([exit['top1'] for exit in said[:-1]], abs=1e-3)
    early = json.loads((FOLDER / 'early_exit.json').read_text())['test']
    left = timm_selfdistill.EarlyExit(model).evaluate(network.batches(data.test))
    assert left['cost'] == pytest.approx(early['cost'], abs=1e-3) and left['cost'] < 0.9
    assert left['top1'] == pytest.approx(early['top1'], abs=0.05)
    assert left['leaving'] == pytest.approx(early['leaving'], abs=1e-3)
