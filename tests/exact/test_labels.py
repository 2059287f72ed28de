"""Labels from the head's gradient: exact for one example, counted for a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.exact.labels import neighbors, one_hot_label, recover_labels, round_counts
from gradleak.models import lenet
from gradleak.structure.head import Head
from gradleak.training import CrossEntropy, FedSGD, parameters

SHAPE = (1, 8, 8)


def victim(classes: int = 10, dtype: torch.dtype = torch.float64) -> nn.Module:
    return lenet(width=6, classes=classes, in_channels=1, image_size=8, seed=0).to(dtype)


def gradient(model: nn.Module, labels: Tensor, loss: CrossEntropy, seed: int = 0) -> dict[str, Tensor]:
    params = parameters(model)
    like = next(iter(params.values()))
    x = torch.rand(len(labels), *SHAPE, generator=torch.Generator().manual_seed(seed)).to(like)
    return FedSGD(loss).tensors(model, params, x, labels)


class NoBias(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.fc = nn.Linear(32, classes, bias=False)
        generator = torch.Generator().manual_seed(3)
        for p in self.parameters():
            nn.init.uniform_(p, -0.3, 0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.hidden(x.flatten(1))))


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy("sum"), CrossEntropy(label_smoothing=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_example_is_proved(loss: CrossEntropy, dtype: torch.dtype) -> None:
    model = victim(dtype=dtype)
    for label in range(10):
        update = gradient(model, torch.tensor([label]), loss, seed=label)
        found = recover_labels(model, parameters(model), update, SHAPE, 1, loss)
        assert found.labels.tolist() == [label]
        assert found.exact


def test_confident_model_with_smoothing_needs_the_feature() -> None:
    # p_y exceeds 1 − ε, so every other logit is pulled harder than the label's: the sign rule fails, the proof holds.
    model = victim()
    with torch.no_grad():
        model.fc[0].bias[4] = 6.0
    loss = CrossEntropy(label_smoothing=0.3)
    update = gradient(model, torch.tensor([4]), loss)
    assert one_hot_label(None, update["fc.0.bias"]) != 4
    found = recover_labels(model, parameters(model), update, SHAPE, 1, loss)
    assert found.labels.tolist() == [4]
    assert found.exact


def test_sign_rule() -> None:
    model = victim()
    update = gradient(model, torch.tensor([7]), CrossEntropy())
    assert one_hot_label(update["fc.0.weight"], update["fc.0.bias"]) == 7
    assert one_hot_label(update["fc.0.weight"], None) == 7
    with pytest.raises(NotApplicable, match="share"):
        one_hot_label(None, None)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy("sum"), CrossEntropy(label_smoothing=0.2)])
def test_counts_of_a_batch(loss: CrossEntropy) -> None:
    model = victim(classes=30)
    for seed, size in enumerate((2, 3, 5, 8, 12, 20)):
        labels = torch.randint(0, 30, (size,), generator=torch.Generator().manual_seed(seed))
        found = recover_labels(model, parameters(model), gradient(model, labels, loss, seed), SHAPE, size, loss)
        assert found.labels.tolist() == sorted(labels.tolist())
        assert int(found.counts.sum()) == size
        if len(set(labels.tolist())) == size <= 5:
            assert found.exact


def test_unique_classes_give_exact_features() -> None:
    model = victim(classes=30)
    labels = torch.tensor([3, 17, 21])
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    update = gradient(model, labels, CrossEntropy())
    found = recover_labels(model, parameters(model), update, SHAPE, 3, CrossEntropy())
    assert found.exact
    truth: list[Tensor] = []
    handle = model.fc[0].register_forward_pre_hook(lambda _m, args: truth.append(args[0]))
    model(torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(x))
    handle.remove()
    assert found.features is not None
    assert torch.allclose(found.features, truth[0], rtol=1e-6)


def test_repeated_class_is_counted_but_not_called_exact() -> None:
    model = victim(classes=30)
    labels = torch.tensor([5, 5, 5, 9])
    found = recover_labels(model, parameters(model), gradient(model, labels, CrossEntropy()), SHAPE, 4, CrossEntropy())
    assert found.labels.tolist() == [5, 5, 5, 9]
    assert not found.exact
    assert "rounded" in found.reason


def test_head_without_bias() -> None:
    model = NoBias(20).double()
    for label in range(20):
        update = gradient(model, torch.tensor([label]), CrossEntropy(), seed=label)
        found = recover_labels(model, parameters(model), update, SHAPE, 1, CrossEntropy())
        assert found.labels.tolist() == [label]
        assert found.exact
    labels = torch.tensor([2, 2, 11, 19])
    found = recover_labels(model, parameters(model), gradient(model, labels, CrossEntropy()), SHAPE, 4, CrossEntropy())
    assert found.labels.tolist() == [2, 2, 11, 19]
    assert not found.exact
    assert "no bias" in found.reason


def test_two_classes_without_bias_are_not_proved() -> None:
    # (h, y) and (−h, 1 − y) have the same gradient, so no one can prove the label.
    model = NoBias(2).double()
    update = gradient(model, torch.tensor([1]), CrossEntropy())
    assert not recover_labels(model, parameters(model), update, SHAPE, 1, CrossEntropy()).exact


def test_noised_update_is_not_called_exact() -> None:
    model = victim(classes=30)
    labels = torch.tensor([3, 17, 21])
    generator = torch.Generator().manual_seed(0)
    update = {
        k: v + 1e-4 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in gradient(model, labels, CrossEntropy()).items()
    }
    found = recover_labels(model, parameters(model), update, SHAPE, 3, CrossEntropy())
    assert found.labels.tolist() == labels.tolist()
    assert not found.exact


def test_other_losses_and_headless_models_say_what_to_do() -> None:
    model = victim()
    update = gradient(model, torch.tensor([1]), CrossEntropy())
    with pytest.raises(NotApplicable, match="pass the labels"):
        recover_labels(model, parameters(model), update, SHAPE, 1, nn.functional.mse_loss)
    headless = nn.Sequential(model, nn.Softmax(1))
    with pytest.raises(NotApplicable, match="pass the labels"):
        recover_labels(headless, parameters(headless), update, SHAPE, 1, CrossEntropy())


@given(
    raw=st.lists(st.floats(-3, 9, allow_nan=False), min_size=1, max_size=12),
    total=st.integers(0, 40),
)
def test_rounding_sums_to_the_total(raw: list[float], total: int) -> None:
    values = torch.tensor(raw, dtype=torch.float64)
    counts = round_counts(values, total)
    assert int(counts.sum()) == total
    assert bool((counts >= 0).all())


@given(counts=st.lists(st.integers(0, 5), min_size=2, max_size=10), seed=st.integers(0, 1000))
def test_rounding_returns_perturbed_counts(counts: list[int], seed: int) -> None:
    truth = torch.tensor(counts)
    noise = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(round_counts(truth + 0.8 * (noise - 0.5), int(truth.sum())), truth)


def test_neighbors_move_one_example_closest_call_first() -> None:
    model = NoBias(20).double()
    labels = torch.tensor([2, 2, 11, 19])
    found = recover_labels(model, parameters(model), gradient(model, labels, CrossEntropy()), SHAPE, 4, CrossEntropy())
    others = list(neighbors(found, 5))
    assert len(others) == 5
    for other in others:
        assert int((other.counts - found.counts).abs().sum()) == 2
        assert int(other.counts.sum()) == 4
    moved = [float((found.raw - o.counts).norm()) for o in others]
    assert moved[0] == min(moved)


def test_head_logits_use_its_bias() -> None:
    head = Head("fc", "fc.weight", "fc.bias", torch.eye(3), torch.arange(3.0))
    assert torch.equal(head.logits(torch.ones(2, 3)), torch.tensor([[1.0, 2.0, 3.0]] * 2))
