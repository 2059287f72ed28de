"""The recursion without matrices: its systems against their definition, its estimates against the truth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.exact.light import _System, solve_light
from gradleak.exact.outer_product import read_outer_product
from gradleak.exact.one_example import RecursionResult, invert_layers
from gradleak.models import lenet
from gradleak.structure.chain import Affine
from gradleak.structure.reader import trace_chain


def gradient(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(model(x), torch.tensor([3]))
    names = [n for n, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def invert(model: nn.Module, x: Tensor, *, quick: bool = True) -> RecursionResult:
    return invert_layers(model, dict(model.named_parameters()), gradient(model, x), tuple(x.shape[1:]), quick=quick)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(2, 6, 3), nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.Conv2d(2, 4, 3, stride=(2, 1), dilation=2),
     nn.Conv2d(2, 3, (2, 3), stride=4, padding="valid")],
    ids=str,
)  # fmt: skip
def test_split_system_is_the_normal_matrix(conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    out = conv(torch.zeros(1, conv.in_channels, 8, 12)).numel()
    model = nn.Sequential(conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(out, 5)).double()
    step = trace_chain(model, (conv.in_channels, 8, 12)).steps[0]
    assert isinstance(step, Affine)
    params = {k: p.detach() for k, p in model.named_parameters()}
    delta = torch.randn(step.outputs, generator=draw, dtype=torch.float64)
    variance = torch.rand(step.outputs, generator=draw, dtype=torch.float64) + 0.1
    weights = params["0.weight"]
    system = _System(step, params, delta, torch.ones_like(weights), variance)
    eye = torch.eye(step.inputs, dtype=torch.float64)
    forward = step.apply(eye, weights).T
    leaf = weights.clone().requires_grad_()
    rows = [
        torch.autograd.grad(F.conv2d(e.view(1, *step.in_shape), leaf, None, conv.stride, conv.padding, conv.dilation),
                            leaf, delta.reshape(1, *step.out_shape))[0].flatten() for e in eye
    ]  # fmt: skip
    own = torch.stack(rows, 1)
    wanted = forward.T @ (forward / variance[:, None]) + own.T @ own
    assert torch.allclose(system.join(system.product(torch.float64)(system.split(eye))), wanted)
    assert torch.equal(system.join(system.split(eye)), eye)
    assert torch.allclose(system.join(system.diagonal()[None])[0], (forward.square() / variance[:, None]).sum(0))
    assert system.rank >= int(torch.linalg.matrix_rank(own)) / step.channels
    u = torch.randn(1, step.outputs, generator=draw, dtype=torch.float64)
    g = torch.randn(1, *weights.shape, generator=draw, dtype=torch.float64)
    right = (u / variance) @ forward + g.flatten(1) @ own
    assert torch.allclose(system.join(system.pull(u, g)), right)
    # Blocks between the layer and its adjoint, summed over channels first or not.
    half = torch.randn(system.gram.shape, generator=draw, dtype=torch.float64)
    blocks, apply = half + half.mT, system._convolutions(torch.float64)[0]
    for pairs in (0.0, math.inf):
        monkeypatch.setattr("gradleak.exact.light._PAIRS", pairs)
        assert torch.allclose(system.around(blocks), apply(system.blocks(apply(eye).T.contiguous(), blocks)))
    # The approximate inverse is symmetric and positive definite, as conjugate gradients need it.
    precondition = system.preconditioner()
    assert precondition is not None
    inverse = precondition.inverse(eye.float())
    assert torch.allclose(inverse, inverse.T, rtol=1e-3, atol=1e-3 * float(inverse.abs().max()))
    assert float(torch.linalg.eigvalsh((inverse + inverse.T) / 2).min()) > 0
    if precondition.image is not None:
        image, product = precondition.image(eye.float(), inverse), system.product(torch.float64)(inverse.double())
        assert torch.allclose(image.double(), product, atol=1e-3 * float(product.abs().max()))


def test_float32_lenet_within_two_orders_of_the_floor_and_honest_about_it() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = lenet(image_size=16, seed=1)
    quick, whole = invert(model, x), invert(model, x, quick=False)
    assert quick.input is not None
    assert whole.input is not None
    assert (quick.steps, len(quick.layers)) == (0, 3)
    error, floor = (float((r.input - x[0].double()).square().mean()) for r in (quick, whole))  # type: ignore[operator]
    assert error < 1e-10
    assert error < 100 * floor
    assert error / 20 < quick.spread < 100 * error
    assert [(r.name, r.unknowns, r.rank_bound) for r in quick.layers] == [
        (r.name, r.unknowns, r.rank_bound) for r in whole.layers
    ]


def light(model: nn.Module, shape: tuple[int, ...]) -> object:
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = gradient(model, x)
    params = {k: p.detach() for k, p in model.named_parameters()}
    chain = trace_chain(model, shape)
    outer = read_outer_product(seen[chain.anchor.weight_name], seen[chain.anchor.bias_name or ""])
    weight = params[chain.anchor.weight_name]
    return solve_light(
        chain,
        params,
        seen,
        outer.features,
        outer.delta,
        weight,
        noise=1e-7,
        seed=0,
        refine=lambda _index, value, _inverse: value,
    )


def test_where_it_does_not_serve() -> None:
    def made(*first: nn.Module, features: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(*first, nn.Flatten(), nn.Linear(features, 10)).double()

    assert light(made(nn.Conv2d(1, 16, 3), nn.ReLU(), features=576), (1, 8, 8)) is None
    assert light(made(nn.Conv2d(2, 16, 3, groups=2), nn.Tanh(), features=576), (2, 8, 8)) is None
    assert light(made(nn.Conv2d(1, 16, 3), nn.AvgPool2d(2), features=144), (1, 8, 8)) is None
    assert light(made(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Tanh(), features=400), (1, 9, 9)) is None
    assert light(made(nn.Conv2d(1, 16, 3), nn.Tanh(), features=576), (1, 8, 8)) is not None


@pytest.mark.parametrize("inputs", [12, 40], ids=["more outputs", "fewer outputs"])
def test_linear_layer_without_bias(inputs: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(inputs, 16, bias=False), nn.Tanh(), nn.Linear(16, 5))
    x = torch.rand(1, inputs, generator=torch.Generator().manual_seed(0))
    result = invert(model, x)
    assert result.input is not None
    assert result.steps == 0
    assert float((result.input - x[0].double()).square().mean()) < 1e-10


def test_an_update_that_is_not_explained_is_left_to_the_factors() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = lenet(image_size=16, seed=1)
    seen = gradient(model, x)
    name = next(n for n in seen if n.endswith("weight"))
    seen[name] = seen[name] * 1.01
    result = invert_layers(model, dict(model.named_parameters()), seen, (3, 16, 16))
    assert result.residual > 1e-4
    assert result.steps > 0
