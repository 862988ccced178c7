"""Where images leave now and where they left at calibration: counted exactly, compared without false alarms."""
import threading
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from timm_selfdistill.inference.drift import ExitCounter, compare_leaving
from timm_selfdistill.inference.early_exit import EarlyExit
from timm_selfdistill.inference.export import export_network
from timm_selfdistill.inference.staged_session import StagedSession
from timm_selfdistill.models.exit_rule import ExitRule


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_sd', num_classes=3, exits=(2, 3)).eval()
    return EarlyExit(model, thresholds=0.4)


def test_what_is_counted_is_what_the_outputs_say(predictor):
    exits, batches = [], [torch.randn(n, 3, 32, 32) * n for n in (1, 5, 1, 8)]
    for images in batches:
        exits.append(predictor(images).exit_index)
    exits = torch.cat(exits)
    assert predictor.counter.images == tuple(exits.bincount(minlength=3).tolist())
    logits = [torch.cat(z) for z in zip(*(predictor.model.forward_exits(images) for images in batches))]
    for number, mean in enumerate(predictor.counter.confidence):
        left = exits == number
        if left.any():
            assert mean == pytest.approx(logits[number][left].softmax(-1).amax(-1).mean().item(), rel=1e-4)
        else:
            assert mean is None
    assert len(exits.unique()) > 1
    predictor.counter.reset()
    assert predictor.counter.images == (0, 0, 0) and predictor.counter.confidence == (None,) * 3


def test_many_threads_and_many_batches_lose_nothing():
    counter = ExitCounter(3)

    def add():
        with torch.inference_mode():
            for number in range(700):
                counter.add(torch.tensor([number % 3, 2]), torch.tensor([0.5, 1.]))

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    images = [8 * sum(number % 3 == i for number in range(700)) for i in range(3)]
    images[2] += 8 * 700
    assert counter.images == tuple(images)
    assert counter.confidence[:2] == (0.5, 0.5)


def test_without_a_change_few_alarms_are_given_and_a_change_is_found():
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])

    def draw(seed, share, count=400):
        generator = torch.Generator().manual_seed(seed)
        return share.multinomial(count, replacement=True, generator=generator).bincount(minlength=4).tolist()

    alarms = sum(compare_leaving(draw(2 * i, share), draw(2 * i + 1, share), 0.05).drifted for i in range(400))
    assert alarms <= 0.05 * 400 + 3 * (0.05 * 0.95 * 400) ** 0.5
    assert all(compare_leaving(draw(i, share.flip(0)), draw(i, share), 0.01).drifted for i in range(20))


def test_the_histogram_of_the_calibration_travels_with_the_thresholds(predictor):
    images, target = torch.randn(40, 3, 32, 32), torch.arange(40) % 3
    with pytest.raises(ValueError, match='choose them with calibrate'):
        predictor.drift()
    predictor(images)
    predictor.calibrate([(images, target)], budget=0.99)
    assert predictor.counter.images == (0, 0, 0)
    with pytest.raises(ValueError, match='0 images now, 40 at calibration'):
        predictor.drift()
    again = EarlyExit(predictor.model)
    again(images)
    drift = again.drift()
    assert drift.now == drift.then == predictor.rule.leaving.images
    assert not drift.drifted and str(drift).startswith('no sign that anything has changed: exit0 ')
    rule = predictor.rule
    assert ExitRule.from_settings(rule.settings(), 3) == rule
    assert replace(rule, thresholds=0.987).leaving is None
    with pytest.raises(ValueError, match='significance=2: expected a number above 0 and below 1'):
        again.drift(2)


@pytest.mark.parametrize('leaving', [
    [1, 2, 3], {}, dict(images=[1, 2], made_for='x'), dict(images=[1, 2, -1], made_for='x'),
    dict(images=[1, 2, 1.5], made_for='x'), dict(images=3, made_for='x'), dict(images=[1, 2, 3], made_for=1)])
def test_a_histogram_that_is_none_is_refused(leaving):
    with pytest.raises(ValueError, match='early_exit: leaving='):
        ExitRule.from_settings(dict(ExitRule(3, 5).settings(), leaving=leaving), 3)


def test_a_staged_session_counts_too(predictor, tmp_path):
    images = torch.randn(30, 3, 160, 160)
    predictor.calibrate([(images, torch.arange(30) % 3)], budget=0.99)
    export_network(predictor.model, tmp_path / 'staged', staged=True)
    session = StagedSession(tmp_path / 'staged')
    assert session.counts == (0, 0, 0) and session.confidence == (None,) * 3
    assert session.manifest['early_exit']['leaving'] == list(predictor.rule.leaving.images)
    logits, exits = (np.concatenate(parts) for parts in zip(*map(session.run, np.split(images.numpy(), 3))))
    assert session.counts == tuple(np.bincount(exits, minlength=3).tolist())
    largest = torch.from_numpy(logits).softmax(-1).amax(-1).numpy()
    for number, mean in enumerate(session.confidence):
        assert mean is None if not (exits == number).any() else mean == pytest.approx(largest[exits == number].mean())
    session.reset_counts()
    assert session.counts == (0, 0, 0)
