"""Features of every example of a batch, with a verdict each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradleak.errors import InvalidInput, ResourceLimit
from gradleak.exact.features import CLASS_SPAN, EXACT, NOT_IDENTIFIABLE, Disaggregation, disaggregate
from gradleak.exact.labels import LabelEstimate
from gradleak.exact.mixing import MixingEquations
from gradleak.structure.head import Head
from gradleak.training import CrossEntropy


def batch(
    labels: list[int], classes: int = 40, width: int = 64, *, seed: int = 0, bias: bool = True
) -> tuple[Head, Tensor, Tensor]:
    """A head and the features of a batch, float64, spread like those of a sigmoid network."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.3 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    offset = 0.3 * torch.randn(classes, generator=generator, dtype=torch.float64) if bias else None
    common = torch.rand(width, generator=generator, dtype=torch.float64)
    own = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    head = Head("fc", "fc.weight", "fc.bias" if bias else None, weight, offset)
    return head, common + 0.3 * own, torch.tensor(sorted(labels))


def gradients(head: Head, features: Tensor, labels: Tensor, loss: CrossEntropy) -> tuple[Tensor, Tensor | None]:
    weight = head.weight.clone().requires_grad_()
    logits = features @ weight.T
    variables = [weight]
    if head.bias is not None:
        bias = head.bias.clone().requires_grad_()
        logits, variables = logits + bias, [weight, bias]
    found = torch.autograd.grad(loss(logits, labels), variables)
    return found[0], found[1] if head.bias is not None else None


def known(labels: Tensor, classes: int) -> LabelEstimate:
    counts = torch.bincount(labels, minlength=classes)
    return LabelEstimate(counts, labels, False, "known", counts.double())


def solve(
    labels: list[int], loss: CrossEntropy | None = None, *, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[Disaggregation, Tensor]:
    loss = CrossEntropy() if loss is None else loss
    head, features, y = batch(labels, **options)  # type: ignore[arg-type]
    gw, gb = gradients(head, features, y, loss)
    found = disaggregate(gw.to(dtype), None if gb is None else gb.to(dtype), head, known(y, head.classes), loss=loss)
    return found, features


def error(found: Disaggregation, features: Tensor) -> Tensor:
    """Relative to the spread, nearest match within the class: (B,)."""
    spread = (features - features.mean(0)).norm() / math.sqrt(len(features)) if len(features) > 1 else features.norm()
    same = found.labels[:, None] == found.labels
    distance = torch.where(same, torch.cdist(found.features, features), torch.inf)
    return distance.min(1).values / spread


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy("sum")])
@pytest.mark.parametrize("labels", [[3], [0, 9], [1, 5, 22, 30], list(range(0, 36, 3))])
def test_distinct_classes(labels: list[int], loss: CrossEntropy, bias: bool) -> None:
    found, features = solve(labels, loss, bias=bias)
    assert float(error(found, features).max()) < 1e-9
    assert found.verdicts == (EXACT,) * len(labels)
    assert bool(found.exact.all())
    assert found.rank == len(labels)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("labels", [[4, 4], [4, 4, 7, 7, 20], [2, 2, 2, 11, 30, 31]])
def test_repeated_classes(labels: list[int], bias: bool) -> None:
    found, features = solve(labels, bias=bias)
    assert float(error(found, features).max()) < 1e-6
    assert found.verdicts == (EXACT,) * len(labels)


def test_label_smoothing() -> None:
    found, features = solve([1, 1, 8, 30], CrossEntropy(label_smoothing=0.1))
    # The smoothing itself is held in single precision, so float64 gradients stop near 1e-8.
    assert float(error(found, features).max()) < 1e-5
    assert found.verdicts == (EXACT,) * 4


def test_float32_updates_and_predicted_errors() -> None:
    for seed in range(5):
        found, features = solve([0, 5, 5, 12, 20, 33], dtype=torch.float32, seed=seed)
        actual = error(found, features)
        assert float(actual.max()) < 1e-3
        assert bool((actual <= found.errors).all())
        assert found.verdicts == (EXACT,) * 6


def test_twins_are_not_called_exact() -> None:
    # Two examples of one class whose features agree to 1e-6: their mean is determined, they are not.
    head, features, y = batch([6, 6, 13, 27], seed=2)
    features[1] = features[0] + 1e-6 * (features[1] - features[0])
    gw, gb = gradients(head, features, y, CrossEntropy())
    assert gb is not None
    found = disaggregate(gw.float(), gb.float(), head, known(y, 40))
    assert found.verdicts[2:] == (EXACT, EXACT)
    spread = (features - features.mean(0)).norm() / 2
    mean = (found.features[:2].mean(0) - features[:2].mean(0)).norm() / spread
    assert float(mean) < 1e-3
    for k in (0, 1):
        assert found.verdicts[k] == CLASS_SPAN or float(error(found, features)[k]) < 1e-2


def test_noise_is_reported_in_the_errors() -> None:
    head, features, y = batch([3, 14, 14, 29])
    gw, gb = gradients(head, features, y, CrossEntropy())
    assert gb is not None
    generator = torch.Generator().manual_seed(1)
    scale = 0.05 * float(gw.abs().mean())
    noisy = gw + scale * torch.randn(gw.shape, generator=generator, dtype=gw.dtype)
    found = disaggregate(noisy, gb, head, known(y, 40))
    assert EXACT not in found.verdicts
    assert bool((error(found, features) <= found.errors).all())


def test_wrong_counts_are_not_explained() -> None:
    head, features, y = batch([3, 14, 14, 29])
    gw, gb = gradients(head, features, y, CrossEntropy())
    for wrong in ([3, 3, 14, 29], [3, 14, 14, 30]):
        found = disaggregate(gw, gb, head, known(torch.tensor(wrong), 40))
        assert EXACT not in found.verdicts
        assert found.residual > 1e6 * found.floor


def test_more_examples_than_rank() -> None:
    found, features = solve([k % 5 for k in range(5)], classes=5)
    assert found.verdicts == (NOT_IDENTIFIABLE,) * 5
    assert "rank at most 4" in found.reason
    assert found.features.shape == features.shape
    assert not bool(found.exact.any())


def test_limits_are_errors_with_a_remedy() -> None:
    head, features, y = batch(list(range(100)), classes=200, width=150)
    gw, gb = gradients(head, features, y, CrossEntropy())
    with pytest.raises(ResourceLimit, match="at most 96"):
        disaggregate(gw, gb, head, known(y, 200))
    with pytest.raises(InvalidInput, match="recover_labels"):
        disaggregate(gw, gb, head, known(y[:3], 201))


def test_dead_features_are_zero() -> None:
    head, features, y = batch([1, 8, 30])
    features[:, ::4] = 0
    gw, gb = gradients(head, features, y, CrossEntropy())
    found = disaggregate(gw, gb, head, known(y, 40))
    assert float(error(found, features).max()) < 1e-9
    assert bool((found.features[:, ::4] == 0).all())


def test_a_head_that_sees_nothing_shows_nothing() -> None:
    head, features, y = batch([0, 1, 2])
    gw, gb = gradients(head, torch.zeros_like(features), y, CrossEntropy())
    found = disaggregate(gw, gb, head, known(y, head.classes))
    assert set(found.verdicts) == {NOT_IDENTIFIABLE}
    assert "zero" in found.reason


def test_same_seed_same_result() -> None:
    first, second = (solve([4, 4, 4, 9, 21], dtype=torch.float32)[0] for _ in range(2))
    assert torch.equal(first.features, second.features)


def test_derivatives_are_exact() -> None:
    head, features, y = batch([4, 4, 9, 11], classes=12, width=10, seed=3)
    gw, gb = gradients(head, features, y, CrossEntropy(label_smoothing=0.1))
    means = torch.stack([features[:2].mean(0), features[2], features[3]])
    system = MixingEquations.build(gw, gb, head, known(y, 12), means, CrossEntropy(label_smoothing=0.1))
    generator = torch.Generator().manual_seed(0)
    mixing = system.starts(means, known(y, 12), 2, generator)

    def flat(a: Tensor) -> Tensor:
        return system.residual(a.view(1, 4, 4))[1].flatten()

    p, residual = system.residual(mixing)
    m, d, normal = system.jacobian(p, mixing)
    pulled = system.pull(m, d, mixing, residual)
    step = torch.randn(mixing.shape, generator=generator, dtype=mixing.dtype)
    bent = system.bend(p, mixing, step)
    for r in range(2):
        jacobian = torch.func.jacrev(flat)(mixing[r].flatten())
        assert torch.allclose(normal[r], jacobian.T @ jacobian, rtol=1e-10, atol=1e-12)
        assert torch.allclose(pulled[r], jacobian.T @ residual[r].flatten(), rtol=1e-10, atol=1e-12)
        here, there = mixing[r].flatten(), step[r].flatten()

        def along(t: Tensor, here: Tensor = here, there: Tensor = there) -> Tensor:
            return flat(here + t * there)

        second = torch.func.jacrev(torch.func.jacrev(along))(torch.zeros((), dtype=torch.float64))
        assert torch.allclose(bent[r].flatten(), second, rtol=1e-10, atol=1e-12)
