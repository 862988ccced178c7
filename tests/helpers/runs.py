"""Runs, whole or interrupted."""
import pytest
import timm
import yaml

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import Preempted
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.training.loop import Loop
from timm_selfdistill.training.trainer import train


def untrained_run(folder, exits=(2, 3), num_classes=10, dataset=None):
    """Write what training leaves and the recipes read, without the training."""
    model = timm.create_model('test_resnet_sd', num_classes=num_classes, exits=exits)
    save_model(model, folder, dict(input_size=(3, 32, 32), crop_pct=1., mean=(0.5,) * 3, std=(0.5,) * 3))
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(dataset=dataset, val_fraction=0.1)))
    return folder


def resumable(folder, **more):
    values = dict(
        model='test_resnet', exits=(2, 3), epochs=2, batch_size=100, model_ema=True, mixup=0.2, drop=0.1, reprob=0.2,
        temperature_end=1., checkpoint_every='5', output=str(folder), experiment='run', resume='auto',
    )
    return TrainConfig(**{**values, **more})


def interrupted(config, patch, at, how):
    """Train until `how` is called before the step `at`, then go on; return the folder."""
    original = Loop.train_batch

    def train_batch(run, *batch):
        if run.keeper.progress.steps == at:
            how()
        return original(run, *batch)

    with patch.context() as context:
        context.setattr(Loop, 'train_batch', train_batch)
        with pytest.raises((KeyboardInterrupt, Preempted)):
            train(config)
    return train(config)


def die():
    raise KeyboardInterrupt
