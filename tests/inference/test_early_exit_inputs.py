"""What EarlyExit is given: batches as loaders make them, labels of every type, networks in half precision."""
import json

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_selfdistill import EarlyExit
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.inference.batches import read_batch
from timm_selfdistill.inference.cuts import randomise
from timm_selfdistill.models.exit_rule import CRITERIA, ExitRule, follow_rule

TARGET = torch.arange(12) % 5


@pytest.fixture(scope='module')
def images():
    return torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2, 3)).eval()
    randomise(model)
    return model


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('labels', [
    *(TARGET.to(dtype) for dtype in (torch.int32, torch.uint8, torch.int16, torch.uint16, torch.float, torch.half)),
    *(TARGET.numpy().astype(dtype) for dtype in ('int32', 'uint8', 'int64', 'float64')),
    TARGET.tolist(),
    list(TARGET),
    torch.nn.functional.one_hot(TARGET, 5),
    torch.eye(5)[TARGET],
    np.eye(5, dtype='float32')[TARGET.numpy()],
], ids=str)
def test_labels_of_every_type_calibrate_alike(model, images, labels):
    expected = EarlyExit(model).calibrate([(images, TARGET)], budget=0.9).point
    batches = [(images, labels)]
    predictor = EarlyExit(model)
    assert predictor.calibrate(batches, budget=0.9).point == expected
    model.exit_rule = predictor.rule
    assert EarlyExit(model).evaluate(batches)['top1'] == pytest.approx(expected['top1'])


@pytest.mark.parametrize('keys', [('image', 'label'), ('pixel_values', 'labels'), ('img', 'target')])
def test_dicts_are_read_by_the_names_that_people_use(model, images, keys):
    batch = dict(zip(keys, (images, TARGET)), path=['a.png'] * 12)
    assert EarlyExit(model).calibrate([batch], budget=0.9).count == 12
    assert EarlyExit(model).evaluate([dict(zip(keys, (images.numpy(), TARGET.numpy())))])['count'] == 12


@pytest.mark.parametrize('batch, message', [
    (lambda x: {'image': x, 'fine_label': TARGET}, "the keys 'image', 'fine_label': expected one of .* one of labels"),
    (lambda x: {'image': x, 'label': TARGET, 'labels': TARGET}, "'image', 'label', 'labels': expected one of"),
    (lambda x: x, 'A batch is a Tensor: expected images and labels, or a dict of both'),
    (lambda x: (x, TARGET, ['a.png'] * 12), 'A batch is a tuple of 3: expected images and labels'),
    (lambda x: ([x[0], x[1]], TARGET[:2]), r'Images in a list: expected a tensor \(N, C, H, W\)'),
    (lambda x: (x, ['cat'] * 12), "Labels .*cat.*: expected whole numbers"),
    (lambda x: (x, None), 'Labels None: expected whole numbers'),
    (lambda x: (x, TARGET[:7]), r'12 images with labels of shape \(7,\): expected one label each, \(12,\), or one-hot'),
    (lambda x: (x, TARGET[:, None]), r'12 images with labels of shape \(12, 1\)'),
    (lambda x: (x, torch.nn.functional.one_hot(TARGET, 6)), r'12 images with labels of shape \(12, 6\)'),
    (lambda x: (x, torch.eye(5)[TARGET] * 0.9 + 0.02), r'shape \(12, 5\) that are not one-hot.*Mixup'),
    (lambda x: (x, TARGET + 0.5), 'Label 0.5: expected whole numbers from 0 to 4'),
    (lambda x: (x, torch.full((12,), torch.nan)), 'Label nan: expected whole numbers'),
    (lambda x: (x, (TARGET - 1).numpy()), 'Label -1 is unknown to the network'),
    (lambda x: ((x * 9).to(torch.uint8), TARGET), 'images of torch.uint8: expected floating point'),
])
def test_batches_that_cannot_be_read_are_refused_in_a_sentence(model, images, batch, message):
    predictor = EarlyExit(model)
    for use in (lambda batches: predictor.calibrate(batches, budget=0.9), predictor.evaluate):
        with pytest.raises(ValueError, match=message):
            use([batch(images)])
    assert model.exit_rule is None


def test_what_is_read_is_what_was_given(images):
    found, target = read_batch([images, TARGET.to(torch.int8)], 5)
    assert found is images and target.dtype == torch.long and torch.equal(target, TARGET)


# -- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_half_precision_is_judged_in_float32(criterion, ensemble):
    logits = [torch.randn(400, 10).mul(3).to(torch.bfloat16) for _ in range(3)]
    threshold = dict(confidence=0.7, margin=0.5, entropy=0.8, patience=1)[criterion]
    rule = ExitRule(3, 10, threshold, criterion, (0.7, 1.3, 2.), ensemble)
    decided, exits = follow_rule(rule, logits)
    expected, expected_exits = follow_rule(rule, [z.float() for z in logits])
    assert torch.equal(exits, expected_exits) and torch.equal(decided, expected)
    assert decided.dtype == torch.float and len(exits.unique()) > 1
    assert follow_rule(rule, [z.double() for z in logits])[0].dtype == torch.double


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half])
@pytest.mark.parametrize('criterion, ensemble', [('confidence', False), ('margin', True), ('entropy', False)])
def test_the_shares_that_calibration_promised_are_those_that_run(model, dtype, criterion, ensemble):
    images = torch.randn(64, 3, 64, 64)
    target = torch.arange(64) % 5
    model.to(dtype)
    for head in model.exit_heads:
        head.fc.weight.data *= 0.1  # close together: in half precision many would be equally sure
    batches = [(images[:32], target[:32]), (images[32:], target[32:])]
    predictor = EarlyExit(model, None, criterion, ensemble=ensemble)
    for budget in (0.87, 0.9, 0.95):
        point = predictor.calibrate(batches, budget=budget).point
        out = [predictor(x) for x, _ in batches]
        exits = torch.cat([o.exit_index for o in out])
        assert (exits.bincount(minlength=4) / 64).tolist() == pytest.approx(point['leaving'], abs=1 / 64 + 1e-6)
        assert out[0].logits.dtype == out[0].temperatures.dtype == torch.float
        with torch.no_grad():
            simulated = [predictor.simulate(model.forward_exits(x.to(dtype))).exit_index for x, _ in batches]
        assert (exits != torch.cat(simulated)).sum() <= 1  # kernels may round smaller batches otherwise


def test_images_are_taken_to_the_precision_of_the_network(model, images):
    predictor = EarlyExit(model.bfloat16(), 0.5)
    assert torch.equal(predictor(images).logits, predictor(images.bfloat16()).logits)
    with torch.autocast('cpu', torch.bfloat16):
        assert EarlyExit(model.float(), 0.5)(images).logits.dtype == torch.float


# -- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs', [
    ('test_resnet_sd', dict(num_classes=7, in_chans=1)),
    ('test_vit_sd', dict(num_classes=7, img_size=(32, 64), exit_head='cascade')),
    ('test_convnext_sd', {}),
    ('qwen3_vit_88m_enc_sd', dict(num_classes=4, depth=3, embed_dim=64, num_heads=2)),
])
def test_cut_networks_saved_by_timm_and_by_us_load_and_name_their_classes_once(name, kwargs, tmp_path):
    model = timm.create_model(name, **kwargs).eval()
    for number in {0, model.num_exits - 1}:
        cut = model.truncate(number)
        images = torch.randn(2, *((model.in_chans, 32, 64) if 'vit_sd' in name else (model.in_chans, 64, 64)))
        for how in ('timm', 'ours', 'old'):
            folder = tmp_path / f'{how}{number}'
            if how == 'timm':
                save_for_hf(cut, folder, safe_serialization=True)
            else:
                save_model(cut, folder)
            config = json.loads((folder / 'config.json').read_text())
            assert config['num_classes'] == cut.num_classes
            if how == 'ours':
                assert not {'num_classes', 'pretrained', 'architecture'} & set(config['model_args'])
            elif how == 'old':
                config['model_args']['num_classes'] = cut.num_classes
                (folder / 'config.json').write_text(json.dumps(config))
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
            assert torch.equal(loaded(images), cut(images)) and loaded.num_classes == cut.num_classes
            assert timm.create_model(f'local-dir:{folder}', num_classes=3).num_classes == 3


def test_a_folder_of_pickled_weights_is_refused_with_the_way_to_write_others(model, tmp_path):
    save_for_hf(model.truncate(1), tmp_path)
    with pytest.raises(ValueError, match=r'no model.safetensors.*save_for_hf\(model, folder, safe_serialization=True'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
