"""Thresholds with a guarantee: early exit loses no more than was promised, with the probability that was promised.

What early exit costs in accuracy is estimated on held-out images, and an estimate is too low about half of the time.
"Fast yet Safe" (Jazbec et al., NeurIPS 2024, arXiv 2405.20915) tests thresholds instead: they are taken only where the
images refute that the risk is larger than allowed. Many thresholds are tested one after the other, from the safest to
the boldest, until one fails: fixed-sequence testing, which keeps the promise for all of them together (Learn then Test,
Angelopoulos et al., arXiv 2110.01052).
"""
import math
from dataclasses import replace
from itertools import takewhile
from numbers import Real
from typing import Any, Callable, Dict, List, Literal, Optional, Sequence, Tuple

import numpy as np
import torch

from ..costs import RunCosts
from ..models.exit_rule import ExitRule, follow_rule
from ..models.rule_notes import Promise
from .calibration import exit_curve, fit_temperatures, judge_exits, leave_at, measure_thresholds, pareto
from .gates import with_gates

__all__ = [
    'BOUNDS', 'Risk', 'betting_p_value', 'check_promise', 'choose_path', 'choose_safely', 'choose_stake',
    'count_losses', 'count_passing', 'hoeffding_bentkus_p_value', 'images_needed',
]

Risk = Literal['accuracy', 'agreement']
Thresholds = Tuple[Optional[float], ...]

# Part of the images on which temperatures and the path of thresholds are chosen; they are tested on the others.
_CHOOSING = 0.25
# Between two rules that the first images tell apart lie others. A large step may miss what a smaller one would pass.
_STEPS = 8


def choose_stake(changed: int, images: int, count: int, level: float) -> float:
    """Choose how much to bet, from images other than those that are bet on.

    The stake of Waudby-Smith and Ramdas for a test of so many images; losses vary as much as images change.

    Args:
        changed: Images whose loss is not 0.
        images: Of how many.
        count: Images of the test.
        level: Probability with which the test may err.
    """
    variance = (changed + 0.25) / (images + 1)
    return math.sqrt(2 * math.log(1 / level) / (count * variance))


def betting_p_value(worse: int, better: int, count: int, risk: float, stake: float = math.inf) -> float:
    """Return how likely images would speak so clearly against too high a risk, if it were too high.

    A gambler bets, image by image, that losses are below `risk`. Were the risk as high as that, the wealth would not
    grow on average, so it exceeds w with probability 1/w at most (Waudby-Smith and Ramdas, JRSS B 2024, arXiv
    2010.09686). Half of the wealth is bet by `stake`, half by 0.6 of it, in case that is too bold. Images that early
    exit alone gets right count for it, and the order of the images does not matter.

    Args:
        worse: Images whose loss is 1: right at the end, wrong early.
        better: Images whose loss is -1: wrong at the end, right early.
        count: All images; the loss of the others is 0.
        risk: Mean loss that is to be refuted, above 0 and below 1.
        stake: See `choose_stake`; at most all of the wealth is bet.

    Examples:
        >>> betting_p_value(0, 0, 400, 0.01) < 0.05 < betting_p_value(4, 0, 400, 0.01)
        True
    """
    stakes = np.minimum(np.array([0.6, 1.]) * min(stake, 1 / (1 - risk)), 1 / (1 - risk))
    with np.errstate(divide='ignore'):  # the logarithm of nothing left
        lost = worse * np.log(np.maximum(1 - stakes * (1 - risk), 0)) if worse else 0.
    wealth = lost + better * np.log1p(stakes * (1 + risk)) + (count - worse - better) * np.log1p(stakes * risk)
    return float(min(1., np.exp(math.log(len(stakes)) - np.logaddexp.reduce(wealth))))


def hoeffding_bentkus_p_value(worse: int, better: int, count: int, risk: float, stake: float = math.inf) -> float:
    """Return the p-value of Hoeffding and Bentkus (Bates et al., J. ACM 2021, arXiv 2101.02703).

    Takes what `betting_p_value` takes. Losses have to be 0 or 1 here, so images that early exit alone gets right count
    for nothing; nothing is bet.

    Examples:
        >>> hoeffding_bentkus_p_value(0, 0, 300, 0.01) < 0.05 < hoeffding_bentkus_p_value(0, 0, 200, 0.01)
        True
    """
    from scipy.stats import binom  # takes long to import

    mean = min(worse / count, risk)
    divergence = (mean * math.log(mean / risk) if mean else 0.) + (1 - mean) * math.log((1 - mean) / (1 - risk))
    return float(min(1., math.exp(-count * divergence), math.e * binom.cdf(worse, count, risk)))


BOUNDS: Dict[str, Callable[..., float]] = {
    'betting': betting_p_value,
    'hoeffding-bentkus': hoeffding_bentkus_p_value,
}

# The tighter one for each: images that early exit gets right can only be bet on, and there are none of agreement.
_TIGHTER = {'accuracy': 'betting', 'agreement': 'hoeffding-bentkus'}


def check_promise(risk: Optional[float], confidence: float, risk_of: str, bound: Optional[str]) -> str:
    """Return the bound to use.

    Raises:
        ValueError: A number does not lie between 0 and 1, a name is unknown, or no risk is given and something that is
            for it alone.
    """
    if risk is None:
        given = (('confidence', confidence, 0.95), ('risk_of', risk_of, 'accuracy'), ('bound', bound, None))
        for name, value, usual in given:
            if value != usual:
                raise ValueError(f'{name}={value!r}: goes with `risk` only, such as risk=0.01.')
        return _TIGHTER[risk_of]
    for name, value in (('risk', risk), ('confidence', confidence)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
            raise ValueError(f'{name}={value!r}: expected a number above 0 and below 1, such as 0.01 for 1 %.')
    if risk_of not in _TIGHTER:
        raise ValueError(f'risk_of={risk_of!r}: unknown, expected one of {", ".join(_TIGHTER)}.')
    if bound is not None and bound not in BOUNDS:
        raise ValueError(f'bound={bound!r}: unknown, expected one of {", ".join(BOUNDS)}.')
    return bound or _TIGHTER[risk_of]


def images_needed(risk: float, confidence: float, bound: str) -> int:
    """Return how many held-out images a promise takes at least, if early exit never errs on them.

    Examples:
        >>> images_needed(0.01, 0.95, 'hoeffding-bentkus')
        399
    """
    low, high = 0, 1
    while BOUNDS[bound](0, 0, high, risk) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if BOUNDS[bound](0, 0, middle, risk) <= 1 - confidence else (middle, high)
    total = high
    while total - _to_choose(total) < high:
        total += 1
    return total


def _to_choose(count: int) -> int:
    return max(1, round(_CHOOSING * count))


def choose_path(
        rule: ExitRule,
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
        costs: RunCosts,
        temperatures: bool = True,
) -> Tuple[ExitRule, List[Thresholds]]:
    """Choose thresholds that are worth testing, on images that they are not tested on.

    Args:
        rule: Criterion and whether exits decide together.
        logits: Logits of every exit, each (N, num_classes).
        target: Labels (N,), or what the network answers at its end.
        costs: What the network's parts cost.
        temperatures: Choose temperatures as well; those of the rule are kept otherwise.

    Returns:
        The rule with its temperatures, and thresholds from the dearest to the cheapest: those that no others beat in
        cost and in right answers, and small steps from each to the next.
    """
    rule = replace(rule, thresholds=None)
    if temperatures:
        rule = replace(rule, temperatures=fit_temperatures(logits, target, rule.ensemble))
    rule = with_gates(rule, logits, target)
    curve = exit_curve(rule, logits, target, costs, points=400)
    at_end = next(row['cost'] for row in curve if row['thresholds'] == rule.thresholds)
    front = [row['thresholds'] for row in reversed(pareto(curve)) if row['cost'] < at_end]
    if rule.criterion == 'patience':
        return rule, front
    starts = [rule.thresholds, *front]
    steps = range(1, _STEPS + 1)
    return rule, [_between(rule, a, b, step / _STEPS) for a, b in zip(starts, front) for step in steps]


def _between(rule: ExitRule, safer: Thresholds, bolder: Thresholds, share: float) -> Thresholds:
    """Return thresholds on the way from one rule to another; an exit that neither uses stays unused."""
    if share == 1:
        return bolder
    never = 0. if rule.criterion == 'entropy' else 1.
    return tuple(
        None if a is None and b is None else
        (1 - share) * (never if a is None else a) + share * (never if b is None else b)
        for a, b in zip(safer, bolder)
    )


def count_losses(
        rule: ExitRule,
        path: Sequence[Thresholds],
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
) -> List[Tuple[int, int]]:
    """Count for thresholds how many images early exit gets wrong that are right at the end, and the other way round.

    Takes what `choose_path` takes and gives, with images of their own. Returns a pair for each of the path.
    """
    sure, right = map(torch.stack, judge_exits(rule, logits, target))
    images = torch.arange(len(target))
    counts = []
    for thresholds in path:
        early = right[leave_at(replace(rule, thresholds=thresholds), sure), images]
        counts.append(((right[-1] & ~early).sum().item(), (early & ~right[-1]).sum().item()))
    return counts


def count_passing(
        counts: Sequence[Tuple[int, int]],
        images: int,
        before: Sequence[Tuple[int, int]],
        images_before: int,
        risk: float,
        confidence: float,
        bound: str,
) -> int:
    """Return how many thresholds of a path pass the test before the first one fails.

    Args:
        counts: See `count_losses`.
        images: Images that they were counted on.
        before: The same of the images that the path was chosen on, for the stakes.
        images_before: How many these are.
        risk: See `choose_safely`.
        confidence: Likewise.
        bound: Likewise.
    """
    level = 1 - confidence
    stakes = (choose_stake(sum(pair), images_before, images, level) for pair in before)
    passes = (BOUNDS[bound](*pair, images, risk, stake) <= level for pair, stake in zip(counts, stakes))
    return sum(1 for _ in takewhile(bool, passes))


def choose_safely(
        rule: ExitRule,
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        costs: RunCosts,
        risk: float,
        confidence: float = 0.95,
        risk_of: Risk = 'accuracy',
        bound: Optional[str] = None,
        seed: int = 0,
) -> Tuple[ExitRule, Dict[str, Any], List[Dict[str, Any]]]:
    """Choose the cheapest thresholds with which early exit keeps a promise.

    Temperatures and a path of thresholds, from the safest to the boldest, are chosen on a quarter of the images, drawn
    at random. The thresholds are tested on the others along this path until one fails. So the promise holds whatever
    the network and the images are, if those met later are drawn like these.

    Args:
        rule: Criterion and whether exits decide together. Without labels its temperatures stay.
        logits: Logits of every exit on held-out images, each (N, num_classes).
        target: Labels (N,); None for agreement without labels.
        costs: What the network's parts cost.
        risk: What may be lost against running to the end, 0 to 1: of `accuracy`, or of `agreement` the share of images
            that are classified otherwise.
        confidence: Probability over the held-out images with which no more is lost, 0 to 1.
        risk_of: See there.
        bound: A name in `BOUNDS`; the tighter one when None.
        seed: Draws the images to choose on.

    Returns:
        The rule, which knows its promise; its row; and the rows of all that was on the path, see `measure_thresholds`.
        Where no thresholds pass nothing leaves early. Without labels `top1` is the agreement.

    Raises:
        ValueError: See `check_promise`; labels are missing, there are too few images, logits are not finite, or the
            network itself errs no more often than early exit may.
    """
    bound = check_promise(risk, confidence, risk_of, bound)
    if target is None and risk_of == 'accuracy':
        raise ValueError("risk_of='accuracy': needs labels, and there are none; risk_of='agreement' does without.")
    count = len(logits[0]) if len(logits) else 0
    if not count:
        raise ValueError('There are no images.')
    for number, of_exit in enumerate(logits):
        if not of_exit.isfinite().all():
            raise ValueError(f'Exit {number} has logits that are not finite.')
    least = images_needed(risk, confidence, bound)
    if count < least:
        raise ValueError(
            f'risk={risk!r}, confidence={confidence!r}: {count:,} images cannot promise that, even if early exit never '
            f'errs on them; {least:,} would do. Give more images, or allow more risk or less confidence.'
        )
    answers = follow_rule(replace(rule, thresholds=None), logits)[0].argmax(-1)
    if risk_of == 'accuracy':
        errs = (answers != target).double().mean().item()
        if risk >= errs:
            raise ValueError(
                f'risk={risk!r}: the network itself errs on no more of these images ({errs:.4g}); expected less than '
                f'that. A risk is a share, 0.01 for one percentage point.'
            )
    truth = target if risk_of == 'accuracy' else answers
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    choosing, testing = order.split([_to_choose(count), count - _to_choose(count)])
    of_choosing, of_testing = ([z[rows] for z in logits] for rows in (choosing, testing))
    rule, path = choose_path(rule, of_choosing, truth[choosing], costs, risk_of == 'accuracy')
    before = count_losses(rule, path, of_choosing, truth[choosing])
    counts = count_losses(rule, path, of_testing, truth[testing])
    passed = count_passing(counts, len(testing), before, len(choosing), risk, confidence, bound)
    candidates = [('deepest', rule.thresholds), *(('path', thresholds) for thresholds in path)]
    rows = measure_thresholds(rule, candidates, logits, answers if target is None else target, costs)
    point = min(rows[:passed + 1], key=lambda row: row['cost'])
    found = replace(rule, thresholds=point['thresholds'])
    promise = Promise(risk, confidence, risk_of, bound, len(choosing), len(testing), found.digest())
    return replace(found, promise=promise), point, rows
