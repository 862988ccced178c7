"""What is noted of an exit rule: what it guarantees, and where images left when it was chosen."""
from dataclasses import dataclass, fields
from typing import Any, Tuple, Union

__all__ = ['NOTES', 'Leaving', 'Promise', 'read_note']


@dataclass(frozen=True)
class Promise:
    """What thresholds guarantee, and what the guarantee was made from, see `inference.risk_control`.

    Attributes:
        risk: What early exit loses at most against running to the end, as a share.
        confidence: With which probability over the held-out images.
        risk_of: Of what: `accuracy`, or `agreement` with the answers at the end.
        bound: By which test.
        chosen_on: Images on which the thresholds to test were chosen.
        tested_on: Images on which they were tested.
        made_for: `ExitRule.digest` of the rule that it belongs to.
    """
    risk: float
    confidence: float
    risk_of: str
    bound: str
    chosen_on: int
    tested_on: int
    made_for: str

    def __str__(self) -> str:
        if self.risk_of == 'accuracy':
            loss = f'at most {100 * self.risk:.3g} points of accuracy are lost against running to the end'
        else:
            loss = f'at most {100 * self.risk:.3g} % of the images are classified otherwise than at the end'
        return (
            f'with a probability of {self.confidence:g} {loss} ({self.bound} bound, chosen on {self.chosen_on:,} and '
            f'tested on {self.tested_on:,} images)'
        )


@dataclass(frozen=True)
class Leaving:
    """Where the images left that a rule was chosen on.

    Attributes:
        images: How many left at each exit.
        made_for: `ExitRule.digest` of the rule.
    """
    images: Tuple[int, ...]
    made_for: str


# What is noted of a rule, and is true of no other one.
NOTES = {'promise': Promise, 'leaving': Leaving}


def read_note(name: str, note: Any, num_exits: int) -> Union[None, Promise, Leaving]:
    """Read a note as `ExitRule.settings` wrote it.

    Raises:
        ValueError: It is no such dict.
    """
    if note is None:
        return None
    kinds = {f.name: f.type for f in fields(NOTES[name])}
    if 'images' in kinds:
        kinds['images'] = (list, tuple)
    if not isinstance(note, dict) or set(note) != set(kinds) or not all(
            isinstance(value, kinds[key]) and not isinstance(value, bool) for key, value in note.items()):
        raise ValueError(f'early_exit: {name}={note!r}: expected a dict with the keys {", ".join(kinds)}.')
    if name == 'promise':
        return Promise(**note)
    images = tuple(note['images'])
    if len(images) != num_exits or not all(type(count) is int and 0 <= count < 2 ** 53 for count in images):
        raise ValueError(f'early_exit: leaving={note!r}: expected {num_exits} counts of images.')
    return Leaving(images, note['made_for'])
