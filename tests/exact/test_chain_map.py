"""Steps, whole chains and their normal matrices against their definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.exact.chain_map import ChainMap
from gradleak.exact.normal_matrix import normal_matrix
from gradleak.exact.outer_product import read_outer_product
from gradleak.solve.cholesky import Factor
from gradleak.solve.conjugate_gradients import conjugate_gradients
from gradleak.structure.chain import Affine, Chain
from gradleak.structure.reader import trace_chain

CONVOLUTIONS = [
    nn.Conv2d(2, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2),
    nn.Conv2d(2, 4, 3, stride=3, dilation=2, padding=1),
    nn.Conv2d(2, 4, 3, padding="same", dilation=2),
    nn.Conv2d(1, 3, 2, stride=3),
    nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=2, groups=2),
    nn.Conv1d(2, 4, 3, padding="same"),
    nn.Conv3d(2, 4, (3, 2, 3), stride=(2, 1, 3), padding=(1, 0, 2), groups=2),
]


def affine(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[Affine, Tensor]:
    size = (9, 8, 7)[: conv.weight.ndim - 2]
    model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, conv.in_channels, *size))
    chain = trace_chain(model.double(), (conv.in_channels, *size))
    step = chain.steps[0]
    assert isinstance(step, Affine)
    return step, conv.weight.detach()


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolution_parts(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    step, weight = affine(conv)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, *step.in_shape, generator=draw, dtype=torch.float64)
    delta = torch.randn(step.outputs, generator=draw, dtype=torch.float64)
    leaf, kernel = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = step._map(leaf, kernel)
    dx, dw = torch.autograd.grad(out, (leaf, kernel), delta.reshape(out.shape))
    assert torch.allclose(out.detach().flatten(), step.apply(x.flatten(1), weight)[0])
    assert torch.allclose(dx.flatten(), step.adjoint(delta[None], weight)[0])
    assert torch.allclose(dx.flatten(), step.adjoint(delta.expand(9, -1), weight)[8])
    # Both readings of the weight gradient: linear in the input, linear in the output gradient.
    block = step.gradient_block(delta)
    per = step.channels // step.groups
    by_input = torch.einsum("grp,gcp->gcr", block, x.reshape(step.groups, per, -1))
    wanted = dw.reshape(step.groups, -1, per, weight[0, 0].numel()).transpose(1, 2).flatten(2)
    assert torch.allclose(by_input, wanted)
    patches = step.patches(x)
    by_delta = torch.einsum("gkl,gol->gok", patches, delta.reshape(step.groups, -1, patches.shape[-1]))
    assert torch.allclose(by_delta.reshape(dw.shape), dw)
    columns = torch.randn(patches.shape, generator=draw, dtype=torch.float64)
    assert torch.allclose((columns * patches).sum(), step.folded(columns)[0] @ x.flatten())


def left_sides(whole: ChainMap, chain: Chain, params: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the whole map as automatic differentiation sees it."""

    def equations(z: Tensor) -> Tensor:
        leaves = {n: params[n].clone().requires_grad_() for n in whole.names}
        features = chain.forward(z[None], {**params, **leaves}).flatten()
        own = torch.autograd.grad(features @ whole.pull, list(leaves.values()), create_graph=True)
        parts = [(g * whole.scales[n]).flatten() for n, g in zip(leaves, own, strict=True)]
        return torch.cat([features * whole.feature_scale, *parts])

    return equations


@pytest.mark.parametrize(
    ("channels", "stride", "groups"),
    [(6, 1, 1), (12, 2, 1), (12, 2, 2)],
    ids=["fewer weights", "fewer outputs", "fewer outputs, groups"],
)
def test_normal_matrix_is_that_of_the_exact_jacobian(channels: int, stride: int, groups: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, channels, 3, stride, 1), nn.Sigmoid(),
            nn.Conv2d(channels, 12, 3, 3 - stride, 1, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(12 * 16, 20),
        ).double()  # fmt: skip
        x = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    params = {k: p.detach() for k, p in model.named_parameters()}
    grads = torch.autograd.grad(F.cross_entropy(model(x), torch.tensor([3])), list(model.parameters()))
    seen = dict(zip(params, grads, strict=True))
    chain = trace_chain(model, (2, 8, 8))
    outer = read_outer_product(seen["5.weight"], seen["5.bias"])
    whole = ChainMap(chain, params, seen, outer)

    equations = left_sides(whole, chain, params)
    jacobian = torch.autograd.functional.jacobian(equations, x[0]).reshape(-1, 128)
    # The assembled matrix leaves the few bias equations out.
    sizes = [(seen[n].numel(), "weight" in n) for n in whole.names]
    keep = [torch.ones(192, dtype=torch.bool)] + [torch.full((size,), weight) for size, weight in sizes]
    rows = jacobian[torch.cat(keep)]
    wanted = (rows.T @ rows).tril()
    assert torch.allclose(
        normal_matrix(whole, x.flatten()).tril(), wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max())
    )
    off = x.flatten() + 1e-3
    local = whole.linearize(off)
    jacobian = torch.autograd.functional.jacobian(equations, off.view(x.shape)[0]).reshape(-1, 128)
    v = torch.rand(2, 128, dtype=torch.float64)
    assert torch.allclose(local.product(v), v @ jacobian.T @ jacobian)
    assert torch.allclose(local.residual, whole.target - equations(off.view(x.shape)[0]).detach())
    assert torch.allclose(local.descent, local.residual @ jacobian)


CHAINS = {
    "groups, dilation, pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=2, dilation=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, groups=4),
            nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 5),
        ),
        (2, 8, 8),
    ),
    "activation before any layer, no bias": (
        lambda: nn.Sequential(
            nn.Sigmoid(), nn.Conv2d(2, 6, (3, 2), (2, 1), (1, 0), bias=False), nn.ELU(), nn.Flatten(), nn.Linear(168, 5)
        ),
        (2, 8, 8),
    ),
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(9, 8), nn.Softplus(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)),
        (9,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_written_out_derivatives_are_those_of_autograd(case: str) -> None:
    make, shape = CHAINS[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        x, v = torch.rand(shape, dtype=torch.float64), torch.rand(3, *shape, dtype=torch.float64).flatten(1)
    params = {k: p.detach() for k, p in model.named_parameters()}
    chain = trace_chain(model, shape, anchor=[n for n in params if n.endswith("weight")][-1])
    grads = torch.autograd.grad(F.cross_entropy(model(x[None]), torch.tensor([3])), list(model.parameters()))
    seen = dict(zip(params, grads, strict=True))
    outer = read_outer_product(seen[chain.anchor.weight_name], seen[str(chain.anchor.bias_name)])
    whole = ChainMap(chain, params, seen, outer)

    equations = left_sides(whole, chain, params)
    near = x + 0.01
    jacobian = torch.autograd.functional.jacobian(equations, near).reshape(-1, x.numel())
    local = whole.linearize(near.flatten())
    assert len(whole.names) == sum(1 for n in params if not n.startswith(chain.anchor.weight_name.split(".")[0]))
    assert torch.allclose(whole.outputs(near), equations(near))
    assert torch.allclose(local.product(v), v @ jacobian.T @ jacobian)
    assert torch.allclose(local.descent, local.residual @ jacobian)


def test_conjugate_gradients_solve_several_systems() -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=draw, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(30)
    right = torch.randn(2, 30, generator=draw, dtype=torch.float64)
    factor = Factor.of(matrix)
    x, steps, done = conjugate_gradients(lambda v: v @ matrix, right, factor.solve, tolerance=1e-12, limit=20)
    assert done
    assert steps < 5
    assert torch.allclose(x @ matrix, right)


@pytest.mark.parametrize("rows", [1, 3])
def test_conjugate_gradients_by_images_take_the_same_steps(rows: int) -> None:
    """With A = B + N and P = B⁻¹, the image of P r is r + N P r; B itself is never multiplied with."""
    draw = torch.Generator().manual_seed(1)
    base = torch.diag(torch.rand(30, generator=draw, dtype=torch.float64) + 0.5)
    root = torch.randn(30, 30, generator=draw, dtype=torch.float64)
    extra = root @ root.T / 10
    matrix, inverse = base + extra, torch.linalg.inv(base)
    right = torch.randn(rows, 30, generator=draw, dtype=torch.float64)

    def solve(image: Callable[[Tensor, Tensor], Tensor] | None) -> tuple[Tensor, int, bool]:
        return conjugate_gradients(
            lambda v: v @ matrix, right, lambda r: r @ inverse, tolerance=1e-9, limit=60, image=image
        )

    plain, steps, done = solve(None)
    ours, taken, well = solve(lambda r, z: r + z @ extra)
    assert done
    assert well
    assert abs(taken - steps) <= 1
    assert torch.allclose(ours @ matrix, right, atol=1e-7)
    assert torch.allclose(ours, plain, atol=1e-7)
