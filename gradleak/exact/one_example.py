"""One example through a whole network: its input from its gradient, by linear algebra alone.

The gradient of a linear layer with bias is an outer product that shows the layer's input and output gradient. From
there :mod:`gradleak.exact.backward` walks to the input, and where that is not as accurate as the update allows, a few
Gauss–Newton steps on all equations together finish (:mod:`gradleak.exact.chain_map`).

Sources: R-GAP (Zhu & Blaschko, ICLR 2021, Section 3) and R-CONV (arXiv 2406.04227). Deviations: equations are weighted
by what is known how well, so float32 updates are inverted to their noise floor; the walk starts at the earliest linear
layer with bias, not at the last; neither loss nor label is needed, and nothing changes when the update is scaled (a
weight delta of one plain SGD step is −learning rate times the gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable, ResourceLimit
from gradleak.exact.backward import walk_back
from gradleak.exact.chain_map import ChainMap, Linearized, feature_scale
from gradleak.exact.counting import LayerReport
from gradleak.exact.layer_iterative import SAMPLES, Going, Known
from gradleak.exact.normal_matrix import factorize
from gradleak.exact.outer_product import read_head, read_outer_product
from gradleak.solve.cholesky import Factor
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients
from gradleak.solve.least_squares import State, minimize
from gradleak.structure.chain import Affine, Chain, Elementwise, Maximum
from gradleak.structure.reader import trace_chain

__all__ = ["RecursionResult", "check_together", "fit_layers", "invert_layers"]

Tensors = Mapping[str, Tensor]

_ACCUMULATED = 16.0
"""The client's rounding accumulates to so many times what the outer product shows (measured: 10 to 40)."""
_CLOSE = 150.0
"""Relative residual at which an update counts as explained, in units of the outer product's noise."""
_GOOD = 1.2e-10
"""Estimated mean squared error that the walk may leave to no further steps, relative to the input's squared peak: 99
dB. On 120 CIFAR-100 images with float32 updates, the estimate was 1.2 to 14 times the true error, and the worst of the
87 images accepted so had 4e-11."""
_REFINED = 40
"""Conjugate gradient steps that refine a layer; two digits are wanted of them."""
_STEPS = 8
"""Gauss–Newton steps that finish a walk."""
_PROBES = 8
"""Random signs by which an error is estimated: one could miss the direction that is known worst."""
_CHECK = 200
"""Conjugate gradient steps in which a determined system is solved, given its factor."""
_SINGULAR = 1e-13
"""Below this share of the scaled spectrum, a direction counts as not determined (float64 cannot tell it from zero)."""


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
    smooth: bool = False,
    seed: int = 0,
    going: Going | None = None,
) -> RecursionResult:
    """Return the input that one example's gradient determines, layer by layer.

    Args:
        model: the model, used for its graph and constants only.
        params: parameters by name.
        grads: gradient of any loss of one example, up to one common factor, by name; frozen parameters may lack.
        shape: of one input.
        chain: the traced chain, to share among examples of one model.
        polish: whether Gauss–Newton steps on the whole map may finish.
        quick: whether to leave them out where residual and estimated error are small without.
        smooth: whether neighboring values of the input tend to be equal, as pixels do.
        seed: of the samples that estimate errors.
        going: whether to go on, asked in every iteration.

    Raises:
        NotApplicable: there is no layer to start at, the gradient there is no outer product, or ``going`` said no.

    """
    case = _Example(model, params, grads, shape, chain)
    chain, noise = case.chain, _ACCUMULATED * case.outer.noise
    draw = torch.Generator().manual_seed(seed)
    walked = walk_back(
        chain, case.params, case.seen, case.known(noise, draw), noise,
        seed=seed, refine=case.refine, tolerance=math.inf, onward=True, smooth=smooth, going=going,
    )  # fmt: skip
    whole = case.whole(chain=walked.chain)
    start = None if walked.start is None else walked.start[0]
    residual = math.nan if start is None else whole.relative(start.view(chain.shape))
    if walked.stop is not None or start is None:
        found = None if start is None else start.view(chain.shape)
        return case.result(None, walked.stop, walked.layers, found, residual)
    state = State(start, whole.cost(start))
    # The samples are those of the walk's noise; the residual shows how large the noise is.
    spread = whole.variance(state.cost) * float(walked.known.errors.square().mean()) / noise**2
    good = residual <= _CLOSE * case.outer.noise and spread <= _GOOD * float(start.abs().max()) ** 2
    if polish and not (quick and good) and whole.steps:
        with suppress(ResourceLimit):  # What the walk found stands, with its larger error.
            state, spread = _polished(whole, start, _CLOSE * case.outer.noise, seed, going)
    residual = math.sqrt(state.cost) / whole.size
    found = state.z.view(chain.shape)
    folded = [s.name for s in chain.steps if isinstance(s, Elementwise) and s.folds]
    if folded and residual > _CLOSE * case.outer.noise:
        reason = f"{folded[-1]!r} falls before it rises, and on which side its inputs lie is not known"
        return case.result(None, reason, walked.layers, found, residual)
    return case.result(found, None, walked.layers, None, residual, spread, state.steps)


def _polished(whole: ChainMap, start: Tensor, close: float, seed: int, going: Going | None) -> tuple[State, float]:
    """Return where Gauss–Newton steps on the whole map lead, and the estimated mean squared error there."""
    factor, n = factorize(whole, start), len(start)
    whole.factorize = lambda *_: factor
    enough = 1e-2 * n / max(len(whole.target) - n, 1)  # A hundredth of what noise alone explains.
    state = minimize(
        whole, start, iterations=_STEPS, damping=0.0, enough=enough, least=(close * whole.size) ** 2,
        going=None if going is None else lambda *_: going(),
    )  # fmt: skip
    probe = _signs((_PROBES, n), seed).to(start)
    return state, whole.variance(state.cost) * float((probe * factor.solve(probe)).mean())


def _signs(shape: tuple[int, ...], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, shape, generator=draw, dtype=torch.int64) - 1).double()


def fit_layers(
    model: nn.Module,
    params: Tensors,
    grads: Tensors,
    start: Tensor,
    *,
    chain: Chain | None = None,
    seed: int = 0,
    iterations: int = 360,
    going: Callable[[float, int], bool] | None = None,
) -> RecursionResult:
    """Solve all layers together for the input that explains one example's gradient, by Gauss–Newton from ``start``.

    No layer needs to be determined by itself, only the whole. Measured on sigmoid LeNets, the steps converge from a
    gray image; from a good start, one factorization serves them all.

    Args:
        model: the model, used for its graph and constants only.
        params: parameters by name.
        grads: gradient of any loss of one example, up to one common factor, by name; frozen parameters may lack.
        start: where the steps begin (*shape), model-input units.
        chain: the traced chain.
        seed: of the probe that estimates condition and error.
        iterations: steps at most.
        going: (relative residual, steps so far) → whether to go on.

    Returns:
        The result; ``input`` is None and ``start`` the best point where the steps do not reach the update, or where the
        layers together leave a direction open.

    Raises:
        NotApplicable: the model is no chain of smooth layers from the input to a linear layer, or the gradient there is
            no outer product.
        ResourceLimit: there are too many values, or the matrices of a layer do not fit in memory.

    """
    case = _Example(model, params, grads, tuple(start.shape), chain)
    check_together(case.chain)
    whole = case.whole(factorize)
    size, noise = whole.size, case.outer.noise
    value, features = start.detach().double().flatten(), case.outer.features.numel()
    state = minimize(
        whole, value, iterations=iterations, damping=0.0,
        enough=1e-2 * len(value) / max(len(whole.target) - len(value), 1), least=(_CLOSE * noise * size) ** 2,
        going=None if going is None else lambda s, _: going(math.sqrt(s.cost) / size, s.steps),
    )  # fmt: skip
    residual, done = math.sqrt(state.cost) / size, state.status == "converged"
    local = Linearized(whole, state.z, factorize(whole, state.z))
    condition, response = _condition(local, seed)
    spread = whole.variance(state.cost) * response
    unknowns, equations = len(value), len(whole.target) - features
    shows, error = condition > _SINGULAR, math.sqrt(spread)
    relative = 3 * error / max(float(state.z.square().mean().sqrt()), 1e-300) if shows else math.nan
    report = LayerReport(
        "all layers together", unknowns, features, equations, min(unknowns, features + equations),
        shows and done, error, relative, state.steps,
    )  # fmt: skip
    found = state.z.view(start.shape)
    explained = residual <= _CLOSE * noise
    if report.determined and explained:
        return case.result(found, None, (report,), None, residual, spread, state.steps)
    reason = str(report)
    if not done or not explained:
        reason = f"the steps ended at a relative residual of {residual:.1e}, which does not explain the update"
    return case.result(None, reason, (report,), found, residual, steps=state.steps)


def _condition(local: Linearized, seed: int) -> tuple[float, float]:
    """Return about the least eigenvalue of the scaled normal matrix, and the mean diagonal of its inverse."""
    factor, n = local.factor, len(local.descent)
    assert factor is not None
    probe = _signs((_PROBES, n), seed).to(local.descent)
    ready = factor.solve(probe)
    response, _, done = conjugate_gradients(local.product, probe[:1], factor.solve, tolerance=1e-3, limit=_CHECK)
    exact = response[0]
    condition = float(exact @ local.product(response)[0]) / float(
        (exact / factor.scale).square().sum().clamp(min=1e-300)
    )
    # Where the factor's own precision hides a weak direction, the exact product shows it.
    hidden = float(probe[0] @ exact) / max(float(probe[0] @ ready[0]), 1e-300)
    return condition if done else 0.0, float((probe * ready).mean()) * max(1.0, hidden)


def check_together(chain: Chain) -> None:
    """Check that the layers of ``chain`` can be solved together.

    Raises:
        NotApplicable: they are no chain of smooth layers from the input on.

    """
    kinks = [s.name for s in chain.steps if isinstance(s, Maximum) or (isinstance(s, Elementwise) and s.clips)]
    if chain.stop is not None or kinks:
        reason = chain.stop or f"{kinks[0]!r} has a kink, where the gradient jumps"
        raise NotApplicable(f"The layers cannot be solved together: {reason}; use matching.")
    if not any(isinstance(s, Affine) for s in chain.steps):
        raise NotApplicable(f"The gradient of {chain.anchor.name!r} shows its input; use linear_inversion().")


@final
class _Example:
    """One example's gradient and the chain that it came through, in float64."""

    def __init__(
        self, model: nn.Module, params: Tensors, grads: Tensors, shape: tuple[int, ...], chain: Chain | None
    ) -> None:
        self.chain = trace_chain(model, shape) if chain is None else chain
        self.params = {k: p.detach().double() for k, p in params.items()}
        self.seen = {k: g.detach().double() for k, g in grads.items()}
        anchor = self.chain.anchor
        if anchor.weight_name not in self.seen:
            raise NotApplicable(
                f"The update has no gradient of {anchor.name!r}, where the recursion starts; share it, or use matching."
            )
        gradient, bias = grads[anchor.weight_name].detach(), anchor.bias_name or ""
        if bias in self.seen:
            self.outer = read_outer_product(self.seen[anchor.weight_name], self.seen[bias])
        elif self.chain.head:
            self.outer = read_head(gradient, self.params[anchor.weight_name], self.params.get(bias))
        else:
            raise NotApplicable(
                f"The update has no gradient of {anchor.name!r}'s bias, where the recursion starts; share it, or use "
                "matching."
            )

    def known(self, noise: float, draw: torch.Generator) -> Known:
        """Return what is known of the chain's output; rounding is relative."""
        outer, weight = self.outer, self.params[self.chain.anchor.weight_name]
        size = noise / feature_scale(outer.features)[None]

        def normal(like: Tensor) -> Tensor:
            return like * torch.randn((SAMPLES, *like.shape), generator=draw, dtype=torch.float64).to(like)

        slips = normal(noise * outer.delta[None]) @ weight
        return Known(outer.features[None], size**-2, normal(size), (outer.delta @ weight)[None], slips)

    def whole(
        self, factorize: Callable[[ChainMap, Tensor], Factor] | None = None, chain: Chain | None = None
    ) -> ChainMap:
        """Return the whole chain as one map."""
        return ChainMap(self.chain if chain is None else chain, self.params, self.seen, self.outer, factorize=factorize)

    def refine(self, chain: Chain, index: int, values: Tensor, precondition: Rows) -> Tensor:
        """Return the inputs (1, n) of a layer after a step on everything that comes from there on."""
        local = ChainMap(chain, self.params, self.seen, self.outer, first=index).linearize(values[0])
        step, _, _ = conjugate_gradients(
            local.product, local.descent[None], precondition, tolerance=1e-2, limit=_REFINED
        )
        return values + step

    def result(
        self,
        value: Tensor | None,
        stopped_at: str | None,
        layers: tuple[LayerReport, ...],
        start: Tensor | None,
        residual: float,
        spread: float = math.nan,
        steps: int = 0,
    ) -> RecursionResult:
        """Return the result with what the outer product shows."""
        outer, head = self.outer, self.chain.head
        label = _label(outer.delta) if head else None
        return RecursionResult(
            value, stopped_at, layers, start, outer.features, head, label, outer.noise, residual, spread, steps
        )


def _label(delta: Tensor) -> int | None:
    # Either sign: a weight delta is the gradient times a negative number.
    for signs in (delta < 0, delta > 0):
        if len(delta) > 2 and int(signs.sum()) == 1:
            return int(signs.to(torch.uint8).argmax())
    return None
