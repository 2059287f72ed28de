"""Time and signals: what ends a run from outside, in whatever phase it is."""

from __future__ import annotations

import signal
import threading
import types
from typing import Any

from gradleak.cli.console import warn
from gradleak.clock import Deadline, TimeSpent

__all__ = ["Watch"]

_GRACE, _LEAST_GRACE = 0.05, 0.5
"""Share of the budget, and seconds, that a phase has to notice by itself that the time is over."""
_AGAIN = 1.0
"""Seconds until a phase that began after the time was over is ended as well."""
_SHIELDED = 0.05
"""Seconds until a watchdog looks again that came while a result was put away, or a module imported."""
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Watch:
    """While it is entered, signals and a spent budget end the run with its best so far.

    A first Ctrl-C, SIGTERM or SIGHUP cuts the deadline short; a second Ctrl-C gives up at once. Phases that ask the
    deadline, or call back, end at their next step. A timer ends the others, a little later: it raises
    :class:`TimeSpent` in the main thread, again and again, for as long as the run goes on.
    """

    def __init__(self, deadline: Deadline) -> None:
        """Watch over ``deadline``, which starts when it is made."""
        self.deadline = self._current = deadline
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._mine, self._resting = False, False

    def __enter__(self) -> Watch:
        """Take over the signals; only the main thread may, elsewhere they keep their usual meaning."""
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                # A program that was started with a signal ignored (nohup) goes on ignoring it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._asked)
            if hasattr(signal, "SIGALRM"):
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
                self._mine = True
                self.limit(self.deadline)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        self.rest()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def limit(self, current: Deadline) -> None:
        """Set the timer for a phase that has a deadline of its own within that of the run."""
        self._resting = False
        self._current, left = current, current.left()
        if left < float("inf"):
            self._wake(left + max(_GRACE * left, _LEAST_GRACE))

    def rest(self) -> None:
        """Stop the timer: what follows, such as writing the result, is not torn apart."""
        self._resting = True
        if self._mine:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal that ended the run, 0 if none did."""
        return 0 if self.signal is None else 128 + self.signal

    def _wake(self, after: float) -> None:
        if self._mine and not self._resting:
            signal.setitimer(signal.ITIMER_REAL, after)

    def _asked(self, number: int, _: types.FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.deadline.cut()
        self._wake(_LEAST_GRACE)
        warn("Stopping; press Ctrl-C (once more) to give up at once.")

    def _late(self, _: int, frame: types.FrameType | None) -> None:
        if self._resting:
            return
        if self._current.shielded or _importing(frame):
            self._wake(_SHIELDED)
            return
        self._wake(_AGAIN)
        raise TimeSpent


def _importing(frame: types.FrameType | None) -> bool:
    """Tell whether a module is being imported: torn apart, it would stay half-made for everything that follows."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
