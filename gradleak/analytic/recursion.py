"""Recursion through the layers: the input of a network from the gradient of one example, by linear algebra alone.

Sources: R-GAP (Zhu & Blaschko 2021, Section 3) and R-CONV (arXiv 2406.04227). The gradient of a linear layer with bias
is an outer product that shows the layer's input and output gradient. From there every layer is one linear system for
its input: forward equations (the output is known) and gradient equations (the weight gradient is a correlation of the
sought input with the known output gradient).

Deviations: equations are weighted by what is known how well, so float32 updates are inverted to their noise floor; the
recursion starts at the earliest linear layer with bias, not at the last; neither loss nor label is needed, and nothing
changes when the update is scaled (a weight delta of one plain SGD step is −learning rate times the gradient).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from gradleak.analytic.graph import Affine, Chain, Elementwise, Fixed, Step, trace_chain
from gradleak.analytic.layers import (
    Composite,
    Curvature,
    Information,
    Rows,
    conjugate_gradients,
    factorize,
    solve_layer,
)
from gradleak.errors import NotApplicable

__all__ = ["LayerReport", "OuterProduct", "RecursionResult", "invert_layers", "read_outer_product"]

Tensors = Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class LayerReport:
    """How one layer's input was determined.

    Attributes:
        name: the layer's path in the model.
        unknowns: values of the layer's input.
        forward: usable forward equations (a ReLU output of zero gives none).
        gradient: gradient equations.
        rank_bound: the most that forward and gradient equations together can have as rank, known before solving.
        determined: whether the system has full rank, as solved.
        condition: smallest Rayleigh quotient found against the scaled normal matrix; zero where nothing was solved.
        spread: estimated mean squared error of the layer's input, from the update's own noise.
        iterations: of conjugate gradients.

    """

    name: str
    unknowns: int
    forward: int
    gradient: int
    rank_bound: int
    determined: bool
    condition: float = 0.0
    spread: float = math.nan
    iterations: int = 0

    def __str__(self) -> str:
        state = "determined" if self.determined else "not determined"
        return (
            f"{self.name}: {state}, {self.unknowns} unknowns, {self.forward} forward and {self.gradient} gradient "
            f"equations of rank at most {self.rank_bound}"
        )


@final
@dataclass(frozen=True, eq=False)
class OuterProduct:
    """A linear layer's gradient, read as δ hᵀ and δ.

    Attributes:
        features: h (d,), the layer's exact input.
        delta: δ (C,), the gradient at its output.
        noise: relative root mean square deviation from an outer product: the rounding of the update.

    """

    features: Tensor
    delta: Tensor
    noise: float


@final
@dataclass(frozen=True, eq=False)
class RecursionResult:
    """What the recursion reached.

    Attributes:
        input: the model's input (*shape), None where some layer is not determined.
        stopped_at: which layer or operation stopped it and why, None where the input was reached.
        layers: one report per parameterized layer, from the last to the first.
        start: an approximate input (*shape) for matching where ``input`` is None and the chain reaches the input.
        features: exact input of the linear layer where the recursion began.
        label: class of the example where the recursion began at the head and one entry of its bias gradient alone has
            its sign (cross-entropy: p − y is negative at the label only); otherwise None.
        noise: relative noise of the update, measured on its own outer product.
        residual: relative distance of the re-simulated gradient to the seen one at ``input`` or ``start``.
        spread: estimated mean squared error of ``input``, from residual and rank alone; NaN without ``input``.
        steps: Gauss–Newton steps of the polish.

    """

    input: Tensor | None
    stopped_at: str | None
    layers: tuple[LayerReport, ...]
    start: Tensor | None
    features: Tensor
    label: int | None
    noise: float
    residual: float
    spread: float
    steps: int


def read_outer_product(weight: Tensor, bias: Tensor) -> OuterProduct:
    """Return input and output gradient of a linear layer that saw one vector, from its gradients (C, d) and (C,).

    Every row k gives h = ∂W_k / ∂b_k; rounding is relative, so all rows count alike and are averaged.

    Raises:
        NotApplicable: the gradient is zero, or no outer product (more than one example, noise, pruning).

    """
    weight, bias = weight.double(), bias.double()
    top = bias.abs().max()
    if not bool(top > 0):
        raise NotApplicable("The bias gradient where the recursion starts is zero, so the update says nothing there.")
    rows = bias.abs() > 1e-4 * top
    ratios = weight[rows] / bias[rows, None]
    features = ratios.mean(0)
    scale = features.square().mean().sqrt().clamp(min=1e-300)
    used = features.abs() > 1e-3 * scale
    relative = (ratios - features)[:, used] / features[used]
    noise = float(relative.square().mean().sqrt()) if relative.numel() else 0.0
    mismatch = float((weight - torch.outer(bias, features)).norm() / weight.norm().clamp(min=1e-300))
    if mismatch > 1e-2:
        raise NotApplicable(
            f"The gradient of the linear layer is no outer product (relative distance {mismatch:.1e}), so the update "
            "comes from more than one example or step, or was noised or pruned; disaggregate it, or use matching."
        )
    return OuterProduct(features, bias, max(noise, 2.0**-53))


def invert_layers(
    model: nn.Module,
    params: Tensors,
    grads: Tensors,
    shape: tuple[int, ...],
    *,
    chain: Chain | None = None,
    polish: bool = True,
    seed: int = 0,
) -> RecursionResult:
    """Return the input that one example's gradient determines, layer by layer.

    Args:
        model: the model, used for its graph and constants only.
        params: parameters by name.
        grads: gradient of any loss of one example, up to one common factor, by name; frozen parameters may lack.
        shape: of one input.
        chain: the traced chain, to share among examples of one model.
        polish: whether to finish with Gauss–Newton steps on the whole map.
        seed: of the probes that estimate conditions.

    Raises:
        NotApplicable: there is no layer to start at, or the gradient there is no outer product.

    """
    chain = trace_chain(model, shape) if chain is None else chain
    params = {k: p.detach().double() for k, p in params.items()}
    seen = {k: g.detach().double() for k, g in grads.items()}
    anchor = chain.anchor
    if anchor.weight_name not in seen or anchor.bias_name not in seen:
        raise NotApplicable(
            f"The update has no gradient of {anchor.name!r}, where the recursion starts; share it, or use matching."
        )
    outer = read_outer_product(seen[anchor.weight_name], seen[anchor.bias_name])
    label = _label(outer.delta) if chain.head else None
    walk = _Walk(chain, params, seen, outer, seed)
    walk.run()
    value = walk.value.reshape(chain.shape) if walk.reached else None
    if value is None or walk.stop is not None:
        residual = math.nan
        if value is not None:
            residual = _Map(chain, params, seen, outer).relative(value)
        return RecursionResult(
            None, walk.stop, tuple(walk.reports), value, outer.features, label, outer.noise, residual, math.nan, 0
        )
    whole = _Map(chain, params, seen, outer)
    steps, spread = 0, math.nan
    if polish and any(isinstance(s, Affine) for s in chain.steps):
        value, steps, spread = _polish(whole, value, walk.probe(value.numel()))
    return RecursionResult(
        value, None, tuple(walk.reports), None, outer.features, label, outer.noise, whole.relative(value), spread, steps
    )


def _label(delta: Tensor) -> int | None:
    # Either sign: a weight delta is the gradient times a negative number.
    for signs in (delta < 0, delta > 0):
        if len(delta) > 2 and int(signs.sum()) == 1:
            return int(signs.to(torch.uint8).argmax())
    return None


class _Walk:
    """The walk from the anchor back to the input; its state is what is known about the current tensor."""

    def __init__(self, chain: Chain, params: Tensors, seen: Tensors, outer: OuterProduct, seed: int) -> None:
        self.chain, self.params, self.seen, self.outer = chain, params, seen, outer
        self.generator = torch.Generator().manual_seed(seed)
        weight = params[chain.anchor.weight_name]
        self.value = outer.features
        self.delta = outer.delta @ weight
        floor = 0.05 * self.value.square().mean().sqrt()
        self.information = Information.diagonal(self.value.abs().clamp(min=float(floor) + 1e-300).square().reciprocal())
        self.usable = self.value.numel()
        self.pending: list[Fixed | Elementwise] = []
        self.reports: list[LayerReport] = []
        self.stop: str | None = None
        self.reached = False

    def probe(self, size: int) -> Tensor:
        signs = torch.randint(0, 2, (size,), generator=self.generator, dtype=torch.int64)
        return (2 * signs - 1).to(self.value)

    def run(self) -> None:
        for step in reversed(self.chain.steps):
            if isinstance(step, Affine):
                self._affine(step)
            elif isinstance(step, Fixed):
                self.delta = step.adjoint(self.delta[None])[0]
                if not step.reorders:
                    self.pending.insert(0, step)
            elif isinstance(step, Elementwise):
                if self.pending and step.affine:
                    self.delta = self.delta * step.derivatives(torch.zeros_like(self.delta))[0]
                    self.pending.insert(0, step)
                else:
                    self._activation(step)
        if self.chain.stop is not None:
            self._halt(self.chain.stop)
            return
        self._resolve("the model's input")
        self.reached = True

    def _halt(self, reason: str) -> None:
        self.stop = self.stop or reason

    def _resolve(self, where: str) -> None:
        """Solve the parameter-free maps that wait between the current tensor and what is known."""
        if not self.pending:
            return
        composite = Composite(tuple(self.pending), self.params)
        unknowns, known = self.pending[0].inputs, self.value.numel()
        right = composite.adjoint((self.value - composite.constant(self.value))[None])
        value, _, done = conjugate_gradients(
            lambda v: composite.adjoint(composite.apply(v)), right, lambda r: r, tolerance=1e-14, limit=500
        )
        names = ", ".join(repr(s.name) for s in self.pending)
        if known < unknowns or not done:
            self._halt(f"{names} keeps {known} of the {unknowns} values before it, so {where} is not determined")
        information = self.information
        dense = None if information.dense is None else composite.sandwich(information.dense)
        self.information = Information(lambda v: composite.adjoint(information.product(composite.apply(v))), dense)
        self.value, self.usable, self.pending = value[0], min(known, unknowns), []

    def _activation(self, step: Elementwise) -> None:
        self._resolve(f"the output of {step.name!r}")
        value = self.value.reshape(1, *step.in_shape)
        pre = step.inverse(value).flatten()
        slope, _ = step.derivatives(pre)
        if step.rectifies:
            # A ReLU is never negative: the most negative recovered value measures the error of the others.
            error = float((-self.value).max().clamp(min=0))
            active = self.value > 3 * error
            slope = active.to(slope)
            self.usable = int(active.sum())
        else:
            self.usable = int((slope.abs() > 0).sum())
        self.value, self.delta = pre, self.delta * slope
        self.information = self.information.scaled(slope)

    def _affine(self, step: Affine) -> None:
        gradient = self.seen.get(step.weight_name)
        composite = Composite((step, *self.pending), self.params)
        known = min(self.usable, self.value.numel())
        unknowns = step.inputs
        solution = solve_layer(
            step, composite, self.value, self.information, self.delta, gradient,
            noise=self.outer.noise, probe=self.probe(unknowns),
        )  # fmt: skip
        rows, rank = solution.rows
        per_channel = min(rows, step.positions) if rank < 0 else rank
        live = 0 if gradient is None else per_channel * step.channels
        bound = min(unknowns, known + live)
        determined = bound >= unknowns and solution.condition > _SINGULAR
        equations = 0 if gradient is None else gradient.numel()
        spread = solution.spread * self.outer.noise**2
        report = LayerReport(
            step.name, unknowns, known, equations, bound, determined, solution.condition, spread, solution.iterations
        )
        if self.stop is None:  # behind the first gap, values only serve as a start, and their ranks mean nothing
            self.reports.append(report)
        if not determined:
            self._halt(f"the input of {report}")
        self.value, self.information, self.delta = solution.value, solution.information, solution.delta
        self.usable, self.pending = unknowns, []


_SINGULAR = 1e-13
"""Below this share of the scaled spectrum, a direction counts as not determined (float64 cannot tell it from zero)."""


class _Map:
    """The map from the input to features and layer gradients for the seen output gradient, weighted by noise."""

    def __init__(self, chain: Chain, params: Tensors, seen: Tensors, outer: OuterProduct) -> None:
        self.chain, self.outer, self.seen = chain, outer, seen
        self.params = {k: p.clone() for k, p in params.items()}
        wanted = [
            n for s in chain.steps if isinstance(s, Affine) for n in (s.weight_name, s.bias_name) if n is not None
        ]
        self.names = [n for n in wanted if n in seen and float(seen[n].square().sum()) > 0]
        self.pull = outer.delta @ params[chain.anchor.weight_name]
        features = outer.features
        floor = float(0.05 * features.square().mean().sqrt()) + 1e-300
        self.feature_scale = features.abs().clamp(min=floor).reciprocal()
        self.scales = {n: float(seen[n].square().mean().rsqrt()) for n in self.names}
        self.target = torch.cat(
            [features * self.feature_scale] + [(seen[n] * self.scales[n]).flatten() for n in self.names]
        )

    def outputs(self, x: Tensor, *, graph: bool) -> Tensor:
        """Return the weighted equations' left sides at ``x`` (*shape)."""
        dtype = x.dtype
        leaves = {n: self.params[n].to(dtype).detach().requires_grad_() for n in self.names}
        params = {k: p.to(dtype) for k, p in self.params.items()} | leaves
        features = self.chain.forward(x[None], params).flatten()
        grads = torch.autograd.grad(features @ self.pull.to(dtype), list(leaves.values()), create_graph=graph)
        parts = [features * self.feature_scale.to(dtype)]
        parts += [(g * self.scales[n]).flatten() for n, g in zip(self.names, grads, strict=True)]
        return torch.cat(parts)

    def relative(self, x: Tensor) -> float:
        """Return the relative distance of the weighted equations at ``x``."""
        if not self.names:
            return float(
                (self.chain.forward(x[None], self.params).flatten() - self.outer.features).norm()
                / self.outer.features.norm()
            )
        with torch.enable_grad():
            return float((self.outputs(x, graph=False).detach() - self.target).norm() / self.target.norm())


@torch.enable_grad()
def _polish(whole: _Map, value: Tensor, probe: Tensor) -> tuple[Tensor, int, float]:
    """Take Gauss–Newton steps on the whole map until they are below the noise that the residual shows."""
    x, steps, spread = value, 0, math.nan
    factor = None
    best: tuple[float, Tensor] | None = None
    while True:
        leaf = x.clone().requires_grad_()
        left = whole.outputs(leaf, graph=True)
        residual = (whole.target - left).detach()
        norm = float(residual.square().sum())
        if best is not None and not norm < best[0] * (1 + 1e-3):
            return best[1], steps, spread
        best = (norm, x)
        if steps >= _STEPS:
            return x, steps, spread
        dummy = torch.zeros_like(left, requires_grad=True)
        (pulled,) = torch.autograd.grad(left, leaf, dummy, create_graph=True)

        right = _pull(left, leaf, residual)[None]
        if factor is None:
            factor = factorize(_normal(whole, x))
        excess = max(len(residual) - probe.numel(), 1)
        variance = max(norm, 1e-300) / excess
        spread = variance * float((probe * factor.solve(probe[None])[0]).sum()) / probe.numel()
        decrement = float((right * factor.solve(right)).sum())
        if decrement < 1e-2 * variance * probe.numel():
            return x, steps, spread
        product = _normal_product(left, leaf, pulled, dummy)
        step, _, _ = conjugate_gradients(product, right, factor.solve, tolerance=1e-3, limit=60)
        x = x + step[0].reshape(x.shape)
        steps += 1


_STEPS = 8


def _pull(left: Tensor, leaf: Tensor, u: Tensor) -> Tensor:
    return torch.autograd.grad(left, leaf, u, retain_graph=True)[0].flatten()


def _normal_product(left: Tensor, leaf: Tensor, pulled: Tensor, dummy: Tensor) -> Rows:
    """Return v ↦ Jᵀ J v for rows (1, n); ``pulled`` is Jᵀ ``dummy``, so its derivative is J."""

    def product(v: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, dummy, v.reshape(leaf.shape), retain_graph=True)
        return _pull(left, leaf, pushed)[None]

    return product


@torch.no_grad()
def _normal(whole: _Map, x: Tensor) -> Tensor:
    """Return the normal matrix of the whole linearized map at ``x``, (n, n), assembled layer by layer."""
    chain, params = whole.chain, whole.params
    values: list[Tensor] = []
    with torch.no_grad():
        current = x[None]
        for step in chain.steps:
            values.append(current)
            current = step.forward(current, params)
    curvature = Curvature(torch.diag(whole.feature_scale.square()), None, whole.pull)
    first = next(i for i, s in enumerate(chain.steps) if isinstance(s, Affine))
    for index in range(len(chain.steps) - 1, -1, -1):
        step: Step = chain.steps[index]
        if isinstance(step, Elementwise):
            slope, bend = step.derivatives(values[index].flatten())
            curvature = curvature.through(slope, bend)
        elif isinstance(step, Affine):
            curvature = curvature.before(
                step, values[index].flatten(), whole.seen.get(step.weight_name), params, last=index == first
            )
        elif isinstance(step, Fixed) and not step.reorders:
            curvature = curvature.behind(Composite((step,), params))
    return curvature.information
