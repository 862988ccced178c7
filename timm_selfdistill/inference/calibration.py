"""Choosing on held-out images when to leave a multi-exit network."""
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from ..costs import RunCosts
from ..models.exit_rule import Candidate, ExitRule, decide_together, single_exits
from .batches import check_targets

__all__ = [
    'Calibration', 'check_aim', 'choose_point', 'exit_curve', 'fit_temperature', 'fit_temperatures', 'judge_exits',
    'leave_at', 'measure_thresholds', 'pareto',
]


# -- temperatures -----------------------------------------------------------------------------------------------------


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Compute what to divide logits by so that their probabilities are as often right as they say.

    The temperature has the lowest negative log likelihood (Guo et al., ICML 2017, arXiv 1706.04599), which on images
    that are all classified correctly has no minimum. A standard normal prior on the temperature's logarithm, which
    weighs about as much as a single image, keeps it finite there.

    Args:
        logits: Logits of one exit (N, num_classes), of images that it was not trained on.
        target: Labels (N,).

    Examples:
        >>> logits = torch.tensor([[9., 0.], [9., 0.], [9., 0.]])  # too confident: one of three is wrong
        >>> fit_temperature(logits, torch.tensor([0, 0, 1])) > 3
        True
    """
    logits = logits.detach().double()
    log_temperature = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * (-log_temperature).exp(), target) + log_temperature ** 2 / (2 * len(target))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return log_temperature.exp().item()


def fit_temperatures(
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
        ensemble: bool = False,
) -> Tuple[float, ...]:
    """Find the temperature of every exit, see `fit_temperature`.

    Args:
        logits: Logits of every exit, each (N, num_classes).
        target: Labels (N,).
        ensemble: Take the mean of the logits up to each exit in place of its own, as `ExitRule` does.
    """
    if ensemble:
        logits = decide_together(logits)
    return tuple(fit_temperature(of_exit, target) for of_exit in logits)


# -- costs ------------------------------------------------------------------------------------------------------------


# -- accuracy over cost -----------------------------------------------------------------------------------------------


@dataclass
class Calibration:
    """When to leave a network, as it was chosen on held-out images.

    Attributes:
        rule: The rule chosen.
        point: What it comes to on these images: its row of the curve.
        curve: Every rule that was tried, see `exit_curve`.
        count: Images that it was chosen on.
        costs: What the network's parts were taken to cost.
    """
    rule: ExitRule
    point: Dict[str, Any]
    curve: List[Dict[str, Any]]
    count: int
    costs: RunCosts

    @property
    def unit(self) -> str:
        """What the costs are counted in."""
        return self.costs.unit


def judge_exits(
        rule: ExitRule,
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """Return how sure each exit is of each image (N,), and whether it would be right (N,), whatever the thresholds."""
    check_targets(target, rule.num_classes)
    if len(logits) != rule.num_exits:
        raise ValueError(f'Logits of {len(logits)} exits: expected {rule.num_exits}.')
    sure, right = [], []
    memory: Dict[str, torch.Tensor] = {}
    for number, of_exit in enumerate(logits):
        if not of_exit.isfinite().all():
            raise ValueError(f'Exit {number} has logits that are not finite.')
        decided, of_exit, memory = rule.judge(number, of_exit, memory)
        sure.append(of_exit)
        right.append(decided.argmax(-1) == target)
    return sure, right


def leave_at(rule: ExitRule, sure: torch.Tensor) -> torch.Tensor:
    """Return the number of the exit that each image leaves at (N,).

    Args:
        rule: The rule.
        sure: How sure each exit is of each image (num_exits, N), as of `judge_exits`.
    """
    levels = [rule.level(number) for number in range(rule.num_exits)]
    # the first of those that are sure enough
    return torch.stack([of_exit >= level for of_exit, level in zip(sure, levels)]).byte().argmax(0)


def _measure(
        rule: ExitRule,
        candidates: Iterable[Candidate],
        sure: Sequence[torch.Tensor],
        right: Sequence[torch.Tensor],
        costs: RunCosts,
) -> List[Dict[str, Any]]:
    rows = []
    count = len(right[0])
    scores, answers = torch.stack(tuple(sure)), torch.stack(tuple(right))
    for family, thresholds in candidates:
        candidate = replace(rule, thresholds=thresholds)
        exits = leave_at(candidate, scores)
        correct = answers.gather(0, exits[None]).sum().item()
        leaving = [left / count for left in exits.bincount(minlength=rule.num_exits).tolist()]
        rows.append(dict(
            family=family,
            thresholds=candidate.thresholds,
            cost=sum(share * cost for share, cost in zip(leaving, costs.of(candidate))),
            top1=100 * correct / count,
            leaving=leaving,
        ))
    return rows


def measure_thresholds(
        rule: ExitRule,
        candidates: Iterable[Candidate],
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
        costs: RunCosts,
) -> List[Dict[str, Any]]:
    """Report what a rule comes to with other thresholds in place of its own.

    Args:
        rule: The rule.
        candidates: What to call each, and its thresholds, one for each exit but the deepest.
        logits: Logits of every exit, each (N, num_classes).
        target: Labels (N,).
        costs: What the network's parts cost.

    Returns:
        One dict a candidate: `family`, what it is called; `thresholds`; `cost`, the mean over the images, in the unit
        of `costs`; `top1` in percent; and `leaving`, the share of the images that leave at each exit.

    Raises:
        ValueError: Thresholds do not fit the rule, there are no images, the network does not know a label, or logits
            are not finite or not of as many exits as the rule has.
    """
    return _measure(rule, candidates, *judge_exits(rule, logits, target), costs)


def exit_curve(
        rule: ExitRule,
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
        costs: RunCosts,
        points: int = 100,
) -> List[Dict[str, Any]]:
    """Try many thresholds on held-out images: how much accuracy for how much cost.

    The families of thresholds are

    - `deepest`: nothing leaves early;
    - `anytime`: everything leaves at one exit (by patience that cannot be had);
    - `shared`: one threshold for all exits, over the quantiles of what occurs, or all whole numbers for patience;
    - `budgeted`: as in budgeted batch classification (Huang et al., ICLR 2018, arXiv 1703.09844), exit k lets a share
      of the images leave that is proportional to q^k, for values of q between 1/50 and 50. Not for patience.

    Args:
        rule: Criterion, temperatures and whether exits decide together; its thresholds are of no account.
        logits: Logits of every exit, each (N, num_classes).
        target: Labels (N,).
        costs: What the network's parts cost.
        points: Thresholds to try of each family, at most.

    Returns:
        One dict for each, as of `measure_thresholds`.

    Raises:
        ValueError: See `measure_thresholds`.
    """
    sure, right = judge_exits(rule, logits, target)
    candidates = single_exits(rule.num_exits)
    auxiliary = rule.num_exits - 1
    if rule.criterion == 'patience':
        candidates = candidates[-1:] + [('shared', (float(n),) * auxiliary) for n in range(1, auxiliary + 1)]
    elif auxiliary:
        least = _threshold(rule, -math.inf)
        candidates = [(family, tuple(t if t is None else least for t in ts)) for family, ts in candidates]
        occurring = torch.cat(sure[:-1]).sort().values
        places = torch.linspace(0, len(occurring) - 1, points).round().long()
        candidates += [('shared', (_threshold(rule, value),) * auxiliary) for value in occurring[places].tolist()]
        ratios = torch.logspace(-math.log10(50), math.log10(50), points).tolist()
        candidates += [('budgeted', _budgeted(rule, sure, ratio)) for ratio in ratios]
    return _measure(rule, dict.fromkeys(candidates), sure, right, costs)


def _threshold(rule: ExitRule, level: float) -> float:
    """Return the threshold that a confidence score belongs to, the closest one that there is."""
    if rule.criterion == 'entropy':
        return min(max(-level, 0.), math.log(rule.num_classes))
    return min(max(level, 0.), 1.)  # sums of rounded probabilities may exceed 1


def _budgeted(rule: ExitRule, sure: Sequence[torch.Tensor], ratio: float) -> Tuple[Optional[float], ...]:
    """Choose thresholds at which the shares leaving are as the powers of `ratio`, but for images equally sure."""
    powers = [ratio ** number for number in range(len(sure))]
    waiting = torch.ones_like(sure[0], dtype=torch.bool)
    thresholds: List[Optional[float]] = []
    for of_exit, power in zip(sure[:-1], powers):
        left = of_exit[waiting].sort(descending=True).values
        count = min(round(len(of_exit) * power / sum(powers)), len(left))
        level = left[count - 1].item() if count else math.inf
        thresholds.append(_threshold(rule, level) if count else None)
        waiting &= of_exit < level
    return tuple(thresholds)


def pareto(rows: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the rows of a curve that no other equals or beats in both cost and top-1 accuracy, by rising cost."""
    front: List[Dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row['cost'], -row['top1'])):
        if not front or row['top1'] > front[-1]['top1']:
            front.append(row)
    return front


def choose_point(
        rows: Sequence[Dict[str, Any]],
        budget: Optional[float] = None,
        accuracy_drop: Optional[float] = None,
        latency: Optional[float] = None,
) -> Dict[str, Any]:
    """Choose a row of a curve: the most accurate within a budget, or the cheapest that is accurate enough.

    Args:
        rows: What `exit_curve` returned.
        budget: What an image may cost on average, where costs are shares.
        accuracy_drop: Percentage points of top-1 accuracy that it may lose against the row where nothing leaves
            early: the deepest exit, or all exits together where the rule lets them decide together.
        latency: What an image may cost on average, where costs are milliseconds.

    Raises:
        ValueError: See `check_aim`; or even the cheapest row costs more.
    """
    name, value = check_aim(budget, accuracy_drop, latency)
    front = pareto(rows)
    if name == 'accuracy_drop':
        whole = next(row for row in rows if all(threshold is None for threshold in row['thresholds']))
        return next(row for row in front if row['top1'] >= whole['top1'] - value - 1e-9)
    # a sum of shares may exceed by rounding what it should be
    within = [row for row in front if row['cost'] <= value * (1 + 1e-9)]
    if not within:
        raise ValueError(f'{name}={value!r}: too low, the cheapest way to run this network costs '
                         f'{front[0]["cost"]:.4g}, with a top-1 accuracy of {front[0]["top1"]:.2f} %.')
    return within[-1]


def check_aim(
        budget: Optional[float] = None,
        accuracy_drop: Optional[float] = None,
        latency: Optional[float] = None,
        risk: Optional[float] = None,
) -> Tuple[str, float]:
    """Return which of the four is given, and its value.

    Raises:
        ValueError: Not exactly one of them is given, or it is no number from 0 on.
    """
    aims = dict(budget=budget, accuracy_drop=accuracy_drop, latency=latency, risk=risk)
    given = [(name, value) for name, value in aims.items() if value is not None]
    if len(given) != 1:
        said = ', '.join(f'{name}={value!r}' for name, value in aims.items())
        raise ValueError(f'{said}: expected exactly one of them.')
    name, value = given[0]
    if name == 'risk':  # a share, see `check_promise`
        return name, value
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f'{name}={value!r}: expected a number, 0 or more.')
    return name, value
