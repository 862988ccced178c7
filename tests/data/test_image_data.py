import random

import datasets
import numpy as np
import pytest
import torch
from helpers.images import noise_images, write_two_colours
from hypothesis import given
from hypothesis import strategies as st

from timm_selfdistill.data.augment import Cutout, eval_transform, train_transform
from timm_selfdistill.data.data_files import load_digits
from timm_selfdistill.data.epoch_order import EpochBatches
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.source import DataSource, Shard
from timm_selfdistill.data.workers import create_eval_loader, create_train_loader
from timm_selfdistill.errors import DataError

CONFIG = dict(
    input_size=(3, 32, 32), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode='center')
NAMES = ['ant', 'bee', 'cat']


def make_table(labels, **columns):
    features = dict(img=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    values = dict(img=noise_images(len(labels)), label=labels)
    for name, feature in columns.items():
        features[name] = feature
        values[name] = noise_images(len(labels)) if isinstance(feature, datasets.Image) else [0] * len(labels)
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def write_parquet(folder, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(folder / f'{name}-00000-of-00001.parquet')
    return str(folder)


@pytest.fixture(scope='module')
def digits():
    return load_image_data()


def test_digits_are_fixed_and_every_scan_is_used_once(digits):
    parts = load_digits()
    assert {name: len(rows) for name, rows in parts.items()} == dict(train=1250, validation=183, test=364)
    from sklearn.datasets import load_digits as load
    bunch = load()
    ours = np.concatenate([
        np.stack([np.asarray(image) for image in rows['image'][:]]) for rows in parts.values()]).reshape(1797, 64)
    theirs = (bunch.images * (255 / 16)).round().astype(np.uint8).reshape(1797, 64)
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    for rows in parts.values():  # every part has every class, as often as it should
        counts = np.bincount(rows['label'][:], minlength=10)
        assert counts.max() - counts.min() <= counts.mean() * 0.15
    assert not digits.mirrored
    assert digits.image_size == (8, 8)
    assert digits.label_names == [str(i) for i in range(10)]


def test_parquet_files_and_a_held_out_part(tmp_path):
    folder = write_parquet(tmp_path / 'set', train=make_table([0, 1, 2] * 20), test=make_table([0, 1, 2]))
    data = load_image_data(DataSource(data_dir=folder, val_fraction=0.2))
    assert {k: len(v) for k, v in data.splits().items()} == dict(train=48, validation=12, test=3)
    assert np.bincount(data.validation.labels).tolist() == [4, 4, 4]
    assert (data.num_classes, data.label_names, data.image_size) == (3, NAMES, (32, 32))
    assert data.mirrored
    again = load_image_data(DataSource(data_dir=folder, val_fraction=0.2))
    assert np.array_equal(again.train.labels, data.train.labels)
    whole = load_image_data(DataSource(data_dir=folder, val_fraction=0.))
    assert whole.validation is None
    assert len(whole.train) == 60


def test_image_folders_and_saved_data_sets(tmp_path):
    for part, count in (('train', 6), ('validation', 2)):
        for name in NAMES:
            folder = tmp_path / 'images' / part / name
            folder.mkdir(parents=True)
            for i, image in enumerate(noise_images(count)):
                image.save(folder / f'{i}.png')
    data = load_image_data(DataSource(data_dir=str(tmp_path / 'images')))
    assert {k: len(v) for k, v in data.splits().items()} == dict(train=18, validation=6)
    assert data.label_names == NAMES
    datasets.DatasetDict(train=make_table([0, 1] * 10)).save_to_disk(tmp_path / 'saved')
    data = load_image_data(DataSource(data_dir=str(tmp_path / 'saved')))
    assert {k: len(v) for k, v in data.splits().items()} == dict(train=18, validation=2)


def test_a_column_must_be_chosen_where_two_could_be_meant(tmp_path):
    coarse = datasets.ClassLabel(names=['insect', 'mammal'])
    folder = write_parquet(tmp_path / 'two', train=make_table([0, 1, 2] * 5, coarse_label=coarse))
    with pytest.raises(DataError, match='two has several label columns: label, coarse_label.*`label_column=label`'):
        load_image_data(DataSource(data_dir=folder))
    assert load_image_data(DataSource(data_dir=folder, label_column='coarse_label')).num_classes == 2
    with pytest.raises(DataError, match='`label_column=fine`: two has no label column of that name.*label, coarse_l'):
        load_image_data(DataSource(data_dir=folder, label_column='fine'))
    folder = write_parquet(tmp_path / 'images', train=make_table([0, 1, 2] * 5, mask=datasets.Image()))
    with pytest.raises(DataError, match='several image columns: img, mask. Pick one, for example `image_column=img`'):
        load_image_data(DataSource(data_dir=folder))


def test_missing_columns_parts_and_folders_are_named(tmp_path):
    folder = write_parquet(tmp_path / 'a', train=make_table([0, 1] * 5).remove_columns('label'))
    with pytest.raises(DataError, match='a has no label column, which holds class labels, whole .*; .*: img'):
        load_image_data(DataSource(data_dir=folder))
    folder = write_parquet(tmp_path / 'b', train=make_table([0, 1] * 5).remove_columns('img'))
    with pytest.raises(DataError, match='b has no image column, which holds images; its columns are: label'):
        load_image_data(DataSource(data_dir=folder))
    folder = write_parquet(tmp_path / 'c', test=make_table([0, 1] * 5))
    with pytest.raises(DataError, match='c has no split named train; its splits are: test'):
        load_image_data(DataSource(data_dir=folder))
    with pytest.raises(DataError, match='`data_dir=.*nowhere`: no such folder'):
        load_image_data(DataSource(data_dir=str(tmp_path / 'nowhere')))
    (tmp_path / 'd').mkdir()
    with pytest.raises(DataError, match='/d holds 0 images and no class folders. Expected one folder for each class'):
        load_image_data(DataSource(data_dir=str(tmp_path / 'd')))
    (tmp_path / 'd' / 'train.parquet').write_bytes(b'PAR1 and nothing more')
    with pytest.raises(DataError, match=r'`data_dir=.*/d` \(read as parquet\): Parquet magic bytes'):
        load_image_data(DataSource(data_dir=str(tmp_path / 'd')))
    with pytest.raises(DataError, match='`val_fraction=1.5`'):
        load_image_data(DataSource(val_fraction=1.5))


def integer_table(labels):
    features = datasets.Features(img=datasets.Image(), label=datasets.Value('int64'))
    return datasets.Dataset.from_dict(dict(img=noise_images(len(labels)), label=labels), features=features)


def test_labels_out_of_range_are_named_by_row(tmp_path):
    folder = write_parquet(tmp_path / 'a', train=integer_table([0, 1, 2, 1]), test=integer_table([0, 2, 3, 5]))
    with pytest.raises(DataError, match=r'Label 3 in row 2 of the test split is out of range: expected 0 to 2'):
        load_image_data(DataSource(data_dir=folder))
    folder = write_parquet(tmp_path / 'b', train=integer_table([0, 1, -1, 1]))
    with pytest.raises(DataError, match='Label -1 in row 2 of the train split'):
        load_image_data(DataSource(data_dir=folder))
    folder = write_parquet(tmp_path / 'c', train=integer_table([0, 1, None, 1]))
    with pytest.raises(DataError, match='no label in row 2 of the train split'):
        load_image_data(DataSource(data_dir=folder))
    folder = write_parquet(tmp_path / 'd', train=integer_table([0, 1] * 10), test=integer_table([-1, -1]))
    assert load_image_data(DataSource(data_dir=folder)).test is None  # withheld labels, as the Hub marks them


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_is_named_by_its_row(tmp_path, workers):
    table = make_table([0, 1] * 10).cast_column('img', datasets.Image(decode=False))

    def damage(row, i):
        whole = row['img']['bytes']
        return dict(img=dict(bytes={7: whole[:len(whole) // 2], 9: b'no image'}.get(i, whole), path=None))

    table = table.map(damage, with_indices=True, features=table.features).cast_column('img', datasets.Image())
    data = load_image_data(DataSource(data_dir=write_parquet(tmp_path, train=table), val_fraction=0.))
    for row in (7, 9):
        with pytest.raises(DataError, match=f'Cannot read the image in row {row} of the train split'):
            data.train.image(row)
    with pytest.raises(DataError, match='Cannot read the image in row 7 of the train split'):
        list(create_eval_loader(data.train, eval_transform(CONFIG), 4, workers=workers))


@pytest.mark.slow
@given(
    length=st.integers(8, 200), per_rank=st.integers(1, 4), ranks=st.integers(1, 2), seed=st.integers(0, 2 ** 31),
    epoch=st.integers(0, 500),
)
def test_processes_share_exactly_the_batches_of_one(length, per_rank, ranks, seed, epoch):
    batch_size = per_rank * ranks
    alone = EpochBatches(length, batch_size, seed)
    shares = [EpochBatches(length, batch_size, seed, Shard(rank, ranks)) for rank in range(ranks)]
    for sampler in (alone, *shares):
        sampler.set_epoch(epoch)
    expected = list(alone)
    assert [sum(parts, []) for parts in zip(*shares)] == expected
    rows = [row for batch in expected for _, row in batch]
    assert len(set(rows)) == len(rows) == length // batch_size * batch_size
    assert {e for batch in expected for e, _ in batch} == {epoch}
    assert list(alone) == expected  # nothing depends on what ran before


def test_epochs_and_seeds_differ_in_order():
    def order(seed, epoch):
        sampler = EpochBatches(64, 64, seed)
        sampler.set_epoch(epoch)
        return [row for _, row in next(iter(sampler))]

    orders = [order(s, e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize('length, batch_size, ranks, message', [
    (10, 64, 1, '`batch_size=64` is more than the 10 training images'),
    (100, 9, 2, '`batch_size=9`: expected a multiple of the number of processes, 2'),
    (100, 0, 1, '`batch_size=0`'),
])
def test_batches_that_cannot_be_are_refused(length, batch_size, ranks, message):
    with pytest.raises(DataError, match=message):
        EpochBatches(length, batch_size, shard=Shard(0, ranks))


def test_augmentation_depends_on_seed_epoch_and_row_alone(digits):
    transform = train_transform(CONFIG, crop='pad', auto_augment='rand-m9-mstd0.5', re_prob=0.5)

    def epoch(number, seed=0, workers=0):
        loader = create_train_loader(digits.train, transform, 128, seed=seed, workers=workers)
        loader.batch_sampler.set_epoch(number)
        return next(iter(loader))[0]

    first = epoch(0)
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(epoch(0), first)
    assert torch.equal(epoch(0, workers=1), first)
    assert not torch.equal(epoch(1), first)
    assert not torch.equal(epoch(0, seed=1), first)


def test_augmentation_leaves_the_generators_alone(digits):
    digits.train.transform = train_transform(CONFIG, crop='rrc', hflip=0.5, color_jitter=0.4)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    digits.train[(0, 5)]
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_pad_crop_shifts_by_an_eighth_at_most(tmp_path):
    image = noise_images(1)[0]
    whole = eval_transform(CONFIG)(image)
    shift = train_transform(CONFIG, crop='pad', hflip=0.)
    for _ in range(20):
        out = shift(image)
        assert out.shape == whole.shape
        found = [
            (dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)
            if torch.equal(out[:, max(0, -dy):32 - max(0, dy), max(0, -dx):32 - max(0, dx)],
                           whole[:, max(0, dy):32 + min(0, dy), max(0, dx):32 + min(0, dx)])
        ]
        assert found


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_evaluation_sees_every_row_once(digits, ranks):
    rows = []
    for rank in range(ranks):
        loader = create_eval_loader(digits.test, eval_transform(CONFIG), 50, shard=Shard(rank, ranks))
        rows += [i for batch in loader.batch_sampler for i in batch]
    assert sorted(rows) == list(range(364))


def test_grey_images():
    data = load_image_data(DataSource(in_chans=1))
    config = dict(CONFIG, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    data.train.transform = train_transform(config, crop='pad')
    assert data.train[(0, 0)][0].shape == (1, 32, 32)


# -- what the CIFAR recipes need ---------------------------------------------------------------------------------------


def test_cutout_blots_out_a_square_and_cuts_off_what_lies_outside():
    image = torch.ones(3, 12, 20)
    areas = set()
    for _ in range(300):
        out = Cutout(6)(image)
        hole = (out == 0).all(0)
        assert torch.equal((out == 0).any(0), hole)
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns)  # a rectangle
        assert 3 <= len(rows) <= 6
        assert 3 <= len(columns) <= 6
        areas.add((len(rows), len(columns)))
    assert (6, 6) in areas
    assert len(areas) > 4
    assert (image == 1).all()


def test_autoaugments_policy_comes_from_torchvision():
    transform = train_transform(CONFIG, crop='pad', hflip=0., auto_augment='cifar10', cutout=8)
    kinds = [type(t).__name__ for t in transform.transforms[0].transforms] + [
        type(t).__name__ for t in transform.transforms]
    assert 'AutoAugment' in kinds
    assert kinds[-1] == 'Cutout'
    image = noise_images(1)[0]
    assert not torch.equal(transform(image), transform(image))


@pytest.mark.parametrize('policy', ['rand-m10-n8-p1', 'rand-m10-n8-p1-inc1', 'original', 'augmix-m10'])
def test_timms_policies_take_images_at_every_magnitude(policy):
    transform = train_transform(CONFIG, crop='pad', auto_augment=policy)
    for image in noise_images(40):
        assert transform(image).shape == (3, 32, 32)


def test_superclasses_are_found_for_every_class(tmp_path):
    data = load_image_data(DataSource(
        data_dir=str(write_two_colours(tmp_path)), label_column='fine', superclass_column='coarse', val_fraction=0.25))
    assert data.superclasses.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert load_image_data(DataSource(data_dir=str(tmp_path), label_column='fine')).superclasses is None


@pytest.mark.parametrize('label, superclass, message', [
    ('fine', 'family', '`superclass_column=family`: .* has no such column .*; it has: fine, coarse'),
    ('fine', 'image', '`superclass_column=image`'),
    ('coarse', 'fine', 'each class needs one superclass, class 0 lies in several'),
])
def test_superclasses_that_are_none_are_refused(tmp_path, label, superclass, message):
    folder = str(write_two_colours(tmp_path))
    with pytest.raises(DataError, match=message):
        load_image_data(DataSource(data_dir=folder, label_column=label, superclass_column=superclass))
