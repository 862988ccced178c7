"""Carrying frozen features over to other data."""
import csv
import json
import runpy
import shutil
import sys

import datasets
import numpy as np
import pytest
from helpers import RECIPES
from helpers.runs import untrained_run
from PIL import Image


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp('runs') / 'run')


@pytest.fixture(scope='module')
def stripes(tmp_path_factory):
    """A data set in colour with more classes than digits: stripes of a class's colour, in noise."""
    folder = tmp_path_factory.mktemp('stripes')
    colours = np.random.default_rng(1).integers(60, 200, (12, 3))
    for part, per_class, seed in (('train', 15, 0), ('test', 5, 1)):
        rng = np.random.default_rng(seed)
        labels = np.tile(np.arange(12), per_class)
        pixels = rng.normal(colours[labels][:, None, None], 20, (len(labels), 16, 16, 3)).clip(0, 255)
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=12))
        rows = dict(image=[Image.fromarray(p.astype(np.uint8)) for p in pixels], label=labels.tolist())
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f'{part}-00000-of-00001.parquet')
    return folder


def transfer(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['transfer.py', *map(str, arguments)])
    runpy.run_path(str(RECIPES / 'transfer.py'), run_name='__main__')


def test_features_carry_over_to_data_with_other_classes(run, stripes, tmp_path, monkeypatch, capsys):
    transfer(monkeypatch, '--checkpoint', run, '--data-dir', stripes, '--output', tmp_path)
    out = json.loads((tmp_path / 'transfer.json').read_text())
    assert [row['exit'] for row in out['exits']] == ['exit0', 'exit1', 'exit2']
    assert out['images'] == 60
    assert out['exits'][0]['test_top1'] > 50  # chance is 8 %; colours are easy for a shallow exit
    with (tmp_path / 'transfer.csv').open() as f:
        rows = list(csv.DictReader(f))
    assert [float(row['test_top1']) for row in rows] == [row['test_top1'] for row in out['exits']]
    assert (tmp_path / 'transfer.png').read_bytes().startswith(b'\x89PNG')
    assert 'linear classifier on frozen features' in capsys.readouterr().out


@pytest.mark.slow
def test_generations_are_taken_in_order(run, tmp_path, monkeypatch):
    for number in (0, 1):
        shutil.copytree(run, tmp_path / 'family' / f'generation{number}')
    transfer(monkeypatch, '--checkpoint', tmp_path / 'family', '--dataset', 'digits', '--output', tmp_path / 'out')
    rows = json.loads((tmp_path / 'out' / 'transfer.json').read_text())['exits']
    assert [row['network'] for row in rows] == ['generation0'] * 3 + ['generation1'] * 3
    assert [row['test_top1'] for row in rows[:3]] == [row['test_top1'] for row in rows[3:]]


def test_transfer_asks_for_data_and_for_a_test_part(run, stripes, tmp_path, monkeypatch, capsys):
    shutil.copy(stripes / 'train-00000-of-00001.parquet', tmp_path)
    for arguments, message in (
        ([], '--dataset, --data-dir: pass one of them'),
        (['--data-dir', tmp_path], 'a test split is needed too'),
    ):
        with pytest.raises(SystemExit) as stopped:
            transfer(monkeypatch, '--checkpoint', run, *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
