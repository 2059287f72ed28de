"""What a search leaves for the report: iterates of every candidate, and the curves of the one that is returned."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.base import Callback, Progress
from gradleak.attacks.matching.evaluate import SLOTS, Group
from gradleak.clock import Deadline
from gradleak.solve import Outcome
from gradleak.types import Trace

__all__ = ["Recorder", "write_trace"]

_SPACING = 1.15
"""Iterates are kept at evaluations that grow by this factor: some sixty of ten thousand."""
_REPORTED = 0.1
"""Seconds between two reports of progress."""
_AFTER = 0.3
"""Seconds that writing curves may take once somebody waits for the result."""


class Recorder:
    """Keeps iterates of every candidate on a geometric schedule, and reports progress."""

    def __init__(self, group: Group, callback: Callback | None, total: int) -> None:
        """Begin with no candidate seen."""
        self.group, self.callback, self.total = group, callback, total
        self.best, self.last = float("inf"), 0.0
        self.offset = [0] * (len(group.problems) * group.restarts)
        self.frames: dict[int, list[tuple[int, Tensor]]] = {}
        self._rows: Tensor | None = None
        self._working: list[int] = []
        self._born: dict[int, int] = {}
        steps = {0}
        while max(steps) < total:
            steps.add(max(max(steps) + 1, int(max(steps) * _SPACING)))
        self._schedule = steps

    def stage(self, spent: list[int]) -> None:
        """Begin another run of the solver, on problems that have had ``spent`` evaluations."""
        self.offset, self._born, self._rows = spent, {}, None

    def __call__(self, step: int, rows: Tensor, x: Tensor, objective: Tensor) -> bool:
        """Take note of one round; never stops the run."""
        if self.group.attack.trace:
            if rows is not self._rows:
                self._rows, self._working = rows, rows.tolist()
                for r in self._working:
                    self._born.setdefault(r, step)
            for place, r in enumerate(self._working):
                age = step - self._born[r] + self.offset[r]
                if age in self._schedule:
                    self.frames.setdefault(r, []).append((age, x[place].detach().clone()))
        now = time.monotonic()
        if self.callback is not None and (now - self.last > _REPORTED or step + 1 >= self.total):
            self.last = now
            self.best = min(self.best, float(objective.min()))
            self.callback(Progress(min(step + 1, self.total), self.total, self.best, f"{len(rows)} candidates"))
        return False


def write_trace(group: Group, row: int, recorder: Recorder, outcome: Outcome, deadline: Deadline) -> Trace:
    """Evaluate the recorded iterates of one candidate: objective, distance per layer, decoded picture.

    Where the time is over or somebody interrupted, as many of them as :data:`_AFTER` allows, evenly spread.
    """
    given = group.arguments(row)
    space = group.space
    frames = recorder.frames.get(row, [])
    # The iterate that is returned closes the curve.
    last = max(int(outcome.evaluations[row]), frames[-1][0] + 1 if frames else 0)
    frames = [(step, z.to(group.like)) for step, z in frames] + [(last, outcome.x[row])]

    def measure(z: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        value, simulated, inputs = group.measure(z, given)
        return value, {k: (simulated[k] - v).square().sum() for k, v in given.observed.items()}, inputs

    with torch.no_grad():
        late = deadline.over or outcome.late or outcome.interrupted
        if late:
            began = time.monotonic()
            measure(frames[-1][1])
            count = max(2, int(_AFTER / max(time.monotonic() - began, 1e-6)))
            if count < len(frames):
                frames = [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]
        size = SLOTS if len(frames) > 1 and not late and group.vectorize else 1
        steps: list[int] = []
        objectives: list[float] = []
        pictures: list[Tensor] = []
        layers: dict[str, list[float]] = {k: [] for k in given.observed}
        for some in (frames[k : k + size] for k in range(0, len(frames), size)):
            if len(some) == 1:
                value, squares, inputs = measure(some[0][1])
                values, squares, batches = value[None], {k: v[None] for k, v in squares.items()}, inputs[None]
            else:
                values, squares, batches = vmap(measure)(torch.stack([z for _, z in some]))
            steps += [step for step, _ in some]
            objectives += values.tolist()
            for k in given.observed:
                layers[k] += squares[k].tolist()
            pictures += [space.decode(x).to(torch.float32).cpu() for x in batches]
    return Trace(tuple(steps), tuple(objectives), {k: tuple(v) for k, v in layers.items()}, torch.stack(pictures))
