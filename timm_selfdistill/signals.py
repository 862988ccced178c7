"""Being asked to stop, by a scheduler that wants its machine back or by Ctrl-C."""
import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, Dict, Iterator, Optional

__all__ = ['Preempted', 'StopSignals', 'keep_worker_alive', 'starting_workers']

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Preempted(RuntimeError):
    """Training was asked to stop and has; the message says how to go on."""


class StopSignals:
    """While entered, SIGTERM and SIGINT are noted instead of obeyed; one that comes `PATIENCE` seconds later is obeyed.

    Sooner it is no second thought: a launcher passes on what the terminal or the scheduler has told all processes.

    Attributes:
        received: Name of the signal that came, None so far.
    """

    PATIENCE = 5.

    def __init__(self):
        self.received: Optional[str] = None
        self._before: Dict[int, Any] = {}

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > self.PATIENCE:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> 'StopSignals':
        try:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        except ValueError:  # not in the main thread, where nobody may set handlers
            pass
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()


def keep_worker_alive(worker: int) -> None:
    """Let a loader's worker end with the trainer and not before, for `worker_init_fn`.

    Schedulers and terminals signal all processes at once, and without its workers the trainer could not finish the step
    after which it writes its checkpoint. So a worker ignores Ctrl-C, and SIGTERM unless the trainer itself has sent it,
    by which Python ends its children; that one, and the trainer's death, end it wherever it is. Where the system does
    not tell who sent a signal (macOS, Windows), every SIGTERM ends it, and so it may in a worker that was not
    started within `starting_workers`.
    """
    trainer = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if trainer is None or not hasattr(signal, 'sigtimedwait'):
        return
    # threads that start from here on inherit it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_end, args=(trainer, os.getppid()), daemon=True).start()


@contextmanager
def starting_workers() -> Iterator[None]:
    """Let worker processes that start here be born with SIGTERM and SIGINT blocked, in all of their threads.

    Before `keep_worker_alive` is called in them either would end them. And in those that are not forked from this
    process (by default from Python 3.14 on) libraries have started threads by then, any of which may take a signal.
    """
    if not hasattr(signal, 'sigtimedwait'):
        yield
        return
    if multiprocessing.get_start_method() != 'fork':
        resource_tracker.ensure_running()  # when it starts, it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(_SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await_end(trainer: multiprocessing.Process, system_parent: int) -> None:
    """End this process when its trainer wants that or is gone; a fork server may be what the system calls its parent.

    The trainer's sentinel alone would not do: a pipe stays open as long as a worker forked later has inherited it.
    """
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.)
        if received is not None and received.si_pid == trainer.pid:
            break
        if os.getppid() != system_parent or not trainer.is_alive():
            break
    os._exit(0)  # an orphan's threads may wait for ever to hand over a batch
