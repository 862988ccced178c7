import io
import logging
import os

import datasets
import numpy as np
import pytest
import torch
from helpers.images import noise_images
from PIL import Image

from timm_selfdistill.data import device_loader as device_data
from timm_selfdistill.data.augment import eval_transform, train_transform
from timm_selfdistill.data.device_augment import BatchAugment, normalize
from timm_selfdistill.data.device_loader import DeviceEvalLoader, DeviceLoader, decode_split, fits_on_device
from timm_selfdistill.data.epoch_order import EpochBatches
from timm_selfdistill.data.image_data import ImageSplit, load_image_data
from timm_selfdistill.data.source import DataSource, Shard
from timm_selfdistill.data.workers import create_eval_loader, create_train_loader
from timm_selfdistill.errors import UnreadableImageError

CPU = torch.device('cpu')
CONFIG = dict(
    input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5, 0.47, 0.43), std=(0.25, 0.24, 0.26), crop_pct=0.875,
    crop_mode='center',
)
LABELS = [0, 1, 2] * 100


def make_split(images=None, mode='RGB'):
    images = images if images is not None else noise_images(48, size=16)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['ant', 'bee', 'cat']))
    table = datasets.Dataset.from_dict(dict(image=images, label=LABELS[:len(images)]), features=features)
    return ImageSplit(table, 'train', 'image', table['label'][:], mode=mode)


@pytest.fixture
def large(monkeypatch):
    """Few images are many."""
    monkeypatch.setattr(device_data, 'LARGE', 8)


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('size', [16, 23])
@pytest.mark.parametrize(('mode', 'world_size'), [('RGB', 1), ('RGB', 3), ('L', 1)])
def test_evaluation_gives_the_batches_of_the_workers_path(crop_mode, size, mode, world_size):
    channels = len(mode) if mode == 'RGB' else 1
    config = dict(
        CONFIG, input_size=(channels, 16, 16), crop_mode=crop_mode, mean=CONFIG['mean'][:channels],
        std=CONFIG['std'][:channels])
    split = make_split(noise_images(40, size), mode)
    pixels = decode_split(split, config)
    assert (pixels.shape, pixels.dtype) == ((40, 16, 16, channels), torch.uint8)
    assert pixels.is_contiguous()
    seen = []
    for rank in range(world_size):
        expected = create_eval_loader(split, eval_transform(config), 9, shard=Shard(rank, world_size))
        loader = DeviceEvalLoader(pixels, split.labels, config, 9, CPU, Shard(rank, world_size))
        batches = list(loader)
        assert len(batches) == len(loader) == len(expected)
        for (images, target), (their_images, their_target) in zip(batches, expected):
            assert torch.equal(images, their_images)
            assert torch.equal(target, their_target)
            seen += images
    assert len(seen) == 40


def test_training_images_are_crops_of_the_same_pixels_as_in_the_workers_path():
    split = make_split(noise_images(24, 23))
    loader = DeviceLoader(
        decode_split(split, CONFIG, training=True), split.labels, EpochBatches(24, 8, seed=3),
        BatchAugment(CONFIG, CPU, hflip=0.))
    theirs = create_train_loader(split, train_transform(CONFIG, crop='pad', hflip=0.), 8, seed=3)
    rows = iter(loader.batch_sampler.order())
    for (images, target), (their_images, their_target) in zip(loader, theirs):
        assert torch.equal(target, their_target)
        for image, other, row in zip(images, their_images, rows):
            padded = normalize(loader.pixels[row][None], loader.augment.mean, loader.augment.std)[0]
            crops = padded.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
            assert len(crops) == 25
            for crop in (image, other):
                assert (crops == crop).flatten(1).all(1).sum() == 1


def make_loader(epoch=0, start=0, seed=0, auto_augment='rand-m8-mstd0.5-inc1', **shares):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    augment = BatchAugment(CONFIG, CPU, auto_augment=auto_augment, re_prob=0.5, cutout=4)
    batches = EpochBatches(200, 48, seed, **shares)
    loader = DeviceLoader(torch.from_numpy(pixels), np.arange(200), batches, augment)
    loader.batch_sampler.set_epoch(epoch, start)
    return loader


def images_of(loader):
    batches = list(loader)
    assert len(batches) == len(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([target for _, target in batches])


@pytest.mark.parametrize('auto_augment', ['rand-m8-mstd0.5-inc1', 'cifar10'])
def test_processes_slices_and_start_change_no_image(auto_augment):
    images, target = images_of(make_loader(epoch=2, auto_augment=auto_augment))
    assert images.shape == (192, 3, 16, 16)
    by_step = images.view(4, 48, 3, 16, 16)
    assert torch.equal(
        images_of(make_loader(epoch=2, accumulate=4, auto_augment=auto_augment))[0], images)
    for world_size, accumulate, start in ((2, 1, 0), (3, 2, 0), (1, 3, 3), (4, 2, 2)):
        shares = [
            images_of(make_loader(
                epoch=2, start=start, shard=Shard(rank, world_size), accumulate=accumulate,
                auto_augment=auto_augment))
            for rank in range(world_size)
        ]
        together = torch.cat([share.view(4 - start, -1, 3, 16, 16) for share, _ in shares], 1)
        assert torch.equal(together, by_step[start:])
        labels = torch.cat([share.view(4 - start, -1) for _, share in shares], 1)
        assert torch.equal(labels, target.view(4, 48)[start:])


def test_epochs_and_seeds_differ_and_repeat():
    images, target = images_of(make_loader())
    again, target_again = images_of(make_loader())
    assert torch.equal(images, again) and torch.equal(target, target_again)
    for changed in (dict(epoch=1), dict(seed=1)):
        others, other_target = images_of(make_loader(**changed))
        assert not torch.equal(target, other_target)
        both = np.intersect1d(target, other_target)
        assert len(both) > 150
        same = [torch.equal(images[target == row], others[other_target == row]) for row in both]
        assert np.mean(same) < 0.05  # the same rows look otherwise


def test_batches_are_float32_in_channels_last_and_labels_int64():
    images, target = next(iter(make_loader()))
    assert (images.dtype, target.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (48, 3, 16, 16)


def test_labels_belong_to_their_images():
    pixels = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 16, 16, 3)
    loader = DeviceLoader(pixels, np.arange(200), EpochBatches(200, 48), BatchAugment(CONFIG, CPU))
    for images, target in loader:
        grey = images[:, 0] * CONFIG['std'][0] + CONFIG['mean'][0]  # padded with black, which is less
        assert torch.equal((grey * 255).round().long().amax((1, 2)), target)


def counting(split, monkeypatch):
    """Count the images that are decoded."""
    decoded = []
    image = split.image
    monkeypatch.setattr(split, 'image', lambda row: decoded.append(row) or image(row))
    return decoded


def test_a_large_part_is_decoded_once(tmp_path, monkeypatch, large):
    split = make_split()
    decoded = counting(split, monkeypatch)
    pixels = decode_split(split, CONFIG, cache_dir=tmp_path / 'new' / 'cache')
    assert len(decoded) == 48
    assert torch.equal(decode_split(split, CONFIG, cache_dir=tmp_path / 'new' / 'cache'), pixels)
    assert len(decoded) == 48
    assert [p.suffix for p in (tmp_path / 'new' / 'cache').iterdir()] == ['.npy']
    again = make_split()  # opened anew, the same content
    decoded = counting(again, monkeypatch)
    assert torch.equal(decode_split(again, CONFIG, cache_dir=tmp_path / 'new' / 'cache'), pixels)
    assert not decoded


def test_the_default_cache_lies_beside_that_of_datasets(tmp_path, monkeypatch, large):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path))
    decode_split(make_split(), CONFIG)
    assert len(list((tmp_path / 'timm_selfdistill').iterdir())) == 1


def test_a_small_part_is_not_cached(tmp_path):
    decode_split(make_split(), CONFIG, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('change', ['image', 'row', 'mode', 'size', 'interpolation', 'crop', 'crop_mode', 'training'])
def test_the_cache_knows_content_and_options(tmp_path, large, change):
    images = noise_images(48, size=16)
    decode_split(make_split(images), CONFIG, cache_dir=tmp_path)
    config, mode, training = dict(CONFIG), 'RGB', False
    if change == 'image':
        other = np.array(images[17])
        other[3, 4, 1] ^= 1
        images = [*images[:17], Image.fromarray(other), *images[18:]]
    if change == 'size':
        config['input_size'] = (3, 15, 15)
    if change == 'interpolation':
        config['interpolation'] = 'bicubic'
    if change == 'crop':
        config['crop_pct'] = 0.9
    if change == 'crop_mode':
        config['crop_mode'] = 'border'
    if change == 'mode':
        mode, config['input_size'] = 'L', (1, 16, 16)
    split = make_split(images, mode)
    if change == 'row':
        split = split.select(np.r_[1, 0, 2:48], 'train')
    pixels = decode_split(split, config, training=training or change == 'training', cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    resize = eval_transform(dict(config, crop_pct=1.0) if change == 'training' else config).transforms[:2]
    expected = []
    for row in range(48):
        image = split.image(row)
        for transform in resize:
            image = transform(image)
        expected.append(np.asarray(image).reshape(pixels.shape[1:]))
    assert np.array_equal(pixels, expected)


def test_files_are_known_by_path_size_and_time(tmp_path, monkeypatch, large):
    for part, count in (('train', 10), ('test', 2)):
        for name in ('ant', 'bee'):
            folder = tmp_path / 'set' / part / name
            folder.mkdir(parents=True)
            for i, image in enumerate(noise_images(count)):
                image.save(folder / f'{i}.bmp')  # of one size whatever it shows
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'datasets')
    split = load_image_data(DataSource(data_dir=str(tmp_path / 'set'), val_fraction=0.)).train
    cache = tmp_path / 'cache'
    pixels = decode_split(split, CONFIG, cache_dir=cache)
    assert torch.equal(decode_split(split, CONFIG, cache_dir=cache), pixels)
    assert len(list(cache.iterdir())) == 1
    changed = tmp_path / 'set' / 'train' / 'bee' / '3.bmp'
    Image.new('RGB', (32, 32), 'red').save(changed)
    os.utime(changed, ns=(1, 1))
    assert not torch.equal(decode_split(split, CONFIG, cache_dir=cache), pixels)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize('damage', ['cut', 'empty', 'text', 'shape', 'dtype'])
def test_a_damaged_cache_is_made_anew_and_said(tmp_path, large, caplog, damage):
    split = make_split()
    pixels = decode_split(split, CONFIG, cache_dir=tmp_path)
    path, = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == 'shape':
        np.save(path, pixels[:-1].numpy())
    elif damage == 'dtype':
        np.save(path, pixels.float().numpy())
    else:
        path.write_bytes(dict(cut=content[:-100], empty=b'', text=b'not an array')[damage])
    with caplog.at_level(logging.WARNING, logger='timm_selfdistill'):
        assert torch.equal(decode_split(split, CONFIG, cache_dir=tmp_path), pixels)
    assert str(path) in caplog.text
    assert path.read_bytes() == content
    caplog.clear()
    decode_split(split, CONFIG, cache_dir=tmp_path)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, large, caplog):
    (tmp_path / 'file').write_text('')
    with caplog.at_level(logging.WARNING, logger='timm_selfdistill'):
        pixels = decode_split(make_split(), CONFIG, cache_dir=tmp_path / 'file' / 'cache')
    assert pixels.shape == (48, 16, 16, 3)
    assert str(tmp_path / 'file' / 'cache') in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path, large, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'save', full)
    with caplog.at_level(logging.WARNING, logger='timm_selfdistill'):
        decode_split(make_split(), CONFIG, cache_dir=tmp_path)
    assert 'No space left on device' in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('workers', [0, 1])
def test_rows_keep_their_order(tmp_path, large, workers):
    images = noise_images(300, size=16)
    pixels = decode_split(make_split(images), dict(CONFIG, crop_pct=1.0), workers=workers, cache_dir=tmp_path)
    assert np.array_equal(pixels, images)


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_named(tmp_path, large, workers):
    images = [dict(bytes=image_bytes(image), path=None) for image in noise_images(20)]
    images[13]['bytes'] = b'no image'
    split = make_split(images).select(np.arange(5, 20), 'part')
    with pytest.raises(UnreadableImageError, match='row 13 of the train split'):
        decode_split(split, CONFIG, workers=workers, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def image_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def test_a_quarter_of_the_free_memory_is_the_limit(monkeypatch):
    memory = type('Memory', (), dict(available=4 * 100 * 3 * 40 * 40))
    monkeypatch.setattr(device_data.psutil, 'virtual_memory', lambda: memory)
    assert fits_on_device(100, (3, 32, 32), CPU)
    assert not fits_on_device(101, (3, 32, 32), CPU)
    assert not fits_on_device(100, (3, 33, 32), CPU)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (4 * 10 * 3 * 40 * 40, 10 ** 12))
    assert fits_on_device(10, (3, 32, 32), torch.device('cuda'))
    assert not fits_on_device(11, (3, 32, 32), torch.device('cuda'))
