"""When an image has been seen well enough to leave a multi-exit network."""
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from numbers import Real
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .exit_gate import create_gates
from .rule_notes import NOTES, Leaving, Promise, read_note

__all__ = [
    'CRITERIA', 'Candidate', 'ExitRule', 'Thresholds', 'confidence_score', 'decide_together', 'follow_rule',
    'single_exits',
]

Candidate = Tuple[str, Tuple[Optional[float], ...]]

Thresholds = Union[None, float, Sequence[Optional[float]]]

# Functions of the logits. Besides there is `gate`, which has to be trained.
CRITERIA = ('confidence', 'margin', 'entropy', 'patience')


def confidence_score(logits: torch.Tensor, criterion: str = 'confidence') -> torch.Tensor:
    """Return an exit's confidence score of each image; more is more confident.

    Args:
        logits: Logits of one exit (N, num_classes), divided by its temperature.
        criterion: `confidence`, the largest probability (0 to 1); `margin`, by how much it exceeds the second largest
            (0 to 1); or `entropy`, the entropy of the probabilities in nats with its sign changed (-ln num_classes
            to 0), as in BranchyNet (Teerapittayanon et al., ICPR 2016, arXiv 1709.01686).

    Returns:
        One value an image (N,).

    Raises:
        ValueError: The criterion is unknown, or is no function of one exit's logits.

    Examples:
        >>> confidence_score(torch.tensor([[0., 0.]]), 'confidence')
        tensor([0.5000])
    """
    if criterion == 'confidence':
        return logits.softmax(-1).amax(-1)
    if criterion == 'margin':
        first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second
    if criterion == 'entropy':
        lowest = -math.log(logits.shape[-1])  # which rounding may miss
        return (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).clamp(lowest, 0.)
    raise ValueError(f'criterion={criterion!r}: expected confidence, margin or entropy.')


@dataclass(frozen=True)
class ExitRule:
    """At which exit an image leaves.

    Args:
        num_exits: Exits of the network, the deepest included, which keeps whatever comes to it.
        num_classes: Its classes.
        thresholds: Where an image is sure enough: one number for all auxiliary exits, or one for each, None for an
            exit that nothing leaves at. None for no early exit at all. An image leaves where its confidence or margin
            (0 to 1) is at least the threshold, where its entropy (0 to ln num_classes, in nats) is at most the
            threshold, or where that many exits in a row have agreed with the one before them (patience: whole numbers
            from 1; PABEE, Zhou et al., NeurIPS 2020, arXiv 2006.04152). Where the gate's probability (0 to 1) is at
            least the threshold, with `gate`.
        criterion: What the thresholds are compared with, one of `CRITERIA`, or `gate`.
        temperatures: What the logits of each exit are divided by before probabilities are made of them, one for each
            exit, the deepest included (Guo et al., ICML 2017, arXiv 1706.04599); 1 when None.
        ensemble: Let all exits passed so far decide together, by the mean of their logits. The temperature is then that
            of the mean up to an exit.
        promise: What the thresholds guarantee. It is dropped where it was made for other ones, or other temperatures.
        leaving: Where the images left that the thresholds were chosen on; dropped likewise.
        gates: For `gate`: one `ExitGate` for each exit but the deepest. Without, no image may leave early.

    Raises:
        ValueError: A value does not fit; the message names it and says what is allowed.
    """
    num_exits: int
    num_classes: int
    thresholds: Thresholds = None
    criterion: str = 'confidence'
    temperatures: Optional[Sequence[float]] = None
    ensemble: bool = False
    promise: Optional[Promise] = None
    leaving: Optional[Leaving] = None
    gates: Optional[nn.ModuleList] = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.criterion not in (*CRITERIA, 'gate'):
            raise ValueError(f'criterion={self.criterion!r}: unknown, expected one of {", ".join(CRITERIA)}, gate.')
        if not isinstance(self.ensemble, bool):
            raise ValueError(f'ensemble={self.ensemble!r}: expected True or False.')
        object.__setattr__(self, 'thresholds', self._check_thresholds())
        object.__setattr__(self, 'temperatures', self._check_temperatures())
        for name in NOTES:
            note = getattr(self, name)
            if note is not None and note.made_for != self.digest():
                object.__setattr__(self, name, None)

    def __str__(self) -> str:
        sign = '<=' if self.criterion == 'entropy' else '>='
        leave = ', '.join(
            f'exit {i}: never' if t is None else f'exit {i}: {self.criterion} {sign} {t:.4g}'
            for i, t in enumerate(self.thresholds)
        )
        if all(threshold is None for threshold in self.thresholds):
            leave = 'no image leaves early'
        return leave + (', ensemble of the exits passed' if self.ensemble else '')

    def digest(self) -> str:
        """Return a short hash of all that decides where images leave."""
        settings = {name: value for name, value in self.settings().items() if name not in NOTES}
        return hashlib.sha256(json.dumps([self.num_exits, settings], sort_keys=True).encode()).hexdigest()[:16]

    def _check_thresholds(self) -> Tuple[Optional[float], ...]:
        given, count = self.thresholds, self.num_exits - 1
        if given is None or _is_number(given):
            values = (given,) * count
        elif isinstance(given, (list, tuple)):
            values = tuple(given)
        else:
            raise ValueError(f'thresholds={given!r}: expected None, a number, or one number or None for each exit.')
        if len(values) != count:
            raise ValueError(
                f'thresholds={given!r}: {len(values)} given for a network of {self.num_exits} exits; expected {count}, '
                f'one for each exit but the deepest, where all that is left leaves, or one number for all of them.'
            )
        lowest, highest, unit = {
            'confidence': (0, 1, ''),
            'margin': (0, 1, ''),
            'entropy': (0, math.log(max(self.num_classes, 1)), f' nats for {self.num_classes} classes'),
            'gate': (0, 1, ''),
            'patience': (1, max(count, 1), f', whole, for {self.num_exits} exits'),
        }[self.criterion]
        for value in values:
            if value is None:
                continue
            whole = self.criterion != 'patience' or (_is_number(value) and value == int(value))
            if not _is_number(value) or not lowest <= value <= highest or not whole:
                raise ValueError(
                    f'thresholds={given!r}: {value!r} is out of range for {self.criterion}, which goes from '
                    f'{lowest} to {highest:.4g}{unit}.'
                )
        if self.criterion == 'gate' and self.gates is None and any(value is not None for value in values):
            raise ValueError(f'thresholds={given!r}: gates have to be trained first, which calibrate() does.')
        return tuple(None if value is None else float(value) for value in values)

    def _check_temperatures(self) -> Tuple[float, ...]:
        given = self.temperatures
        if given is None:
            return (1.,) * self.num_exits
        if not isinstance(given, (list, tuple)) or len(given) != self.num_exits:
            raise ValueError(f'temperatures={given!r}: expected {self.num_exits} numbers, one for each exit.')
        for value in given:
            if not _is_number(value) or not value > 0:
                raise ValueError(f'temperatures={given!r}: {value!r} is no temperature, expected a number above 0.')
        return tuple(map(float, given))

    @classmethod
    def from_settings(cls, settings: Dict[str, Any], num_exits: int) -> 'ExitRule':
        """Read what `settings` wrote, as it stands in a `config.json`.

        Raises:
            ValueError: It is no such dict, or does not fit a network of so many exits.
        """
        known = {'num_classes', 'criterion', 'thresholds', 'temperatures', 'ensemble'}
        if not isinstance(settings, dict) or set(settings) - set(NOTES) != known:
            raise ValueError(f'early_exit={settings!r}: expected a dict with the keys {", ".join(sorted(known))}.')
        count = settings['num_classes']
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 1e9:
            raise ValueError(f'early_exit: num_classes={count!r}: expected a whole number above 0.')
        notes = {name: read_note(name, settings.get(name), num_exits) for name in NOTES}
        gates = create_gates(num_exits, count) if settings['criterion'] == 'gate' else None
        return cls(num_exits, gates=gates, **{**settings, **notes})

    def settings(self) -> Dict[str, Any]:
        """Return the rule as JSON can hold it."""
        settings = dict(
            num_classes=self.num_classes,
            criterion=self.criterion,
            thresholds=list(self.thresholds),
            temperatures=list(self.temperatures),
            ensemble=self.ensemble,
        )
        notes = {name: getattr(self, name) for name in NOTES}
        notes = {name: asdict(note) for name, note in notes.items() if note is not None}
        if 'leaving' in notes:
            notes['leaving']['images'] = list(self.leaving.images)  # as JSON gives it back
        return {**settings, **notes}

    def asks(self, number: int) -> bool:
        """Return whether exit `number` has to run at all: one that nothing leaves at only counts where exits decide
        together."""
        deepest = number == self.num_exits - 1
        return deepest or self.ensemble or self.criterion == 'patience' or self.thresholds[number] is not None

    def level(self, number: int) -> float:
        """Return the confidence score from which on images leave at exit `number`."""
        if number == self.num_exits - 1:
            return -math.inf
        threshold = self.thresholds[number]
        if threshold is None:
            return math.inf
        return -threshold if self.criterion == 'entropy' else threshold

    def judge(
            self,
            number: int,
            logits: torch.Tensor,
            memory: Dict[str, torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor, Dict[str, torch.Tensor]]:
        """Judge images at an exit, in float32 at least; in half precision many would be equally sure.

        Args:
            number: Number of the exit.
            logits: Its logits (N, num_classes).
            memory: What the exit before returned of the same images, {} at the first.

        Returns:
            The logits that these images leave with, if they leave here (N, num_classes), float32 or float64; how sure
            the exit is of each (N,), to be compared with `level`; and what the next exit has to know of each, tensors
            (N, ...).
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float))
        later: Dict[str, torch.Tensor] = {}
        if self.ensemble:
            later['total'] = memory['total'] + logits if memory else logits
            logits = later['total'] / (number + 1)
        if self.criterion == 'gate' and self.gates is not None and number < self.num_exits - 1:
            return logits, self.gates[number](logits / self.temperatures[number]), later
        if self.criterion == 'gate':
            return logits, torch.zeros_like(logits[:, 0]), later  # nothing leaves, or all that is left
        if self.criterion != 'patience':
            return logits, confidence_score(logits / self.temperatures[number], self.criterion), later
        later['prediction'] = logits.argmax(-1)
        if memory:
            later['agreed'] = (memory['agreed'] + 1) * later['prediction'].eq(memory['prediction']).to(logits.dtype)
        else:
            later['agreed'] = torch.zeros_like(logits[:, 0])
        return logits, later['agreed'], later


def decide_together(logits: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Return what the exits up to each one decide together: the mean of their logits, each (N, num_classes)."""
    return [total / (number + 1) for number, total in enumerate(accumulate(logits))]


def follow_rule(rule: ExitRule, logits: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Apply a rule to logits that exist already; nothing is saved by it.

    Args:
        rule: The rule.
        logits: Logits of every exit, each (N, num_classes).

    Returns:
        The logits that each image leaves with (N, num_classes), see `ExitRule.judge`, and the number of the exit it
        leaves at (N,).

    Examples:
        >>> rule = ExitRule(num_exits=2, num_classes=2, thresholds=0.9)
        >>> shallow, deep = torch.tensor([[9., 0.], [0., 0.]]), torch.tensor([[9., 0.], [0., 9.]])
        >>> follow_rule(rule, [shallow, deep])[1]
        tensor([0, 1])
    """
    left_with = torch.empty(())
    exit_index = torch.full(logits[0].shape[:1], -1, dtype=torch.long, device=logits[0].device)
    memory: Dict[str, torch.Tensor] = {}
    for number, of_exit in enumerate(logits):
        decided, sure, memory = rule.judge(number, of_exit, memory)
        left_with = left_with if number else torch.empty_like(decided)
        leaves = (exit_index < 0) & ((sure >= rule.level(number)) | (number == rule.num_exits - 1))
        left_with[leaves] = decided[leaves]
        exit_index[leaves] = number
    return left_with, exit_index


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300


def single_exits(num_exits: int) -> List[Candidate]:
    """Return the thresholds of confidence or margin with which all images leave at one exit, for each of the exits.

    The family is `anytime` for all but the last, where nothing leaves early: `deepest`.
    """
    auxiliary = range(num_exits - 1)
    alone = [('anytime', tuple(0. if i == number else None for i in auxiliary)) for number in auxiliary]
    return [*alone, ('deepest', (None,) * (num_exits - 1))]
