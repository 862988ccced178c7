"""Splits, classes and files of images in one folder a class are those on disk, or an error names the culprit."""
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.images import noise_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.image_folder import IMAGE_SUFFIXES, read_image_folder, walk
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.data.split_names import SPLITS, split_of
from timm_selfdistill.errors import DataError

IMAGE = noise_images(1, 4)[0]


def write(folder, *paths):
    """Write an image at each of these paths."""
    for path in paths:
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        IMAGE.save(path)
    return folder


def read(folder):
    """Return the number of images of each class by split, and the notes."""
    splits, notes = read_image_folder(folder)
    return {split: dict(Counter(name for _, name in samples)) for split, samples in splits.items()}, notes


def many(pattern, count):
    return [pattern.format(i) for i in range(count)]


# -- what people have -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stem', ['train_{}', 'test-{}', 'val {}', 'Validation{}', 'dev.{}', '{} eval'])
def test_names_of_files_mean_nothing(tmp_path, stem):
    write(tmp_path, *many('lion/' + stem + '.png', 5), *many('rose/{}.png', 3))
    assert read(tmp_path) == (dict(train=dict(lion=5, rose=3)), [])
    data = load_image_data(DataSource(data_dir=str(tmp_path), val_fraction=0.))
    assert np.bincount(data.train.labels).tolist() == [5, 3]


@pytest.mark.parametrize('train, validation, test', [
    ('Train', 'VAL', 'Test'), ('training', 'valid', 'testing'), ('TRAINING', 'Dev', 'TESTING'),
    ('train', 'eval', 'test'), ('train', 'validation', 'test'),
])
def test_splits_are_told_by_the_names_that_people_use(tmp_path, train, validation, test):
    write(tmp_path, *many(f'{train}/a/{{}}.png', 3), f'{train}/b/0.png', f'{validation}/a/0.png', f'{test}/b/0.png')
    assert read(tmp_path) == (dict(train=dict(a=3, b=1), validation=dict(a=1), test=dict(b=1)), [])
    data = load_image_data(DataSource(data_dir=str(tmp_path)))
    assert {name: len(split) for name, split in data.splits().items()} == dict(train=4, validation=1, test=1)
    assert data.test.labels.tolist() == [1]


def test_a_class_holds_everything_under_it(tmp_path):
    write(tmp_path, 'train/cat/front/1.png', 'train/cat/front/far/2.png', 'train/cat/3.png', 'train/dog/back/1.png')
    write(tmp_path / 'elsewhere', 'x/1.png', '2.png')
    (tmp_path / 'train' / 'dog' / 'more').symlink_to(tmp_path / 'elsewhere', target_is_directory=True)
    (tmp_path / 'train' / 'emu').symlink_to(tmp_path / 'elsewhere' / 'x', target_is_directory=True)
    (tmp_path / 'train' / 'cat' / '4.png').symlink_to(tmp_path / 'elsewhere' / '2.png')
    splits, notes = read(tmp_path)
    assert splits == dict(train=dict(cat=4, dog=3, emu=1))
    assert notes == ['left aside: elsewhere/ (2 images) is not the name of a split']


@pytest.mark.parametrize('name', ['x [v1]', 'a*b?', '{braces}', "o'clock", 'ünïcode', 'new\nline', ' blank '])
def test_any_name_of_a_folder_is_legal(tmp_path, name):
    write(tmp_path / name, f'train/{name}/[1].png', 'train/other/*.png', f'test/{name}/1.png')
    data = load_image_data(DataSource(data_dir=str(tmp_path / name), val_fraction=0.))
    assert {split: len(part) for split, part in data.splits().items()} == dict(train=2, test=1)
    assert sorted(data.label_names) == sorted([name, 'other'])


def test_what_is_left_aside_is_said(tmp_path):
    write(tmp_path, 'train/a/1.png', 'train/b/1.png', 'train/stray.png')
    write(tmp_path, 'raw/1.png', 'raw/2.png', 'top.png', 'test/9.png')
    for name in ('train/a/notes.txt', 'train/b/Thumbs.db', 'train/b/README'):
        (tmp_path / name).write_text('no image')
    (tmp_path / 'train' / 'empty').mkdir()
    (tmp_path / 'train' / 'a' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    data = load_image_data(DataSource(data_dir=str(tmp_path), val_fraction=0.))
    assert (data.label_names, len(data.train), data.test) == (['a', 'b'], 2, None)
    notes = '\n'.join(data.described())
    for words in (
        '2 train images; 2 classes: a, b', 'raw/ (2 images) is not the name of a split', '1 image directly in train/',
        'empty/ in train/: no images', 'gone.png is a broken link', 'test/ holds 1 image in no class folder',
        f'1 image directly in {tmp_path.name}/', 'no images by their ending: 3 files (.db 1, .txt 1, no ending 1)',
    ):
        assert words in notes, words


@pytest.mark.parametrize('paths, culprit, why', [
    (['train/a/1.png', 'Training/a/1.png'], 'Training and train', 'both mean the train split'),
    (['val/a/1.png', 'dev/a/1.png', 'train/a/1.png'], 'dev and val', 'both mean the validation split'),
    (['train/1.png', 'test/2.png'], 'train', 'no class folders with images'),
    (['1.png', '2.png'], '', 'holds 2 images and no class folders'),
    (['photos/train/a/1.png', 'photos/test/a/1.png'], 'photos', 'holds the splits test, train.*`data_dir=.*photos'),
    (['a/train/1.png', 'b/train/1.png'], 'a', 'holds the splits train'),
    (['train2017/a/1.png', 'val2017/a/1.png'], 'train2017', 'looks like the train split but is not named so'),
    (['test-images/a/1.png', 'b/a/1.png'], 'test-images', 'looks like the test split but is not named so'),
    (['bus/1.png', 'car/1.png', 'train/1.png'], 'train', 'If train is a class itself, put all class folders into'),
    (['train/a/1.png', 'train/.ipynb_checkpoints/1.png'], '.ipynb_checkpoints', 'a hidden folder with 1 image '),
])
def test_what_cannot_be_read_is_named(tmp_path, paths, culprit, why):
    write(tmp_path, *paths)
    with pytest.raises(DataError, match=f'(?s){culprit}.*{why}'):
        read_image_folder(tmp_path)


def test_empty_splits_and_folders_are_named(tmp_path):
    write(tmp_path, 'train/a/1.png', 'train/b/1.png')
    (tmp_path / 'val').mkdir()
    with pytest.raises(DataError, match='val: the validation split holds no images. Add .* or remove it'):
        load_image_data(DataSource(data_dir=str(tmp_path)))
    shutil.rmtree(tmp_path / 'val')
    shutil.rmtree(tmp_path / 'train' / 'b')
    with pytest.raises(DataError, match='has the single class a, expected two or more'):
        load_image_data(DataSource(data_dir=str(tmp_path)))
    (tmp_path / 'other' / 'a').mkdir(parents=True)
    (tmp_path / 'other' / 'a' / 'x.zip').write_bytes(b'PK')
    with pytest.raises(DataError, match=r'other holds no images in class folders; files found by .*: \.zip 1'):
        read_image_folder(tmp_path / 'other')


def test_links_in_circles_are_named_and_end(tmp_path):
    write(tmp_path, 'train/a/1.png', 'train/b/1.png')
    links = {'train/a/up': 'train', 'train/b/self': 'train/b', 'train/a/far': '.', 'train/b/root': '/'}
    for link, target in links.items():
        (tmp_path / link).symlink_to((tmp_path / target).resolve(), target_is_directory=True)
        with pytest.raises(DataError, match=f'{link.rpartition("/")[2]}: the link leads back to .* Remove the link'):
            read_image_folder(tmp_path)
        (tmp_path / link).unlink()
    # two folders that lead to each other
    (tmp_path / 'train' / 'a' / 'to').symlink_to(tmp_path / 'train' / 'b', target_is_directory=True)
    (tmp_path / 'train' / 'b' / 'to').symlink_to(tmp_path / 'train' / 'a', target_is_directory=True)
    with pytest.raises(DataError, match='the link leads back to'):
        read_image_folder(tmp_path)


def test_a_pipe_is_no_image_and_does_not_hang(tmp_path):
    write(tmp_path, 'a/1.png', 'b/1.png')
    os.mkfifo(tmp_path / 'a' / '2.png')
    splits, notes = read(tmp_path)
    assert splits == dict(train=dict(a=1, b=1))
    assert len(notes) == 1 and notes[0].endswith('2.png is no file')


def test_accents_are_compared_however_they_are_stored(tmp_path):
    composed, taken_apart = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    write(tmp_path, f'train/{composed}/1.png', 'train/bar/1.png', f'test/{taken_apart}/1.png')
    assert load_image_data(DataSource(data_dir=str(tmp_path), val_fraction=0.)).test.labels.tolist() == [1]


# -- any tree at all --------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from([
        'train', 'Training', 'val', 'VALID', 'dev', 'test', 'Testing', 'eval', 'train_old', 'test2', 'cat', 'dog',
        'emu', 'x [v1]', '.hidden', '__MACOSX', 'a*', 'front', 'ß', '1',
    ]),
    st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1, max_size=6).filter(
        lambda name: name not in ('.', '..')),
)
FILES = st.tuples(
    NAMES, st.sampled_from(['.png', '.JPG', '.jpeg', '.webp', '.txt', '', '.csv', '.gif', '.tar.gz', '.Tiff']))
LEAVES = st.lists(FILES, max_size=3)
BELOW = st.recursive(  # what may lie in a folder: files, and folders by name
    LEAVES, lambda inner: st.tuples(LEAVES, st.dictionaries(NAMES, inner, max_size=3)), max_leaves=5)
WORDS = st.sampled_from(['cat', 'dog', 'emu', 'x [v1]', 'ß', 'a*', 'train', 'Test', '.hidden', '1', 'big cat'])
CLASSES = st.tuples(st.lists(FILES, max_size=1), st.dictionaries(WORDS, BELOW, min_size=1, max_size=4))
SPLIT_NAMES = st.sampled_from(['train', 'Training', 'val', 'VALID', 'dev', 'test', 'Testing', 'eval', 'raw', 'train2'])
TREES = st.one_of(
    BELOW, CLASSES,
    st.tuples(st.lists(FILES, max_size=1), st.dictionaries(SPLIT_NAMES, CLASSES, min_size=1, max_size=3)),
)


def build(folder, tree, everything):
    """Make the files and folders of a tree; nothing has to be an image to be found by its name."""
    folder.mkdir(exist_ok=True)
    everything.append(folder)
    files, inner = tree if isinstance(tree, tuple) else (tree, {})
    for name, below in inner.items():
        build(folder / name, below, everything)
    for stem, suffix in files:
        if not (folder / (stem + suffix)).exists():
            (folder / (stem + suffix)).write_bytes(b'')


def images_below(folder):
    """List what torchvision's finder takes for images."""
    return [
        os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    ]


def on_disk(folder):
    """Count images by class: folders directly in this one that hold images."""
    counts = {entry.name: len(images_below(entry.path)) for entry in os.scandir(folder) if entry.is_dir()}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tree=TREES, links=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), WORDS), max_size=3),
    circles=st.sampled_from([False] * 9 + [True]),
)
def test_the_classes_and_counts_found_are_those_on_disk_or_an_error_names_the_culprit(
        tmp_path_factory, tree, links, circles):
    root = tmp_path_factory.mktemp('tree') / 'set'
    folders = []
    build(root, tree, folders)
    for source, target, name in links:
        link, target = folders[source % len(folders)] / name, folders[target % len(folders)].resolve()
        if not (link.exists() or link.is_symlink()) and (circles or target not in link.resolve().parents):
            link.symlink_to(target, target_is_directory=True)
    try:
        splits, notes = read_image_folder(root)
    except DataError as e:
        assert str(root) in str(e), 'the culprit is named'
        assert len(str(e)) > len(str(root)) + 20, 'and the reason'
        return
    told = ' '.join(notes)
    named = [entry.name for entry in os.scandir(root) if entry.is_dir() and split_of(entry.name) is not None]
    expected = {split_of(name): on_disk(root / name) for name in named}
    if not named:
        expected = dict(train=on_disk(root))
    found = {split: dict(Counter(name for _, name in samples)) for split, samples in splits.items()}
    assert found == {split: counts for split, counts in expected.items() if counts}
    assert not any(name.startswith('.') for counts in found.values() for name in counts)
    assert all(Path(path).is_file() for samples in splits.values() for path, _ in samples)
    # what is an image and was not taken is said
    for name in set(named) - {name for name in named if split_of(name) in found}:
        assert f'{name}/' in told
    if named:
        for entry in os.scandir(root):
            if entry.is_dir() and entry.name not in named and images_below(entry.path):
                assert f'{entry.name}/' in told
    taken = [root / name for name in named if split_of(name) in found] if named else [root]
    classes = [path for folder in taken for path in folder.iterdir() if path.is_dir()]
    files = [name for folder in classes for _, names in walk(folder) for name in names]
    if any(os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES for name in files):
        assert 'no images by their ending' in told


def test_every_split_has_names_of_its_own():
    names = [name for names in SPLITS.values() for name in names]
    assert len(names) == len(set(names))
    assert all(split_of(name.upper()) == split for split, names in SPLITS.items() for name in names)
