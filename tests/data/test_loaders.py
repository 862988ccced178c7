import dataclasses

import pytest
import torch
from helpers.images import write_two_colours

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.loaders import Loaders, open_data
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.training.build import build_model
from timm_selfdistill.training.trainer import create_accelerator, train

TINY = TrainConfig(model='test_resnet', exits=(2, 3), batch_size=16, label_column='fine', val_fraction=0.25)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_two_colours(tmp_path_factory.mktemp('data'), train=80, test=16)


def loaders(folder, **settings):
    config = dataclasses.replace(TINY, data_dir=str(folder), **settings)
    accelerator = create_accelerator(config)
    data = open_data(config, accelerator)
    return Loaders(config, data, build_model(config, data).data_config, accelerator)


@pytest.mark.parametrize('settings, kind', [
    (dict(), 'device'),
    (dict(aa='cifar10', cutout=8, reprob=0.2), 'device'),
    (dict(aa='rand-m5-mstd0.5'), 'device'),
    (dict(loader='workers'), 'workers'),
    (dict(crop='rrc'), 'workers'),
    (dict(color_jitter=0.4), 'workers'),
    (dict(aa='augmix-m3'), 'workers'),
    (dict(streaming=True), 'stream'),
])
def test_batches_are_made_where_they_can_be(folder, settings, kind):
    made = loaders(folder, **settings)
    assert made.kind == kind
    loader = made.train()
    loader.batch_sampler.set_epoch(0)
    images, target = next(iter(loader))
    assert images.shape == (16, 3, 32, 32)
    assert (images.dtype, target.dtype) == (torch.float32, torch.int64)
    assert len(loader) == loader.batch_sampler.steps == (5 if kind == 'stream' else 3)


@pytest.mark.parametrize('settings, message', [
    (dict(crop='rrc'), '`loader=device`: what `crop=rrc`, `aa=None`, `color_jitter=0` ask for is not done there'),
    (dict(aa='augmix-m3'), '`loader=device`: what `crop=pad`, `aa=augmix-m3`'),
])
def test_the_device_is_refused_what_it_cannot_do(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        loaders(folder, loader='device', **settings)


def test_the_device_is_refused_what_it_cannot_hold(folder, monkeypatch):
    monkeypatch.setattr('timm_selfdistill.data.loaders.fits_on_device', lambda *args: False)
    with pytest.raises(ConfigError, match='`loader=device`: 96 images do not fit into a quarter of the free memory'):
        loaders(folder, loader='device')
    assert loaders(folder).kind == 'workers'


def test_all_ways_evaluate_the_same_images(folder):
    parts = [loaders(folder, **more) for more in (dict(), dict(loader='workers'), dict(streaming=True))]
    images, labels = zip(*([torch.cat(t) for t in zip(*made.evaluation(made.data.test))] for made in parts))
    assert len(labels[0]) == 16
    for other_images, other_labels in zip(images[1:], labels[1:]):
        assert torch.equal(other_labels, labels[0])
        assert torch.allclose(other_images, images[0], atol=1e-6)


def test_a_streamed_run_goes_through(folder, tmp_path):
    config = dataclasses.replace(
        TINY, data_dir=str(folder), streaming=True, workers=1, epochs=2, output=str(tmp_path), experiment='run')
    run = train(config)
    assert (run / 'summary.csv').read_text().count('\n') == 3
    assert not (run / 'best').exists(), 'nothing is held out to choose by'
