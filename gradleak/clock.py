"""One deadline for a whole run: every phase asks it how much time is left, and it can be cut short from outside."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

__all__ = ["Deadline", "TimeSpent"]


class TimeSpent(KeyboardInterrupt):
    """The time is over; whoever holds a result so far returns it.

    It is a ``KeyboardInterrupt``, so that everything that answers Ctrl-C with its best so far answers it as well, and
    nothing that catches ``Exception`` swallows it.
    """


class Deadline:
    """A point in time that one run shares among its phases; None stands for no limit.

    The command line lets a watchdog raise :class:`TimeSpent` in the main thread a little after the deadline, in
    whatever phase does not ask by itself. A phase that must not be torn apart, because it puts a result away, runs
    inside :meth:`shield`.
    """

    def __init__(self, seconds: float | None = None, *, within: Deadline | None = None) -> None:
        """Start the clock: ``seconds`` from now, or no limit; ``within`` is a deadline that ends this one, too."""
        self.seconds = seconds
        self._until = math.inf if seconds is None else time.monotonic() + seconds
        self._within = within
        self._shields = 0
        self._cut = False

    def left(self) -> float:
        """Return the seconds that are left, 0 once it is over, infinity without a limit."""
        own = max(0.0, self._until - time.monotonic())
        return own if self._within is None else min(own, self._within.left())

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return self.left() <= 0

    def raise_if_over(self) -> None:
        """Raise :class:`TimeSpent` if the time is used up."""
        if self.over:
            raise TimeSpent

    def cut(self) -> None:
        """End the run now: somebody pressed Ctrl-C, or the system asks the program to stop."""
        self._until, self._cut = min(self._until, time.monotonic()), True

    @property
    def cut_short(self) -> bool:
        """Whether :meth:`cut` ended the run, rather than its time."""
        return self._cut or (self._within is not None and self._within.cut_short)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Keep the watchdog from raising inside this block, which must be short."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    @property
    def shielded(self) -> bool:
        """Whether a block runs that must not be torn apart."""
        return self._shields > 0

    def part(self, share: float) -> Deadline:
        """Return a deadline for a phase that gets ``share`` of the time that is left."""
        left = self.left()
        return Deadline(None if left == math.inf else share * left, within=self)
