"""One layer of a batch from its outputs and its gradient together: what is determined, and how well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.exact.layer_equations import Composite, LayerEquations, counts
from gradleak.exact.layer_iterative import SAMPLES, Known, Solved, _Weighted, solve_layer
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
) -> tuple[Tensor, Tensor, Known]:
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
    deviation = max(noise, 1e-12) / slope
    errors = deviation * normal(SAMPLES, *z.shape)
    slips = above * s * (1 - s) * (1 - 2 * s) * errors
    return x.flatten(1), gradient, Known(seen, deviation**-2, errors, pull(seen), slips)


def solve(
    step: Affine,
    params: dict[str, Tensor],
    gradient: Tensor | None,
    known: Known,
    noise: float,
    going: Callable[[], bool] | None = None,
) -> Solved:
    equations = LayerEquations(Composite((step,), params), gradient, known.pull)
    draw = torch.Generator().manual_seed(0)
    return solve_layer(equations, known, noise, draw, doubt=0.1, accuracy=1e-3, going=going)


@pytest.mark.parametrize(("outs", "groups", "stride"), [(8, 1, 2), (12, 2, 2), (4, 1, 1), (7, 1, 2)])
def test_both_kinds_of_equation_determine_what_neither_does(outs: int, groups: int, stride: int) -> None:
    step, weight, bias = layer(outs, groups, stride)
    x, gradient, outputs = problem(step, weight, bias)
    # The outputs are fewer than the inputs, or as many in an ill-conditioned map.
    assert step.outputs <= step.inputs
    found = solve(step, named(step, weight, bias), gradient, outputs, 1e-15)
    assert found.complete
    assert float((found.known.values - x).square().mean().sqrt()) <= 1e-4


def test_outputs_alone_where_they_are_more() -> None:
    step, weight, bias = layer(40)
    x, _, outputs = problem(step, weight, bias)
    found = solve(step, named(step, weight, bias), None, outputs, 1e-15)
    assert found.complete
    assert float((found.known.values - x).square().mean().sqrt()) <= 1e-6


@pytest.mark.parametrize("outs", [1, 3])
def test_a_direction_that_no_equation_touches_is_noticed(outs: int) -> None:
    step, weight, bias = layer(outs)
    x, gradient, outputs = problem(step, weight, bias)
    unknown = step.inputs * N
    assert outs * 25 * step.channels + step.outputs * N < unknown
    found = solve(step, named(step, weight, bias), gradient, outputs, 1e-15)
    assert not found.complete
    assert float((found.known.values - x).square().mean().sqrt()) > 1e-3


def test_a_single_input_without_any_weight_is_noticed() -> None:
    step, weight, bias = layer(40, channels=2)
    weight[:, 0] = 0  # The layer ignores a channel, and no gradient is shared.
    x, _, outputs = problem(step, weight, bias)
    found = solve(step, named(step, weight, bias), None, outputs, 1e-15)
    unseen = torch.zeros(step.in_shape, dtype=torch.bool)
    unseen[0] = True
    assert found.complete
    assert torch.equal(found.unseen, unseen.flatten().expand_as(x))
    assert not bool(found.known.weights[found.unseen].any())
    assert float((found.known.values - x)[~found.unseen].square().mean().sqrt()) <= 1e-6


def test_outputs_that_a_saturated_activation_hides_cost_only_their_own_equation() -> None:
    step, weight, bias = layer(40)
    x, gradient, outputs = problem(step, weight, bias)
    hidden = torch.rand(outputs.values.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    wrong = replace(
        outputs,
        values=torch.where(hidden, 50.0, outputs.values),
        weights=torch.where(hidden, 0.0, outputs.weights),
        errors=torch.where(hidden, 0.0, outputs.errors),
    )
    found = solve(step, named(step, weight, bias), gradient, wrong, 1e-15)
    assert found.complete
    assert float((found.known.values - x).square().mean().sqrt()) <= 1e-5


def test_the_predicted_error_is_that_of_the_worst_example() -> None:
    ratios = []
    for seed in range(16):
        step, weight, bias = layer(8)
        x, gradient, outputs = problem(step, weight, bias, noise=1e-7, seed=seed)
        found = solve(step, named(step, weight, bias), gradient, outputs, 1e-7)
        assert found.complete
        ratios.append(float((found.known.values - x).square().mean(1).max().sqrt()) / found.known.deviation)
    # One standard error each: three cover, and a tenth would be an idle warning.
    assert max(ratios) <= 3
    assert min(ratios) >= 0.1


def test_it_ends_when_it_is_told_to() -> None:
    step, weight, bias = layer(8)
    _, gradient, outputs = problem(step, weight, bias)
    with pytest.raises(NotApplicable, match="time ended before the inputs of '0' were solved"):
        solve(step, named(step, weight, bias), gradient, outputs, 1e-15, going=lambda: False)


@pytest.mark.parametrize(
    ("conv", "size"),
    [(nn.Conv2d(2, 6, 3), (8, 12)), (nn.Conv2d(3, 4, 5, stride=2, padding=2), (8, 12)),
     (nn.Conv2d(2, 4, 3, stride=(2, 1), dilation=2), (9, 7)), (nn.Conv2d(4, 6, (2, 3), stride=3, groups=2), (8, 10)),
     (nn.Conv1d(2, 5, 4, stride=3, padding=1), (20,)), (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (3, 4, 3))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pooled", [False, True])
def test_the_system_is_the_normal_matrix_of_the_equations(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: tuple[int, ...], pooled: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    behind = [(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(size) - 1](2)] if pooled else []
    shape = (conv.in_channels, *size)
    body = nn.Sequential(conv, *behind, nn.Flatten()).double()
    model = nn.Sequential(*body, nn.Linear(body(torch.zeros(1, *shape, dtype=torch.float64)).numel(), 5)).double()
    steps = trace_chain(model, shape).steps
    params = {k: p.detach() for k, p in model.named_parameters()}
    maps = Composite(tuple(s for s in steps if not getattr(s, "reorders", False)), params)  # type: ignore[arg-type]

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=draw, dtype=torch.float64)

    outputs, inputs, examples = maps.steps[-1].outputs, maps.steps[0].inputs, 2
    pulls, weights = uniform(examples, outputs) - 0.5, uniform(examples, outputs) + 0.1
    gradient = uniform(*conv.weight.shape)
    equations = LayerEquations(maps, gradient, pulls)
    system = _Weighted(equations, weights, 0.3, None)

    def simulate(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and weight gradient as automatic differentiation sees them, without the bias."""
        leaf = params["0.weight"].clone().requires_grad_()
        zero = {"0.weight": leaf, "0.bias": torch.zeros_like(params["0.bias"])}
        out = torch.func.functional_call(body, zero, (x.view(examples, *shape),))
        (own,) = torch.autograd.grad((out * pulls).sum(), leaf)
        return out.detach().flatten(), own.flatten()

    rows = [simulate(e) for e in torch.eye(examples * inputs, dtype=torch.float64)]
    forward, own = (torch.stack(part, 1) for part in zip(*rows, strict=True))
    wanted = forward.T @ (forward * weights.flatten()[:, None]) + own.T @ own / 0.09
    eye = torch.eye(examples * inputs, dtype=torch.float64).view(-1, examples, inputs)
    assert torch.allclose(system.product(eye).flatten(1), wanted)
    seen = uniform(1, examples, outputs)
    right = (seen * weights).flatten() @ forward + gradient.flatten() @ own / 0.09
    assert torch.allclose(system.pull(seen, equations.target[None]).flatten(), right)
    assert counts(equations.step, params["0.weight"], examples).rank * conv.in_channels >= int(
        torch.linalg.matrix_rank(own)
    )
    # The approximate inverse is symmetric and positive definite, as conjugate gradients need it.
    flat = eye.flatten(1)
    inverse = system.inverse(flat)
    assert torch.allclose(inverse, inverse.T, rtol=1e-3, atol=1e-3 * float(inverse.abs().max()))
    assert float(torch.linalg.eigvalsh((inverse + inverse.T) / 2).min()) > 0
    if system.image is not None:
        assert torch.allclose(system.image(flat, inverse), inverse @ wanted, atol=1e-9 * float(wanted.abs().max()))
