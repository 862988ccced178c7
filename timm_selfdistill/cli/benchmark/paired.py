"""Timing that a noisy machine does not mislead: what is compared runs in turn, again and again."""
import statistics
from typing import Callable, Dict, List

from rich.console import Console

from ...evaluation.progress import Watch

__all__ = ['compare']


def compare(functions: List[Callable[[], float]], rounds: int) -> List[Dict[str, float]]:
    """Call functions that return seconds in turn, forth and back, so that a drift of the machine's speed favours none.

    Returns:
        For each its median of seconds and, but for the first, the median and the middle half of the ratios to the first
        one (`ratio`, `low`, `high`).
    """
    order = [*range(len(functions)), *reversed(range(len(functions)))]
    seconds = []
    with Watch(Console(stderr=True)) as watch:
        watch.begin('compare', rounds)
        for turn in range(rounds):
            taken = [0.] * len(functions)
            for i in order[turn % len(order):] + order[:turn % len(order)]:
                taken[i] += functions[i]() / 2
            seconds.append(taken)
            watch.advance('compare')
    figures = []
    for i, taken in enumerate(zip(*seconds)):
        figures.append(dict(seconds=statistics.median(taken)))
        if i:
            low, median, high = statistics.quantiles((t[i] / t[0] for t in seconds), n=4)
            figures[-1].update(ratio=median, low=low, high=high)
    return figures
