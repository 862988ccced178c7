"""Exceptions whose message is a sentence for the user: what is wrong, where, and what to do."""
import difflib
import re
from typing import Dict, Iterable, Optional

__all__ = [
    'SETTING', 'CheckpointError', 'ConfigError', 'DataError', 'ExportError', 'HubError', 'NonFiniteLossError',
    'Preempted', 'SplitError', 'StreamError', 'UnreadableImageError', 'UserError', 'WeightsError', 'WorkerDiedError',
    'counted', 'nearest', 'os_error_behind', 'reason_of',
]

# A setting in a message, with its value where one is named.
SETTING = re.compile(r'`([a-z]\w*)(?:=([^`]*))?`')

# Errors that are raised with a sentence; others, such as KeyError, need their name to be understood.
_SPEAKING = (AssertionError, RuntimeError, TypeError, ValueError)

# Characters of what an error says that are repeated; torch lists every tensor that does not fit.
_LONGEST = 400


def counted(number: int, noun: str) -> str:
    """Return a number of things as a message says it.

    Examples:
        >>> counted(1, 'image'), counted(1200, 'image')
        ('1 image', '1,200 images')
    """
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


class UserError(Exception):
    """What a user can mend: the message names the setting and its value in backticks, and says what is allowed.

    A setting stands there as in Python: `batch_size=0`, or `batch_size` alone. The command line shows it as an option,
    `--batch-size 0`. The text holds all, as exceptions travel between processes as text.

    Attributes:
        settings: The settings that the message names with a value, as text, by name.

    Examples:
        >>> error = ConfigError('`batch_size=0`: expected a number of 1 or more.')
        >>> error.settings
        {'batch_size': '0'}
    """

    @property
    def settings(self) -> Dict[str, str]:
        return {name: value for name, value in SETTING.findall(str(self)) if value}


class DataError(UserError, ValueError):
    """The data cannot be used as they are; the message says what, where and what to do."""


class ConfigError(UserError, ValueError):
    """A setting cannot be used; the message names it and what is allowed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the names closest to a mistyped one; empty if none comes close."""
    close = difflib.get_close_matches(name, list(known), n=5)
    return f'; the nearest names are {", ".join(close)}' if close else ''


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss or one of its terms became infinite or not a number."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint, or the weights, could not be written; the message says where and why."""

    local = True  # only the process that writes knows


def os_error_behind(error: BaseException) -> Optional[OSError]:
    """Return what the operating system said, where a library wraps it in an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class Preempted(UserError, RuntimeError):
    """Training was asked to stop and has; the message says how to go on."""


class HubError(UserError):
    """The Hub refuses, or cannot be reached; the message says what to do."""


class StreamError(DataError):
    """A stream breaks off, or an example in it has no usable label."""

    local = True  # of several processes only the one that came upon it knows


class WorkerDiedError(DataError):
    """A loader's worker process was killed."""

    local = True  # of several processes only the one it belonged to knows


class UnreadableImageError(DataError):
    """An image cannot be decoded.

    Attributes:
        path: Where it lies, None if it is known by its place in a table alone.
        reason: What is wrong with it.
    """

    local = True  # of several processes only the one that came upon it knows

    def __init__(self, message: str, path: Optional[str] = None, reason: str = ''):
        super().__init__(message)
        self.path, self.reason = path, reason


class SplitError(UserError, ValueError):
    """A network cannot be cut into graphs that pass images on one by one."""


class ExportError(ConfigError):
    """A network cannot be exported, or what was exported computes something else."""


class WeightsError(UserError, ValueError):
    """A config or weights cannot be used; the message says which, and why."""


def reason_of(error: BaseException) -> str:
    """Return what an error says, with its kind where that alone is not a sentence."""
    said = ' '.join(str(error).split()).rstrip('.')
    said = said if len(said) <= _LONGEST else f'{said[:_LONGEST]} ...'
    return said if said and isinstance(error, _SPEAKING) else f'{type(error).__name__}: {said}'.removesuffix(': ')
