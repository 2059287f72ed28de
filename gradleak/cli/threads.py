"""How many threads a command computes with: as many as this model, on this machine as busy as it is, gains from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

import gradleak.models
from gradleak.exchange import Client
from gradleak.types import Batch

__all__ = ["choose_threads", "typical_work"]

_CLEARLY = 0.8
"""Share of one thread's time below which more threads are taken. Threads of small operations wait for each other all
the time: where another program holds one core, each of these waits can last a time slice of the scheduler, and a
search takes ten times as long. So several threads must pay clearly."""
_ROUNDS, _SECONDS = 4, 0.6
_SLICE = 0.04
"""Seconds that one timing takes at least: several time slices, so that a core that is busy elsewhere shows."""
_SET_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def typical_work() -> Callable[[], object]:
    """Return one gradient of the paper's LeNet, for a command whose work is of many kinds."""
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Client(gradleak.models.lenet(seed=0), Batch(images, torch.tensor([0]))).send


def choose_threads(work: Callable[[], object]) -> int:
    """Set and return the number of threads with which ``work`` is fastest; the user's own choice is left alone.

    ``work`` is a small piece of what the command will do over and over. One thread and all of them take turns, so that
    a change of the machine's load meets both, and whole times are compared rather than best ones: a best time does not
    show how often a thread had to wait.
    """
    many = torch.get_num_threads()
    if many == 1 or any(os.environ.get(name, "").strip() for name in _SET_BY):
        return many
    spent = {many: 0.0, 1: 0.0}
    end = time.perf_counter() + _SECONDS
    repeats = 1
    for turn in range(_ROUNDS + 1):
        for count in spent:
            torch.set_num_threads(count)  # noqa: TID251 - the process is the command's own
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            taken = time.perf_counter() - began
            spent[count] = taken if turn <= 1 else spent[count] + taken
        if turn == 0:  # which warms up, and counts only where nothing else will
            repeats = max(1, round(_SLICE / max(taken, 1e-6)))
        if time.perf_counter() > end:
            break
    chosen = many if spent[many] < _CLEARLY * spent[1] else 1
    torch.set_num_threads(chosen)  # noqa: TID251 - the process is the command's own
    return chosen
