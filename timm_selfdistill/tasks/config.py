"""What every exit learns, and from whom."""
from dataclasses import dataclass, replace
from typing import Union

from ..losses import EXIT_TEACHERS, EXIT_WEIGHTS, HINT_FORMS, TOLERANCES

__all__ = ['DistillationConfig', 'Linear']


@dataclass(frozen=True)
class Linear:
    """A number that changes linearly in the course of training.

    Args:
        start: Its value at the beginning.
        end: Its value at the end.

    Examples:
        >>> Linear(1.0, 3.0).at(0.25)
        1.5
    """
    start: float
    end: float

    def at(self, progress: float) -> float:
        """Return the value when a share of the training is done, 0 to 1."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class DistillationConfig:
    """What every exit learns, and from whom.

    With `alpha` and `hint_weight` 0 it is deep supervision. The names are those of the options of the command line and
    of the arguments of `losses`.

    Args:
        alpha: Share of the divergence against the labels at auxiliary exits, 0 to 1.
        temperature: Softens teacher and student in the divergence, greater than 0.
        square_temperature: Multiply the divergence by the squared temperature.
        hint_weight: λ, the weight of the hint loss; 0 leaves it and its projections out.
        hint_on: What the hint compares: `features`, pooled vectors, or `maps`, before the pooling.
        hint_form: Distance of the hint, see `losses.hint_loss`.
        hint_exits: Which auxiliary exits have a hint, `all` or `all-but-last`.
        hint_linear: Learn a linear layer in front of every hint; otherwise only where the widths differ.
        exit_teacher: Who teaches the auxiliary exits, see `losses.exit_teachers`.
        exit_weights: How the auxiliary exits are weighted, see `losses.weigh_exits`.
        patriarch: What a network without a teacher minimises besides, see `losses.supervision_terms`.
        eta: η, share of the cross entropy against the tolerance of a patriarch, 0 to 1.
        tsd_k: K of the top score difference.
        label_weight: λ, share of the labels against a teacher outside the network, 0 to 1.
        teacher_temperature: Softens student and teacher, greater than 0.

    Raises:
        ValueError: A value is out of range.

    Examples:
        >>> DistillationConfig(alpha=Linear(0.1, 0.9)).at(0.5).alpha
        0.5
    """
    alpha: Union[float, Linear] = 0.5
    temperature: Union[float, Linear] = 3.0
    square_temperature: bool = True
    hint_weight: float = 0.03
    hint_on: str = 'features'
    hint_form: str = 'mean'
    hint_exits: str = 'all'
    hint_linear: bool = False
    exit_teacher: str = 'deepest'
    exit_weights: str = 'equal'
    patriarch: str = 'plain'
    eta: float = 0.6
    tsd_k: int = 5
    label_weight: float = 0.6
    teacher_temperature: float = 1.0

    def __post_init__(self):
        for name, fits, allowed in (
            ('alpha', lambda value: 0 <= value <= 1, 'from 0 to 1'),
            ('eta', lambda value: 0 <= value <= 1, 'from 0 to 1'),
            ('label_weight', lambda value: 0 <= value <= 1, 'from 0 to 1'),
            ('temperature', lambda value: value > 0, 'greater than 0'),
            ('teacher_temperature', lambda value: value > 0, 'greater than 0'),
            ('hint_weight', lambda value: value >= 0, 'of 0 or more'),
            ('tsd_k', lambda value: value >= 2, 'of 2 or more'),
        ):
            value = getattr(self, name)
            if not all(map(fits, (value.start, value.end) if isinstance(value, Linear) else (value,))):
                raise ValueError(f'{name}={value}: expected a number {allowed}.')
        for name, known in (
            ('hint_on', ('features', 'maps')), ('hint_form', HINT_FORMS), ('hint_exits', ('all', 'all-but-last')),
            ('exit_teacher', EXIT_TEACHERS), ('exit_weights', EXIT_WEIGHTS), ('patriarch', ('plain', *TOLERANCES)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f'{name}={value!r}: unknown, expected one of {", ".join(known)}.')

    def at(self, progress: float) -> 'DistillationConfig':
        """Return the settings when a share of the training is done, 0 to 1."""
        return replace(self, **{
            name: value.at(progress) for name, value in vars(self).items() if isinstance(value, Linear)})
