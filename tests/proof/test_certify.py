"""The certificate: what it must say, what it must never say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak import defenses
from gradleak.clock import Deadline
from gradleak.errors import InvalidModel
from gradleak.formats import number_format, storage_deviation
from gradleak.models import lenet
from gradleak.proof import certify as proof
from gradleak.solve.jacobian import jacobian
from gradleak.training import CrossEntropy, FedAvg, FedSGD, LocalTraining, Simulator
from gradleak.types import Batch, Certificate, Construction

SHAPE = (1, 8, 8)


def certify(
    model: nn.Module,
    update: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    training: LocalTraining | None = None,
    **options: Any,
) -> Certificate:
    return proof.certify(Simulator(model, training), update, inputs, labels, **options)


def victim(n: int = 2, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batch]:
    model = lenet(width=6, classes=5, in_channels=1, image_size=8, seed=0).to(dtype)
    draw = torch.Generator().manual_seed(1)
    return model, Batch(torch.rand(n, *SHAPE, generator=draw).to(dtype), torch.arange(n) % 5)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "certificate.py"
    spec = importlib.util.spec_from_file_location("certificate_trials", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_never_wrong_on_random_trials(benchmark: ModuleType) -> None:
    trials = [benchmark.trial(seed) for seed in range(5000, 5000 + len(benchmark.SCENARIOS))]
    found = benchmark.summary(trials)
    assert found["wrong"] == 0, found["wrong_trials"]
    assert found["of_these_unproved"] == 0, found["missed_trials"]
    assert found["proofs"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [FedSGD(), FedAvg(lr=0.1, epochs=2)], ids=["gradient", "two steps"])
def test_the_truth_is_proved(dtype: torch.dtype, training: FedSGD | FedAvg) -> None:
    model, batch = victim(dtype=dtype)
    found = certify(model, training(model, batch).tensors, batch.inputs, batch.labels, training=training)
    assert (found.verdict, found.examples) == ("proved", ("proved", "proved"))
    assert found.rank == found.unknowns == 128
    assert found.residual <= found.floor
    assert found.floor < (1e-5 if dtype is torch.float32 else 5e-14)


def test_bound_holds_and_is_not_loose() -> None:
    model, batch = victim(dtype=torch.float64)
    off = batch.inputs + 1e-10 * torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(0)).double()
    single = {k: v.float() for k, v in FedSGD()(model, batch).tensors.items()}
    found = certify(model, single, off, batch.labels, training=FedSGD())
    assert found.verdict == "proved"
    assert found.bound is not None
    assert 1e-10 < found.bound < 1e-4


@pytest.mark.parametrize(
    ("what", "blame"),
    [
        ("inputs", "differs"),
        ("labels", "differs"),
        ("reduction", "factor of 0.5"),
        ("noise", "differs"),
        ("prune", "differs"),
    ],
)
def test_what_differs_is_not_proved(what: str, blame: str) -> None:
    model, batch = victim()
    update = dict(FedSGD()(model, batch).tensors)
    inputs, labels, believed = batch.inputs.clone(), batch.labels.clone(), FedSGD()
    if what == "inputs":
        inputs[0, 0, 0, 0] += 1e-3
    elif what == "labels":
        labels[0] = 3
    elif what == "reduction":
        believed = FedSGD(CrossEntropy("sum"))
    elif what == "noise":
        update = defenses.gaussian_noise(1e-4).transform(update, torch.Generator().manual_seed(0))
    else:
        update = defenses.prune(0.1).transform(update)
    found = certify(model, update, inputs, labels, training=believed)
    assert blame in found.reason
    # A wrong reduction changes the scale only, which is fitted and told: the inputs are proved all the same.
    assert found.verdict == ("proved" if what == "reduction" else "unproved")


def test_an_update_of_limits_alone_matches_nothing() -> None:
    model, batch = victim(1)
    training = defenses.clamp(1e-6).wrap(FedSGD())
    seen = training(model, batch).tensors
    for inputs in (batch.inputs, 1 - batch.inputs):
        found = certify(model, seen, inputs, batch.labels, training)
        assert found.verdict == "unproved"
        assert "limited or zeroed" in found.reason


def test_equal_examples_match_but_are_not_proved() -> None:
    model, batch = victim(3, torch.float64)
    inputs = batch.inputs.clone()
    inputs[1] = inputs[0]
    labels = torch.tensor([0, 0, 1])
    found = certify(model, FedSGD()(model, Batch(inputs, labels)).tensors, inputs, labels, training=FedSGD())
    assert found.verdict == "matched"
    assert found.examples == ("matched", "matched", "proved")
    assert found.rank is not None
    assert found.unknowns is not None
    assert found.rank < found.unknowns


def test_dead_units_leave_the_input_open() -> None:
    first = nn.Linear(6, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        first.bias.fill_(-100)
    batch = Batch(torch.rand(1, 6, dtype=torch.float64), torch.tensor([1]))
    found = certify(model, FedSGD()(model, batch).tensors, batch.inputs + 1, batch.labels, training=FedSGD())
    assert (found.verdict, found.mixture) == ("matched", True)
    assert found.rank is None  # Nothing can be proved any more, so the Jacobian is not computed.


def test_known_rounding_is_part_of_the_floor() -> None:
    model, batch = victim(1)
    half = defenses.half_precision().wrap(FedSGD())
    update = half(model, batch).tensors
    assert number_format(update) is torch.float16
    for training in (half.known(), FedSGD()):  # the format shows in the numbers, told or not
        found = certify(model, update, batch.inputs, batch.labels, training=training)
        assert found.verdict == "proved"
        assert 1e-4 < found.floor < 1e-2


def test_unknown_training_leaves_a_factor_open() -> None:
    model, batch = victim(1)
    found = certify(model, FedAvg(lr=0.25)(model, batch).tensors, batch.inputs, batch.labels)
    assert found.verdict == "proved"
    assert found.factor == pytest.approx(-0.25, rel=1e-5)


def test_probabilities_count_as_unknowns() -> None:
    model, batch = victim(1, torch.float64)
    soft = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64)
    update = FedSGD()(model, Batch(batch.inputs, soft)).tensors
    assert certify(model, update, batch.inputs, soft, training=FedSGD()).verdict == "proved"


def test_a_construction_replaces_the_jacobian() -> None:
    model, batch = victim(1)
    update = FedSGD()(model, batch).tensors
    sure = Construction(64, 1e-7, "every layer was solved")
    found = certify(model, update, batch.inputs, batch.labels, training=FedSGD(), construction=sure)
    assert found.verdict == "proved"
    assert "every layer was solved" in found.reason
    vague = Construction(64, 1.0, "every layer was solved")
    assert certify(model, update, batch.inputs, batch.labels, construction=vague).verdict == "matched"


def test_too_many_unknowns_are_matched_only() -> None:
    model, batch = victim(1)
    update = FedSGD()(model, batch).tensors
    found = certify(model, update, batch.inputs, batch.labels, training=FedSGD(), largest=10)
    assert found.verdict == "matched"
    assert "unknown" in found.reason
    asked = certify(model, update, batch.inputs, batch.labels, training=FedSGD(), largest=10, uniqueness=True)
    assert asked.verdict == "proved"


def test_zero_update_and_random_masks() -> None:
    model, batch = victim(1)
    zero = {k: torch.zeros_like(v) for k, v in FedSGD()(model, batch).tensors.items()}
    assert certify(model, zero, batch.inputs, batch.labels).verdict == "unproved"
    masked = nn.Sequential(model, nn.Dropout(0.5)).train()
    with pytest.raises(InvalidModel, match="dropout"):
        certify(masked, {f"0.{k}": v for k, v in zero.items()}, batch.inputs, batch.labels)


def test_number_formats() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=draw, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert number_format({"w": x.to(dtype)}) is dtype
        assert number_format({"w": x.to(dtype).double()}) is dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = x.to(dtype).double()
        whitened = (rounded - x) / storage_deviation(rounded, dtype)
        assert float(whitened.square().mean().sqrt()) == pytest.approx(1, abs=0.05)
    assert number_format({"w": torch.ones(3)}) is torch.float32


def test_a_certificate_costs_in_proportion_to_what_it_may_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = victim()
    update, simulate, runs = FedSGD()(model, batch).tensors, Simulator.update, []

    def counted(self: Simulator, *arguments: Any) -> dict[str, Tensor]:
        runs.append(1)
        return simulate(self, *arguments)

    monkeypatch.setattr(Simulator, "update", counted)
    options: dict[str, Any] = {"training": FedSGD(), "uniqueness": False}
    assert certify(model, update, batch.inputs.flip(3), batch.labels, **options).verdict == "unproved"
    assert len(runs) == 3  # the candidate, and one sample of the rounding
    runs.clear()
    assert certify(model, update, batch.inputs, batch.labels, **options).verdict == "matched"
    assert len(runs) == 7 + 13  # three samples, then six directions


def test_the_jacobian_ends_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = victim()
    over = iter([False, True])  # before the Jacobian, within it
    monkeypatch.setattr(Deadline, "over", property(lambda _: next(over)))
    update = FedSGD()(model, batch).tensors
    found = certify(model, update, batch.inputs, batch.labels, training=FedSGD(), deadline=Deadline())
    assert found.verdict == "matched"
    assert "the time ended" in found.reason


def test_jacobian() -> None:
    A = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.linspace(-1, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(jacobian(lambda v: (A @ v).sin(), z), ((A @ z).cos()[:, None] * A).T)
