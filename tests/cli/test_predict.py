"""Images in, answers out: in order, whatever cannot be read, each as deep as it needs."""
import csv
import json
import re
import sys

import pytest
import timm
import torch
from helpers.images import noise_images
from rich.console import Console
from timm.data import resolve_data_config

from timm_selfdistill.cli import predict as module
from timm_selfdistill.cli.predict import PredictConfig, predict
from timm_selfdistill.data.augment import eval_transform
from timm_selfdistill.data.images import decode_image
from timm_selfdistill.errors import ConfigError, DataError
from timm_selfdistill.hub.networks import load_checkpoint, save_model
from timm_selfdistill.inference.early_exit import EarlyExit

CLASSES = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('network')
    model = timm.create_model('test_resnet_sd', num_classes=6, exits=(2, 3)).eval()
    view = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.)
    logits = model.forward_exits(torch.randn(64, 3, 32, 32))
    sure = [z.softmax(-1).amax(-1).median().item() for z in logits[:-1]]
    EarlyExit(model, sure)
    model.exit_rule = EarlyExit(model, sure, temperatures=(1., 2., 3.)).rule
    save_model(model, folder, view, CLASSES)
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for i, image in enumerate(noise_images(23)):
        where = folder / ('deep/er' if i % 3 else '.')
        where.mkdir(parents=True, exist_ok=True)
        image.resize((32 + i, 40)).save(where / f'{i:02}.png')
    (folder / 'deep' / 'broken.jpg').write_bytes(b'nothing')
    (folder / 'notes.txt').write_text('no image')
    return folder


def run(network, capsys, **settings):
    said = Console(file=sys.stderr, width=200, highlight=False)
    predict(PredictConfig(checkpoint=str(network), device='cpu', **settings), said)
    return capsys.readouterr()


def expected(network, files):
    """What the network says of files one at a time."""
    model, _ = load_checkpoint(str(network))
    transform, predictor = eval_transform(resolve_data_config(model=model)), EarlyExit(model)
    for file in files:
        image = transform(decode_image(dict(path=file), 'RGB', file))[None]
        out = predictor(image)
        confidence, label = out.probabilities[0].max(-1)
        yield file, CLASSES[label], confidence.item(), out.exit_index.item()


def test_a_folder_in_order_whatever_cannot_be_read(network, photos, tmp_path, capsys):
    out = run(network, capsys, input=(str(photos),), output=tmp_path / 'out.csv', batch_size=4)
    rows = list(csv.reader((tmp_path / 'out.csv').open()))
    assert rows[0] == ['file', 'label', 'confidence', 'exit']
    assert [row[0] for row in rows[1:]] == sorted(row[0] for row in rows[1:]) and len(rows) == 24
    for row, (file, label, confidence, number) in zip(rows[1:], expected(network, [row[0] for row in rows[1:]])):
        assert row[:2] == [file, label] and int(row[3]) == number
        assert float(row[2]) == pytest.approx(confidence, abs=1e-4)
    assert len({row[3] for row in rows[1:]}) > 1, 'some leave early, some do not'
    listed = list(csv.DictReader((tmp_path / 'out.unreadable.csv').open()))
    assert [entry['path'] for entry in listed] == [str(photos / 'deep/broken.jpg')]
    assert 'broken.jpg' in out.err and '23 images in' in out.err
    counts = [int(n) for n in re.findall(r'exit\d (\d+) \(', out.err)]
    assert counts == [sum(row[3] == str(i) for row in rows[1:]) for i in range(3)]
    assert re.search(r'early exit took \d+ % of the MACs and was [\d.]+ times as fast as running to the end', out.err)


@pytest.mark.parametrize('batch_size, workers', [(1, 0), (7, 2), (64, 0)])
def test_batches_and_workers_change_nothing(network, photos, tmp_path, capsys, batch_size, workers):
    run(network, capsys, input=(str(photos),), output=tmp_path / 'a.csv', batch_size=5)
    run(network, capsys, input=(str(photos),), output=tmp_path / 'b.csv', batch_size=batch_size, workers=workers)
    one, other = (list(csv.reader((tmp_path / f'{name}.csv').open())) for name in 'ab')
    assert [row[:2] + row[3:] for row in one] == [row[:2] + row[3:] for row in other]
    for row, same in zip(one[1:], other[1:]):
        assert float(row[2]) == pytest.approx(float(same[2]), abs=1e-4)


def test_json_lines_with_the_likeliest_classes_and_every_exits_answer(network, photos, capsys):
    out = run(
        network, capsys, input=(str(photos / '00.png'), str(photos / 'deep/er/*.png')), format='jsonl', top_k=3,
        all_exits=True)
    rows = [json.loads(line) for line in out.out.splitlines()]
    assert rows[0]['file'] == str(photos / '00.png') and len(rows) == 16
    for row in rows:
        assert [a['label'] for a in row['top']][0] == row['label'] and len({a['label'] for a in row['top']}) == 3
        assert row['confidence'] == row['top'][0]['confidence'] >= row['top'][1]['confidence']
        assert len(row['exits']) == 3
        assert row['exits'][row['exit']] == dict(label=row['label'], confidence=row['confidence'])


def test_csv_has_a_column_for_each_of_these(network, photos, capsys):
    out = run(network, capsys, input=(str(photos / '00.png'),), top_k=2, all_exits=True)
    header = out.out.splitlines()[0].split(',')
    of_exits = [f'exit{i}_{key}' for i in range(3) for key in ('label', 'confidence')]
    assert header[4:] == ['label_2', 'confidence_2', *of_exits]


def test_thresholds_of_the_command_line(network, photos, capsys):
    for thresholds, exits in (((0.,), {0}), ((1.,), {2}), ((1., 0.), {1})):
        out = run(network, capsys, input=(str(photos),), format='jsonl', thresholds=thresholds)
        assert {json.loads(line)['exit'] for line in out.out.splitlines()} == exits


def test_weights_without_thresholds_run_to_the_end(tmp_path, photos, capsys):
    save_model(timm.create_model('test_resnet_sd', num_classes=6, exits=(2,)), tmp_path, dict(input_size=(3, 32, 32)))
    out = run(tmp_path, capsys, input=(str(photos / '00.png'),))
    assert out.out.splitlines()[1].endswith(',1') and 'There are no thresholds' in out.err
    assert out.out.splitlines()[1].split(',')[1] in '012345', 'classes without names are numbered'


def test_a_data_set(network, capsys):
    out = run(network, capsys, dataset='digits', split='validation', format='jsonl')
    rows = [json.loads(line) for line in out.out.splitlines()]
    assert [row['file'] for row in rows] == [f'validation/{i}' for i in range(183)]


@pytest.mark.parametrize('settings, problem', [
    (dict(input=('EMPTY',)), '`input=.*`: there are no images below this folder'),
    (dict(input=('EMPTY/*.png',)), 'as a pattern it matches none'),
    (dict(input=('no/such/file.png',)), 'there is no such file or folder'),
    (dict(), '`input`: pass files or folders, or else `dataset` or `data_dir`'),
    (dict(input=('x',), dataset='digits'), 'one of them'),
    (dict(input=('x',), top_k=7), '`top_k=7`: expected a number from 1 to 6'),
    (dict(input=('x',), top_k=0), '`top_k=0`'),
    (dict(input=('x',), batch_size=0), '`batch_size=0`: expected 1 or more'),
    (dict(input=('x',), workers=-1), '`workers=-1`'),
    (dict(dataset='digits', thresholds=(2.,)), '`thresholds=2.0`: .*out of range'),
    (dict(dataset='digits', thresholds=(.1, .2, .3)), '3 given for a network of 3 exits; expected 2'),
    (dict(dataset='digits', output='out.txt'), '`output=out.txt`: expected a name that ends in .csv or .jsonl'),
    (dict(dataset='digits', split='test', device='nowhere'), '`device=nowhere`'),
])
def test_what_cannot_be_done_is_said(network, tmp_path, capsys, settings, problem):
    (tmp_path / 'EMPTY').mkdir()
    given = {
        name: tuple(v.replace('EMPTY', str(tmp_path / 'EMPTY')) for v in value) if name == 'input' else value
        for name, value in settings.items()
    }
    if 'output' in given:
        given['output'] = tmp_path / given['output']
    with pytest.raises((ConfigError, DataError), match=problem.replace('=out', '=.*out')):
        predict(PredictConfig(checkpoint=str(network), **{'device': 'cpu', **given}), Console(quiet=True))
    assert not (tmp_path / 'out.txt').exists()


def test_when_nothing_can_be_read_that_is_an_error_and_older_answers_are_kept(network, tmp_path, capsys):
    (tmp_path / 'bad.png').write_bytes(b'')
    (tmp_path / 'out.csv').write_text('older')
    with pytest.raises(DataError, match='None of the 1 image can be read: .*bad.png: the file is empty'):
        run(network, capsys, input=(str(tmp_path / 'bad.png'),), output=tmp_path / 'out.csv')


def test_the_command(network, photos, monkeypatch, capsys):
    arguments = ['--checkpoint', str(network), '--input', str(photos / '00.png'), '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['predict.py', *arguments])
    module.main()
    assert capsys.readouterr().out.startswith('file,label,confidence,exit\n')
