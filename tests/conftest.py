import os

# No test may reach for the Hub; set before huggingface_hub is imported.
os.environ['HF_HUB_OFFLINE'] = '1'

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_selfdistill  # noqa: F401  registers the names

datasets.disable_progress_bars()


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
