from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from gradleak.cli.threads import choose_threads


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, which nobody asked for; afterwards as many as before."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def work(one: float, two: float, calls: list[int] | None = None) -> Callable[[], None]:
    """Return work that takes so many seconds with one thread and with two."""

    def run() -> None:
        if calls is not None:
            calls.append(torch.get_num_threads())
        time.sleep(one if torch.get_num_threads() == 1 else two)

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("one", "many", "chosen"), [(0.01, 0.004, 2), (0.01, 0.02, 1), (0.01, 0.1, 1), (0.5, 0.1, 2)])
def test_several_threads_must_pay_clearly(one: float, many: float, chosen: int) -> None:
    assert choose_threads(work(one, many)) == chosen
    assert torch.get_num_threads() == chosen


@pytest.mark.usefixtures("two")
def test_it_takes_no_longer_than_a_moment() -> None:
    began = time.perf_counter()
    choose_threads(work(0.001, 0.001))
    assert time.perf_counter() - began < 2


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[int] = []
    monkeypatch.setenv(name, "2")
    assert choose_threads(work(0.001, 0.1, calls)) == 2
    assert not calls
