"""One layer of a batch from its outputs and its gradient together: what is determined, and how well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.exact.joint import Outputs, solve_jointly
from gradleak.structure.chain import Affine
from gradleak.structure.reader import trace_chain

N, SIDE = 3, 8


def layer(outs: int, groups: int = 1, stride: int = 2, channels: int = 4) -> tuple[Affine, Tensor, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outs, 5, stride=stride, padding=2, groups=groups)
    width = SIDE // stride
    model = nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(outs * width**2, 3)).double()
    step = trace_chain(model, (channels, SIDE, SIDE)).steps[0]
    assert isinstance(step, Affine)
    return step, conv.weight.detach(), conv.bias.detach()  # type: ignore[union-attr]


def named(step: Affine, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {step.weight_name: weight, str(step.bias_name): bias}


def problem(
    step: Affine, weight: Tensor, bias: Tensor, noise: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Outputs]:
    """Return inputs, weight gradient and what is known of the outputs, where activations are off by ``noise``."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x = torch.rand(N, *step.in_shape, generator=draw, dtype=torch.float64)
    params = named(step, weight, bias)
    z = step.forward(x, params).flatten(1)
    above = normal(*z.shape)  # gradient behind a sigmoid

    def pull(z: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        return above * s * (1 - s)

    live = weight.clone().requires_grad_()
    out = step.forward(x, params | {step.weight_name: live}).flatten(1)
    (gradient,) = torch.autograd.grad((out * pull(z)).sum(), live)
    gradient = gradient + noise * gradient.square().mean().sqrt() * normal(*gradient.shape)
    s = torch.sigmoid(z)
    slope = s * (1 - s)
    seen = z + noise / slope * normal(*z.shape)
    s = torch.sigmoid(seen)
    outputs = Outputs(seen, (slope / max(noise, 1e-12)).square(), pull(seen), above * s * (1 - s) * (1 - 2 * s))
    return x.flatten(1), gradient, outputs


@pytest.mark.parametrize(("outs", "groups", "stride"), [(8, 1, 2), (12, 2, 2), (4, 1, 1), (7, 1, 2)])
def test_both_kinds_of_equation_determine_what_neither_does(outs: int, groups: int, stride: int) -> None:
    step, weight, bias = layer(outs, groups, stride)
    x, gradient, outputs = problem(step, weight, bias)
    # The outputs are fewer than the inputs, or as many in an ill-conditioned map.
    assert step.outputs <= step.inputs
    found = solve_jointly(step, named(step, weight, bias), gradient, outputs, 1e-15)
    assert found.complete
    assert float((found.values - x).square().mean().sqrt()) <= 1e-4


def test_outputs_alone_where_they_are_more() -> None:
    step, weight, bias = layer(40)
    x, _, outputs = problem(step, weight, bias)
    found = solve_jointly(step, named(step, weight, bias), None, outputs, 1e-15)
    assert found.complete
    assert float((found.values - x).square().mean().sqrt()) <= 1e-6


@pytest.mark.parametrize("outs", [1, 3])
def test_a_direction_that_no_equation_touches_is_noticed(outs: int) -> None:
    step, weight, bias = layer(outs)
    x, gradient, outputs = problem(step, weight, bias)
    unknown = step.inputs * N
    assert outs * 25 * step.channels + step.outputs * N < unknown
    found = solve_jointly(step, named(step, weight, bias), gradient, outputs, 1e-15)
    assert not found.complete
    assert float((found.values - x).square().mean().sqrt()) > 1e-3


def test_a_single_input_without_any_weight_is_noticed() -> None:
    step, weight, bias = layer(40, channels=2)
    weight[:, 0] = 0  # The layer ignores a channel, and no gradient is shared.
    x, _, outputs = problem(step, weight, bias)
    assert not solve_jointly(step, named(step, weight, bias), None, outputs, 1e-15).complete
    assert x.shape[1] == step.inputs


def test_outputs_that_a_saturated_activation_hides_cost_only_their_own_equation() -> None:
    step, weight, bias = layer(40)
    x, gradient, outputs = problem(step, weight, bias)
    hidden = torch.rand(outputs.values.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    wrong = Outputs(
        torch.where(hidden, 50.0, outputs.values),
        torch.where(hidden, 0.0, outputs.weights),
        outputs.pull,
        outputs.bend,
    )
    found = solve_jointly(step, named(step, weight, bias), gradient, wrong, 1e-15)
    assert found.complete
    assert float((found.values - x).square().mean().sqrt()) <= 1e-5


def test_the_predicted_error_is_that_of_the_worst_example() -> None:
    ratios = []
    for seed in range(16):
        step, weight, bias = layer(8)
        x, gradient, outputs = problem(step, weight, bias, noise=1e-7, seed=seed)
        found = solve_jointly(step, named(step, weight, bias), gradient, outputs, 1e-7)
        assert found.complete
        ratios.append(float((found.values - x).square().mean(1).max().sqrt()) / found.deviation)
    # One standard error each: three cover, and a tenth would be an idle warning.
    assert max(ratios) <= 3
    assert min(ratios) >= 0.1


def test_it_ends_when_it_is_told_to() -> None:
    step, weight, bias = layer(8)
    _, gradient, outputs = problem(step, weight, bias)
    with pytest.raises(NotApplicable, match="time ended before the inputs of '0' were solved"):
        solve_jointly(step, named(step, weight, bias), gradient, outputs, 1e-15, going=lambda: False)
