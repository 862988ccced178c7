"""Whether images leave as they did when the thresholds were chosen."""
import threading
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple

import torch

__all__ = ['Drift', 'ExitCounter', 'compare_leaving']

_HELD = 256  # batches whose figures may wait on the device


@dataclass(frozen=True)
class Drift:
    """The exits at which images leave now, compared with those at calibration.

    Attributes:
        now: Images that left at each exit since the predictor was made, or since `EarlyExit.reset_counts`.
        then: Those at calibration.
        p_value: How likely such a difference, or a larger one, is if nothing has changed.
        drifted: Whether that is less likely than was asked for.
    """
    now: Tuple[int, ...]
    then: Tuple[int, ...]
    p_value: float
    drifted: bool

    def __str__(self) -> str:
        shares = '; '.join(
            f'exit{i} {100 * b / sum(self.then):.1f} % then, {100 * a / sum(self.now):.1f} % now'
            for i, (a, b) in enumerate(zip(self.now, self.then)))
        verdict = 'calibrate the thresholds again' if self.drifted else 'no sign that anything has changed'
        return f'{verdict}: {shares} ({sum(self.now):,} images, p = {self.p_value:.2g})'


def compare_leaving(now: Sequence[int], then: Sequence[int], significance: float) -> Drift:
    """Compare two histograms of exits by the chi-squared test of homogeneity.

    Args:
        now: Images at each exit.
        then: Likewise.
        significance: Probability with which a drift may be reported where there is none.

    Raises:
        ValueError: One of them has no images, or the significance does not lie between 0 and 1.

    Examples:
        >>> compare_leaving([50, 50], [500, 500], 0.01).drifted, compare_leaving([90, 10], [500, 500], 0.01).drifted
        (False, True)
    """
    from scipy.stats import chi2_contingency  # takes long to import

    if isinstance(significance, bool) or not 0 < significance < 1:
        raise ValueError(f'significance={significance!r}: expected a number above 0 and below 1, such as 0.01.')
    if not sum(now) or not sum(then):
        raise ValueError(f'{sum(now):,} images now, {sum(then):,} at calibration: expected some of both.')
    table = [pair for pair in zip(now, then) if any(pair)]
    p_value = float(chi2_contingency(table, correction=False).pvalue) if len(table) > 1 else 1.
    return Drift(tuple(now), tuple(then), p_value, p_value < significance)


class ExitCounter:
    """Counts, from any thread and without waiting for the device, where images left and how sure these exits were.

    Args:
        num_exits: Exits of the network.
    """

    def __init__(self, num_exits: int):
        self._lock = threading.Lock()
        self._num_exits = num_exits
        self.reset()

    def __reduce__(self) -> Any:
        return type(self), (self._num_exits,)  # a copy has seen nothing, and locks cannot be copied

    def reset(self) -> None:
        """Forget all images."""
        with self._lock:
            self._waiting: List[Tuple[torch.Tensor, torch.Tensor]] = []
            self._totals = [(0, 0.)] * self._num_exits

    def add(self, exits: torch.Tensor, sure: torch.Tensor) -> None:
        """Add a batch: the exits taken (N,) and their confidence scores (N,)."""
        with self._lock:
            self._waiting.append((exits, sure))
            if len(self._waiting) >= _HELD:
                self._settle()

    def _settle(self) -> None:
        if self._waiting:
            exits, sure = (torch.cat(part).cpu() for part in zip(*self._waiting))
            images = exits.bincount(minlength=self._num_exits).tolist()
            scores = exits.bincount(sure.double(), minlength=self._num_exits).tolist()
            self._totals = [(n + more, s + score) for (n, s), more, score in zip(self._totals, images, scores)]
            self._waiting = []

    @property
    def images(self) -> Tuple[int, ...]:
        """Images that left at each exit."""
        with self._lock:
            self._settle()
            return tuple(images for images, _ in self._totals)

    @property
    def confidence(self) -> Tuple[Optional[float], ...]:
        """Mean confidence score of the images that left at each exit, None where there were none."""
        with self._lock:
            self._settle()
            return tuple(score / images if images else None for images, score in self._totals)
