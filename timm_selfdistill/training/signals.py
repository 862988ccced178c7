"""Being asked to stop, by a scheduler that wants its machine back or by Ctrl-C."""
import os
import signal
import time
from types import FrameType
from typing import Any, Dict, Optional

__all__ = ['StopSignals']

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
