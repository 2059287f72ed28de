"""What surrounds the solvers: slots, racing restarts, the time budget, memory, coordinates."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak.attacks.base import Attack, Progress
from gradleak.attacks.matching import LBFGS, Adam, StepDecay, engine, memory
from gradleak.attacks.matching.coordinates import NaturalImages
from gradleak.attacks.matching.race import Race
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import InvalidInput, ResourceLimit
from gradleak.types import Status

SHAPE = (1, 8, 8)


def observe(seed: int = 0) -> gl.Observation:
    generator = torch.Generator().manual_seed(seed)
    batch = gl.Batch(torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64), torch.tensor([seed % 5]))
    client = gl.Client(gl.models.lenet(width=4, classes=5, in_channels=1, image_size=8, seed=seed).double(), batch)
    return gl.ThreatModel().observe(
        client.model, client.send(), space=gl.ImageSpace(SHAPE), training=client.training, batch_size=1
    )


def bowl(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.linspace(1, 30, x.shape[1], dtype=x.dtype)
    return 0.5 * (scale * x.square()).sum(1), scale * x


@pytest.mark.parametrize("solver", [LBFGS(iterations=60, check_every=5), Adam(iterations=60, check_every=5, lr=0.1)])
def test_slots_change_the_order_of_work_and_nothing_else(solver: LBFGS | Adam) -> None:
    start = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start[3] *= 1e-6  # One is done at once and gives its place to another.
    together = solver.minimize(bowl, start, tolerance=1e-9)
    seen: list[int] = []
    few = solver.minimize(
        bowl, start, tolerance=1e-9, slots=2, monitor=lambda step, rows, x, f: seen.append(len(rows)) or False
    )
    assert max(seen) == 2
    torch.testing.assert_close(few.evaluations, together.evaluations)
    torch.testing.assert_close(few.x, together.x, rtol=1e-4, atol=1e-6)


def test_rounds_spent_before_count() -> None:
    start = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for solver in (LBFGS(iterations=40), Adam(iterations=40)):
        found = solver.minimize(bowl, start, spent=[40, 30, 30])
        assert int(found.evaluations[0]) == 0
        assert int(found.evaluations[1]) in (10, 11)  # First-order solvers look at their last iterate too.
        torch.testing.assert_close(found.x[0], start[0])


def test_a_converged_restart_ends_the_others() -> None:
    seen = observe(1)
    attack = gl.attacks.dlg(restarts=4, tolerance=1e-6, trace=False)
    attack = dataclasses.replace(attack, solver=LBFGS(iterations=2000, check_every=1))
    racing, patient = (dataclasses.replace(attack, race=race).reconstruct(seen) for race in (True, False))
    assert racing.status == patient.status == "converged"
    assert racing.objective <= 1e-6
    assert racing.evaluations < patient.evaluations


def test_restarts_far_behind_are_dropped() -> None:
    race = Race(4, 0.0, on=True, share=None)
    rows = range(4)
    assert race(rows, [75] * 4, [1.0, 1e-3, 1e-3, 1e-3], False) == set()
    assert race(rows, [100] * 4, [1e-3, 1.1e-3, 1e-3, 1.0], False) == {3}
    assert race(rows, [125] * 4, [1e-3, 1.0, 1e-3, 1.0], False) == set()
    assert race.dropped == {3}


def slow(name: str, budget: float | None, **options: int) -> Attack:
    """Return an attack that would go on for hours."""
    made = getattr(gl.attacks, name)(iterations=10**6, budget=budget, **options)
    if name != "inverting_gradients":
        made = dataclasses.replace(made, tolerance=0.0, solver=LBFGS(iterations=10**6, patience=10**6))
    return made


@pytest.mark.parametrize("restarts", [1, 40])
@pytest.mark.parametrize("name", ["dlg", "idlg", "inverting_gradients"])
def test_a_time_budget_returns_the_best_so_far(name: str, restarts: int) -> None:
    attack, seen = slow(name, 0.4, restarts=restarts), [observe(i) for i in range(2)]
    began = time.monotonic()
    found = attack.reconstruct_all(seen)
    assert 0.4 <= time.monotonic() - began < 1.1 * 0.4 + 2  # also on a busy machine
    for one in found:
        assert one.status is Status.BUDGET
        assert one.trace is not None
        assert one.objective <= 1.001 * one.trace.objectives[0]  # which is computed in float64
        assert "The search was ended by its time budget." in one.notes


def test_time_that_ends_while_curves_are_written_costs_the_curves_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise TimeSpent

    monkeypatch.setattr(engine, "write_trace", late)
    found = gl.attacks.dlg(iterations=20).reconstruct(observe())
    assert found.trace is None
    assert found.evaluations >= 20


def test_a_budget_that_is_over_at_once_still_measures_every_observation() -> None:
    found = slow("dlg", 1e-6, restarts=2).reconstruct_all([observe(i) for i in range(2)])
    assert all(one.status is Status.BUDGET and 0 < one.objective < 1e3 for one in found)


@pytest.mark.parametrize(("error", "status"), [(TimeSpent, Status.BUDGET), (KeyboardInterrupt, Status.INTERRUPTED)])
@pytest.mark.parametrize("name", ["dlg", "inverting_gradients"])
def test_time_spent_elsewhere_is_no_interruption(name: str, error: type[BaseException], status: Status) -> None:
    def callback(progress: Progress) -> None:
        raise error

    assert slow(name, None).reconstruct(observe(), callback=callback).status is status


@dataclasses.dataclass
class Clock:
    """A clock that only a test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_shortens_the_schedule_instead_of_cutting_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rates = Clock(), list[float]()
    monkeypatch.setattr(time, "monotonic", clock)

    @dataclasses.dataclass(frozen=True)
    class Heard(StepDecay):
        def __call__(self, progress: float) -> float:
            rates.append(super().__call__(progress))
            return rates[-1]

    def second(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        clock.now += 1.0
        return bowl(x, rows)

    solver, start = Adam(iterations=400, schedule=Heard()), torch.ones(1, 3, dtype=torch.float64)
    for seconds, rounds in ((80.0, 80), (1000.0, 401)):
        rates.clear()
        found = solver.minimize(second, start, deadline=Deadline(seconds))
        assert int(found.evaluations) == rounds
        assert found.late == (seconds < 400)
        shares = [rates.count(pytest.approx(0.1**k)) / len(rates) for k in range(4)]
        assert shares == pytest.approx([3 / 8, 2 / 8, 2 / 8, 1 / 8], abs=0.02)
    # Groups that take turns share the time.
    rates.clear()
    found = solver.minimize(second, start.repeat(4, 1), slots=2, deadline=Deadline(160.0))
    assert found.evaluations.tolist() == [80, 80, 80, 80]
    assert min(rates) == pytest.approx(1e-3)


def test_memory_limits_the_slots_and_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available(torch.device("cpu")) > 0
    assert memory.fitting(8, 100, 0, once=0, free=300) == 2
    assert memory.fitting(8, 10, 0, once=0, free=10**6) == 8
    with pytest.raises(ResourceLimit, match="smaller batch"):
        memory.fitting(1, 1000, 0, once=0, free=100)
    monkeypatch.setattr(engine, "available", lambda device: 1000)
    with pytest.raises(ResourceLimit, match="GiB"):
        gl.attacks.dlg(iterations=2).reconstruct(observe())


def test_the_estimate_counts_what_a_gradient_makes() -> None:
    x = torch.zeros(1000, dtype=torch.float64)
    assert memory.candidate_bytes(lambda z: (2 * z).view(10, 100).sum(), (x,)) == 8008
    assert memory.candidate_bytes(lambda z: z * z.sum().item(), (x,)) == 0


def test_coordinates_are_one_to_one_and_start_at_gray() -> None:
    space, natural = gl.ImageSpace((3, 6, 5), mean=(0.5,), std=(0.25,)), NaturalImages()
    zero = torch.zeros(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(space.decode(natural.inputs(zero, space)), zero + 0.5)
    jacobian = torch.func.jacrev(lambda z: natural.inputs(z.view(1, 3, 6, 5), space).flatten())(zero[0].flatten())
    assert int(torch.linalg.matrix_rank(jacobian)) == 90
    # Brightness: the mean square of unit-variance coordinates, in image units.
    assert float((0.25 * jacobian).square().sum() / 90) == pytest.approx((1 + 2 * 0.3**2) / 3)
    plain = gl.TensorSpace((4,))
    assert natural.inputs(zero[0, 0, :4, :4], plain) is not None


def test_a_box_and_coordinates_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="box"):
        dataclasses.replace(gl.attacks.inverting_gradients(), coordinates=NaturalImages())
