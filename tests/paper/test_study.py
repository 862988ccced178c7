"""The study as one command, on images made on the spot."""
import csv
import subprocess
import sys

import datasets
import numpy as np
import pytest
from helpers import PAPER
from helpers.images import noise_images

RECIPE = PAPER / 'study.py'


def study(folder, *arguments):
    return subprocess.run(
        [sys.executable, RECIPE, '--data-dir', folder / 'data', '--model', 'test_resnet', '--superclasses', '2',
         '--images', '80', '--epochs', '1', '--generations', '1', '--jobs', '1', '--precision', 'no',
         '--work', folder / 'work', '--output', folder / 'results', *arguments],
        capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_study_goes_from_data_to_table_and_never_mixes_recipes(tmp_path):
    (tmp_path / 'data').mkdir()
    for part, count in (('train', 540), ('test', 90)):
        fine = np.arange(count) % 9  # three superclasses of three classes, whose numbers lie apart
        table = dict(img=noise_images(count), fine_label=fine.tolist(), coarse_label=(fine % 3).tolist())
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / 'data' / f'{part}.parquet')
    out = study(tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]
    assert (tmp_path / 'results' / 'study.png').read_bytes().startswith(b'\x89PNG')
    with (tmp_path / 'results' / 'study.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert [(r['method'], r['patriarch'], r['generation']) for r in rows] == [
        *(('plain', p, g) for p in ('plain', 'tsd', 'label-smoothing', 'confidence-penalty') for g in '01'),
        ('byot', 'plain', ''), ('deep-supervision', 'plain', ''), ('plain', 'plain', ''), ('plain', 'plain', '')]
    used = datasets.load_dataset('parquet', data_dir=str(tmp_path / 'work' / 'data-2x80'))
    assert sorted(set(used['train']['fine_label'])) == list(range(6))
    assert (len(used['train']), len(used['test'])) == (360, 60)
    before = (tmp_path / 'results' / 'study.csv').read_text()
    out = study(tmp_path, '--seed', '7')
    assert out.returncode == 2
    assert 'of another recipe: --seed was 42 and is 7' in out.stderr
    assert (tmp_path / 'results' / 'study.csv').read_text() == before
