"""Labels as people have them, and classes told by name between splits, networks and teachers."""
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers.images import noise_images
from hypothesis import given
from hypothesis import strategies as st

from timm_selfdistill.data.image_data import hold_out, load_image_data
from timm_selfdistill.data.labels import Classes, match_classes, shortened
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.errors import DataError
from timm_selfdistill.tasks import DistillationConfig, SelfDistillationTask

NAMES = ['apple', 'bus', 'castle', 'lion', 'rose']


def write(folder, feature, column='label', **splits):
    """Write a parquet file a split: noise images with these labels."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({'img': datasets.Image(), column: feature})
    for name, labels in splits.items():
        rows = {'img': noise_images(len(labels), 8), column: labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f'{name}.parquet')
    return str(folder)


def read(folder, known=False, **kwargs):
    return load_image_data(DataSource(data_dir=str(folder), val_fraction=0., **kwargs), known)


def class_label(names):
    return datasets.ClassLabel(names=list(names))


# -- labels as people have them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype, labels, names, numbers', [
    ('string', ['b', 'a', 'c', 'a'], ['a', 'b', 'c'], [1, 0, 2, 0]),
    ('large_string', ['no', 'yes', 'no'], ['no', 'yes'], [0, 1, 0]),
    ('bool', [True, False, True], ['False', 'True'], [1, 0, 1]),
    ('bool', [True, True, True], ['False', 'True'], [1, 1, 1]),
    ('float32', [0., 2., 1.], None, [0, 2, 1]),
    ('float64', [3., 1., 2.], None, [3, 1, 2]),
    ('uint8', [2, 0, 1], None, [2, 0, 1]),
    ('int64', [10, 30, 20, 10], ['10', '20', '30'], [0, 2, 1, 0]),
    ('int32', [7, 700000, 7], ['7', '700000'], [0, 1, 0]),
    ('float64', [100., 5., 100.], ['5', '100'], [1, 0, 1]),
])
def test_texts_booleans_and_whole_numbers_become_classes(tmp_path, dtype, labels, names, numbers):
    data = read(write(tmp_path, datasets.Value(dtype), train=labels))
    assert data.label_names == names
    assert data.train.labels.tolist() == numbers
    assert data.num_classes == len(names or range(max(numbers) + 1))


@pytest.mark.parametrize('labels, note', [
    ([1, 2, 3], 'run from 1 to 3, so class 0 has no training image'),
    ([1, 2, 3, 4, 5], 'run from 1 to 5, so class 0 has no training image'),
    ([0, 1, 3], 'classes without a training image: 2'),
    ([10, 20, 30], 'the numbers 10, 20, 30 in column label are taken for the names of 3 classes'),
    ([1000, 5], 'the numbers 5, 1000 in column label are taken for the names of 2 classes'),
])
def test_gaps_in_whole_numbers_are_said(tmp_path, labels, note):
    assert any(note in line for line in read(write(tmp_path, datasets.Value('int64'), train=labels)).notes)


@pytest.mark.parametrize('feature, labels, message', [
    (datasets.List(datasets.Value('int64')), [[1, 0], [0, 1]], 'holds a list for each image, as one-hot'),
    (datasets.List(datasets.Value('float32'), length=3), [[1, 0, 0], [0, 0, 1]], 'one-hot.*argmax gives it'),
    (datasets.Value('float64'), [0., 0.5], 'holds 0.5: expected whole numbers'),
    (datasets.Value('float64'), [0., float('nan'), 1.], 'There is no label in row 1 of the train split'),
    (datasets.Value('string'), ['a', '', 'b'], 'There is no label in row 1'),
    (datasets.Value('string'), ['a', 'b', None], 'There is no label in row 2'),
    (datasets.Value('bool'), [None, True], 'There is no label in row 0'),
    (datasets.Value('timestamp[s]'), [0, 1], 'no label column, which holds class labels, whole numbers or texts'),
    (datasets.Value('string'), ['a', 'a'], 'has the single class a, expected two or more'),
    (datasets.Value('int64'), [0, 0], 'has the single class 0'),
])
def test_labels_that_are_none_are_refused_in_a_sentence(tmp_path, feature, labels, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, feature, train=labels))


def test_of_several_columns_the_usual_name_is_taken_and_said(tmp_path):
    features = datasets.Features(img=datasets.Image(), id=datasets.Value('int64'), Label=datasets.Value('string'))
    rows = dict(img=noise_images(2, 8), id=[0, 1], Label=['x', 'y'])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'train.parquet')
    data = read(tmp_path)
    assert data.label_names == ['x', 'y']
    assert 'labels are read from column Label, not from id' in data.notes
    assert read(tmp_path, label_column='id').label_names is None
    datasets.Dataset.from_dict(rows, features=features).rename_column('Label', 'kind').to_parquet(
        tmp_path / 'train.parquet')
    with pytest.raises(DataError, match='several label columns: id, kind. Pick one'):
        read(tmp_path)


@pytest.mark.parametrize('form', ['struct', 'bytes', 'turned', 'large'])
def test_encoded_images_need_no_metadata(tmp_path, form):
    encoded = [datasets.Image().encode_example(image)['bytes'] for image in noise_images(3, 8)]
    column = {
        'struct': pa.array([dict(bytes=data, path=f'{i}.png') for i, data in enumerate(encoded)]),
        'turned': pa.array([dict(path=None, bytes=data) for data in encoded], pa.struct(
            [('path', pa.string()), ('bytes', pa.binary())])),
        'bytes': pa.array(encoded),
        'large': pa.array(encoded, pa.large_binary()),
    }[form]
    pq.write_table(pa.table(dict(picture=column, label=pa.array(['a', 'b', 'a']))), tmp_path / 'train.parquet')
    data = read(tmp_path)
    assert [np.array(data.train.image(i)).tolist() for i in range(3)] == [
        np.array(image).tolist() for image in noise_images(3, 8)]


def test_splits_of_files_and_saved_data_sets_are_told_by_the_usual_names(tmp_path):
    label = class_label('ab')
    write(tmp_path / 'files', label, **{
        'Train-00000-of-00001': [0, 1], 'Valid': [1], 'TESTING_0': [0, 0, 1], 'latest': [0] * 5})
    data = read(tmp_path / 'files')
    assert {name: len(split) for name, split in data.splits().items()} == dict(train=2, validation=1, test=3)
    assert any('latest.parquet' in note for note in data.notes)
    write(tmp_path / 'folders' / 'plain' / 'Dev', label, **{'0000': [1, 1]})
    write(tmp_path / 'folders' / 'plain' / 'training', label, **{'0000': [0, 1], '0001': [0, 1]})
    data = read(tmp_path / 'folders')
    assert {name: len(split) for name, split in data.splits().items()} == dict(train=4, validation=2)
    table = datasets.Dataset.from_parquet(str(tmp_path / 'files' / 'Valid.parquet'))
    both = datasets.concatenate_datasets([table, datasets.Dataset.from_parquet(str(tmp_path / 'files/latest.parquet'))])
    saved = tmp_path / 'saved [v1]'
    datasets.DatasetDict({'Training': both, 'dev': table, 'EVALUATE': table, 'Test': table}).save_to_disk(saved)
    data = read(saved)
    assert {name: len(split) for name, split in data.splits().items()} == dict(train=6, validation=1, test=1)
    assert any('left aside: EVALUATE' in note for note in data.notes)
    datasets.DatasetDict({'train': both, 'Training': both}).save_to_disk(tmp_path / 'twice')
    with pytest.raises(DataError, match='train and Training both mean the train split'):
        read(tmp_path / 'twice')
    write(tmp_path / 'odd', label, **{'train-test': [0, 1]})
    with pytest.raises(DataError, match='train-test.parquet: the name means the splits test and train. Rename'):
        read(tmp_path / 'odd')


def test_splits_without_labels_or_images_are_named(tmp_path):
    folder = write(tmp_path / 'a', class_label('ab'), train=[0, 1])
    table = datasets.Dataset.from_parquet(f'{folder}/train.parquet')
    datasets.DatasetDict(train=table, test=table.remove_columns('label')).save_to_disk(tmp_path / 'b')
    with pytest.raises(DataError, match='The test split of b has no column label .*; its columns are: img. Give it'):
        read(tmp_path / 'b')
    datasets.DatasetDict(train=table, valid=table.select([])).save_to_disk(tmp_path / 'c')
    with pytest.raises(DataError, match='The valid split of .*/c is empty. Give it images, or remove it'):
        read(tmp_path / 'c')
    write(tmp_path / 'p', class_label('ab'), train=[0, 1], Testing=[])
    with pytest.raises(DataError, match='The test split of .*/p is empty. Give it images, or remove it'):
        read(tmp_path / 'p')
    datasets.DatasetDict(train=table, test=table.rename_column('img', 'x')).save_to_disk(tmp_path / 'd')
    with pytest.raises(DataError, match='The test split of d has no column img for its images'):
        read(tmp_path / 'd')
    (tmp_path / 'c' / 'dataset_dict.json').write_text('{"splits"')
    with pytest.raises(DataError, match=r'`data_dir=.*/c` \(read as saved data set\): '):
        read(tmp_path / 'c')


def test_a_test_split_with_withheld_labels_alone_cannot_be_measured(tmp_path):
    for name, feature in (('numbers', datasets.Value('int64')), ('classes', class_label('ab'))):
        folder = write(tmp_path / name, feature, test=[-1, -1])
        with pytest.raises(DataError, match=f'{name} has no labels: those of its only split, test, are all -1'):
            read(folder, num_classes=2, class_names=['a', 'b'], known=True)


# -- classes by name --------------------------------------------------------------------------------------------------


def test_splits_may_list_the_names_in_different_orders(tmp_path):
    write(tmp_path, class_label(NAMES), train=[0, 1, 2, 3, 4])
    write(tmp_path, class_label(NAMES[::-1]), test=[0, 1, 1])
    write(tmp_path, datasets.Value('string'), val=['lion', 'bus'])
    data = read(tmp_path)
    assert data.test.labels.tolist() == [4, 3, 3]
    assert data.validation.labels.tolist() == [3, 1]
    write(tmp_path, class_label(NAMES[::-1]), train2=[0, 1])
    with pytest.raises(DataError, match='train2.parquet and .*train.parquet are both of the train split.*: label'):
        read(tmp_path)


def test_names_that_the_training_split_lacks_are_listed(tmp_path):
    write(tmp_path, class_label(NAMES[:3]), train=[0, 1, 2])
    write(tmp_path, class_label(NAMES), test=[0, 3, 4, 4])
    with pytest.raises(DataError, match=r'The test split of .* has classes that the train split does not know: '
                                        r'lion \(1 image\), rose \(2 images\). It knows: apple, bus, castle'):
        read(tmp_path)
    write(tmp_path, class_label(NAMES), test=[0, 2])  # names without an image do no harm
    assert read(tmp_path).test.labels.tolist() == [0, 2]


def test_labels_get_the_numbers_of_the_network(tmp_path):
    folder = write(tmp_path / 'two', class_label(['lion', 'rose']), test=[0, 1, 1])
    known = dict(num_classes=5, class_names=NAMES, known=True)
    data = read(folder, **known)
    assert (data.train, data.test.labels.tolist(), data.num_classes) == (None, [3, 4, 4], 5)
    folder = write(tmp_path / 'other', datasets.Value('string'), test=['lion', 'zebra', 'ant'])
    with pytest.raises(DataError, match=r'the network does not know: ant \(1 image\), zebra \(1 image\). It knows'):
        read(folder, **known)
    folder = write(tmp_path / 'bare', datasets.Value('int64'), test=[3, 4])
    data = read(folder, **known)
    assert data.test.labels.tolist() == [3, 4]
    assert any('have no names and are taken to count the classes' in note for note in data.notes)
    folder = write(tmp_path / 'far', datasets.Value('int64'), test=[3, 5])
    with pytest.raises(DataError, match='Label 5 in row 1 of the test split is out of range: expected 0 to 4'):
        read(folder, **known)
    folder = write(tmp_path / 'numerals', datasets.Value('int64'), test=[30, 10])
    assert read(folder, num_classes=3, class_names=['10', '20', '30'], known=True).test.labels.tolist() == [2, 0]


def test_a_network_without_names_is_matched_by_count_and_that_is_said(tmp_path):
    folder = write(tmp_path / 'a', class_label(NAMES), test=[1, 4])
    data = read(folder, num_classes=5, known=True)
    assert data.test.labels.tolist() == [1, 4]
    assert any("the network's classes have no names" in note for note in data.notes)
    with pytest.raises(DataError, match=r'The data name 5 classes \(apple.*\), the network has 7 without names'):
        read(folder, num_classes=7, known=True)
    folder = write(tmp_path / 'b', datasets.Value('int64'), test=[10, 30])  # a few classes of a network of 100
    assert read(folder, num_classes=100, known=True).test.labels.tolist() == [10, 30]


@given(
    names=st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8, unique=True), seed=st.integers(0, 1000),
    count=st.integers(1, 8),
)
def test_matching_by_name_is_the_identity_on_names(names, seed, count):
    wanted = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]
    numbers = match_classes(names, wanted, len(names), len(wanted), 'it')
    assert [names[i] for i in (range(len(names)) if numbers is None else numbers)] == wanted
    keys = [wanted[i % len(wanted)] for i in range(10)]
    assert [names[i] for i in Classes(names).numbers(keys, 'test', 'set')] == keys
    assert shortened(names, len(names)) == ', '.join(names)


# -- teachers ---------------------------------------------------------------------------------------------------------


def test_a_teachers_classes_are_matched_by_name():
    student = timm.create_model('test_resnet_sd', num_classes=3, exits=())
    teacher = timm.create_model('test_resnet', num_classes=5).eval()
    classes = match_classes(NAMES, ['rose', 'apple', 'lion'], 5, 3, 'The teacher')
    assert classes == [4, 0, 3]
    task = SelfDistillationTask(
        student, DistillationConfig(label_weight=0.), teacher=teacher, teacher_classes=classes, verbose=False)
    task.train()
    images = torch.randn(4, 3, 64, 64)
    loss = task(images, torch.tensor([0, 1, 2, 0]))['loss']
    with torch.no_grad():
        target = teacher(images)[:, [4, 0, 3]].log_softmax(-1)
        own = task.get_eval_model().backbone(images).log_softmax(-1)
    assert torch.allclose(loss, (target.exp() * (target - own)).sum(-1).mean(), atol=1e-5)
    with pytest.raises(ValueError, match='teacher_classes=.*expected 3 numbers of classes from 0 to 4'):
        SelfDistillationTask(student, teacher=teacher, teacher_classes=[0, 5, 1], verbose=False)


@pytest.mark.parametrize('known, wanted, counts, message', [
    (NAMES, ['rose', 'zebra'], (5, 2), 'It does not know the classes zebra. It knows: apple'),
    (None, NAMES, (4, 5), 'It has 4 classes, expected 5; they cannot be matched by name, as it names none'),
    (NAMES, None, (5, 3), 'It has 5 classes, expected 3; .* as the data names none'),
])
def test_classes_that_cannot_be_matched_are_named(known, wanted, counts, message):
    with pytest.raises(DataError, match=message):
        match_classes(known, wanted, *counts, 'It')


# -- held out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('labels, fraction', [
    ([0] * 20 + [1], 0.1), ([0, 1, 2] * 2, 0.1), ([0] * 30 + [1] * 30 + [2], 0.2), ([0, 0, 1, 2, 3, 4], 0.5),
    (list(range(50)) * 3, 0.1),
])
def test_a_class_with_few_images_keeps_one_for_training(tmp_path, labels, fraction):
    folder = write(tmp_path, datasets.Value('int64'), train=labels)
    data = load_image_data(DataSource(data_dir=folder, val_fraction=fraction))
    assert set(data.train.labels) == set(labels)
    assert 1 <= len(data.validation) <= max(1, round(fraction * len(labels)))
    assert sorted([*data.train.index, *data.validation.index]) == list(range(len(labels)))
    again = load_image_data(DataSource(data_dir=folder, val_fraction=fraction))
    assert again.validation.index.tolist() == data.validation.index.tolist()
    assert any('held out of the train split' in note for note in data.notes)


def test_where_nothing_can_be_held_out_the_way_on_is_told(tmp_path):
    folder = write(tmp_path, datasets.Value('int64'), train=[0, 1, 2])
    with pytest.raises(DataError, match='every class has a single image. Give the classes more images, or the data a'):
        load_image_data(DataSource(data_dir=folder))
    kept, held_out = hold_out(read(write(tmp_path, class_label('ab'), train=[0, 1] * 10)).train, 0.5, 'test')
    assert (kept.name, held_out.name, len(kept), len(held_out)) == ('train', 'test', 10, 10)


def test_names_in_a_config_are_those_that_a_run_goes_on_with(tmp_path):
    from accelerate import Accelerator

    from timm_selfdistill.config import TrainConfig
    from timm_selfdistill.data.loaders import open_data
    from timm_selfdistill.hub.networks import names_of_run

    folder = write(tmp_path / 'data', class_label(['bee', 'ant']), train=[0, 1] * 10, test=[1, 0])
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(dict(label_names=['ant', 'bee'])))
    data = open_data(TrainConfig(data_dir=folder), Accelerator(cpu=True), names_of_run(tmp_path / 'run'))
    assert data.label_names == ['ant', 'bee']
    assert data.test.labels.tolist() == [0, 1]
    write(tmp_path / 'data', class_label(['bee', 'cow']), train=[0, 1] * 10, test=[1, 0])
    with pytest.raises(DataError, match='classes that the network does not know: cow'):
        open_data(TrainConfig(data_dir=folder), Accelerator(cpu=True), names_of_run(tmp_path / 'run'))
