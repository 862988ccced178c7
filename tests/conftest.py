import collections
import os

# No test may reach for the Hub; set before huggingface_hub is imported.
os.environ['HF_HUB_OFFLINE'] = '1'

# pytest's worker processes share the cores: threads of several on one core wait for each other most of the time.
if 'PYTEST_XDIST_WORKER' in os.environ and hasattr(os, 'sched_setaffinity'):
    worker, count = int(os.environ['PYTEST_XDIST_WORKER'][2:]), int(os.environ['PYTEST_XDIST_WORKER_COUNT'])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[worker::count] or cores)

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_selfdistill  # noqa: F401  registers the names

datasets.disable_progress_bars()


def pytest_collection_modifyitems(items):
    """Begin with the files that have most of the slow tests, so that all worker processes end at about one time."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker('slow'))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """A multi-exit ResNet of a few hundred thousand parameters, two auxiliary exits, five classes."""
    return timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3))


def noise_images(count, size=32, seed=0):
    """Return PIL images of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def write_two_colours(folder, train=160, test=80):
    """Write a data set of eight classes in four superclasses: images of one colour each, its shade the class."""
    rng = np.random.default_rng(0)
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    features = datasets.Features(
        image=datasets.Image(),
        fine=datasets.ClassLabel(names=[f'{shade} {colour}' for colour in 'rgby' for shade in ('dark', 'light')]),
        coarse=datasets.ClassLabel(names=list('rgby')),
    )
    for part, count in (('train', train), ('test', test)):
        labels = np.arange(count) % 8
        shades = np.where(labels % 2, 220, 120)[:, None] * colours[labels // 2]
        pixels = (shades[:, None, None] + rng.integers(0, 30, (count, 32, 32, 3))).astype(np.uint8)
        table = dict(image=[Image.fromarray(p) for p in pixels], fine=labels.tolist(), coarse=(labels // 2).tolist())
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f'{part}.parquet')
    return folder
