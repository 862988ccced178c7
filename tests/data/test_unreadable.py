"""Going on without the images that cannot be read."""
import csv
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import RECIPES
from helpers.images import noise_images
from PIL import Image

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.augment import eval_transform
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.loaders import Loaders, leave_out_unreadable, open_data
from timm_selfdistill.data.source import DataSource, Shard
from timm_selfdistill.data.streamed_loader import create_streamed_eval_loader, create_streamed_train_loader
from timm_selfdistill.data.streaming import load_streamed_data
from timm_selfdistill.data.unreadable import (
    SkippedImages,
    Unreadable,
    list_unreadable,
    read_unreadable,
    write_unreadable,
)
from timm_selfdistill.data.workers import create_eval_loader
from timm_selfdistill.errors import DataError, UnreadableImageError
from timm_selfdistill.evaluation.trained_network import EvaluationConfig, TrainedNetwork, open_network
from timm_selfdistill.training.run import Run
from timm_selfdistill.training.trainer import create_accelerator, train

TRAIN = RECIPES / 'train.py'
BAD = {('ant', 0): 'empty', ('ant', 7): 'cut', ('bee', 3): 'text', ('bee', 4): 'eps', ('cat', 19): 'float'}
CONFIG = dict(
    input_size=(3, 32, 32), interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode='center')


def spoiled(kind, image):
    buffer = io.BytesIO()
    if kind == 'float':
        Image.fromarray(np.full((8, 8), 700, dtype=np.float32)).save(buffer, 'TIFF')
    else:
        image.save(buffer, 'EPS' if kind == 'eps' else 'PNG')
    return dict(empty=b'', text=b'404 not found', cut=buffer.getvalue()[:-200]).get(kind, buffer.getvalue())


def write_set(root, bad=BAD, each=20, split='train'):
    for c, name in enumerate(('ant', 'bee', 'cat')):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i, image in enumerate(noise_images(each, seed=c)):
            path = folder / f'{i:02d}.png'
            image.save(path)
            if (name, i) in bad:
                path.write_bytes(spoiled(bad[name, i], image))
    return str(root)


def settings(folder, tmp_path, **more):
    return TrainConfig(**(dict(
        model='test_resnet', exits=(2, 3), epochs=2, batch_size=8, data_dir=str(folder), val_fraction=0.2,
        output=str(tmp_path), experiment='run', skip_unreadable=True) | more))


def paths(images):
    return {(Path(image.path).parent.name, int(Path(image.path).stem)) for image in images}


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / 'set')


def opened(folder, tmp_path, **more):
    config = settings(folder, tmp_path, **more)
    accelerator = create_accelerator(config)
    data = open_data(config, accelerator)
    return data, leave_out_unreadable(data, accelerator, tmp_path / 'run'), config, accelerator


def test_the_splits_are_what_they_would_be_less_the_unreadable_images(folder, tmp_path):
    whole = load_image_data(DataSource(data_dir=write_set(tmp_path / 'whole', bad={}), val_fraction=0.2))
    data, found, *_ = opened(folder, tmp_path)
    assert paths(found) == set(BAD)
    assert [image.reason for image in found if image.path.endswith('ant/00.png')] == ['the file is empty']
    lost = {int(image.place.removeprefix('row ')) for image in found}
    for name, split in whole.splits().items():
        ours = data.splits()[name]
        assert ours.index.tolist() == [row for row in split.index.tolist() if row not in lost]
        assert len(ours.labels) == len(ours) and all(ours.image(row) for row in range(len(ours)))
    assert sum(map(len, data.splits().values())) == 60 - len(BAD)


@pytest.mark.parametrize('loader', ['device', 'workers'])
def test_loaders_see_the_rest(folder, tmp_path, loader):
    data, _, config, accelerator = opened(folder, tmp_path, loader=loader)
    made = Loaders(config, data, CONFIG, accelerator)
    train_loader = made.train()
    assert train_loader.batch_sampler.length == len(data.train)
    assert sum(len(labels) for _, labels in train_loader) == len(data.train) // 8 * 8
    assert sum(len(labels) for _, labels in made.evaluation(data.validation)) == len(data.validation)


def test_without_the_option_the_first_is_an_error_that_names_it(folder, tmp_path):
    with pytest.raises(UnreadableImageError, match=r'Cannot read the image \S+\.png \(row \d+ of the train split\): .*'
                                                   r'`skip_unreadable`'):
        train(settings(folder, tmp_path, skip_unreadable=False))


def test_a_class_without_images_and_a_split_without_images_are_errors(tmp_path):
    folder = write_set(tmp_path / 'a', {('bee', i): ('cut', 'text')[i % 2] for i in range(20)})
    with pytest.raises(DataError, match='no image of class bee can be read in the train split'):
        opened(folder, tmp_path)
    folder = write_set(tmp_path / 'b', {(name, i): 'cut' for name in ('ant', 'bee', 'cat') for i in range(20)})
    with pytest.raises(DataError, match='Cannot read the image'):
        opened(folder, tmp_path)
    write_set(tmp_path / 'c', {})
    every = {(name, i): 'text' for name in ('ant', 'bee', 'cat') for i in range(2)}
    folder = write_set(tmp_path / 'c', every, each=2, split='test')
    with pytest.raises(DataError, match='None of the 6 images of the test split can be read: .*png: it is in no image'):
        opened(folder, tmp_path)


@pytest.mark.slow
def test_a_run_tells_lists_and_goes_on_with_what_it_began_with(folder, tmp_path, capsys):
    run = train(settings(folder, tmp_path))
    out = capsys.readouterr().out
    assert out.count('skipped  ') == len(BAD) + 1
    assert 'skipped  5 images that cannot be read; ' in out and 'ant/00.png: the file is empty' in out
    listed = read_unreadable(run / 'unreadable.csv')
    assert paths(listed) == set(BAD)
    config = settings(folder, tmp_path, resume='auto')
    before = Run(config, create_accelerator(config), run).setup.data
    for name in ('00', '07'):  # repaired
        noise_images(1)[0].save(Path(folder) / 'train' / 'ant' / f'{name}.png')
    after = Run(config, create_accelerator(config), run).setup.data
    assert np.array_equal(before.train.index, after.train.index)
    assert read_unreadable(run / 'unreadable.csv') == listed


@pytest.mark.slow
def test_two_processes_leave_out_the_same(folder, tmp_path):
    arguments = [
        '--model', 'test_resnet', '--exits', '2', '3', '--epochs', '1', '--batch-size', '8', '--data-dir', folder,
        '--val-fraction', '0.2', '--output', str(tmp_path), '--skip-unreadable',
    ]
    for processes in (1, 2):
        done = subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', str(TRAIN),
             *arguments, '--experiment', f'run{processes}'], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    lists = [(tmp_path / f'run{n}' / 'unreadable.csv').read_text() for n in (1, 2)]
    assert lists[0] == lists[1] and lists[0].count('\n') == 1 + len(BAD)
    rows = [list(csv.DictReader((tmp_path / f'run{n}' / 'summary.csv').open()))[0] for n in (1, 2)]
    assert float(rows[0]['eval_loss']) == pytest.approx(float(rows[1]['eval_loss']), rel=0.2)


def test_measuring_goes_on_and_tells(folder, tmp_path, tiny, capsys):
    data = load_image_data(DataSource(data_dir=folder, val_fraction=0., skip_unreadable=True))
    network = TrainedNetwork(tiny, data, CONFIG, EvaluationConfig(skip_unreadable=True))
    for _ in range(2):
        assert sum(len(labels) for _, labels in network.batches(data.train)) == 60 - len(BAD)
    said = capsys.readouterr()
    assert said.out == '' and said.err.count('skipped  ') == len(BAD) + 1
    plain = dataclasses.replace(network, config=EvaluationConfig(), data=load_image_data(DataSource(
        data_dir=write_set(tmp_path / 'b', {('cat', 9): 'cut'}), val_fraction=0.)))
    with pytest.raises(UnreadableImageError, match='cat/09.png .*`skip_unreadable`'):
        list(plain.batches(plain.data.train))


@pytest.mark.slow
def test_a_checkpoint_is_opened_on_a_folder_that_begins_with_a_bad_image(folder, tmp_path):
    run = train(settings(write_set(tmp_path / 'good', {}), tmp_path, epochs=1, skip_unreadable=False))
    config = EvaluationConfig(data_dir=folder, skip_unreadable=True, device='cpu')
    assert open_network(str(run), config).data.image_size == (32, 32)


# -- streams -----------------------------------------------------------------------------------------------------------


def stream(folder, file=None):
    split = load_streamed_data(DataSource(data_dir=folder, skip_unreadable=True)).train
    split.skipped = SkippedImages()
    split.skipped.file = file
    return split


@pytest.mark.parametrize('workers', [0, 2])
def test_streams_skip_and_note_each_once(folder, tmp_path, workers):
    file = tmp_path / 'unreadable.csv'
    write_unreadable(file, [])
    split = stream(folder, file)
    for _ in range(2):
        loader = create_streamed_eval_loader(split, eval_transform(CONFIG), 7, workers=workers)
        assert sum(len(labels) for _, labels in loader) == 60 - len(BAD)
        listed = read_unreadable(file)
        assert len(listed) == len(BAD)
    assert {image.split for image in listed} == {'train'}
    assert all(image.place.startswith('example ') and 'shard 0' in image.place and image.reason for image in listed)


def epoch(split, start=0, **kwargs):
    loader = create_streamed_train_loader(split, eval_transform(CONFIG), 8, seed=3, **kwargs)
    loader.batch_sampler.set_epoch(1, start)
    return list(loader)


def test_batches_of_a_stream_keep_their_size_and_go_on_alike(folder):
    whole = epoch(stream(folder))
    assert [len(labels) for _, labels in whole] == [8] * 7
    for start in (1, 3, 6):
        for (images, labels), (theirs, their_labels) in zip(epoch(stream(folder), start), whole[start:], strict=True):
            assert torch.equal(images, theirs) and torch.equal(labels, their_labels)
    shares = [epoch(stream(folder), shard=Shard(rank, 2), workers=rank) for rank in (0, 1)]
    for (images, _), *slices in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([share for share, _ in slices]), images)
    alone = [epoch(stream(folder), accumulate=8)]  # a batch may consist of one bad image
    assert torch.equal(torch.cat([images for images, _ in alone[0]]), torch.cat([images for images, _ in whole]))


def test_only_the_places_of_bad_images_change(folder, tmp_path):
    good = epoch(stream(write_set(tmp_path / 'good', {})))
    images, others = (torch.cat([images for images, _ in batches]) for batches in (epoch(stream(folder)), good))
    assert (images != others).flatten(1).any(1).sum() <= len(BAD)


def test_a_stream_of_nothing_but_bad_images_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_selfdistill.data.streamed_loader._TRIES', 50)
    bad = {(name, i): 'text' for name in ('ant', 'bee', 'cat') for i in range(20)}
    with pytest.raises(UnreadableImageError, match='Cannot read the image in example'):
        load_streamed_data(DataSource(data_dir=write_set(tmp_path / 'a', bad), skip_unreadable=True))
    folder = write_set(tmp_path / 'b', {})
    split = stream(folder)
    for path in Path(folder).rglob('*.png'):
        path.write_bytes(b'')
    with pytest.raises(UnreadableImageError, match='the file is empty'):
        epoch(split)


@pytest.mark.slow
def test_a_streamed_run_lists_what_it_skips(folder, tmp_path, capfd):
    write_set(Path(folder), {('bee', 1): 'text'}, each=3, split='validation')
    run = train(settings(folder, tmp_path, streaming=True, workers=1, epochs=2, img_size=32))
    listed = read_unreadable(run / 'unreadable.csv')
    assert len(listed) >= len(BAD) and ('validation', 'bee') in {
        (image.split, Path(image.path).parent.name) for image in listed}
    assert len({(image.split, image.place) for image in listed}) == len(listed)
    assert capfd.readouterr().err.count('skipped  ') == len(listed)


# -- lists -------------------------------------------------------------------------------------------------------------


def test_ten_are_told_and_all_are_written(tmp_path):
    images = [Unreadable('train', f'row {i}', f'/a, "b"/{i}.png' if i % 2 else '', 'cut\u2028') for i in range(25)]
    said = []
    list_unreadable(images, said.append, tmp_path / 'unreadable.csv')
    assert len(said) == 11 and said[-1].startswith('skipped  25 images that cannot be read; ')
    assert said[0].startswith('skipped  row 0 of the train split: cut')
    write_unreadable(tmp_path / 'unreadable.csv', images)
    assert read_unreadable(tmp_path / 'unreadable.csv') == images
    assert read_unreadable(tmp_path / 'nothing.csv') is None


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'split,place,path,reason,more\na,b,c,d,e\n', b'a\nb\n'])
def test_a_damaged_list_is_an_error(tmp_path, content):
    (tmp_path / 'unreadable.csv').write_bytes(content)
    with pytest.raises(DataError, match='unreadable.csv: cannot be read'):
        read_unreadable(tmp_path / 'unreadable.csv')


def test_an_image_is_decoded_in_worker_processes_where_there_are_many(folder, monkeypatch):
    from timm_selfdistill.data import unreadable
    monkeypatch.setattr(unreadable, '_MANY', 8)
    split = load_image_data(DataSource(data_dir=folder, val_fraction=0., skip_unreadable=True)).train
    found = unreadable.find_unreadable(split, workers=1)
    assert paths(found) == set(BAD)
    shares = [unreadable.find_unreadable(split, shard=Shard(rank, 3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(found)
    unreadable.leave_out(split, found)
    assert len(list(create_eval_loader(split, eval_transform(CONFIG), 55))) == 1
