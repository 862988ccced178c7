"""How commands fail: what a user can mend is one plain sentence, with options of the command line."""
import atexit
import errno
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Callable, List, Optional, Tuple

import torch

from ..errors import (
    SETTING,
    CheckpointError,
    ConfigError,
    DataError,
    HubError,
    NonFiniteLossError,
    Preempted,
    os_error_behind,
)
from ..version import __version__

__all__ = ['PREEMPTED', 'as_options', 'run_command']

# Exit status after a signal: sysexits.h's EX_TEMPFAIL, "try again later".
PREEMPTED = 75

# What all processes of a run find out alike; the first one speaks for them.
_SHARED = (CheckpointError, ConfigError, DataError, HubError, NonFiniteLossError, Preempted)

_NO_SPACE = 'Free some space there, or choose another folder.'
_NO_ACCESS = 'Choose a place that this user may write to, or change its permissions.'
_NO_FILES = 'ulimit -n allows more of them; fewer --workers need fewer.'
_PORT = 'Another program uses the port; --main_process_port gives accelerate launch another one.'
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE, errno.EDQUOT: _NO_SPACE, errno.EFBIG: _NO_SPACE,
    errno.EACCES: _NO_ACCESS, errno.EPERM: _NO_ACCESS, errno.EROFS: _NO_ACCESS,
    errno.ENOENT: 'Check the path.', errno.ENOTDIR: 'A folder is needed in the place of the file.',
    errno.EISDIR: 'A file is needed in the place of the folder.', errno.ENAMETOOLONG: 'Choose a shorter name.',
    errno.EMFILE: _NO_FILES, errno.ENFILE: _NO_FILES, errno.EADDRINUSE: _PORT,
}

# What torch says on a CPU; on other devices it raises an error of its own.
_CPU_MEMORY = ("can't allocate memory", 'not enough memory')

# What gloo and NCCL say when a process of the run is gone.
_LOST = (
    'Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'remote process exited', 'Socket closed',
)


def run_command(main: Callable[[], None]) -> None:
    """Run a recipe; report what its user can mend as a sentence on stderr and exit with status 2.

    After a signal the status is `PREEMPTED`; torch's and accelerate's launchers make 1 of it. Anything unforeseen shows
    its traceback, headed by where to report it. What all processes know the first one says, what is marked `local` each
    that it happens to, anything else the first that it happens to.
    """
    handlers = _listen()
    try:
        try:
            main()
            sys.stdout.flush()
        except SystemExit as e:  # rich makes one of a broken pipe
            if not isinstance(e.__context__, BrokenPipeError):
                raise
            raise e.__context__ from None
    except (Exception, KeyboardInterrupt) as e:
        # what is still to come is no one's concern; Python would show a traceback for every piece of it
        atexit.register(_end_at_once)
        for number, _ in handlers:  # a launcher that stops the others now must not cut the report short
            signal.signal(number, signal.SIG_IGN)
        if isinstance(e, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or else Python fails when it flushes
        if _speaks(e):
            print(_report(e), file=sys.stderr, flush=True)
        sys.exit(PREEMPTED if isinstance(e, (KeyboardInterrupt, Preempted)) else 2)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def as_options(text: str) -> str:
    """Return a message with its settings written as options of the command line.

    Examples:
        >>> as_options('`batch_size=0`: expected 1 or more; `streaming` needs more.')
        '--batch-size 0: expected 1 or more; --streaming needs more.'
    """
    def option(setting: 're.Match[str]') -> str:
        name, value = setting.groups()
        return f'--{name.replace("_", "-")}' + (f' {value}' if value else '')

    return SETTING.sub(option, text)


def _interrupt(number: int, frame: Optional[FrameType]) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _listen() -> List[Tuple[int, object]]:
    """Make SIGTERM do what Ctrl-C does; return the handlers before."""
    try:
        return [(number, signal.signal(number, _interrupt)) for number in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:  # not in the main thread, where nobody may set handlers
        return []


def _end_at_once() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _report(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return (
            f'Stopped by {str(error) or "SIGINT"}. The same command begins again; --resume auto lets a training run go '
            f'on from its last checkpoint.'
        )
    sentence = str(error) if isinstance(error, Preempted) else _sentence(error)
    if sentence is not None:
        sentence = as_options(' '.join(line.strip() for line in sentence.splitlines()))
        return sentence if isinstance(error, Preempted) else f'error: {sentence}'
    trace = ''.join(traceback.format_exception(error)).rstrip()
    return (
        f'This is a fault of timm_selfdistill {__version__}. Please report it where you got it from, with the '
        f'command and all that follows.\n$ {shlex.join(sys.argv)}\n{trace}'
    )


def _sentence(error: BaseException) -> Optional[str]:
    """Return a sentence for an error that the user can do something about; None for any other."""
    text = str(error)
    if isinstance(error, _SHARED):
        behind = os_error_behind(error)
        if behind is not None and behind.filename is not None and _cache(_path(behind)) is not None:
            return _system_sentence(behind)  # whoever passes on what a library says knows nothing of its cache
        return text or f'{type(error).__name__}.'
    if _out_of_memory(error):
        where = 'device' if isinstance(error, torch.OutOfMemoryError) else 'machine'
        said = text.partition('.')[0] if isinstance(error, torch.OutOfMemoryError) else text.rpartition('] ')[2]
        return (
            f'The memory of the {where} is full{f" ({said})" if said else ""}. A smaller --batch-size needs less; '
            f'in training also --grad-checkpointing, --grad-accum-steps, and fewer --workers.'
        )
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return (
            'Nobody reads the standard output any more, so the program has stopped. Send it to a file, or through tee; '
            'a training run goes on with --resume auto.'
        )
    if isinstance(error, OSError):
        return _system_sentence(error)
    if isinstance(error, ModuleNotFoundError) and error.name and find_spec(error.name.partition('.')[0]) is None:
        package = error.name.partition('.')[0]
        extra = 'export' if package.startswith('onnx') else 'demo' if package == 'gradio' else None
        source = f'timm_selfdistill[{extra}]' if extra else package
        return f'The package {package} is needed for this and is not installed; pip install "{source}" does it.'
    if _lost_others(error):
        return (
            f'Process {os.environ.get("RANK")} has lost the connection to another process of the run, which has ended '
            f'without a word; often it was killed because the memory was full. '
            f'The same command with --resume auto goes on from the last checkpoint.'
        )
    return None


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MEMORY)


def _lost_others(error: BaseException) -> bool:
    several = int(os.environ.get('WORLD_SIZE') or 1) > 1
    return several and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _system_sentence(error: OSError) -> Optional[str]:
    """Return a sentence for what the system has refused, None where it was not asked for anything that a user named."""
    if error.errno is None:  # libraries say in words what they have not found or reached
        known = isinstance(error, (ConnectionError, FileNotFoundError, TimeoutError)) and error.args
        return str(error) if known else None
    if error.filename is None and error.errno not in _REMEDIES:
        return None
    place = '' if error.filename is None else f'{_place(_path(error))}: '
    reason = error.strerror or os.strerror(error.errno)
    return f'{place}{reason.rstrip(".")}. {_REMEDIES.get(error.errno, "Choose another place.")}'


def _path(error: OSError) -> Path:
    return Path(os.fsdecode(error.filename))


def _place(path: Path) -> str:
    """Name a path by the option or the environment variable that it comes from, where one does."""
    for option, word in zip(sys.argv[1:], sys.argv[2:]):
        given = Path(word)
        beside = path.name.startswith('.') and path.parent == given.parent  # written there before it is renamed
        if option.startswith('-') and word and (given in (path, *path.parents) or beside):
            return f'{option} {word}' if path == given else f'{option} {word} ({path})'
    cache = _cache(path)
    if cache is not None:
        return f'{path} (the environment variable {cache[0]} says where the cache is, {cache[1]} now)'
    if path.parent == Path(tempfile.gettempdir()) and path.name.startswith(tempfile.gettempprefix()):
        return f'{path} (the environment variable TMPDIR says where temporary files are, {path.parent} now)'
    return str(path)


def _cache(path: Path) -> Optional[Tuple[str, Path]]:
    """Return the environment variable and the folder of the cache that a path belongs to, None if it is in none."""
    import datasets
    from huggingface_hub import constants

    for variable, folder in (
        ('HF_DATASETS_CACHE', datasets.config.HF_DATASETS_CACHE), ('HF_HUB_CACHE', constants.HF_HUB_CACHE),
        ('HF_HOME', constants.HF_HOME),
    ):
        folder = Path(folder)
        if folder == path or folder in path.parents or path in folder.parents:
            # the other two lie in HF_HOME unless they are set
            return (variable if variable in os.environ else 'HF_HOME'), folder
    return None


def _speaks(error: BaseException) -> bool:
    """Return whether this one of several processes is to report an error."""
    if getattr(error, 'local', False):
        _is_first()  # the others, which have lost this one, need not say so
        return True
    if isinstance(error, (*_SHARED, KeyboardInterrupt)):
        return os.environ.get('RANK', '0') == '0'
    return _is_first()


def _is_first() -> bool:
    """Return whether no other process of the run has asked this before, by the store that torch's launchers keep."""
    env = os.environ
    if int(env.get('WORLD_SIZE') or 1) < 2 or not env.get('MASTER_ADDR'):
        return True
    try:
        store = torch.distributed.TCPStore(
            env['MASTER_ADDR'], int(env['MASTER_PORT']), is_master=False, timeout=timedelta(seconds=5))
        return store.add(f'timm_selfdistill/failed/{env.get("TORCHELASTIC_RESTART_COUNT", 0)}', 1) == 1
    except (KeyError, RuntimeError, ValueError):  # there is none, or it is gone with the process that kept it
        return True
