from __future__ import annotations

import math
import time

import pytest

from gradleak.clock import Deadline, TimeSpent


def test_no_limit() -> None:
    deadline = Deadline()
    assert deadline.left() == math.inf
    assert not deadline.over
    deadline.raise_if_over()
    assert deadline.part(0.5).left() == math.inf


def test_a_limit_passes() -> None:
    deadline = Deadline(0.02)
    assert 0 < deadline.left() <= 0.02
    deadline.raise_if_over()
    time.sleep(0.03)
    assert deadline.over
    assert deadline.left() == 0
    with pytest.raises(TimeSpent):
        deadline.raise_if_over()
    assert not deadline.cut_short


def test_cutting_ends_the_parts_too() -> None:
    deadline = Deadline(100)
    half = deadline.part(0.5)
    assert 49 < half.left() <= 50
    deadline.cut()
    assert deadline.over
    assert half.over
    assert deadline.cut_short


def test_a_part_ends_alone() -> None:
    deadline = Deadline(100)
    half = deadline.part(0.5)
    half.cut()
    assert half.over
    assert not deadline.over


def test_who_answers_ctrl_c_answers_a_spent_time() -> None:
    with pytest.raises(KeyboardInterrupt):
        Deadline(0).raise_if_over()


def test_shields_nest() -> None:
    deadline = Deadline()
    with deadline.shield():
        with deadline.shield():
            assert deadline.shielded
        assert deadline.shielded
    assert not deadline.shielded
