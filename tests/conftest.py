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
import pytest
import timm
import torch

import timm_selfdistill  # noqa: F401  registers the names

datasets.disable_progress_bars()


def pytest_collection_modifyitems(items):
    """Begin with the files that have most of the slow tests, so that all worker processes end at about one time."""
    marks = ('slow', 'models', 'faults')
    slow = collections.Counter(item.path for item in items if any(map(item.get_closest_marker, marks)))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """A multi-exit ResNet of a few hundred thousand parameters, two auxiliary exits, five classes."""
    return timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3))


