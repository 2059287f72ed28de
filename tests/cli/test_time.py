from __future__ import annotations

import importlib
import os
import signal
import time

import pytest

from gradleak.cli.signals import Watch
from gradleak.clock import Deadline, TimeSpent

FILES = ["reconstruction.safetensors", "report.html", "result.json", "trace.safetensors"]

ATTACKS = """
import os, signal, time
import torch
from gradleak.attacks.base import Attack, Progress
from gradleak.threat import Knowledge
from gradleak.types import Reconstruction


class Slow(Attack):
    requires = Knowledge.BATCH_SIZE

    def __init__(self, asks, sends, best): self.asks, self.sends, self.best = asks, sends, best

    def _reconstruct(self, observations, seed, callback):
        end = time.monotonic() + 60
        try:
            for name in filter(None, self.sends.split(",")):
                os.kill(os.getpid(), getattr(signal, name))
            while time.monotonic() < end:
                time.sleep(0.002)
                if self.asks:
                    callback(Progress(1, 2, 0.5))
        except KeyboardInterrupt:
            if not self.best:
                raise
        shape = observations[0].space.shape
        return [Reconstruction(torch.full((o.batch_size, *shape), 0.5), None, 1.0, status="interrupted")
                for o in observations]


def slow(*, asks: bool = True, sends: str = "", best: bool = True): return Slow(asks, sends, best)
"""


@pytest.fixture
def slow(case):
    """Run an attack that takes a minute unless it is stopped; it may send signals to itself."""
    (case.folder / "slow.py").write_text(ATTACKS)

    def go(*, budget: str | None = None, **options: object):
        words = [w for k, v in options.items() for w in ("--attack-option", f"{k}={v}")]
        began = time.monotonic()
        done = case.attack(*words, attack="slow.py:slow", budget=budget)
        return done, time.monotonic() - began

    return go


@pytest.mark.slow
@pytest.mark.parametrize("asks", [True, False])
def test_a_spent_budget_is_no_interruption_and_holds_in_every_phase(case, slow, asks: bool) -> None:
    slow(budget="0.01s")  # what is imported and rendered for the first time counts for nobody
    done, seconds = slow(budget="0.5s", asks=asks)
    assert done.code == 0, done.err
    assert case.record().outcome.status == "budget"
    assert any("time budget" in note for note in case.record().outcome.notes)
    assert seconds < 0.5 * 1.1 + 2
    assert sorted(os.listdir(case.folder / "out")) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_writes_the_best_so_far_and_says_so(case, slow, name: str, code: int, asks: bool) -> None:
    number = getattr(signal, name)
    outer = signal.signal(number, signal.default_int_handler)  # Under nohup SIGHUP is ignored, and stays so.
    try:
        before = signal.getsignal(number), signal.getsignal(signal.SIGALRM)
        done, seconds = slow(sends=name, asks=asks)
        after = signal.getsignal(number), signal.getsignal(signal.SIGALRM)
    finally:
        signal.signal(number, outer)
    assert done.code == code
    assert "interrupted" in done.err
    assert case.record().outcome.status == "interrupted"
    assert sorted(os.listdir(case.folder / "out")) == FILES
    assert seconds < 20  # It takes a minute unless it is stopped.
    assert after == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_second_interruption_gives_up_and_writes_nothing(case, slow) -> None:
    done, seconds = slow(sends="SIGINT,SIGINT", best=False)
    assert done.code == 130
    assert "nothing was written" in done.err
    assert not (case.folder / "out").exists()
    assert seconds < 20


@pytest.mark.parametrize(("options", "code"), [({"budget": "0.3s"}, 0), ({"sends": "SIGTERM"}, 143)])
def test_a_run_that_has_found_nothing_in_its_time_says_so(case, slow, options: dict[str, str], code: int) -> None:
    done, _ = slow(best=False, **options)
    assert done.code == code
    found = case.record()
    assert found.outcome.status == ("budget" if code == 0 else "interrupted")
    assert found.certificate.verdict == "unproved"
    assert "before any attack had found anything" in found.certificate.reason
    assert found.verdict.grade == "unmatched"


def test_a_signal_that_the_program_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Watch(Deadline()) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert watch.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_shield_keeps_the_watchdog_away_and_no_longer() -> None:
    deadline, kept = Deadline(0.01), []

    def put_away() -> None:
        with deadline.shield():
            time.sleep(0.8)
            kept.append(1)
        time.sleep(10)

    with Watch(deadline), pytest.raises(TimeSpent):
        put_away()
    assert kept


def test_an_import_is_not_torn_apart(tmp_path, monkeypatch) -> None:
    (tmp_path / "takes_a_while.py").write_text("import time\ntime.sleep(1)\ndone = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    imported = []

    def late() -> None:
        imported.append(importlib.import_module("takes_a_while").done)
        time.sleep(10)

    with Watch(Deadline(0.01)), pytest.raises(TimeSpent):
        late()
    assert imported


def test_nothing_is_torn_apart_once_the_result_is_there() -> None:
    with Watch(Deadline(0.01)) as watch:
        watch.rest()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.7)
        assert watch.exit_code == 143


def test_auto_is_the_default_and_is_told_its_time_budget(case) -> None:
    done = case.attack(attack=None, budget="1m")
    assert done.code == 0, done.err
    found = case.record()
    assert found.attack.name == "auto"
    assert found.attack.options["budget"] == 60
