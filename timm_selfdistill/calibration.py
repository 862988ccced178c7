"""Choosing on held-out images when to leave a multi-exit network."""
import math
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Real
from reprlib import repr as shortened
from statistics import median
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from .exit_rule import ExitRule
from .heads import ExitHead, chain_logits
from .metrics import device_time, eval_mode
from .multi_exit import MultiExit
from .stages import count_macs, meta_probe, take_taps

__all__ = [
    'MS', 'SHARE', 'Calibration', 'Candidate', 'RunCosts', 'check_aim', 'check_targets', 'choose_point',
    'compute_costs', 'exit_curve', 'fit_temperature', 'fit_temperatures', 'measure_costs', 'measure_thresholds',
    'pareto', 'read_batch', 'single_exits', 'time_parts', 'timed_costs',
]

SHARE = "share of the plain network's multiply-adds"
MS = 'ms'

Candidate = Tuple[str, Tuple[Optional[float], ...]]

# What people call images and labels in batches that are dicts.
_IMAGES = ('pixel_values', 'image', 'images', 'img')
_LABELS = ('labels', 'label', 'targets', 'target')


def read_batch(batch: Any, num_classes: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Read images and labels from what a loader gives.

    Args:
        batch: Images and labels as a tuple or a list, or as a dict such as those of Hugging Face's data sets. Labels
            are whole numbers (N,) of any type, or one-hot (N, num_classes); both may be NumPy's.
        num_classes: Classes of the network.

    Returns:
        The images as they are, and labels (N,), int64.

    Raises:
        ValueError: The batch holds something else, or labels that the network does not know.
    """
    if isinstance(batch, Mapping):
        found = [[name for name in names if name in batch] for names in (_IMAGES, _LABELS)]
        if list(map(len, found)) != [1, 1]:
            raise ValueError(
                f'A batch with the keys {", ".join(map(repr, batch))}: expected one of {", ".join(_IMAGES)} and one of '
                f'{", ".join(_LABELS)}, or a pair of images and labels.'
            )
        batch = [batch[name] for name, in found]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''
        raise ValueError(f'A batch is a {type(batch).__name__}{count}: expected images and labels, or a dict of both.')
    images, labels = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch)
    if not isinstance(images, torch.Tensor):
        raise ValueError(f'Images in a {type(images).__name__}: expected a tensor (N, C, H, W).')
    try:
        target = torch.as_tensor(labels).double()  # which holds any class, and compares where uint16 does not
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'Labels {shortened(labels)}: expected whole numbers (N,): {error}') from error
    if target.shape == (len(images), num_classes) and num_classes > 1:
        if not (((target == 0) | (target == 1)).all() and (target.sum(1) == 1).all()):
            raise ValueError(
                f'Labels of shape {tuple(target.shape)} that are not one-hot: a calibration needs the one class of '
                f'each image. Give whole numbers (N,), and leave out Mixup and label smoothing.'
            )
        target = target.argmax(1)
    if target.shape != (len(images),):
        raise ValueError(
            f'{len(images)} images with labels of shape {tuple(target.shape)}: expected one label each, '
            f'({len(images)},), or one-hot, ({len(images)}, {num_classes}).'
        )
    odd = target[target != target.floor()]
    if len(odd):
        raise ValueError(f'Label {odd[0].item()!r}: expected whole numbers from 0 to {num_classes - 1}.')
    check_targets(target.long(), num_classes)
    return images, target.long()


def check_targets(target: torch.Tensor, num_classes: int) -> None:
    """Check labels (N,) against the classes of a network.

    Raises:
        ValueError: There are none, or the network does not know one of them.
    """
    if not len(target):
        raise ValueError('There are no images.')
    wrong = target[(target < 0) | (target >= num_classes)]
    if len(wrong):
        raise ValueError(f'Label {wrong[0].item()} is unknown to the network, which has the classes 0 to '
                         f'{num_classes - 1} ({len(wrong)} such images).')


# -- temperatures -----------------------------------------------------------------------------------------------------


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Find what to divide logits by so that their probabilities are as often right as they say.

    The temperature has the lowest negative log likelihood (Guo et al., ICML 2017, arXiv 1706.04599), which on images
    that are all classified correctly has no minimum. A standard normal prior on the temperature's logarithm, which
    weighs about as much as a single image, keeps it finite there.

    Args:
        logits: Logits of one exit (N, num_classes), of images that it was not trained on.
        target: Labels (N,).
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
        logits = [total / (i + 1) for i, total in enumerate(accumulate(logits))]
    return tuple(fit_temperature(of_exit, target) for of_exit in logits)


# -- costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCosts:
    """What the parts of a multi-exit network cost for one image.

    Attributes:
        sections: Cost of the network from each exit to the next, the first from the images on, one for each exit.
        heads: Cost of each exit's head, one for each exit; the deepest exit's counts to its section, so it is 0.
        unit: What the costs are counted in, `SHARE` or `MS`.
        chained: Whether heads take the logits of the exit before, so that all of them run, but for the last one if it
            is not asked.
    """
    sections: Tuple[float, ...]
    heads: Tuple[float, ...]
    unit: str = SHARE
    chained: bool = False

    def of(self, rule: ExitRule) -> List[float]:
        """Return what an image costs that leaves at each exit, one value for each.

        Heads that the rule does not ask do not run, unless a later one takes their logits.
        """
        taken = len(self.heads) - 2 if self.chained else 0  # the deepest exit takes none
        run = (head if i < taken or rule.asks(i) else 0. for i, head in enumerate(self.heads))
        return list(accumulate(section + head for section, head in zip(self.sections, run)))


def _is_chained(model: MultiExit) -> bool:
    return any(head.takes_logits for head in model.exit_heads)


def _sections(upto: Iterable[float]) -> List[float]:
    """Return the steps between costs up to each exit, none of them below 0."""
    # in networks of parallel branches a shallow map alone may take as much as a deeper one
    highest = list(accumulate(upto, max))
    return [b - a for a, b in zip([0, *highest], highest)]


def compute_costs(model: MultiExit, input_size: Optional[Tuple[int, int, int]] = None) -> RunCosts:
    """Count the multiply-adds of the network's parts, as shares of those of the plain network.

    Args:
        model: The network.
        input_size: Channels, height and width of an image; what the model was built for when None.
    """
    probe, x = meta_probe(model, input_size)
    full, _ = count_macs(probe, x)
    upto, heads, taps = [], [], []
    for number in range(len(probe.exits)):
        macs, taps = count_macs(take_taps, probe.backbone, x, probe.exits[:number + 1])
        upto.append(min(macs, full))
    previous: Optional[torch.Tensor] = None
    for head, tap in zip(probe.exit_heads, taps):
        macs, previous = count_macs(_run_head, head, tap, previous)
        heads.append(macs)
    shares = [[macs / max(full, 1) for macs in part] for part in (_sections([*upto, full]), [*heads, 0])]
    return RunCosts(tuple(shares[0]), tuple(shares[1]), SHARE, _is_chained(model))


def _run_head(head: ExitHead, tap: torch.Tensor, previous: Optional[torch.Tensor]) -> torch.Tensor:
    return head.forward_head(head.forward_features(tap), previous)


def measure_costs(model: MultiExit, images: torch.Tensor, rounds: int = 15) -> RunCosts:
    """Measure the time that the network's parts take on this machine, in milliseconds for one image.

    Everything runs in turn, again and again; the medians count. What parts of a batch cost may be more for an image
    than in the whole batch, and choosing and moving images costs as well: neither is in here.

    Args:
        model: The network, on the device of the images; run in eval mode and left in the mode it was in.
        images: A batch (N, C, H, W) of the size that is used later.
        rounds: Times that everything is measured.

    Raises:
        ValueError: There are no images, or fewer rounds than one.
    """
    return timed_costs(model, [median(of_part) for of_part in zip(*time_parts(model, images, rounds))])


def timed_costs(model: MultiExit, ms: Sequence[float]) -> RunCosts:
    """Return the costs of a network's parts, given what `time_parts` measured in a round."""
    upto, heads = ms[:model.num_exits], ms[model.num_exits:]
    return RunCosts(tuple(_sections(upto)), (*heads, 0.), MS, _is_chained(model))


@torch.no_grad()
def time_parts(model: MultiExit, images: torch.Tensor, rounds: int, seconds: float = 0.) -> List[List[float]]:
    """Measure the time that the network's parts take on this machine, in turn and again and again.

    Args:
        model: See `measure_costs`.
        images: Likewise.
        rounds: Times that everything is measured at least.
        seconds: Time that this is to take at least.

    Returns:
        A list a round: milliseconds for one image to each exit's map, to the deepest exit, and of each head.

    Raises:
        ValueError: There are no images, or fewer rounds than one.
    """
    if not len(images) or rounds < 1:
        raise ValueError(f'{len(images)} images, rounds={rounds}: expected 1 or more of both.')
    with eval_mode(model):
        taps = take_taps(model.backbone, images, model.exits) if model.exits else []
        logits = chain_logits(model.exit_heads, [h.forward_features(tap) for h, tap in zip(model.exit_heads, taps)])
        calls: List[Callable[[], Any]] = [
            lambda i=i: take_taps(model.backbone, images, model.exits[:i + 1]) for i in range(len(taps))]
        calls.append(lambda: model(images))
        for head, tap, previous in zip(model.exit_heads, taps, [None, *logits]):
            calls.append(lambda head=head, tap=tap, previous=previous: _run_head(head, tap, previous))
        measured: List[List[float]] = []
        begin = device_time(images.device)
        while len(measured) < rounds + 2 or device_time(images.device) - begin < seconds:
            taken = []
            for call in calls:
                start = device_time(images.device)
                call()
                taken.append(1000 * (device_time(images.device) - start) / len(images))
            measured.append(taken)
    return measured[2:]  # the first ones choose algorithms and allocate memory


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


def _judge(
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


def _measure(
        rule: ExitRule,
        candidates: Iterable[Candidate],
        sure: Sequence[torch.Tensor],
        right: Sequence[torch.Tensor],
        costs: RunCosts,
) -> List[Dict[str, Any]]:
    rows = []
    count = len(right[0])
    for family, thresholds in candidates:
        candidate = replace(rule, thresholds=thresholds)
        waiting = torch.ones_like(right[0])
        correct, leaving = 0, []
        for number, (of_exit, is_right) in enumerate(zip(sure, right)):
            leaves = waiting & (of_exit >= candidate.level(number))
            waiting = waiting ^ leaves
            correct += (leaves & is_right).sum().item()
            leaving.append(leaves.sum().item() / count)
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
    """Say what a rule comes to with other thresholds in place of its own.

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
    return _measure(rule, candidates, *_judge(rule, logits, target), costs)


def single_exits(num_exits: int) -> List[Candidate]:
    """Return the thresholds of confidence or margin with which all images leave at one exit, for each of the exits.

    The family is `anytime` for all but the last, where nothing leaves early: `deepest`.
    """
    auxiliary = range(num_exits - 1)
    alone = [('anytime', tuple(0. if i == number else None for i in auxiliary)) for number in auxiliary]
    return [*alone, ('deepest', (None,) * (num_exits - 1))]


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
    sure, right = _judge(rule, logits, target)
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
    """Return the threshold that a level of surety belongs to, the closest one that there is."""
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
        budget: What an image may cost in the mean, where costs are shares.
        accuracy_drop: Percentage points of top-1 accuracy that it may lose against the row where nothing leaves
            early: the deepest exit, or all exits together where the rule lets them decide together.
        latency: What an image may cost in the mean, where costs are milliseconds.

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
) -> Tuple[str, float]:
    """Return which of the three is given, and its value.

    Raises:
        ValueError: Not exactly one of them is given, or it is no number from 0 on.
    """
    aims = dict(budget=budget, accuracy_drop=accuracy_drop, latency=latency)
    given = [(name, value) for name, value in aims.items() if value is not None]
    if len(given) != 1:
        said = ', '.join(f'{name}={value!r}' for name, value in aims.items())
        raise ValueError(f'{said}: expected exactly one of them.')
    name, value = given[0]
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f'{name}={value!r}: expected a number, 0 or more.')
    return name, value
