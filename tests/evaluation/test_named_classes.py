"""Networks meet data whose classes stand in another order, or that have other splits: from the command line."""
import json
import runpy
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import RECIPES
from PIL import Image
from timm.data import resolve_data_config

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.training.build import build_model, build_task

NAMES = ['apple', 'bus', 'castle', 'lion', 'rose']

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a recipe in this process; return what it printed."""
    def run_recipe(recipe, *args, status=0):
        monkeypatch.setattr(sys, 'argv', [recipe, *map(str, args)])
        try:
            runpy.run_path(str(RECIPES / f'{recipe}.py'), run_name='__main__')
            code = 0
        except SystemExit as e:
            code = e.code or 0
        out = capsys.readouterr()
        assert code == status, out.out + out.err
        assert 'Traceback' not in out.err
        return out
    return run_recipe


def grey(number):
    """Make an image whose class a network can read off: its shade."""
    return Image.new('RGB', (32, 32), (40 + 40 * number,) * 3)


def write_images(folder, names, split, count=8):
    """Write images of some of the classes into folders of their names."""
    for name in names:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            grey(NAMES.index(name)).save(folder / split / name / f'test_{i}.png')  # file names mean nothing
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A network that knows the five shades by heart, whatever machine it learns them on."""
    folder = tmp_path_factory.mktemp('run')
    model = timm.create_model('test_vit_sd', num_classes=5, img_size=32, exits=(0,), exit_head='linear')
    data_config = resolve_data_config(dict(input_size=(3, 32, 32), mean=(0.,) * 3, std=(1.,) * 3), model=model)
    images = torch.stack([torch.full((3, 32, 32), (40 + 40 * n) / 255) for n in range(5)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = sum(torch.nn.functional.cross_entropy(z, torch.arange(5)) for z in model.train().forward_exits(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.1:
            break
    with torch.no_grad():
        assert all(z.argmax(-1).tolist() == list(range(5)) for z in model.eval().forward_exits(images))
    save_model(model, folder, data_config, NAMES)
    return folder


def top1(out):
    return [row['top1'] for row in json.loads(out.out)['exits']]


@pytest.mark.parametrize('names, split', [(['lion', 'rose'], 'test'), (['rose', 'apple', 'castle'], 'Testing')])
def test_a_folder_of_some_classes_is_measured_by_name(run, checkpoint, tmp_path, names, split):
    out = run('evaluate', '--checkpoint', checkpoint, '--data-dir', write_images(tmp_path, names, split), '--json')
    assert set(top1(out)) == {100.}
    assert f'{8 * len(names)} test images; 5 classes: apple, bus' in out.err


def test_class_folders_without_splits_are_measured_whole(run, checkpoint, tmp_path):
    out = run('evaluate', '--checkpoint', checkpoint, '--data-dir', write_images(tmp_path, NAMES[1:], '.'), '--json')
    assert set(top1(out)) == {100.}
    assert json.loads(out.out)['exits'][0]['count'] == 32


def test_classes_that_the_network_does_not_know_are_listed(run, checkpoint, tmp_path):
    write_images(tmp_path, ['lion'], 'test')
    for name in ('zebra', 'Lion'):
        (tmp_path / 'test' / name).mkdir()
        grey(0).save(tmp_path / 'test' / name / '0.png')
    out = run('evaluate', '--checkpoint', checkpoint, '--data-dir', tmp_path, status=2)
    assert 'does not know: Lion (1 image), zebra (1 image). It knows: apple, bus, castle, lion, rose' in out.err


def test_train_and_val_are_enough_to_calibrate(run, checkpoint, tmp_path):
    write_images(tmp_path, NAMES, 'train', 3)
    write_images(tmp_path, NAMES[::2], 'val', 20)
    common = ['calibrate', '--checkpoint', checkpoint, '--data-dir', tmp_path, '--accuracy-drop', 0]
    out = run(*common, '--output', tmp_path / 'out')
    assert 'has no test split, so nothing was measured' in ' '.join(out.out.split())
    told = json.loads((checkpoint / 'early_exit.json').read_text())
    assert told['images'] == dict(validation=60) and 'test' not in told
    assert told['validation']['top1'] == 100.
    header = (tmp_path / 'out' / 'early_exit.csv').read_text().splitlines()[0]
    assert header == 'family,thresholds,validation_cost,validation_top1'
    out = run(*common, '--test-fraction', 0.25, '--output', tmp_path / 'out')
    told = json.loads((checkpoint / 'early_exit.json').read_text())
    assert told['images'] == dict(validation=45, test=15)
    assert told['test_fraction'] == 0.25
    assert 'nothing was measured' not in out.out
    for fraction, message in ((1.5, 'more than 0 and less than 1'), (0, 'more than 0 and less than 1')):
        assert message in run(*common, '--test-fraction', fraction, status=2).err
    write_images(tmp_path, NAMES, 'test', 2)
    assert 'has a test split already' in run(*common, '--test-fraction', 0.5, status=2).err


def test_a_teacher_is_matched_by_name(run, checkpoint, tmp_path):
    folder = write_images(tmp_path / 'data', ['rose', 'apple'], 'train', 4)
    config = TrainConfig(
        model='test_vit', img_size=32, method='kd', teacher=str(checkpoint), data_dir=str(folder), val_fraction=0.25)
    data = load_image_data(DataSource(data_dir=str(folder), val_fraction=0.25))
    built = build_model(config, data)
    model, data_config = built.model, built.data_config
    task = build_task(config, model, torch.device('cpu'), data_config, data)
    assert data.label_names == ['apple', 'rose']
    assert task.teacher_classes.tolist() == [0, 4]
    (folder / 'train' / 'zebra').mkdir()
    grey(0).save(folder / 'train' / 'zebra' / '0.png')
    out = run('train', '--model', 'test_vit', '--img-size', 32, '--teacher', checkpoint, '--method', 'kd', '--data-dir',
              folder, '--batch-size', 4, '--output', tmp_path, status=2)
    assert 'does not know the classes zebra. It knows: apple, bus, castle, lion, rose' in out.err


def test_transfer_and_analyze_meet_other_data(run, checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('valid', 4), ('testing', 4)):
        for name in ('ant', 'bee'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    run('transfer', '--checkpoint', checkpoint, '--data-dir', tmp_path, '--output', tmp_path / 'out')
    assert len((tmp_path / 'out' / 'transfer.csv').read_text().splitlines()) == 3
    out = run('analyze', '--checkpoint', checkpoint, '--data-dir', tmp_path, status=2)
    assert 'the network does not know: ant' in out.err
    known = write_images(tmp_path / 'known', NAMES, 'test', 4)
    out = run('analyze', '--checkpoint', checkpoint, '--data-dir', known, '--analysis', 'secondary',
              '--output', tmp_path / 'secondary')
    assert 'secondary information' in out.out
