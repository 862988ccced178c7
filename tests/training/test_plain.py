"""Runs without auxiliary exits, few classes, and what is said of how long a network takes."""
import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.images import write_two_colours

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.costs import measure_latency
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.hub.card import write_card
from timm_selfdistill.hub.networks import load_checkpoint, load_network, save_model
from timm_selfdistill.hub.push import stage
from timm_selfdistill.models.multi_exit import shown_name, without_exits
from timm_selfdistill.run_files import add_row
from timm_selfdistill.training.generations import train_generations
from timm_selfdistill.training.reporter import Reporter
from timm_selfdistill.training.trainer import train


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_two_colours(tmp_path_factory.mktemp('data'))


def settings(data, output, **changed):
    return TrainConfig(**{**dict(
        model='test_resnet', method='plain', epochs=1, batch_size=80, data_dir=str(data), label_column='coarse',
        output=str(output)), **changed})


@pytest.fixture(scope='module')
def plain(data, tmp_path_factory):
    """A plain run on four classes, and what it printed."""
    output = tmp_path_factory.mktemp('runs')
    code = (
        'import json, sys; from timm_selfdistill.config import TrainConfig; '
        'from timm_selfdistill.training.trainer import train; print(train(TrainConfig(**json.loads(sys.argv[1]))))')
    config = {k: v for k, v in settings(data, output).settings().items()}
    done = subprocess.run([sys.executable, '-c', code, json.dumps(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.splitlines()[-1]), done.stdout


def call(monkeypatch, recipe, *arguments):
    monkeypatch.setattr(sys, 'argv', [recipe, *map(str, arguments)])
    runpy.run_path(str(RECIPES / recipe), run_name='__main__')


def test_it_is_named_as_timm_names_it_and_has_no_ensemble_and_no_top5(plain):
    folder, printed = plain
    assert folder.name.endswith('-test_resnet')
    card = (folder / 'README.md').read_text()
    for text in (printed, card, (folder / 'summary.csv').read_text(), (folder / 'latency.json').read_text()):
        assert 'ensemble' not in text and '_sd' not in text and 'top-5' not in text and 'top5' not in text
    assert re.search(r'epoch 1/1  loss \d\.\d{4} \(ce0 \d\.\d{4}\)  ', printed)
    results = json.loads((folder / 'results.json').read_text())
    for rows in results.values():
        assert [(row['exit'], row['top5'], row['top5_count']) for row in rows] == [('exit0', None, None)]
    row = json.loads((folder / 'record.json').read_text())
    assert (row['ensemble_top1'], row['network'], len(row['top1'])) == (None, 'test_resnet', 1)
    assert 'timm is all that is needed' in card and 'multi-exit' not in card.split('## Citation')[0]


@pytest.mark.slow
def test_it_is_timms_network_without_this_package_too(plain, tmp_path):
    folder, _ = plain
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'test_resnet'
    code = 'import sys, timm; print(type(timm.create_model(sys.argv[1], pretrained=True)).__module__)'
    for place in (folder, folder / 'best'):
        out = subprocess.run(
            [sys.executable, '-c', code, f'local-dir:{place}'], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == 'timm.models.resnet'
    model, path = load_checkpoint(str(folder))
    x = torch.rand(2, 3, 32, 32)
    assert path == folder and model.num_exits == 1 and shown_name(model) == 'test_resnet'
    assert torch.equal(model(x), load_network(str(folder))[0](x)) and not model.training
    assert list(model.pretrained_cfg['label_names']) == list('rgby')


def test_it_is_evaluated_published_and_not_calibrated(plain, tmp_path, monkeypatch, capsys):
    folder, _ = plain
    for ensemble in ('logits', 'learned'):
        call(monkeypatch, 'evaluate.py', '--checkpoint', folder, '--json', '--ensemble', ensemble)
        out = json.loads(capsys.readouterr().out)
        row, = out['exits']
        expected, = json.loads((folder / 'results.json').read_text())['test']
        assert out['ensemble'] is None and row['params'] == expected['params']
        assert row['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    call(monkeypatch, 'evaluate.py', '--checkpoint', folder)
    out = capsys.readouterr().out
    assert 'test_resnet on' in out and 'ensemble' not in out and 'top-5' not in out
    with pytest.raises(SystemExit):
        call(monkeypatch, 'calibrate.py', '--checkpoint', folder, '--budget', '0.5')
    assert 'test_resnet has no auxiliary exits to leave at' in capsys.readouterr().err
    staged = tmp_path / 'staged'
    staged.mkdir()
    stage(folder, staged, f'local-dir:{folder}')
    snippet, _ = re.findall(r'```python\n(.*?)```', (staged / 'README.md').read_text(), re.DOTALL)
    assert 'timm_selfdistill' not in snippet
    exec(snippet, {})
    assert capsys.readouterr().out.strip() in 'rgby'
    assert (staged / 'model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()


@pytest.mark.slow
def test_it_goes_on_to_the_bit_from_what_an_older_version_left(data, tmp_path, monkeypatch):
    """Whose network has the exits' name and whose summary has columns of an ensemble and of the top 5."""
    whole = train(settings(data, tmp_path, epochs=2, experiment='whole'))
    train(settings(data, tmp_path, epochs=1, experiment='half'))
    half = tmp_path / 'half'
    (half / 'results.json').unlink()
    args = yaml.safe_load((half / 'args.yaml').read_text())
    (half / 'args.yaml').write_text(yaml.safe_dump(dict(args, epochs=2)))
    for file in (half / 'checkpoints').glob('*'):  # of another schedule; begin anew
        shutil.rmtree(file)
    with (half / 'summary.csv').open() as f:
        row, = csv.DictReader(f)
    old = dict(list(row.items())[:-1], eval_top5='100', eval_ensemble_top1=row['eval_top1'], lr=row['lr'])
    (half / 'summary.csv').unlink()
    add_row(half / 'summary.csv', old)
    save_model(timm.create_model('test_resnet_sd', exits=(), num_classes=4), half)
    train(settings(data, tmp_path, epochs=2, experiment='half', resume='auto'))
    assert (half / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    assert json.loads((half / 'config.json').read_text())['architecture'] == 'test_resnet'


def test_lines_of_two_versions_stand_in_one_summary(tmp_path):
    summary = tmp_path / 'summary.csv'
    add_row(summary, dict(epoch=0, eval_ensemble_top1=3., lr=0.1))
    add_row(summary, dict(epoch=1, lr=0.2))
    add_row(summary, dict(epoch=2, new=5, lr=0.3))
    assert summary.read_text().split() == [
        'epoch,eval_ensemble_top1,lr,new', '0,3.0,0.1,', '1,,0.2,', '2,,0.3,5']


@pytest.mark.slow
def test_it_teaches_and_is_taught(plain, data, tmp_path):
    folder, _ = plain
    student = train(settings(data, tmp_path, method='kd', teacher=str(folder), experiment='student'))
    assert json.loads((student / 'config.json').read_text())['architecture'] == 'test_resnet'
    card = (student / 'README.md').read_text()
    assert f'taught by {folder.name}' in card and str(folder.parent) not in card
    exits = train(settings(data, tmp_path, method='byot', exits=(2,), teacher=str(folder), experiment='exits'))
    assert load_checkpoint(str(exits))[0].num_exits == 2
    root = train_generations(settings(data, tmp_path, generations=1, experiment='line'))
    header = (root / 'generations.csv').read_text().splitlines()[0].split(',')
    assert 'exit0' in header and 'generations_ensemble' in header and 'ensemble' not in header


def test_an_encoder_keeps_the_classifier_that_it_was_given():
    model = timm.create_model('vit_tiny_patch16_224_sd', num_classes=3, exits=())
    assert without_exits(model) is model.backbone
    encoder = next(name for name in timm.list_models('*_enc'))
    with torch.device('meta'):
        model = timm.create_model(f'{encoder}_sd', num_classes=3, exits=())
    assert without_exits(model) is model and shown_name(model) == f'{encoder}_sd'


def test_a_network_that_was_cut_off_is_refused_with_a_sentence(tmp_path):
    model = timm.create_model('test_resnet_sd', num_classes=3, exits=(2,))
    save_model(model.truncate(0), tmp_path)
    with pytest.raises(ConfigError, match='was cut off at an exit; expected a whole network'):
        load_checkpoint(str(tmp_path))


def test_the_line_of_an_epoch_shows_the_deepest_exits_cross_entropy(capsys):
    metrics = {name: dict(top1=50.) for name in ('exit0', 'exit1', 'ensemble')}
    Reporter(True, 3).epoch(0, dict(loss=5.25, ce0=2., ce1=0.125, kl0=3.), metrics, 'test', 1.)
    assert 'epoch 1/3  loss 5.2500 (ce1 0.1250)  test top-1: exit0 50.00' in capsys.readouterr().out


# -- latency ----------------------------------------------------------------------------------------------------------


def test_the_spread_lies_around_the_median(tiny):
    latency = measure_latency(tiny.eval(), (3, 32, 32), torch.device('cpu'))
    assert list(latency['ms']) == list(latency['quartiles']) == ['exit0', 'exit1', 'exit2', 'ensemble']
    for name, (low, high) in latency['quartiles'].items():
        assert 0 < low <= latency['ms'][name] <= high
    assert latency['rounds'] >= 7
    assert latency['busy'] is (None if latency['others'] is None else latency['others'] > 0.1)


@pytest.mark.parametrize('of_cores, own, others', [
    ([100., 100., 100., 100.], 100., 0.75), ([60., 40., 1., 1.], 100., 0.005), ([90., 90., 90., 90.], 400., 0.),
    ([0., 0., 0., 0.], 100., None), ([50.] * 4, 0., None),
])
def test_what_other_programs_take_is_told(tiny, monkeypatch, of_cores, own, others):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(psutil, 'cpu_percent', lambda percpu: of_cores)
    monkeypatch.setattr(psutil.Process, 'cpu_percent', lambda self: own)
    latency = measure_latency(tiny.eval(), (3, 32, 32), torch.device('cpu'))
    assert latency['others'] == others and latency['busy'] == (None if others is None else others > 0.1)


def test_a_card_gives_the_spread_and_says_that_the_machine_was_busy(plain, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(plain[0], folder)
    latency = json.loads((folder / 'latency.json').read_text())
    for busy in (True, False, None):
        latency.update(others=0.42, busy=busy, ms=dict(exit0=2.), quartiles=dict(exit0=[1.5, 2.25]), rounds=9)
        (folder / 'latency.json').write_text(json.dumps(latency))
        write_card(folder)
        card = (folder / 'README.md').read_text()
        assert '2.00 ms' in card and 'The middle half of 9 measurements:\nexit0 1.50 to 2.25 ms.' in card
        assert ('The machine was busy: other programs took 42 % of its cores' in card) == bool(busy)
    old = {k: v for k, v in latency.items() if k not in ('others', 'busy', 'quartiles', 'rounds')}
    (folder / 'latency.json').write_text(json.dumps(dict(old, ms=dict(exit0=2., ensemble=2.))))
    write_card(folder)
    assert '2.00 ms' in (folder / 'README.md').read_text() and 'middle half' not in (folder / 'README.md').read_text()
