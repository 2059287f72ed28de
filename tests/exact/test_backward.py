"""The recursion for batches: layer inputs of all examples from shared weight gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from gradleak.exact.backward import Walked, walk_back
from gradleak.exact.counting import obstacle
from gradleak.exact.layer_iterative import Known
from gradleak.structure.chain import Chain
from gradleak.structure.reader import trace_chain

Tensors = dict[str, Tensor]


def mlp(act: type[nn.Module], *, widths: tuple[int, ...] = (12, 24, 20, 9), bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


def convolutions(stride: int, groups: int = 1, width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, stride=stride),
        nn.Tanh(),
        nn.Conv2d(12, width, 3, padding=1, groups=groups),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(width * (6 // stride) ** 2, 8),
    )


def known(
    model: nn.Module, x: Tensor, noise: float = 0.0, seed: int = 0
) -> tuple[Chain, Tensors, Tensors, list[Tensor]]:
    """Return chain, parameters, gradients, and true features and cotangents of a batch of distinct labels."""
    last = list(model.modules())[-1]
    assert isinstance(last, nn.Linear)
    weight = next(n for n, p in model.named_parameters() if p is last.weight)
    kept: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    out = model(x)
    hook.remove()
    loss = nn.functional.cross_entropy(out, torch.arange(len(x)))
    names = [n for n, _ in model.named_parameters()]
    *grads, cotangents = torch.autograd.grad(loss, [*model.parameters(), kept[0]])
    draw = torch.Generator().manual_seed(seed)
    seen = {
        n: g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=draw, dtype=torch.float64)
        for n, g in zip(names, grads, strict=True)
    }
    params = {n: p.detach() for n, p in model.named_parameters()}
    return trace_chain(model, tuple(x.shape[1:]), anchor=weight), params, seen, [kept[0].detach(), cotangents]


def walk(chain: Chain, params: Tensors, seen: Tensors, features: Tensor, cotangents: Tensor) -> Walked:
    noise = 2.0**-52
    deviation = 16 * noise * float(features.square().mean().sqrt())
    known = Known.plain(features, cotangents, deviation, torch.Generator().manual_seed(0))
    return walk_back(chain, params, seen, known, noise)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("bias", [True, False])
def test_every_example_of_a_batch_through_linear_layers(act: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    x = drawn(5, 12)
    chain, params, seen, (features, cotangents) = known(mlp(act, bias=bias).double(), x)
    found = walk(chain, params, seen, features, cotangents)
    assert found.index == 0, found.stop
    assert found.stop is None
    torch.testing.assert_close(found.known.values, x, rtol=0, atol=1e-9)
    assert [r.determined for r in found.layers] == [True, True]


@pytest.mark.parametrize(("stride", "groups", "count"), [(1, 1, 2), (2, 1, 3), (1, 3, 1), (2, 2, 4)])
def test_convolutions_with_stride_and_groups(stride: int, groups: int, count: int) -> None:
    torch.manual_seed(0)
    x = drawn(count, 2, 6, 6)
    chain, params, seen, (features, cotangents) = known(convolutions(stride, groups).double(), x)
    found = walk(chain, params, seen, features, cotangents)
    stops = obstacle(chain, params, seen, count)
    if stops is None:
        assert found.index == 0, found.stop
        torch.testing.assert_close(found.known.values, x.flatten(1), rtol=0, atol=1e-6)
    else:
        assert stops == found.stop


def test_it_stops_where_equations_are_too_few_and_keeps_what_it_has() -> None:
    torch.manual_seed(0)
    x = drawn(4, 2, 6, 6)
    model = convolutions(1, width=5).double()
    chain, params, seen, (features, cotangents) = known(model, x)
    found = walk(chain, params, seen, features, cotangents)
    # 5 · 9 gradient equations and 4 · 5 · 36 outputs over 12 channels: too few for the 4 · 36 values of a channel.
    assert found.index == len(chain.steps)
    assert found.stop is not None
    assert "1728 unknowns, 720 forward and 540 gradient equations of rank at most 1260" in found.stop
    assert math.isnan(found.error)
    torch.testing.assert_close(found.known.values, features)
    assert obstacle(chain, params, seen, 4) == found.stop
    assert obstacle(chain, params, seen, 1) is None


def test_outputs_help_where_gradient_equations_are_too_few() -> None:
    torch.manual_seed(0)
    x = drawn(4, 2, 6, 6)
    chain, params, seen, (features, cotangents) = known(convolutions(1).double(), x)
    found = walk(chain, params, seen, features, cotangents)
    assert obstacle(chain, params, seen, 4) is None
    assert found.index == 0, found.stop
    assert [(r.unknowns, r.forward, r.gradient) for r in found.layers] == [(1728, 1728, 1296), (288, 1728, 216)]
    assert float((found.known.values - x.flatten(1)).square().mean().sqrt()) <= found.error
    assert found.error <= 1e-3


def test_a_layer_whose_gradient_is_not_shared_ends_it() -> None:
    torch.manual_seed(0)
    chain, params, seen, (features, cotangents) = known(mlp(nn.Tanh).double(), drawn(3, 12))
    del seen["3.weight"]  # of a layer with fewer outputs than inputs
    found = walk(chain, params, seen, features, cotangents)
    assert found.index > 0
    assert obstacle(chain, params, seen, 3) == found.stop
    assert "0 gradient equations" in str(found.stop)


def test_outputs_do_where_the_gradient_is_not_shared_and_they_are_more() -> None:
    torch.manual_seed(0)
    x = drawn(3, 12)
    chain, params, seen, (features, cotangents) = known(mlp(nn.Tanh).double(), x)
    del seen["1.weight"]
    assert obstacle(chain, params, seen, 3) is None
    found = walk(chain, params, seen, features, cotangents)
    assert found.index == 0, found.stop
    assert "72 forward and 0 gradient equations" in str(found.layers[-1])
    torch.testing.assert_close(found.known.values, x, rtol=0, atol=1e-6)


def test_what_is_averaged_cannot_pass_an_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(12, 12, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(12 * 9, 8),
    ).double()  # fmt: skip
    chain, params, seen, (features, cotangents) = known(model, drawn(2, 2, 6, 6))
    found = walk(chain, params, seen, features, cotangents)
    assert found.index == 3
    assert "'2' keeps 108 of the 432 values" in str(found.stop)
    assert obstacle(chain, params, seen, 2) == found.stop


def test_the_predicted_error_covers_the_true_one() -> None:
    covered, tight = 0, 0
    for seed in range(20):
        torch.manual_seed(seed)
        x = drawn(4, 12, seed=seed)
        noisy = known(mlp(nn.Tanh).double(), x, noise=1e-6, seed=seed)
        found = walk(*noisy[:3], *noisy[3])
        assert found.index == 0, found.stop
        error = float((found.known.values - x).square().mean(1).sqrt().max())
        covered += error <= found.error
        tight += found.error <= 10 * error
    # Three standard errors of the worst example, from residuals with 12 to 16 degrees of freedom per channel.
    assert covered >= 18
    assert tight >= 18


def test_noise_beyond_the_tolerance_is_not_taken_for_an_answer() -> None:
    torch.manual_seed(0)
    noisy = known(mlp(nn.Tanh).double(), drawn(4, 12), noise=1e-2)
    found = walk(*noisy[:3], *noisy[3])
    assert found.index > 0
    assert "not determined well enough" in str(found.stop)


def test_the_error_is_told_in_units_of_the_input_where_the_model_scales_it() -> None:
    torch.manual_seed(0)
    layers = mlp(nn.Tanh)
    scaled = nn.Sequential(nn.BatchNorm2d(3), *layers).double().eval()
    norm = scaled[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    norm.running_var.fill_(1e6)
    small = known(layers.double(), drawn(4, 3, 2, 2), noise=1e-7)
    large = known(scaled, 1e3 * drawn(4, 3, 2, 2), noise=1e-7)
    one, thousand = walk(*small[:3], *small[3]), walk(*large[:3], *large[3])
    assert one.index == thousand.index == 0
    assert thousand.error == pytest.approx(1e3 * one.error, rel=0.5)
    assert float((thousand.known.values - 1e3 * drawn(4, 12)).square().mean(1).sqrt().max()) <= thousand.error
