"""Which restarts go on: those far behind the best of their observation end, and so do all once one has converged."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence

__all__ = ["Race"]

_RUNG, _BEHIND = 100, 10.0
"""Restarts are compared after 100, 200, 400 … evaluations; one ends whose objective is more than 10 times the best and
above the median. On LeNets, restarts that end well are seldom that far behind so late; nothing depends on the numbers
being just these."""


class Race:
    """Ends restarts that are not needed, and shares a limited time among those who wait for their turn."""

    def __init__(self, restarts: int, tolerance: float, *, on: bool, share: float | None) -> None:
        """Prepare a race of ``restarts`` per observation; candidate r belongs to observation r // restarts.

        A candidate at ``tolerance`` has converged, which decides the race of its observation; ``on`` says whether
        restarts are compared at all; ``share`` are the seconds that each may work while others wait, None for no limit.
        """
        self.restarts, self.on = restarts, on and restarts > 1
        self.tolerance, self.share = tolerance, share
        self.decided: set[int] = set()
        self.dropped: set[int] = set()
        self._rungs: dict[tuple[int, int], list[float]] = {}
        self._at: dict[int, int] = {}
        self._since: dict[int, float] = {}

    def __call__(
        self, rows: Sequence[int], ages: Sequence[int], objectives: Sequence[float], waiting: bool
    ) -> Collection[int]:
        """Return which of the candidates ``rows`` end, given their evaluations so far and their objectives."""
        ended: set[int] = set()
        if self.on:
            self.decided |= {r // self.restarts for r, f in zip(rows, objectives, strict=True) if f <= self.tolerance}
            ended |= {r for r in rows if r // self.restarts in self.decided}
            for r, age, f in zip(rows, ages, objectives, strict=True):
                rung = int(math.log2(age / _RUNG)) if age >= _RUNG else -1
                if rung > self._at.get(r, -1):
                    self._at[r] = rung
                    seen = self._rungs.setdefault((r // self.restarts, rung), [])
                    if seen and f > _BEHIND * min(seen) and f > sorted(seen)[len(seen) // 2]:
                        ended.add(r)
                    seen.append(f)
        if self.share is not None and waiting:
            now = time.monotonic()
            ended |= {r for r in rows if now - self._since.setdefault(r, now) > self.share}
        self.dropped |= ended
        return ended
