"""Convolutions with a lean second derivative: the same numbers, fewer convolutions."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import gradleak as gl
from gradleak.attacks.matching import evaluate
from gradleak.attacks.matching.convolutions import LeanConvolutions
from gradleak.models import resnet18

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d, strided": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "2d": (nn.Conv2d(2, 4, 3, padding=1), (3, 2, 6, 6)),
    "2d, no bias": (nn.Conv2d(2, 4, (3, 1), bias=False), (3, 2, 6, 6)),
    "2d, grouped and dilated": (nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding=(2, 1)), (2, 4, 7, 8)),
    "2d, padding by name": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 6, 6)),
    "2d, reflected padding": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 6, 6)),
    "2d, one example without a batch": (nn.Conv2d(2, 3, 3), (2, 6, 6)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


class Counter(TorchDispatchMode):
    """Counts convolutions and their adjoints, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.count += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


def derivatives(layer: nn.Module, shape: tuple[int, ...], lean: bool) -> list[Tensor]:
    """Return a value, its first derivatives, second derivatives of all of those, and third ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    parameters = {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}
    leaves = [x, *parameters.values()]
    moved = {k: 1.0 * p for k, p in parameters.items()}  # No leaves: as after a local step.
    with LeanConvolutions() if lean else nullcontext():
        value = functional_call(layer, moved, (x,)).tanh().square().sum()
    first = torch.autograd.grad(value, leaves, create_graph=True)
    weights = [torch.randn(f.shape, dtype=f.dtype, generator=generator) for f in first]
    found = torch.autograd.grad([(f * w).sum() for f, w in zip(first, weights, strict=True)], leaves, create_graph=True)
    third = torch.autograd.grad([f.square().sum() for f in found], leaves)
    return [value, *first, *found, *third]


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_all_orders_are_pytorchs(name: str) -> None:
    layer, shape = CASES[name]
    for ours, theirs in zip(derivatives(layer, shape, True), derivatives(layer, shape, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("leaf", [True, False])
def test_derivatives_of_some_first_derivatives_only(chosen: tuple[int, ...], leaf: bool) -> None:
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parameters = [p.detach().double().requires_grad_() for p in CASES["2d"][0].parameters()]
    found = []
    for context in (LeanConvolutions(), nullcontext()):
        weight, bias = parameters if leaf else (1.0 * p for p in parameters)
        with context:
            value = F.conv2d(input=x, weight=weight, bias=bias, padding=1).tanh().square().sum()
        leaves = [source for i, source in enumerate((x, weight, bias)) if i in chosen]
        first = torch.autograd.grad(value, leaves, create_graph=True)
        found.append(torch.autograd.grad([f.square().sum() for f in first], [x] if leaf else [x, *parameters]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_computed_bias_passes_its_gradient_on_beside_a_given_weight() -> None:
    weight, shift = (torch.randn(4, *s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3), ()))
    x = torch.rand(1, 2, 5, 5, dtype=torch.float64)
    found = []
    for context in (LeanConvolutions(), nullcontext()):
        with context:
            value = F.conv2d(x, weight, 2 * shift).tanh().sum()
        found.append(torch.autograd.grad(value, shift)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [gl.FedSGD(), gl.FedAvg(lr=0.1, steps=2)], ids=["one gradient", "two steps"])
def test_a_search_sees_the_same_gradient(training: gl.LocalTraining) -> None:
    """In two local steps the weights depend on the input, so their share of the second derivative counts."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    )
    model = model.double()
    y, weights = torch.tensor([0, 2]), dict(model.named_parameters())
    found = []
    for context in (LeanConvolutions(), nullcontext()):
        x = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        with context:
            tensors = training.tensors(model, {k: w.detach() for k, w in weights.items()}, x, y)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in tensors.values()), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_large_model_is_searched_with_fewer_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven for each layer instead of eight: one forward, two back, three through those, and one back to the input."""
    client = gl.Client(resnet18(width=8, seed=0).eval(), gl.Batch(torch.rand(1, 3, 8, 8), torch.tensor([1])))
    monkeypatch.setattr(evaluate, "_VMAP_LIMIT", 0)  # so that it counts as large
    seen = gl.ThreatModel().observe(
        client.model, client.send(), space=gl.ImageSpace((3, 8, 8)), training=client.training, batch_size=1
    )
    attack = dataclasses.replace(gl.attacks.inverting_gradients(iterations=2, trace=False), backend="eager")
    counts, found = [], []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(evaluate, "LeanConvolutions", nullcontext)
        with Counter() as counter:
            found += attack._reconstruct([seen], 0, None)  # without a certificate, which takes far longer
        counts.append(counter.count)
    layers = sum(isinstance(m, nn.Conv2d) for m in client.model.modules())
    # Nothing to spare in the first layer, whose input's gradient is not part of the update.
    assert counts[1] - counts[0] == found[0].evaluations * (layers - 2)
    torch.testing.assert_close(found[0].inputs, found[1].inputs)
