"""Thresholds with a guarantee: the bounds are valid, the promise is kept, and it is not outlived."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

import timm_selfdistill
from timm_selfdistill.costs import RunCosts
from timm_selfdistill.inference.risk_control import (
    BOUNDS,
    betting_p_value,
    choose_safely,
    choose_stake,
    count_losses,
    hoeffding_bentkus_p_value,
    images_needed,
)
from timm_selfdistill.models.exit_rule import CRITERIA, ExitRule, follow_rule

COSTS = RunCosts((0.3, 0.3, 0.4), (0.01, 0.01, 0.))


def draw(count, seed=0, classes=5):
    """Logits of three exits, the deeper the better, and labels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (count,), generator=generator)
    hard = torch.rand(count, 1, generator=generator)
    signal = torch.eye(classes)[target]
    return [
        gain * (1 - hard) * signal + torch.randn(count, classes, generator=generator) for gain in (4., 6., 9.)
    ], target


@pytest.fixture(scope='module')
def held_out():
    return draw(4000)


@pytest.mark.parametrize('bound, better', [('betting', 0.), ('betting', 0.01), ('hoeffding-bentkus', 0.)])
@pytest.mark.parametrize('stake', [0.01, 0.3, 1., math.inf])
@pytest.mark.parametrize('risk, count', [(0.01, 400), (0.05, 100), (0.3, 40)])
def test_too_high_a_risk_passes_no_more_often_than_allowed(bound, better, risk, count, stake):
    """Summed over all that may happen, not sampled, at the least risk that is too high."""
    worse = np.arange(count + 1)
    passing = {0.1: 0., 0.05: 0.}
    for more in range(12 if better else 1):  # the sum is a lower bound where more than these are left out
        share = [
            math.exp(
                math.lgamma(count + 1) - math.lgamma(w + 1) - math.lgamma(more + 1) - math.lgamma(count - w - more + 1)
                + w * math.log(risk + better) + (more * math.log(better) if better else 0.)
                + (count - w - more) * math.log(1 - risk - 2 * better))
            if w + more <= count else 0. for w in worse.tolist()]
        values = [BOUNDS[bound](w, more, count, risk, stake) for w in range(count + 1 - more)]
        for level in passing:
            passing[level] += sum(s for s, value in zip(share, values) if value <= level)
    for level, probability in passing.items():
        assert probability <= level + 1e-9


def test_the_default_is_the_tighter_bound():
    for count, share, risk in itertools.product((500, 2000, 8000), (0.2, 0.5), (0.01, 0.05)):
        for better in (0, int(0.03 * count)):  # of agreement, and of accuracy
            worse = better + int(share * risk * count)
            stake = choose_stake(worse + better, count, count, 0.05)
            bet = betting_p_value(worse, better, count, risk, stake)
            assert (bet < hoeffding_bentkus_p_value(worse, better, count, risk)) == bool(better) or bet == 1


@pytest.mark.parametrize('bound', BOUNDS)
@pytest.mark.parametrize('risk, confidence', [(0.01, 0.95), (0.05, 0.9), (0.2, 0.5)])
def test_as_many_images_as_are_said_to_do_would_do(bound, risk, confidence):
    least = images_needed(risk, confidence, bound)
    tested = least - max(1, round(0.25 * least))
    assert BOUNDS[bound](0, 0, tested, risk) <= 1 - confidence < BOUNDS[bound](0, 0, tested - 1, risk)


@pytest.mark.slow
@pytest.mark.parametrize('risk_of', ['accuracy', 'agreement'])
def test_the_promise_is_kept(risk_of):
    """The risk is known exactly: held-out images are drawn from a population of which all are counted."""
    logits, target = draw(20000, seed=1)
    at_end = logits[-1].argmax(-1)
    draws, risk, confidence, broken, saved = 200, 0.02, 0.9, 0, 0.
    for seed in range(draws):
        rows = torch.randint(len(target), (1500,), generator=torch.Generator().manual_seed(seed))
        rule, _, _ = choose_safely(
            ExitRule(3, 5), [z[rows] for z in logits], target[rows], COSTS, risk, confidence, risk_of, seed=seed)
        answers, exits = follow_rule(rule, logits)
        truth = target if risk_of == 'accuracy' else at_end
        lost = ((at_end == truth).double().mean() - (answers.argmax(-1) == truth).double().mean()).item()
        broken += lost > risk
        saved += (exits < 2).double().mean().item() / draws
    noise = 3 * math.sqrt(confidence * (1 - confidence) * draws)
    assert broken <= (1 - confidence) * draws + noise
    assert saved > 0.05


@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('criterion', CRITERIA)
def test_losses_are_counted_as_the_rule_decides(held_out, criterion, ensemble):
    logits, target = held_out
    rule = ExitRule(3, 5, criterion=criterion, ensemble=ensemble)
    some = {'entropy': (0.4, 0.9), 'patience': (1., 2.)}.get(criterion, (0.8, 0.5))
    path = [some, (some[0], None), (None, some[1])]
    right_at_end = follow_rule(rule, logits)[0].argmax(-1) == target
    for thresholds, found in zip(path, count_losses(rule, path, logits, target)):
        right = follow_rule(replace(rule, thresholds=thresholds), logits)[0].argmax(-1) == target
        assert found == ((right_at_end & ~right).sum().item(), (right & ~right_at_end).sum().item())


@pytest.mark.slow
@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('risk_of', ['accuracy', 'agreement'])
def test_more_risk_or_less_confidence_costs_no_more(held_out, criterion, ensemble, risk_of):
    logits, target = held_out
    rule = ExitRule(3, 5, criterion=criterion, ensemble=ensemble)
    asked = [(0.01, 0.99), (0.01, 0.9), (0.03, 0.9), (0.1, 0.9)]
    costs = [choose_safely(rule, logits, target, COSTS, *pair, risk_of)[1]['cost'] for pair in asked]
    assert costs == sorted(costs, reverse=True)


def test_a_promise_is_written_down_and_does_not_outlive_its_thresholds(held_out):
    rule, point, _ = choose_safely(ExitRule(3, 5), *held_out, COSTS, 0.03, 0.9)
    assert (rule.promise.risk, rule.promise.confidence, rule.promise.bound) == (0.03, 0.9, 'betting')
    assert (rule.promise.chosen_on, rule.promise.tested_on) == (1000, 3000)
    assert str(rule.promise) == (
        'with a probability of 0.9 at most 3 points of accuracy are lost against running to the end (betting bound, '
        'chosen on 1,000 and tested on 3,000 images)')
    assert ExitRule.from_settings(rule.settings(), 3) == rule
    for change in (dict(thresholds=0.5), dict(temperatures=[1., 1., 2.]), dict(ensemble=True)):
        changed = replace(rule, **change)
        assert changed.promise is None and 'promise' not in changed.settings()


@pytest.mark.parametrize('promise', [1, {}, dict(risk=0.1), 'forged'])
def test_a_promise_that_is_none_is_refused(held_out, promise):
    settings = choose_safely(ExitRule(3, 5), *held_out, COSTS, 0.03)[0].settings()
    if promise == 'forged':  # of other thresholds: it is dropped, the thresholds stay
        settings['promise']['made_for'] = '0' * 16
        assert ExitRule.from_settings(settings, 3).promise is None
        return
    with pytest.raises(ValueError, match='promise='):
        ExitRule.from_settings(dict(settings, promise=promise), 3)


@pytest.mark.parametrize('given, message', [
    (dict(risk=0), r'risk=0: expected a number above 0 and below 1'),
    (dict(risk=1), r'risk=1: expected a number above 0'),
    (dict(risk=math.nan), r'risk=nan: expected a number above 0'),
    (dict(risk=True), r'risk=True: expected a number'),
    (dict(confidence=95), r'confidence=95: expected a number above 0 and below 1'),
    (dict(risk_of='error'), r"risk_of='error': unknown, expected one of accuracy, agreement"),
    (dict(bound='clt'), r"bound='clt': unknown, expected one of betting, hoeffding-bentkus"),
    (dict(risk=0.9), r'risk=0.9: the network itself errs on no more of these images \(0\.\d+\)'),
    (dict(target=None), r"risk_of='accuracy': needs labels"),
    (dict(logits=[], target=torch.empty(0, dtype=torch.long)), 'There are no images'),
    (dict(risk=0.0001), r'risk=0.0001, confidence=0.95: 4,000 images cannot promise that, .*; [\d,]+ would do'),
])
def test_what_cannot_be_promised_is_said(held_out, given, message):
    logits, target = held_out
    with pytest.raises(ValueError, match=message):
        choose_safely(ExitRule(3, 5), **{
            **dict(logits=logits, target=target, costs=COSTS, risk=0.02, confidence=0.95), **given})


def test_logits_that_are_not_finite_are_refused(held_out):
    logits = [z.clone() for z in held_out[0]]
    logits[1][7, 0] = math.nan
    with pytest.raises(ValueError, match='Exit 1 has logits that are not finite'):
        choose_safely(ExitRule(3, 5), logits, held_out[1], COSTS, 0.02)


class TestPredictor:
    """`EarlyExit.calibrate(risk=...)` on a network that is as good as random, so that agreement is all there is."""

    @pytest.fixture
    def predictor(self):
        torch.manual_seed(0)
        return timm_selfdistill.EarlyExit(timm.create_model('test_resnet_sd', num_classes=3, exits=(2, 3)))

    @pytest.mark.parametrize('form', [
        lambda x: x, lambda x: (x,), lambda x: dict(image=x), lambda x: (x, torch.full((len(x),), 99))])
    def test_agreement_needs_no_labels(self, predictor, form):
        images = torch.randn(120, 3, 32, 32)
        calibration = predictor.calibrate([form(part) for part in images.split(60)], risk=0.5, risk_of='agreement')
        assert predictor.model.exit_rule is predictor.rule is calibration.rule
        assert predictor.rule.promise.risk_of == 'agreement' and predictor.rule.temperatures == (1.,) * 3

    def test_accuracy_needs_labels_and_nothing_is_changed(self, predictor):
        before = predictor.rule
        for batch in (torch.randn(4, 3, 32, 32), dict(image=torch.randn(4, 3, 32, 32))):
            with pytest.raises(ValueError, match='expected'):
                predictor.calibrate([batch], risk=0.1)
        with pytest.raises(ValueError, match='expected exactly one of them'):
            predictor.calibrate([], risk=0.1, budget=0.5)
        for name, value in (('confidence', 0.9), ('risk_of', 'agreement'), ('bound', 'betting')):
            with pytest.raises(ValueError, match=f'{name}={value!r}: goes with `risk` only'):
                predictor.calibrate([], budget=0.5, **{name: value})
        with pytest.raises(ValueError, match='There are no images'):
            predictor.calibrate([], risk=0.1)
        assert predictor.rule is before
