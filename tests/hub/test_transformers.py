"""What is saved loads in transformers, whose timm wrapper calls `timm.create_model`."""
import json
import os
import warnings

import pytest
import timm
import torch
from helpers.images import noise_images

from timm_selfdistill.hub.networks import save_model

transformers = pytest.importorskip('transformers')
from transformers import (  # noqa: E402
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

# One of each kind: convolutional, by batch and by layer, attention of every sort, mixers, and networks that change
# their form for inference.
NAMES = [
    'test_byobnet', 'test_coatnet', 'test_convnext', 'test_efficientnet', 'test_efficientnet_evos', 'test_mambaout',
    'test_maxvit', 'test_resnet', 'test_vit', 'test_vit3', 'test_vit_relpos', 'resnet20_cifar', 'cait_xxs24_224',
    'crossvit_tiny_240', 'deit_tiny_distilled_patch16_224', 'densenet121', 'edgenext_xx_small', 'efficientvit_b0',
    'fastvit_t8', 'hiera_tiny_224', 'lcnet_035', 'levit_128s', 'mixer_s32_224', 'mobilenetv3_small_050', 'pvt_v2_b0',
    'regnetx_002', 'repvgg_a0', 'swin_tiny_patch4_window7_224', 'tiny_vit_5m_224', 'vgg11', 'xcit_nano_12_p16_224',
]
# Which in transformers cannot be told from others by a difference of rounding: memory lies differently there.
NEAR = dict(rtol=1e-4, atol=1e-5)


def save(name, folder, **more):
    model = timm.create_model(f'{name}_sd', num_classes=7, **more).eval()
    save_model(model, folder, label_names=list('abcdefg'))
    return model


@pytest.mark.models
@pytest.mark.parametrize('name', NAMES)
def test_logits_are_ours_there_and_back(name, tmp_path):
    model = save(name, tmp_path / 'ours')
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / 'ours').eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(loaded(images).logits, expected, **NEAR)
        assert loaded.config.id2label == dict(enumerate('abcdefg'))
        loaded.save_pretrained(tmp_path / 'theirs')
        again = AutoModelForImageClassification.from_pretrained(tmp_path / 'theirs').eval()
        torch.testing.assert_close(again(images).logits, expected, **NEAR)
        back = timm.create_model(f'local-dir:{tmp_path / "theirs"}', pretrained=True).eval()
        for ours, theirs in zip(model.forward_exits(images), back.forward_exits(images)):
            torch.testing.assert_close(theirs, ours, **NEAR)
    assert back.pretrained_cfg['label_names'] == list('abcdefg')


@pytest.mark.slow
def test_one_step_of_the_trainer_changes_the_network(tmp_path):
    save('test_resnet', tmp_path / 'ours', exits=(2, 3))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / 'ours')
    examples = [dict(pixel_values=torch.randn(3, 64, 64), labels=i % 7) for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / 'out'), max_steps=1, per_device_train_batch_size=8, report_to='none', use_cpu=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert any('backbone' in n for n in changed)
    trainer.save_model(str(tmp_path / 'saved'))
    back = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(back(images), model.eval()(images).logits, **NEAR)


@pytest.mark.slow
def test_the_pipeline_sees_pictures_as_we_do(tmp_path):
    model = save('test_resnet', tmp_path / 'ours', exits=(2, 3))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    picture, = noise_images(1, 200)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = pipeline('image-classification', model=str(tmp_path / 'ours'), device='cpu')(picture, top_k=7)
    with torch.no_grad():
        scores = model(transform(picture)[None]).softmax(-1)[0]
    for entry in found:
        assert entry['score'] == pytest.approx(scores['abcdefg'.index(entry['label'])].item(), abs=1e-3)
    assert AutoImageProcessor.from_pretrained(tmp_path / 'ours').data_config['input_size'] == (3, 160, 160)


@pytest.mark.slow
def test_thresholds_and_places_of_exits_come_along(tmp_path):
    model = save('test_resnet', tmp_path / 'ours', exits=(1, 3), exit_head='linear')
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / 'ours')
    assert loaded.timm_model.exits == model.exits and loaded.timm_model.exit_head == 'linear'
    saved = json.loads((tmp_path / 'ours/config.json').read_text())
    assert 'num_classes' not in saved['model_args'] and os.path.exists(tmp_path / 'ours/model.safetensors')
