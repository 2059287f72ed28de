"""Backends agree with the eager gradient, and what does not agree is not used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak.attacks.matching import backends
from gradleak.errors import InvalidInput, UnknownName

SHAPE = (1, 8, 8)


def observe(seed: int = 0, dtype: torch.dtype = torch.float64) -> gl.Observation:
    generator = torch.Generator().manual_seed(seed)
    batch = gl.Batch(
        torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64).to(dtype), torch.tensor([seed % 5])
    )
    model = gl.models.lenet(width=4, classes=5, in_channels=1, image_size=8, seed=seed).to(dtype)
    client = gl.Client(model, batch)
    return gl.ThreatModel().observe(
        model, client.send(), space=gl.ImageSpace(SHAPE), training=client.training, batch_size=1
    )


def attack(backend: str, *, vectorize: bool = True, restarts: int = 3) -> gl.attacks.matching.GradientMatching:
    # Few rounds and one number type: later on, rounding alone parts the paths.
    made = gl.attacks.dlg(iterations=12, restarts=restarts, trace=False)
    return dataclasses.replace(made, warm_dtype=None, backend=backend, vectorize=vectorize, race=False)


def same(ours: gl.Reconstruction, theirs: gl.Reconstruction) -> None:
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-4)
    torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_traced_vmapped_and_looped_agree() -> None:
    seen = observe()
    plain = attack("eager").reconstruct(seen)
    same(attack("eager", vectorize=False).reconstruct(seen), plain)
    same(attack("trace").reconstruct(seen), plain)
    same(attack("trace", vectorize=False, restarts=1).reconstruct(seen), attack("eager", restarts=1).reconstruct(seen))


def test_a_prepared_gradient_does_not_mix_up_tensors_that_come_in_another_order() -> None:
    seen = observe()
    tensors = dict(reversed(seen.update.tensors.items()))  # as a file may list them
    turned = dataclasses.replace(seen, update=gl.Update(tensors, seen.update.kind), key=seen.key)
    first = attack("trace").reconstruct(seen)
    second = attack("trace").reconstruct(turned)
    assert second.notes == ()
    same(second, first)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_agrees(dtype: torch.dtype) -> None:
    if not backends.can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    seen = [observe(i) for i in range(3)]  # Models of their own: vmap makes grouped convolutions of theirs.
    ours, plain = (
        dataclasses.replace(attack(b, restarts=2), dtype=dtype).reconstruct_all(seen) for b in ("compile", "eager")
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.notes == ()
        assert mine.objective == pytest.approx(theirs.objective, rel=1e-4)


def test_a_prepared_gradient_is_reused_and_distrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = backends.traced

    def counting(*arguments: object) -> object:
        made.append(arguments)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backends, "_prepared", type(backends._prepared)())
    monkeypatch.setattr(backends, "traced", counting)
    plain = attack("eager").reconstruct(observe(1))
    for _ in range(2):
        same(attack("trace").reconstruct(observe(1)), plain)
    assert len(made) == 1
    for key, function in list(backends._prepared.items()):

        def wrong(*tensors: Tensor, function: backends.Function = function) -> tuple[Tensor, Tensor]:
            values, gradients = function(*tensors)
            return values, 1.001 * gradients

        backends._prepared[key] = wrong
    found = attack("trace").reconstruct(observe(1))
    same(found, plain)
    assert any("disagreed" in n for n in found.notes)


def test_a_gradient_that_cannot_be_prepared_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> object:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(backends, "_prepared", type(backends._prepared)())
    monkeypatch.setattr(backends, "traced", broken)
    found = attack("trace").reconstruct(observe(2))
    same(found, attack("eager").reconstruct(observe(2)))
    assert any("no such thing" in n for n in found.notes)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_prepared", type(backends._prepared)())
    for i in range(40):
        backends.remember(i, lambda *t: (t[0], t[0]))
    assert len(backends._prepared) == backends._KEPT
    assert backends.prepared(39) is not None
    assert backends.prepared(0) is None


def test_rows_that_are_not_finite_must_be_so_in_both() -> None:
    good = (torch.tensor([1.0, 2.0]), torch.ones(2, 3))
    bad = (torch.tensor([1.0, float("nan")]), torch.ones(2, 3))
    assert backends.agree(good, good)
    assert backends.agree(bad, bad)
    assert not backends.agree(good, bad)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UnknownName, match="compile"):
        attack("compiled")
    with pytest.raises(InvalidInput, match="seconds above 0"):
        dataclasses.replace(attack("eager"), budget=0.0)
