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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable, ResourceLimit
from gradleak.exact.layers import (
    LARGEST,
    Composite,
    Factor,
    Information,
    Solution,
    add_gradient_equations,
    factorize,
    precision,
    quotient,
    solve_layer,
)
from gradleak.exact.light import LightResult, solve_light
from gradleak.exact.outer_product import OuterProduct, read_outer_product
from gradleak.exact.whole import WholeMap, feature_scale, newton_steps
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed
from gradleak.structure.reader import trace_chain

__all__ = ["LayerReport", "OuterProduct", "RecursionResult", "check_together", "fit_layers", "invert_layers"]

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
class RecursionResult:
    """What the recursion reached.

    Attributes:
        input: the model's input (*shape), None where some layer is not determined.
        stopped_at: which layer or operation stopped it and why, None where the input was reached.
        layers: one report per parameterized layer, from the last to the first.
        start: an approximate input (*shape) for matching where ``input`` is None and the chain reaches the input.
        features: exact input of the linear layer where the recursion began.
        head: whether that layer is the model's last.
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
    head: bool
    label: int | None
    noise: float
    residual: float
    spread: float
    steps: int


def invert_layers(
    model: nn.Module,
    params: Tensors,
    grads: Tensors,
    shape: tuple[int, ...],
    *,
    chain: Chain | None = None,
    polish: bool = True,
    quick: bool = True,
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
        quick: whether to try the iterative way first (:mod:`gradleak.exact.light`), and to leave it at that where
            residual and estimated error are small.
        seed: of the probes that estimate conditions.

    Raises:
        NotApplicable: there is no layer to start at, or the gradient there is no outer product.
        ResourceLimit: the matrices of a layer that would be determined do not fit in memory.

    """
    chain = trace_chain(model, shape) if chain is None else chain
    params = {k: p.detach().double() for k, p in params.items()}
    seen = {k: g.detach().double() for k, g in grads.items()}
    outer = _outer(chain, seen)
    label = _label(outer.delta) if chain.head else None
    light = _light(chain, params, seen, outer, seed) if quick and outer.noise > _FINE else None
    known = {} if light is None else _known(light, outer, seen)
    if light is not None:
        quickly = _quickly(chain, params, seen, outer, label, light, known)
        if quickly is not None:
            return quickly
    walk = _Walk(chain, params, seen, outer, seed, known)
    walk.run()
    common = (outer.features, chain.head, label, outer.noise)
    if walk.stop is not None:
        start, residual = None, math.nan
        if walk.reached:
            start = walk.value.reshape(chain.shape)
            residual = WholeMap(chain, chain.steps, params, seen, outer).relative(start)
        return RecursionResult(None, walk.stop, tuple(walk.reports), start, *common, residual, math.nan, 0)
    value, steps, spread = walk.value, 0, math.nan
    if walk.suffix is None or not polish:
        residual = WholeMap(chain, chain.steps, params, seen, outer).relative(value.reshape(chain.shape))
    else:
        # Whatever comes before the first layer (scaling, reshaping) is inverted exactly at the end.
        whole = WholeMap(chain, chain.steps, params, seen, outer)
        if walk.rebuild is None and walk.information.dense is None:
            residual = whole.relative(value.reshape(chain.shape))
        else:
            factor = factorize(walk.normal)
            done = newton_steps(whole, value, factor, walk.probes(value.numel()))
            value, steps, spread, residual = done.value, done.steps, done.spread, done.residual
    found = value.reshape(chain.shape)
    return RecursionResult(found, None, tuple(walk.reports), None, *common, residual, spread, steps)


def fit_layers(
    model: nn.Module,
    params: Tensors,
    grads: Tensors,
    start: Tensor,
    *,
    chain: Chain | None = None,
    seed: int = 0,
    going: Callable[[float, int], bool] | None = None,
) -> RecursionResult:
    """Solve all layers together for the input that explains one example's gradient, by Gauss–Newton from ``start``.

    The normal matrix is put together from the last layer to the first, as the recursion does, at the point reached; but
    no layer needs to be determined by itself, only the whole. Measured on sigmoid LeNets, the steps converge from a
    gray image; from a good start, one factorization serves them all.

    Args:
        model: the model, used for its graph and constants only.
        params: parameters by name.
        grads: gradient of any loss of one example, up to one common factor, by name; frozen parameters may lack.
        start: where the steps begin (*shape), model-input units.
        chain: the traced chain.
        seed: of the probe that estimates condition and error.
        going: (relative residual, steps so far) → whether to go on.

    Returns:
        The result; ``input`` is None and ``start`` the best point where the steps do not reach the update, or where the
        layers together leave a direction open.

    Raises:
        NotApplicable: the model is no chain of smooth layers from the input to a linear layer, or the gradient there is
            no outer product.
        ResourceLimit: there are too many values, or the matrices of a layer do not fit in memory.

    """
    shape = tuple(start.shape)
    chain = trace_chain(model, shape) if chain is None else chain
    params = {k: p.detach().double() for k, p in params.items()}
    seen = {k: g.detach().double() for k, g in grads.items()}
    outer = _outer(chain, seen)
    check_together(chain)
    whole = WholeMap(chain, chain.steps, params, seen, outer)
    value, steps, residual, stopped = start.detach().double().flatten(), 0, math.inf, False

    def on(residual: float, more: int) -> bool:
        nonlocal stopped
        stopped = going is not None and not going(residual, steps + more)
        return not stopped

    walk, factor = _around(chain, params, seen, outer, seed, value)
    probe = walk.probes(value.numel())
    for _ in range(_FACTORS):
        last = newton_steps(
            whole,
            value,
            factor,
            probe,
            limit=_LONG,
            stale=_STALE,
            halvings=_HALVINGS,
            tolerance=_TIGHT,
            floor=_CLOSE * outer.noise,
            going=on,
        )
        value, steps, residual = last.value, steps + last.steps, last.residual
        if last.done or stopped or not on(residual, 0):
            break
        _, factor = _around(chain, params, seen, outer, seed, value)
    product = whole.linearize(value).product
    ready = factor.solve(probe[:1])
    response, _, full = conjugate_gradients(product, probe[:1], factor.solve, tolerance=1e-3, limit=_CHECK, ready=ready)
    condition = quotient(product, response[0], factor.scale)
    # Where the factor's own precision hides a weak direction, the exact product shows it.
    hidden = float(probe[0] @ response[0]) / float(probe[0] @ ready[0])
    spread = last.spread * max(1.0, hidden)
    explained = residual <= _CLOSE * outer.noise
    determined = full and condition > _SINGULAR and last.done
    equations = len(whole.target) - outer.features.numel()
    bound = min(len(value), len(whole.target))
    report = LayerReport(
        "all layers together",
        len(value),
        outer.features.numel(),
        equations,
        bound,
        determined,
        condition,
        spread,
        steps,
    )
    found, label = value.reshape(shape), _label(outer.delta) if chain.head else None
    common = (outer.features, chain.head, label, outer.noise, residual)
    if determined and explained:
        return RecursionResult(found, None, (report,), None, *common, spread, steps)
    reason = str(report)
    if not last.done or not explained:
        reason = f"the steps ended at a relative residual of {residual:.1e}, which does not explain the update"
    return RecursionResult(None, reason, (report,), found, *common, math.nan, steps)


def check_together(chain: Chain) -> None:
    """Check that the layers of ``chain`` can be solved together.

    Raises:
        NotApplicable: they are no chain of smooth layers from the input on.
        ResourceLimit: there are too many values.

    """
    kinks = [s.name for s in chain.steps if isinstance(s, Elementwise) and s.rectifies]
    if chain.stop is not None or kinks:
        reason = chain.stop or f"{kinks[0]!r} has a kink, where the gradient jumps"
        raise NotApplicable(f"The layers cannot be solved together: {reason}; use matching.")
    if not any(isinstance(s, Affine) for s in chain.steps):
        raise NotApplicable(f"The gradient of {chain.anchor.name!r} shows its input; use linear_inversion().")
    largest = max(s.inputs for s in chain.steps)
    if largest > LARGEST:
        raise ResourceLimit(
            f"Solving all layers together factorizes a matrix of {largest} rows, more than {LARGEST}; use matching."
        )


def _around(
    chain: Chain, params: Tensors, seen: Tensors, outer: OuterProduct, seed: int, value: Tensor
) -> tuple[_Walk, Factor]:
    """Return the normal matrix of the whole map, factorized at the chain's input ``value`` (n,)."""
    walk = _Walk(chain, params, seen, outer, seed, _inputs(chain, params, value.reshape(chain.shape)))
    walk.run()
    if walk.stop is not None:
        raise NotApplicable(f"The layers cannot be solved together: {walk.stop}; use matching.")
    return walk, factorize(walk.normal)


def _inputs(chain: Chain, params: Tensors, x: Tensor) -> dict[int, tuple[Tensor, None]]:
    """Return the input of every step at the chain's input ``x`` (*shape), by index."""
    known, value = {}, x[None]
    for index, step in enumerate(chain.steps):
        known[index] = value.flatten(), None
        value = step.forward(value, params)
    return known


def _outer(chain: Chain, seen: Tensors) -> OuterProduct:
    anchor = chain.anchor
    if anchor.weight_name not in seen or anchor.bias_name is None or anchor.bias_name not in seen:
        raise NotApplicable(
            f"The update has no gradient of {anchor.name!r}, where the recursion starts; share it, or use matching."
        )
    return read_outer_product(seen[anchor.weight_name], seen[anchor.bias_name])


def _light(chain: Chain, params: Tensors, seen: Tensors, outer: OuterProduct, seed: int) -> LightResult | None:
    """Solve the layers iteratively, refining each by what the later ones say."""

    def refine(index: int, value: Tensor, precondition: Rows) -> Tensor:
        local = WholeMap(chain, chain.steps[index:], params, seen, outer).linearize(value)
        level = float(local.descent.abs().max().clamp(min=1e-300))
        # Two digits are wanted of the step, and float32 has them.
        step, _, _ = conjugate_gradients(
            local.product, (local.descent / level).float()[None], precondition, tolerance=1e-2, limit=_REFINED
        )
        return value + step[0].to(value) * level

    weight = params[chain.anchor.weight_name]
    noise = _ACCUMULATED * outer.noise
    return solve_light(chain, params, seen, outer.features, outer.delta, weight, noise=noise, seed=seed, refine=refine)


def _known(light: LightResult, outer: OuterProduct, seen: Tensors) -> dict[int, tuple[Tensor, LayerReport]]:
    """Return input and report of the layers solved iteratively, by index, down to the first that is not determined."""
    known: dict[int, tuple[Tensor, LayerReport]] = {}
    usable = outer.features.numel()
    for layer in light.layers:
        step, spread = layer.step, layer.spread * outer.noise**2
        bound = min(step.inputs, usable + layer.rank * step.channels)
        if bound < step.inputs or not layer.condition > _SINGULAR:
            break
        equations, before, usable = seen[step.weight_name].numel(), usable, step.inputs
        known[layer.index] = (
            layer.value,
            LayerReport(
                step.name, step.inputs, before, equations, bound, True, layer.condition, spread, layer.iterations
            ),
        )
    return known


def _quickly(
    chain: Chain,
    params: Tensors,
    seen: Tensors,
    outer: OuterProduct,
    label: int | None,
    light: LightResult,
    known: Mapping[int, tuple[Tensor, LayerReport]],
) -> RecursionResult | None:
    """Return what was found iteratively, or None where it is not good enough."""
    if light.value is None or not known or len(known) < len(light.layers):
        return None
    whole = WholeMap(chain, chain.steps, params, seen, outer)
    value = light.value.reshape(chain.shape)
    residual = whole.relative(value)
    equations = len(whole.target)
    variance = (residual * float(whole.target.norm())) ** 2 / max(equations - value.numel(), 1)
    spread = variance * light.layers[-1].spread
    size = float(value.abs().max()) ** 2
    if not (residual <= _CLOSE * outer.noise and spread <= _GOOD * size):
        return None
    reports = tuple(report for _, report in known.values())
    return RecursionResult(
        value, None, reports, None, outer.features, chain.head, label, outer.noise, residual, spread, 0
    )


_ACCUMULATED = 16.0
"""The client's rounding accumulates to so many times what the outer product shows (measured: 10 to 40)."""
_REFINED = 64
"""Conjugate gradient steps of one refinement."""
_LONG = 30
"""Steps that one factorization may serve where the start is further away."""
_STALE = 60
"""Conjugate gradient steps of one of them beyond which a new factorization is the quicker way."""
_FACTORS = 12
"""Factorizations of one such polish."""
_HALVINGS = 4
"""How often a step from further away is halved."""
_TIGHT = 1e-3
"""Accuracy of such steps."""
_PROBES = 8
"""Random signs by which an error is estimated."""
_CHECK = 200
"""Conjugate gradient steps in which a determined system is solved, given its factor."""
_FINE = 1e-12
"""Below this noise (float64 updates) the many digits wanted make iterations dearer than factors."""
_CLOSE = 150.0
"""Relative residual at which an update counts as explained, in units of the outer product's noise."""
_GOOD = 1e-10
"""Estimated mean squared error that it may leave, relative to the input's squared peak: 100 dB. On 882 images that no
benchmark uses, none accepted so had a true error above 1e-10, 6 with 1.5e-10; matrices were needed for 18 and 13 %."""


def _label(delta: Tensor) -> int | None:
    # Either sign: a weight delta is the gradient times a negative number.
    for signs in (delta < 0, delta > 0):
        if len(delta) > 2 and int(signs.sum()) == 1:
            return int(signs.to(torch.uint8).argmax())
    return None


class _HaltedError(Exception):
    """A layer is not determined, and the graph shows no way on from there."""


class _Walk:
    """The walk from the anchor back to the input; its state is what is known about the current tensor."""

    def __init__(
        self,
        chain: Chain,
        params: Tensors,
        seen: Tensors,
        outer: OuterProduct,
        seed: int,
        known: Mapping[int, tuple[Tensor, LayerReport | None]] | None = None,
    ) -> None:
        self.chain, self.params, self.seen, self.outer = chain, params, seen, outer
        self.solved = known or {}
        self.generator = torch.Generator().manual_seed(seed)
        weight = params[chain.anchor.weight_name]
        self.value = outer.features
        self.delta = outer.delta @ weight
        self.information = Information.diagonal(feature_scale(self.value).square())
        self.hessian: Rows = torch.zeros_like
        self.curve: Tensor | None = torch.zeros_like(self.value)  # The Hessian, as long as it is diagonal.
        self.usable = self.value.numel()
        self.pending: list[Fixed | Elementwise] = []
        self.first = 0
        self.reports: list[LayerReport] = []
        self.stop: str | None = None
        self.reached = False
        self.suffix: WholeMap | None = None
        self.rebuild: Callable[[], Tensor] | None = None

    def probe(self, size: int) -> Tensor:
        signs = torch.randint(0, 2, (size,), generator=self.generator, dtype=torch.int64)
        return (2 * signs - 1).to(self.value)

    def probes(self, size: int) -> Tensor:
        return torch.stack([self.probe(size) for _ in range(_PROBES)])

    def run(self) -> None:
        try:
            self._back()
            if self.chain.stop is not None:
                self._halt(self.chain.stop)
        except _HaltedError:
            return
        except ResourceLimit:
            if self.stop is None:
                raise
            return  # what would only have been a start is not worth so much memory
        self.reached = True

    def _back(self) -> None:
        steps = self.chain.steps
        for index in range(len(steps) - 1, -1, -1):
            step = steps[index]
            if isinstance(step, Affine):
                self._affine(step, index)
            elif isinstance(step, Fixed) and step.reorders:
                continue
            elif isinstance(step, Fixed) or (isinstance(step, Elementwise) and step.affine and self.pending):
                single = Composite((step,), self.params)
                self.delta = single.adjoint(self.delta[None])[0]
                self.hessian, self.curve = _between(single, self.hessian), None
                self.pending.insert(0, step)
                self.first = index
            elif isinstance(step, Elementwise):
                self._activation(step)
        if self.chain.stop is None:
            self._resolve("the model's input")

    def normal(self) -> Tensor:
        """Return the lower triangle of the whole map's normal matrix at the recovered input, to be overwritten."""
        if self.rebuild is None:
            return self.information.matrix()
        return self.information.weigh(self.rebuild())

    def _halt(self, reason: str) -> None:
        self.stop = self.stop or reason
        if self.chain.stop is not None:
            raise _HaltedError  # not even a start can come from here

    def _resolve(self, where: str) -> None:
        """Solve the parameter-free maps that wait between the current tensor and what is known."""
        if not self.pending:
            return
        composite = Composite(tuple(self.pending), self.params)
        if self.first in self.solved:
            self.information = self.information.behind(composite)
            self.value, self.pending = self.solved[self.first][0], []
            return
        unknowns, known = self.pending[0].inputs, self.value.numel()
        names = ", ".join(repr(s.name) for s in self.pending)
        reason = f"{names} keeps {known} of the {unknowns} values before it, so {where} is not determined"
        if known < unknowns:
            self._halt(reason)
        right = composite.adjoint((self.value - composite.constant(self.value))[None])
        value, _, done = conjugate_gradients(
            lambda v: composite.adjoint(composite.apply(v)), right, lambda r: r, tolerance=1e-14, limit=500
        )
        if not done:
            self._halt(reason)
        self.information = self.information.behind(composite)
        self.value, self.usable, self.pending = value[0], min(known, unknowns), []

    def _activation(self, step: Elementwise) -> None:
        self._resolve(f"the output of {step.name!r}")
        value = self.value.reshape(1, *step.in_shape)
        pre = step.inverse(value).flatten()
        slope, bend = step.derivatives(pre)
        if step.rectifies:
            # A ReLU is never negative: the most negative recovered value measures the error of the others.
            error = float((-self.value).max().clamp(min=0))
            active = self.value > 3 * error
            slope = active.to(slope)
            self.usable = int(active.sum())
        else:
            self.usable = int((slope.abs() > 0).sum())
        self.hessian = _bent(self.hessian, slope, bend * self.delta)
        self.curve = None if self.curve is None else self.curve * slope.square() + bend * self.delta
        self.value, self.delta = pre, self.delta * slope
        self.information = self.information.scaled(slope)

    def _affine(self, step: Affine, index: int) -> None:
        gradient = self.seen.get(step.weight_name)
        composite = Composite((step, *self.pending), self.params)
        dense = self.information.dense
        if self.stop is None and dense is not None and index in self.solved and step.inputs <= LARGEST:
            value, report = self.solved[index]
            if report is not None:
                self.reports.append(report)
            self._linearize(step, composite, value, None, gradient, index)
            self.value, self.usable, self.pending = value, step.inputs, []
            return
        known = min(self.usable, self.value.numel())
        unknowns = step.inputs
        solution = solve_layer(
            step, composite, self.value, self.information, self.delta, gradient,
            noise=self.outer.noise, probe=self.probe(unknowns),
        )  # fmt: skip
        live = 0 if gradient is None else solution.rank * step.channels
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
        self._linearize(step, composite, solution.value, solution, gradient, index)
        self.value, self.usable, self.pending = solution.value, unknowns, []

    def _linearize(
        self,
        step: Affine,
        composite: Composite,
        value: Tensor,
        solution: Solution | None,
        gradient: Tensor | None,
        index: int,
    ) -> None:
        """Replace what is known about the layer's input by the exact linearization of everything from there on."""
        weight = self.params[step.weight_name]
        product = None if solution is None else solution.product
        if self.stop is None or product is None:
            self.suffix = WholeMap(self.chain, self.chain.steps[index:], self.params, self.seen, self.outer)
            product = _when_needed(self.suffix, value)
        dense, known, delta, hessian, curve = None, self.information, self.delta, self.hessian, self.curve
        inside = known.dense
        if inside is not None and (solution is None or solution.forward is not None):
            first = [] if solution is None else [solution.forward]
            dtype, earlier = precision(step.inputs), self.chain.steps[:index]
            more = any(isinstance(s, Affine | Fixed) and not getattr(s, "reorders", False) for s in earlier)
            many = gradient is not None and gradient.numel() > step.outputs and composite.steps == (step,)

            def equations() -> Tensor:
                forward, inner = first.pop() if first else None, None
                if forward is None and many:
                    inner = known.matrix(dtype)
                elif forward is None:
                    forward = composite.sandwich(inside.to(dtype), known.slope)
                return add_gradient_equations(
                    forward,
                    step,
                    weight,
                    value,
                    delta,
                    hessian,
                    gradient,
                    lower_only=not more,
                    inner=inner,
                    diagonal=curve,
                )

            if more:
                dense = equations()
            else:
                # Only the polish needs the last one, and a factorization that fails needs it twice.
                self.rebuild = equations
        self.hessian, self.curve = _between(Composite((step,), self.params), self.hessian), None
        if step.inputs <= _MATERIAL and index > 0:
            matrix = self.hessian(torch.eye(step.inputs).to(self.value.device, precision(step.inputs)))
            self.hessian = lambda rows: rows @ matrix.to(rows)
        self.information = Information(product, dense)
        self.delta = step.adjoint(self.delta[None], weight)[0]


def _when_needed(whole: WholeMap, value: Tensor) -> Rows:
    made: list[Rows] = []

    def product(v: Tensor) -> Tensor:
        if not made:
            made.append(whole.linearize(value).product)
        return made[0](v)

    return product


def _bent(hessian: Rows, slope: Tensor, bend: Tensor) -> Rows:
    """Return the Hessian before an activation: D H D + diag(φ″ ∂a)."""
    return lambda rows: hessian(rows * slope.to(rows)).mul_(slope.to(rows)).addcmul_(rows, bend.to(rows))


def _between(composite: Composite, hessian: Rows) -> Rows:
    return lambda rows: composite.adjoint(hessian(composite.apply(rows)))


_MATERIAL = 1024
"""Up to this many values a Hessian is made into a matrix; beyond, it stays a product."""

_SINGULAR = 1e-13
"""Below this share of the scaled spectrum, a direction counts as not determined (float64 cannot tell it from zero)."""
