"""What model.eval() gives is what every caller of EarlyExit gets, whatever becomes of the network meanwhile."""
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn

from timm_selfdistill import EarlyExit
from timm_selfdistill.inference import runners as compaction
from timm_selfdistill.inference.cuts import randomise
from timm_selfdistill.models.probe import eval_view

# batch norm; stochastic depth and dropout; biases of attention that are kept in eval mode
NETWORKS = {
    'test_resnet_sd': dict(exits=(1, 2, 3)),
    'test_vit_sd': dict(img_size=32, patch_size=8, drop_rate=0.5, drop_path_rate=0.5, proj_drop_rate=0.5),
    'efficientformerv2_s0_sd': dict(img_size=64, drop_path_rate=0.5),
}


def create(name, seed=0, **kwargs):
    """Create a network whose exits tell images apart, and images for it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5, **{**NETWORKS.get(name, {}), **kwargs}).eval()
    randomise(model)
    return model, torch.randn(6, 3, *([kwargs.get('img_size', NETWORKS.get(name, {}).get('img_size', 64))] * 2))


def halfway(model, images):
    """Make a predictor with thresholds between the confidences that occur."""
    with torch.no_grad():
        exits = model.forward_exits(images)
    sure = [logits.softmax(-1).amax(-1).sort().values for logits in exits[:-1]]
    return EarlyExit(model, [(v[2] + v[3]).item() / 2 for v in sure]), exits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [m.training for m in model.modules()]


def assert_untouched(model, before):
    tensors, modes = before
    assert [m.training for m in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def assert_exits(out, exits):
    for row, number in enumerate(out.exit_index.tolist()):
        torch.testing.assert_close(out.logits[row], exits[number][row], rtol=1e-4, atol=1e-5)


def wrong_answers(predictor, images, expected, threads=6, calls=10):
    """Call a predictor from threads, each with a slice of the images of its own; return how many answers are off."""
    def work(i):
        rows = slice(i % 3, None)
        wrong = 0
        for _ in range(calls):
            out = predictor(images[rows])
            same = torch.equal(out.exit_index, expected.exit_index[rows])
            wrong += not (same and torch.allclose(out.logits, expected.logits[rows], rtol=1e-4, atol=1e-5))
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_threads_get_what_eval_mode_gives_and_change_nothing_while_the_model_is_in_training_mode(name):
    model, images = create(name)
    predictor, exits = halfway(model, images)
    expected = predictor(images)
    assert_exits(expected, exits)
    assert len(expected.exit_index.unique()) > 1
    model.train()
    next(model.backbone.children()).eval()  # a part of it frozen
    before = state(model)
    assert wrong_answers(predictor, images, expected) == 0
    assert_untouched(model, before)
    assert torch.equal(EarlyExit(model, predictor.rule.thresholds)(images).exit_index, expected.exit_index)
    assert_untouched(model, before)


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_a_thread_that_trains_and_evaluates_meanwhile_disturbs_nobody(name):
    model, images = create(name)
    predictor, _ = halfway(model, images)
    expected = predictor(images)
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            model.train()
            model.eval()

    flipper = threading.Thread(target=flip)
    flipper.start()
    wrong = wrong_answers(predictor, images, expected, threads=3)
    stop.set()
    flipper.join()
    assert not wrong


@pytest.mark.slow
def test_graphs_are_shared_by_threads_as_well(monkeypatch):
    monkeypatch.setattr(compaction, '_found', {})  # of earlier tests
    monkeypatch.setattr(compaction, 'find_cuts', lambda *args: None)
    model, images = create('test_resnet_sd', pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    model.train()
    before = state(model)
    predictor = EarlyExit(model)
    model.eval()
    predictor = EarlyExit(model, halfway(model, images)[0].rule.thresholds)
    expected = predictor(images)
    assert 'graphs' in repr(predictor) and len(expected.exit_index.unique()) > 1
    model.train()
    assert wrong_answers(predictor, images, expected, threads=4, calls=5) == 0
    assert_untouched(model, before)
    # the graphs are made anew by whoever comes first, for what the network is now
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in before[0].items()}, assign=True)
    now, exits = EarlyExit(model, predictor.rule.thresholds), model.eval().forward_exits(images)
    model.train()
    assert wrong_answers(predictor, images, now(images), threads=4, calls=2) == 0
    assert_exits(predictor(images), exits)


@pytest.mark.slow
def test_calibration_and_evaluation_leave_a_training_network_alone():
    model, images = create('test_resnet_sd')
    batches = [(images, torch.arange(6) % 5)]
    points = []
    for mode in (False, True):
        model.train(mode)
        before = state(model)
        predictor = EarlyExit(model)
        points.append(predictor.calibrate(batches, budget=0.9).point)
        predictor.calibrate(batches, latency=1e6)
        assert EarlyExit(model).evaluate(batches)['count'] == 6
        assert_untouched(model, before)
    assert points[0] == points[1]


@pytest.mark.parametrize('name, change', [
    *(('test_resnet_sd', change) for change in ('in place', 'data', 'assign', 'double')),
    *(pytest.param(name, change, marks=pytest.mark.slow)
      for name in ('efficientformerv2_s0_sd', 'efficientvit_m0_sd') for change in ('in place', 'data')),
])
def test_weights_of_later_are_seen(name, change):
    model, images = create(name, **(dict(img_size=64) if 'efficientvit' in name else {}))
    predictor = EarlyExit(model, 0.)
    before = predictor(images)  # from now on biases may be kept
    if change == 'in place':
        with torch.no_grad():
            [p.add_(0.1 * torch.randn_like(p)) for p in model.parameters()]
    elif change == 'data':
        for p in model.parameters():
            p.data.mul_(1.2)
    elif change == 'assign':
        model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True)
    else:
        model.double()
        images = images.double()
    model.train()  # timm's own modules forget what they keep only then
    model.eval()
    out = predictor(images)
    assert out.logits.dtype == next(model.parameters()).dtype
    assert_exits(out, model.forward_exits(images))
    assert change == 'double' or not torch.allclose(out.logits, before.logits)


def test_modules_of_later_are_seen_and_other_exits_or_classes_refused():
    model, images = create('test_resnet_sd')
    predictor = EarlyExit(model, 0.)
    predictor(images)
    model.exit_heads[0].fc = nn.Linear(model.exit_heads[0].num_features, 5)
    model.backbone.layer1[0].conv1 = copy.deepcopy(model.backbone.layer1[0].conv1)
    nn.init.normal_(model.backbone.layer1[0].conv1.weight)
    assert_exits(predictor(images), model.forward_exits(images))
    model.reset_classifier(7)
    with pytest.raises(ValueError, match='4 exits and 7 classes now, the rule was made for 4 and 5: make a new Early'):
        predictor(images)


def test_another_size_of_images_set_later_is_seen():
    model, images = create('test_vit_sd')
    predictor = EarlyExit(model, 0.)
    predictor(images)
    model.set_input_size(img_size=(48, 64))
    images = torch.randn(3, 3, 48, 64)
    assert_exits(predictor(images), model.forward_exits(images))


@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_what_is_wrapped_around_a_network_is_taken_off(wrap):
    model, images = create('test_resnet_sd')
    predictor, exits = halfway(model, images)
    again = EarlyExit(wrap(model), predictor.rule.thresholds)
    assert again.model is model and torch.equal(again(images).exit_index, predictor(images).exit_index)
    with pytest.raises(ValueError, match='test_resnet has no exits to leave at'):
        EarlyExit(wrap(model.backbone))


def test_a_network_compiled_within_is_run_as_it_was():
    model, images = create('test_resnet_sd')
    _, exits = halfway(model, images)
    model.backbone.layer2 = torch.compile(model.backbone.layer2)
    model.backbone.layer3.compile()
    assert_exits(EarlyExit(model, 0.)(images), exits)


def test_predictors_are_copied_and_pickled_with_their_network():
    model, images = create('test_resnet_sd')
    predictor, exits = halfway(model, images)
    expected = predictor(images)
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert torch.equal(other(images).logits, expected.logits)
        assert other.model is not model
        with torch.no_grad():
            [p.mul_(1.1) for p in other.model.parameters()]
            assert_exits(other(images), other.model.forward_exits(images))
    assert torch.equal(predictor(images).logits, expected.logits)


def test_hooks_of_before_are_called_and_the_network_gets_none():
    model, images = create('test_resnet_sd')
    seen = []
    model.backbone.layer2.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    predictor = EarlyExit(model, 0.)
    seen.clear()
    predictor(images)
    assert not seen  # all have left before
    predictor.rule = EarlyExit(model).rule
    seen.clear()
    predictor(images)
    assert seen == [6]
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1


class Merges(nn.Module):
    """Writes to its weights when it is told the mode, as merged adapters do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def train(self, mode=True):
        self.weight.data += 1
        return super().train(mode)

    def forward(self, x):
        return x * self.weight


def test_a_view_shares_tensors_and_tells_nobody_the_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), Merges(), nn.Dropout())
    view = eval_view(model)
    assert model[1].weight == 1 and model.training and not any(m.training for m in view.modules())
    for a, b in zip((*model.parameters(), *model.buffers()), (*view.parameters(), *view.buffers())):
        assert a is b
    model.half()
    assert view[0].running_mean.dtype == view[1].weight.dtype == torch.half
