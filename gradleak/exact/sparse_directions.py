"""Taking a layer's gradient apart into examples by the zeros that an activation leaves.

The weight gradient of a linear layer is ``G = Σ_i δ_i x_iᵀ`` over the examples of a batch, here with the bias gradient
as one more column (and a one as one more input). Its column space holds every δ_i, and where the activation after the
layer is flat, δ_i is zero: in about half of the units after a ReLU.

Where the next linear layer sees h_i = ReLU(z_i) itself, its gradient's row space holds every h_i. So the units that an
example activates and its input are searched in turn: the input whose outputs at these units lie nearest to that space,
then the units that this input activates. It ends where both agree, and most starts end at an example. The zeros of δ_i
must be the same units then, which no part of the search has used. An example that is found is taken out, so the rest is
an easier problem.

Otherwise all δ are needed before one input is known: vectors of the column space with many zeros, found by minimizing
``Σ_j log((U q)_j² + ε²)`` from random kernels, ε falling (iteratively reweighted least squares).

In coordinates: G = U S Vᵀ, δ_i = U q_i, x_i = V a_i, and Σ_i q_i a_iᵀ = S, so that ``q_k · S⁻¹ a_i`` is zero for k ≠ i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import NotApplicable

__all__ = ["Factors", "Separated", "separate", "together"]

_GAP = 30.0
"""Ratio of neighboring singular values that counts as the step from signal to noise."""
_STEPS, _FALL = 40, 0.8
"""Reweighting steps from one start, and by what factor ε falls in each."""
_WIDEST, _FINEST = (-1.3, -0.3), 1e-6
"""Powers of ten between which ε starts, for rows of length one, and where it ends: wide starts find what has most zeros
from anywhere, narrow ones find each what is near."""
_COARSE, _FINE = 3000.0, 60.0
"""Multiples of the noise below which an entry counts as zero: of a direction as searched, or as solved with inputs that
carry errors of their own, and as solved from its zeros alone."""
_SPARE = 2
"""Zeros beyond those that any direction can have, from which on a direction is looked at."""
_ALONE = 1e4
"""Squared size of the second-least zeros, in units of the noise, from which on a direction is the only one."""
_SHARED = 1e-8
"""What other zeros must at least say about what one zero says, relative and squared."""
_EDGE = 1e-4
"""Size of a unit's output, relative to the mean, below which noise decides whether the unit is active."""


@final
@dataclass(frozen=True, eq=False)
class Factors:
    """The gradient of a layer up to its noise: ``left · diag(singular) · rightᵀ``.

    Attributes:
        left: U (m, r).
        singular: S (r,).
        right: V (n, r).
        noise: (m,) standard deviation of the noise in one entry of each row, as what the rank leaves shows it.
        live: (m,) rows that are not zero.
    """

    left: Tensor
    singular: Tensor
    right: Tensor
    noise: Tensor
    live: Tensor

    @property
    def rank(self) -> int:
        """The number of examples that the gradient shows."""
        return len(self.singular)

    @classmethod
    def of(cls, gradient: Tensor, eps: float) -> Factors:
        """Return the factors of ``gradient`` (m, n), whose numbers are rounded to ``eps``, relative.

        Raises:
            NotApplicable: no gap parts the singular values from noise, or the gradient is zero.
        """
        gradient = gradient.double()
        u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
        floor = eps * float(s[0])
        values = torch.cat([s, s.new_zeros(1)]).clamp_min(1e-2 * floor)
        gaps = values[:-1] / values[1:]
        rank = int(gaps[:-1].argmax()) + 1 if len(s) > 1 else 1
        if float(s[0]) == 0 or len(s) < 2 or float(gaps[rank - 1]) < _GAP:
            raise NotApplicable(
                "The singular values of the layer's gradient fall without a gap, so it has noise on it (or was pruned, "
                f"or comes from {len(s)} examples or more) and does not show how many examples there are; use matching."
            )
        left = gradient - (u[:, :rank] * s[:rank]) @ vh[:rank]
        live = gradient.abs().amax(1) > 1e-6 * gradient.abs().max()
        rows = left.square().sum(1) / max(gradient.shape[1] - rank, 1)
        noise = (rows + rows[live].mean() + (1e-2 * floor) ** 2 / gradient.numel()).sqrt()
        return cls(u[:, :rank], s[:rank], vh[:rank].T, noise, live)

    def zeros(self, q: Tensor, times: float) -> Tensor:
        """Return which entries (K, m) of ``U q`` are zero within the noise, for directions q (K, r)."""
        reach = times * self.noise * (q / self.singular).norm(dim=1, keepdim=True)
        return ((q @ self.left.T).abs() <= reach) | ~self.live

    def solve(self, off: Tensor, found: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, bool]:
        """Return the direction (r,) whose entries ``off`` (m,) are zero, its covariance, whether it is the only one.

        Another one has the same zeros where its example activates no other units than this one's; then inputs that are
        ``found``, as coordinates (r,) each, still may leave one direction. No single zero may decide: of examples that
        activate the same units, a mixture at the edge of one more unit looks like an example of its own.
        """
        within = _complement(found, self.singular)
        rows = self.left[off] * self.singular / self.noise[off, None] @ within
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        alone = len(values) == 1
        if not alone and float(values[1]) > _ALONE * max(float(values[0]), len(off)):
            leverage = (rows @ vectors[:, 1:]).square() / values[1:]
            alone = float(leverage.sum(1).max()) < 1 - _SHARED
        scaled = self.singular[:, None] * (within @ vectors)
        length = scaled[:, 0].norm()
        spread = scaled[:, 1:] / (values[1:].clamp_min(1e-300).sqrt() * length)
        return scaled[:, 0] / length, spread @ spread.T, alone

    def search(self, within: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` directions (K, r) in the span of ``within`` (r, k) with as many zeros as others nearby."""
        k = within.shape[1]
        if k == 1:
            return within.T
        rows = self.left[self.live] @ within
        size = rows.norm(dim=1, keepdim=True)
        rows = (rows / size)[size[:, 0] > 1e-6 * size.max()]
        draw = torch.rand(count, len(rows), generator=generator, dtype=torch.float64).argsort(1)[:, : k - 1]
        q = torch.linalg.svd(rows[draw.to(rows.device)], full_matrices=True)[2][:, -1]
        low, high = _WIDEST
        power = low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        eps = (10**power).to(rows)
        for _ in range(_STEPS):
            weights = 1 / ((q @ rows.T).square() + eps**2)
            q = torch.linalg.eigh((weights[:, :, None] * rows).transpose(1, 2) @ rows)[1][:, :, 0]
            eps = (_FALL * eps).clamp_min(_FINEST)
        return q @ within.T

    def candidates(self, q: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the directions of ``q`` (K, r), solved, with their active units (m,); most zeros first."""
        off = self.zeros(q, _COARSE)
        count = (off & self.live).sum(1)
        found: list[tuple[Tensor, Tensor]] = []
        seen: set[bytes] = set()
        for i in count.argsort(descending=True, stable=True).tolist():
            if int(count[i]) < self.rank + _SPARE and len(q) > 1:
                break
            key = off[i].cpu().numpy().tobytes()
            if key not in seen:
                seen.add(key)
                solved, _, alone = self.solve(off[i])
                if alone:
                    found.append((solved, ~self.zeros(solved[None], _FINE)[0]))
        return found


@final
@dataclass(frozen=True, eq=False)
class Separated:
    """Examples taken out of a layer's gradient.

    Attributes:
        inputs: (k, n) their inputs to the layer, the column of the bias included, scaled to a one there.
        active: (k, m) the units that each reaches.
        error: estimated root mean square error of the inputs; NaN unless all were found and the units determine them.
        starts: directions that were searched from.
    """

    inputs: Tensor
    active: Tensor
    error: float
    starts: int


def separate(
    factors: Factors,
    weight: Tensor,
    seen: Tensor,
    *,
    patience: int,
    generator: torch.Generator,
    going: Callable[[int], bool] = lambda found: True,
) -> Separated:
    """Return the examples of a layer before a ReLU whose outputs lie in a known space, one after another.

    Args:
        factors: of the layer's gradient, the bias gradient as last column.
        weight: (m, n) the layer's weight, the bias as last column.
        seen: (m, s) orthonormal basis of a space that holds what the next layer sees of the examples that can be found.
        patience: starts without a new example after which the search ends.
        generator: draws the starts.
        going: (examples found) → whether to go on, asked between searches.
    """
    project = weight.double() @ factors.right
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    starts = idle = 0
    while len(found) < factors.rank and idle < patience and going(len(found)):
        before = len(found)
        for active in _alternate(factors, project, seen, [q for q, _, _ in found], generator):
            known = any(torch.equal(active, other) for _, _, other in found)
            a = None if known or len(found) == factors.rank else _from_outputs(factors, project, seen, active)
            if a is not None:
                (q, _, alone), times = factors.solve(~active), _FINE
                if not alone and found:
                    (q, _, alone), times = factors.solve(~active, [other for _, other, _ in found]), _COARSE
                if alone and torch.equal(~factors.zeros(q[None], times)[0], active):
                    found.append((q, a, active))
        starts += _ROUND
        idle = 0 if len(found) > before else idle + _ROUND
    if not found:
        return _nothing(factors, starts)
    active = torch.stack([on for _, _, on in found])
    whole = _complete(factors, active) if len(found) == factors.rank else None
    inputs, error = whole or (torch.stack([a for _, a, _ in found]) @ factors.right.T, math.nan)
    return Separated(inputs / inputs[:, -1:], active, error, starts)


def _alternate(
    factors: Factors, project: Tensor, seen: Tensor, found: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Return the sets of units (m,) where searching units and inputs in turn ends, from mixtures of inputs on.

    Inputs are searched where the directions ``found`` leave room: q_k · S⁻¹ a is zero for other examples.
    """
    within = _complement([q / factors.singular for q in found], factors.singular)
    rows, k = project @ within, within.shape[1]
    ridge = 1e-9 * rows.square().sum() / k * torch.eye(k).to(rows)
    # A row of the gradient is a mixture of inputs, of few where few examples reach its unit.
    live = factors.live.nonzero().flatten()
    drawn = live[torch.randint(len(live), (_ROUND,), generator=generator).to(live.device)]
    a = (factors.left[drawn] * factors.singular) @ within
    noise = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a)
    spread = torch.arange(_ROUND).to(a)[:, None] % 2  # Every other start is moved far from its row.
    a = a / a.norm(dim=1, keepdim=True) + spread * noise / math.sqrt(k)
    active = a @ rows.T > 0
    active = torch.where((a @ within.T @ factors.right[-1] > 0)[:, None], active, ~active)
    for _ in range(_TRIES):
        before, on = active, rows * active[:, :, None]
        whole, inside = on.transpose(1, 2) @ rows, seen.T @ on
        factor = torch.linalg.cholesky(whole + ridge)
        rest = torch.linalg.solve_triangular(factor, whole - inside.transpose(1, 2) @ inside, upper=False)
        rest = torch.linalg.solve_triangular(factor, rest.transpose(1, 2), upper=False)
        least = torch.linalg.eigh((rest + rest.transpose(1, 2)) / 2)[1][:, :, :1]
        a = torch.linalg.solve_triangular(factor.transpose(1, 2), least, upper=True)[:, :, 0]
        z = a @ rows.T
        active = torch.where((a @ within.T @ factors.right[-1] > 0)[:, None], z > 0, z < 0)
        if torch.equal(active, before):
            break
    return list(torch.unique(active & factors.live, dim=0))


_TRIES = 30
"""Turns of searching units and inputs from one start."""
_ROUND = 64
"""Starts that advance together."""


def together(
    factors: Factors,
    reached: Callable[[Tensor], Tensor],
    back: Tensor | None = None,
    begun: Separated | None = None,
    *,
    patience: int,
    generator: torch.Generator,
    going: Callable[[int], bool] = lambda found: True,
) -> Separated:
    """Return all examples of a layer at once, from its sparse directions alone; none where they are not all found.

    Args:
        factors: of the layer's gradient, the bias gradient as last column.
        reached: layer inputs (r, n) → which units (r, m) they reach, by the model.
        back: (m, k) spans what comes back to the layer's units before the activation's zeros, where that is known.
        begun: examples that are known already.
        patience: starts without a better set of directions after which the search ends.
        generator: draws the starts.
        going: (examples that agree) → whether to go on, asked between searches.
    """
    known = [] if begun is None else [(factors.solve(~on)[0], on) for on in begun.active]
    inputs = [] if begun is None else list(begun.inputs @ factors.right / factors.singular)
    within = _complement(inputs, factors.singular)
    pool: list[tuple[Tensor, Tensor]] = []
    starts = idle = best = 0
    tried = factors.live[None]
    while idle < patience and going(best):
        for q, active in factors.candidates(factors.search(within, _ROUND, generator)):
            new = all(float((q @ other).abs()) < 1 - 1e-9 for other, _ in (*known, *pool))
            if new and (back is None or _comes_back(factors.left[active] @ q, back[active])):
                pool.append((q, active))
        pool.sort(key=lambda pair: int(pair[1].sum()))
        starts, idle = starts + _ROUND, idle + _ROUND
        chosen = _independent([*known, *pool], factors.rank)
        if len(chosen) > best:
            best, idle = len(chosen), 0
        active = torch.stack([factors.live, *(active for _, active in chosen)])[1:]
        if len(chosen) < factors.rank or torch.equal(active, tried):
            continue
        tried = active
        whole = _complete(factors, active)
        if whole is not None:
            shown = whole[0] / whole[0][:, -1:]
            if torch.equal(reached(shown[:, :-1]), active):
                return Separated(shown, active, whole[1], starts)
    return _nothing(factors, starts)


def _nothing(factors: Factors, starts: int) -> Separated:
    return Separated(factors.right.T[:0], factors.live[None][:0], math.nan, starts)


def _comes_back(delta: Tensor, back: Tensor) -> bool:
    """Tell whether ``delta`` (k,), what is not zero of a direction, lies in the span of ``back`` (k, c)."""
    basis = torch.linalg.qr(back)[0]
    return float((delta - basis @ (basis.T @ delta)).norm()) <= _SAME * float(delta.norm())


_SAME = 1e-3
"""Distance from a span, relative, that is taken for noise."""


def _independent(pool: list[tuple[Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first directions of ``pool`` that do not depend on those before, ``rank`` of them at most."""
    chosen: list[tuple[Tensor, Tensor]] = []
    basis: list[Tensor] = []
    for q, active in pool:
        rest = q
        for b in (*basis, *basis):
            rest = rest - (b @ rest) * b
        if float(rest.norm()) > 1e-4:
            basis.append(rest / rest.norm())
            chosen.append((q, active))
        if len(chosen) == rank:
            break
    return chosen


def _complement(taken: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return an orthonormal basis (r, k) of what is orthogonal to all of ``taken``, (r,) each."""
    if not taken:
        return torch.eye(len(like)).to(like)
    columns = torch.stack(list(taken), 1)
    return torch.linalg.svd(columns / columns.norm(dim=0), full_matrices=True)[0][:, len(taken) :]


def _from_outputs(factors: Factors, project: Tensor, seen: Tensor, active: Tensor) -> Tensor | None:
    """Return the coordinates a (r,) of the input that activates ``active`` alone, None where there is none.

    Its outputs at these units, and zeros elsewhere, must lie in the space ``seen``.
    """
    rows = project * active[:, None]
    rest = rows - seen @ (seen.T @ rows)
    values, vectors = torch.linalg.eigh(rest.T @ rest)
    a, one = vectors[:, 0], vectors[:, 0] @ factors.right[-1]
    only = len(values) == 1 or float(values[0]) < _ONLY * float(values[1])
    if not only or float(one.abs()) < 1e-12:
        return None
    z = project @ (a / one)
    wrong = ((z > 0) != active) & factors.live & (z.abs() > _EDGE * z.abs().mean())
    return None if bool(wrong.any()) else a / one


_ONLY = 1e-4
"""Squared distance from a space, against that of the next best input, below which an input is the only one in it."""


def _complete(factors: Factors, active: Tensor) -> tuple[Tensor, float] | None:
    """Return all inputs (r, n) from the units ``active`` (r, m) that each example reaches, and their error.

    None where these do not determine them.

    Directions are solved one by one first, then directions and inputs in turn until both fit the whole gradient.
    """
    solved = [factors.solve(~on) for on in active]
    if not all(alone for _, _, alone in solved):
        return None
    q = torch.stack([s for s, _, _ in solved], 1)
    a = torch.diag(factors.singular) @ torch.linalg.inv(q).T
    whole = factors.left * factors.singular
    delta = factors.left @ q * active.T
    for _ in range(_TURNS):
        # Not the default driver, whose pivots start from memory that nobody has filled: its last bits differ by run.
        left, right = delta / factors.noise[:, None], whole / factors.noise[:, None]
        a = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
        for j in range(len(delta)):
            on = active[:, j]
            if bool(on.any()):
                delta[j, on] = torch.linalg.lstsq(a[:, on], whole[j, :, None], driver="gelsd").solution[:, 0]
    inputs = (factors.right @ a).T
    one = inputs[:, -1].abs().clamp_min(1e-300)
    # Noise of the gradient directly, and through the directions that it turns: dA = −A dQᵀ Q⁻ᵀ.
    level = float(factors.noise[factors.live].square().mean().sqrt())
    direct = level**2 * torch.linalg.inv(delta.T @ delta).diagonal()
    dual = torch.linalg.inv(q)
    size = inputs.square().mean(1)
    turned = sum(size[k] * torch.einsum("ir,rs,is->i", dual, cov, dual) for k, (_, cov, _) in enumerate(solved))
    return inputs, float(((direct + turned) / one**2).mean().sqrt())


_TURNS = 10
"""Turns of solving inputs and directions."""
