import json
import math
import threading
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn as nn

from timm_selfdistill import EarlyExit
from timm_selfdistill.errors import SplitError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.inference import runners as compaction
from timm_selfdistill.models.exit_rule import CRITERIA, ExitRule, confidence_score


def opinionated(images, **kwargs):
    """Create a network whose exits tell images apart; fresh ones are equally unsure of everything."""
    torch.manual_seed(1)
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2, 3), **kwargs).eval()
    classifiers = [*(head.fc for head in model.exit_heads), model.get_classifier()]
    with torch.no_grad():
        for number, fc in enumerate(classifiers):
            logits = model.forward_exits(images)[number]
            fc.bias -= logits.mean(0)
            fc.weight /= logits.std()
            fc.bias /= logits.std()
    return model


@pytest.fixture(scope='module')
def images():
    return torch.randn(24, 3, 96, 96, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope='module')
def model(images):
    return opinionated(images)


@pytest.fixture(scope='module')
def exits(model, images):
    with torch.no_grad():
        return model.forward_exits(images)


def halfway(model, exits, criterion):
    """Thresholds at which about half of the images leave each exit, none of them close to one."""
    if criterion == 'patience':
        return 1
    values = [confidence_score(z, criterion).sort().values for z in exits[:-1]]
    levels = [(v[len(v) // 2 - 1] + v[len(v) // 2]).item() / 2 for v in values]
    return [-v if criterion == 'entropy' else v for v in levels]


def check(out, exits, images):
    for row, number in enumerate(out.exit_index.tolist()):
        torch.testing.assert_close(out.logits[row], exits[number][row], rtol=1e-4, atol=1e-5)


# -- a pass through the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_a_run_gives_what_the_rule_says_of_all_exits(model, images, exits, criterion, ensemble):
    predictor = EarlyExit(model, halfway(model, exits, criterion), criterion, ensemble=ensemble)
    out, expected = predictor(images), predictor.simulate(exits)
    assert predictor.compacts
    assert torch.equal(out.exit_index, expected.exit_index)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(out.exit_index.unique()) > 1
    if not ensemble:
        check(out, exits, images)


def test_images_leave_and_the_rest_goes_on_in_a_smaller_batch(model, images, exits):
    seen = []
    layers = [model.backbone.layer2, model.backbone.layer3, model.backbone.layer4]
    handles = [layer.register_forward_hook(lambda m, a, out: seen.append(len(out))) for layer in layers]
    predictor = EarlyExit(model, halfway(model, exits, 'confidence'))
    seen.clear()
    out = predictor(images)
    counts = out.exit_index.bincount(minlength=4).tolist()
    assert seen == [24 - sum(counts[:i]) for i in (1, 2, 3)]
    for handle in handles:
        handle.remove()


def test_the_network_stops_when_none_is_left(model, images):
    predictor = EarlyExit(model, 0.)
    ran = []
    handle = model.backbone.layer2.register_forward_hook(lambda *args: ran.append(1))
    out = predictor(images)
    handle.remove()
    assert not ran and out.exit_index.eq(0).all()


def test_without_thresholds_it_is_the_plain_network(model, images):
    predictor = EarlyExit(model)
    ran = []
    handle = model.exit_heads[0].register_forward_hook(lambda *args: ran.append(1))
    fc = model.exit_heads[0].fc.register_forward_hook(lambda *args: ran.append(1))
    out = predictor(images)
    handle.remove(), fc.remove()
    with torch.no_grad():
        assert torch.equal(out.logits, model(images))
    assert out.exit_index.eq(3).all() and not ran
    assert 'no image leaves early' in repr(predictor)


def test_an_exit_that_nothing_leaves_at_is_passed_by(model, images, exits):
    predictor = EarlyExit(model, [None, halfway(model, exits, 'margin')[1], None], 'margin')
    assert set(predictor(images).exit_index.tolist()) == {1, 3}
    check(predictor(images), exits, images)
    assert 'exit 0: never' in repr(predictor)


def test_a_network_without_auxiliary_exits_is_left_at_its_end(images):
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=()).eval()
    out = EarlyExit(model, 0.5)(images)
    with torch.no_grad():
        assert torch.equal(out.logits, model(images)) and out.exit_index.eq(0).all()


def test_the_order_of_images_does_not_matter(model, images, exits):
    predictor = EarlyExit(model, halfway(model, exits, 'confidence'))
    order = torch.randperm(len(images))
    out, shuffled = predictor(images), predictor(images[order])
    assert torch.equal(out.exit_index[order], shuffled.exit_index)
    torch.testing.assert_close(out.logits[order], shuffled.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('criterion', ['confidence', 'patience'])
def test_heads_that_take_logits_get_those_of_the_same_image(criterion):
    images = torch.randn(16, 3, 64, 64)
    model = opinionated(images, exit_head='cascade')
    with torch.no_grad():
        exits = model.forward_exits(images)
    thresholds = 1 if criterion == 'patience' else [halfway(model, exits, criterion)[0], None, None]
    out = EarlyExit(model, thresholds, criterion)(images)
    assert len(out.exit_index.unique()) > 1
    check(out, exits, images)


def test_maps_stay_channels_last(model, images, exits):
    seen = []
    handle = model.backbone.layer3.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    predictor = EarlyExit(model.to(memory_format=torch.channels_last), halfway(model, exits, 'confidence'))
    seen.clear()
    predictor(images.contiguous(memory_format=torch.channels_last))
    handle.remove()
    model.to(memory_format=torch.contiguous_format)
    assert seen == [True]


def test_a_training_network_is_run_in_eval_mode_and_left_in_its_own(model, images, exits):
    predictor = EarlyExit(model, halfway(model, exits, 'confidence'))
    expected = predictor(images)
    model.train()
    model.backbone.layer1.eval()
    out = predictor(images)
    assert model.training and not model.backbone.layer1.training
    model.eval()
    assert torch.equal(out.logits, expected.logits)


def test_other_sizes_of_images(model):
    images = torch.randn(8, 3, 64, 80)
    with torch.no_grad():
        exits = model.forward_exits(images)
    check(EarlyExit(model, halfway(model, exits, 'confidence'))(images), exits, images)


def test_threads_do_not_disturb_each_other(model, images, exits):
    predictor = EarlyExit(model, halfway(model, exits, 'confidence'))
    halves = [images[:8], images[8:]]
    expected = [predictor(half) for half in halves]
    wrong = []

    def work(i):
        for _ in range(20):
            out = predictor(halves[i])
            if not torch.equal(out.exit_index, expected[i].exit_index):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_weights_may_change_afterwards(images):
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3)).eval()
    predictor = EarlyExit(model, 0.)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        check(predictor(images), model.forward_exits(images), images)


# -- networks that need more, or refuse -------------------------------------------------------------------------------


def test_a_network_is_cut_into_graphs_where_hooks_do_not_do(model, images, exits, monkeypatch):
    monkeypatch.setattr(compaction, '_found', {})  # of earlier tests
    monkeypatch.setattr(compaction, 'find_cuts', lambda *args: None)
    small = images[..., :64, :64]
    monkeypatch.setitem(model.pretrained_cfg, 'input_size', (3, 64, 64))
    with torch.no_grad():
        exits = model.forward_exits(small)
    predictor = EarlyExit(model, halfway(model, exits, 'confidence'))
    assert predictor.compacts and 'graphs made for images of 3×64×64' in repr(predictor)
    for count in (24, 1):
        out = predictor(small[:count])
        check(out, exits, small)
        assert torch.equal(out.exit_index, predictor.simulate([z[:count] for z in exits]).exit_index)
    with pytest.raises(ValueError, match='3×96×96.*cut into graphs for 3×64×64'):
        predictor(images)


class MinusMean(nn.Module):
    """Lets images of a batch depend on each other."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_a_network_that_mixes_images_runs_whole_batches(images):
    torch.manual_seed(1)
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3)).eval()
    model.backbone.layer4 = nn.Sequential(model.backbone.layer4, MinusMean())
    model.pretrained_cfg['input_size'] = (3, 64, 64)
    predictor = EarlyExit(model)
    with torch.no_grad():
        exits = model.forward_exits(images)
    predictor.rule = replace(predictor.rule, thresholds=halfway(model, exits, 'confidence'))
    assert not predictor.compacts and 'whole batches' in repr(predictor)
    out = predictor(images)
    assert len(out.exit_index.unique()) > 1
    check(out, exits, images)


def test_why_whole_batches_run_is_told(model, monkeypatch, caplog):
    def refuse(*args):
        raise SplitError('test_resnet_sd cannot be exported: it is too fond of this process')
    monkeypatch.setattr(compaction, '_found', {})  # of earlier tests
    monkeypatch.setattr(compaction, 'find_cuts', lambda *args: None)
    monkeypatch.setattr('timm_selfdistill.inference.graphs.split_network', refuse)
    assert 'too fond of this process' in repr(EarlyExit(model))
    assert 'whole batches run to the end, nothing is saved' in caplog.text


def test_a_network_is_probed_once_and_another_by_itself(monkeypatch):
    monkeypatch.setattr(compaction, '_found', {})
    probed = []
    find = compaction.find_cuts
    monkeypatch.setattr(compaction, 'find_cuts', lambda *args: probed.append(1) or find(*args))
    cuts = []
    for settings in (dict(), dict(), dict(exits=(2, 3)), dict(exits=(2, 3), num_classes=7), dict(in_chans=1)):
        cuts.append(EarlyExit(timm.create_model('test_resnet_sd', **settings)).runner.cuts)
    assert len(probed) == 4
    assert cuts[0] == cuts[1] and len(cuts[2]) == 2


# -- the rule travels with the model ----------------------------------------------------------------------------------


def loader_of(images, target, batch_size=8):
    return list(zip(images.split(batch_size), target.split(batch_size)))


@pytest.fixture
def labelled(model, exits, images):
    """Labels such that deeper exits are right more often."""
    target = exits[-1].argmax(1)
    target[::6] = (target[::6] + 1) % 5
    return loader_of(images, target)


@pytest.mark.parametrize('aim', [dict(budget=0.9), dict(accuracy_drop=0.), dict(latency=1e6)])
def test_calibration_reaches_its_aim_and_travels(model, labelled, tmp_path, aim):
    predictor = EarlyExit(model)
    calibration = predictor.calibrate(labelled, **aim)
    assert calibration.count == 24
    whole = next(row for row in calibration.curve if set(row['thresholds']) == {None})
    if 'budget' in aim:
        assert calibration.point['cost'] <= 0.9
    elif 'accuracy_drop' in aim:
        assert calibration.point['top1'] >= whole['top1']
        assert calibration.point['cost'] <= whole['cost']
    else:
        assert calibration.unit == 'ms' and calibration.point['top1'] == max(r['top1'] for r in calibration.curve)
    assert predictor.rule.thresholds == tuple(calibration.point['thresholds'])

    save_model(model, tmp_path)
    args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert args['early_exit'] == predictor.rule.settings()
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert EarlyExit(loaded).rule == predictor.rule
    assert EarlyExit(loaded, 0.5).rule.thresholds == (0.5,) * 3
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).exit_rule is None
    loaded.reset_classifier(5)
    assert loaded.exit_rule is None
    cut = model.truncate(1)
    save_model(cut, tmp_path / 'cut')
    assert timm.create_model(f'local-dir:{tmp_path / "cut"}', pretrained=True).number == 1
    model.exit_rule = None


def test_what_calibration_expects_is_what_a_run_measures(model, exits, images, labelled):
    predictor = EarlyExit(model)
    point = predictor.calibrate(labelled, budget=0.95).point
    again = EarlyExit(model).evaluate(labelled)  # by another one, which has not seen these images
    model.exit_rule = None
    assert again['top1'] == pytest.approx(point['top1'])
    assert again['cost'] == pytest.approx(point['cost'])
    assert again['leaving'] == pytest.approx(point['leaving'])
    assert again['count'] == 24


def test_measuring_on_images_that_were_calibrated_on_is_refused(model, images, labelled):
    predictor = EarlyExit(model)
    predictor.calibrate(labelled, budget=0.95)
    others = loader_of(torch.randn(8, 3, 96, 96), torch.zeros(8, dtype=torch.long))
    assert predictor.evaluate(others)['count'] == 8
    with pytest.raises(ValueError, match='24 of 32 images .* chosen on'):
        predictor.evaluate([*others, *labelled])
    model.exit_rule = None


@pytest.mark.parametrize('aims', [{}, dict(budget=0.5, accuracy_drop=0.)])
def test_one_aim_is_needed(model, labelled, aims):
    with pytest.raises(ValueError, match='expected exactly one'):
        EarlyExit(model).calibrate(labelled, **aims)


def test_calibration_on_what_cannot_be_used_changes_nothing(model, images):
    predictor = EarlyExit(model, 0.5)
    with pytest.raises(ValueError, match='Label 7 is unknown.*0 to 4'):
        predictor.calibrate(loader_of(images, torch.full((24,), 7)), budget=0.5)
    for aim in ('budget', 'latency'):
        with pytest.raises(ValueError, match=f'{aim}=1e-06: too low, the cheapest'):
            predictor.calibrate(loader_of(images, torch.zeros(24, dtype=torch.long)), **{aim: 1e-6})
    with pytest.raises(ValueError, match='no images'):
        predictor.calibrate([], budget=0.5)
    with pytest.raises(ValueError, match='no images'):
        predictor.evaluate([])
    assert predictor.rule.thresholds == (0.5,) * 3 and model.exit_rule is None


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kwargs, message', [
    (dict(thresholds=[0.5, 0.5]), r'2 given for a network of 4 exits; expected 3'),
    (dict(thresholds=[0.5] * 4), r'4 given for a network of 4 exits; expected 3'),
    (dict(thresholds=1.5), r'1.5 is out of range for confidence, which goes from 0 to 1'),
    (dict(thresholds=-0.1), r'-0.1 is out of range'),
    (dict(thresholds=math.nan), r'expected None, a number, or one'),
    (dict(thresholds=[0.5, math.nan, 0.5]), r'nan is out of range'),
    (dict(thresholds='0.5'), r"thresholds='0.5': expected"),
    (dict(thresholds=True), r'thresholds=True: expected'),
    (dict(thresholds=1.7, criterion='entropy'), r'1.7 is out of range for entropy, .* 0 to 1.609 nats for 5 classes'),
    (dict(thresholds=0, criterion='patience'), r'0 is out of range for patience, .* 1 to 3'),
    (dict(thresholds=1.5, criterion='patience'), r'1.5 is out of range for patience'),
    (dict(thresholds=4, criterion='patience'), r'4 is out of range'),
    (dict(criterion='hunch'), r"criterion='hunch': unknown, expected one of confidence, margin, entropy, patience"),
    (dict(temperatures=[1., 1.]), r'expected 4 numbers'),
    (dict(temperatures=[1., 1., 1., 0.]), r'0.0 is no temperature'),
    (dict(ensemble='yes'), r"ensemble='yes': expected True or False"),
])
def test_rules_that_do_not_fit_are_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        EarlyExit(model, **kwargs)


@pytest.mark.parametrize('settings, message', [
    (dict(), 'expected a dict with the keys criterion, ensemble'),
    ([1, 2], 'expected a dict'),
    (dict(num_classes=10 ** 12), 'expected a dict'),
    (dict(num_classes=0, criterion='confidence', thresholds=None, temperatures=None, ensemble=False), 'num_classes=0'),
    (dict(num_classes=5, criterion='confidence', thresholds=[1e400] * 3, temperatures=None, ensemble=False), 'inf'),
    (dict(num_classes=5, criterion='confidence', thresholds=[10 ** 400] * 3, temperatures=None, ensemble=False), '000'),
    (dict(num_classes=5, criterion=['x'], thresholds=None, temperatures=None, ensemble=False), 'unknown'),
])
def test_settings_from_strangers_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2, 3), early_exit=settings)


def test_a_rule_survives_json():
    rule = ExitRule(4, 5, [0.25, None, 1.], 'margin', [1., 2., 3., 1.5], True)
    assert ExitRule.from_settings(json.loads(json.dumps(rule.settings())), 4) == rule


def test_images_that_cannot_be_run_are_refused(model, images):
    predictor = EarlyExit(model, 0.5)
    with pytest.raises(ValueError, match=r'\(0, 3, 96, 96\): expected \(N, C, H, W\) with one image or more'):
        predictor(images[:0])
    with pytest.raises(ValueError, match=r'shape \(3, 96, 96\)'):
        predictor(images[0])
    with pytest.raises(ValueError, match='torch.uint8: expected floating point'):
        predictor(images.to(torch.uint8))
    with pytest.raises(ValueError, match='4×96×96'):
        predictor(torch.randn(2, 4, 96, 96))
    bad = images.clone()
    bad[[2, 5], 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match='images 2, 5 of 24: not finite'):
        predictor(bad)
    with pytest.raises(ValueError, match='expected 4 times'):
        predictor.simulate(predictor.model.forward_exits(images)[:2])
    with pytest.raises(ValueError, match='has no exits to leave at'):
        EarlyExit(model.backbone)
