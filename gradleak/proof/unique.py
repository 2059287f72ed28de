"""Is a reconstruction the only explanation nearby? The Jacobian of the update at the solution, against its noise.

With J the Jacobian of the update with respect to all inputs, rows divided by the noise, the error of example i that the
noise can cause is ‖(J⁺ n)_i‖. It is bounded by the measured samples and by the isotropic part ‖(J⁺)_i‖_F, and the
linearization is checked at finite steps along the weakest directions: two nearly equal examples of one class, for
instance, have a Jacobian that is regular but says little, because the map folds there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.proof.explained import Explanation, Fit
from gradleak.solve.jacobian import jacobian

__all__ = ["SAFETY", "Uniqueness", "uniqueness"]

SAFETY = 16.0
"""Factor between a measured sample of the error and the bound that is stated."""
_WEAKEST = 6
"""Number of singular directions along which the linearization is checked."""
_JOINT = 8
"""Moves along all weak directions at once by which their interplay is measured."""
_STORED = 4e7
"""Numbers of the Jacobian kept at most; further rows are left out, which can only weaken the verdict."""
_RANK = 1e-11
"""Singular values below this share of the largest count as zero in float64."""


@final
@dataclass(frozen=True, eq=False)
class Uniqueness:
    """What the Jacobian tells about each example.

    Attributes:
        rank: numerical rank.
        errors: per example, the bound on the root mean square error (model-input units); infinite where some direction
            of the example is free.
        determined: per example, whether the bound is within the tolerance.
        weakest: smallest singular value, relative to the largest.
        few: whether there are too few equations to show that the update is undistorted.
        why: what leaves examples open, empty where all are determined.
    """

    rank: int
    errors: tuple[float, ...]
    determined: tuple[bool, ...]
    weakest: float
    few: bool
    why: str


def uniqueness(
    explanation: Explanation,
    fit: Fit,
    *,
    unit: float,
    tolerance: float = 0.1,
    folds: bool = True,
    going: Callable[[], bool] | None = None,
) -> Uniqueness | None:
    """Return what the Jacobian at a matched candidate tells; None where it is not finite, or cannot be computed.

    Args:
        explanation: the candidate.
        fit: how it explains the update.
        unit: size of a typical input value.
        tolerance: largest error bound, relative to ``unit``, that still counts as determined.
        folds: whether directions along which the map folds count as free.
        going: says whether to go on, asked now and then.

    Raises:
        TimeSpent: ``going`` said no.
    """
    try:
        J, whitened, rows, live = _linear(explanation, fit, going)
    except (RuntimeError, NotImplementedError):  # an operation without second derivatives
        return None
    count, unknowns = len(explanation.inputs), explanation.inputs.numel()
    if not bool(torch.isfinite(J).all()):
        return None
    values, V, pull = _singular(J)
    top = float(values.max())
    rank = int((values > _RANK * top).sum()) if top > 0 else 0
    inverse = torch.where(values > _RANK * top, 1 / values.clamp(min=1e-300), torch.inf)

    # Directions that the noise leaves free by more than the tolerance, and what each example has to do with them.
    share = V.view(count, -1, unknowns)
    level = max(1.0, fit.excess)
    free = inverse * level * SAFETY > tolerance * unit * math.sqrt(unknowns)
    kept = torch.where(free, torch.zeros_like(inverse), inverse)
    residual = fit.whitened[live]
    shifts = kept[:, None] * pull(torch.cat([residual[None], fit.noise.samples[:, live]]))
    errors = (V @ shifts).view(count, -1, shifts.shape[1]).norm(dim=1)
    spread = (share * kept).square().sum((1, 2)).sqrt()
    bound = errors[:, 0] + SAFETY * (errors[:, 1:].amax(1) + 0.5 * level * spread)
    along = shifts[:, 0].abs() + SAFETY * (shifts[:, 1:].abs().amax(1) + 0.5 * level * kept)
    flat = explanation.inputs.flatten()
    bent, remainders = _folds(whitened, flat, J, V, kept, along, fit, unit, tolerance)
    # What the linearization leaves out along weak directions reaches the other examples too.
    for pair in remainders:
        bound = bound + (V @ (kept[:, None] * pull(pair))).view(count, -1, len(pair)).norm(dim=1).amax(1)
    open_ = free | bent if folds else free
    reach = unit * math.sqrt(unknowns)
    touched = (share.norm(dim=1) * reach * open_ > 0.1 * tolerance * unit * math.sqrt(unknowns / count)).any(1)
    bounds = bound / math.sqrt(unknowns / count)
    good = ~touched & (bounds <= tolerance * unit)
    shown = tuple(float(b) if not bool(t) else math.inf for b, t in zip(bounds, touched, strict=True))
    few = rows < 1.25 * unknowns + 8
    why = ""
    if few:
        why = f"{rows} equations for {unknowns} unknowns leave nothing to show that the update is undistorted"
    elif bool(good.all()):
        pass
    elif rank < unknowns:
        why = f"its Jacobian has rank {rank} of {unknowns}, so others nearby explain it as well"
    elif bool(bent.any()):
        why = "the map folds nearby (nearly equal examples, or a kink), so others nearby may explain it as well"
    elif bool(free.any()):
        why = f"{int(free.sum())} of {unknowns} directions are weaker than the noise"
    else:
        why = f"the noise leaves an error of up to {max(shown):.1e}, too much for a proof"
    weakest = float(values.min()) / top if top > 0 else 0.0
    return Uniqueness(rank, shown, tuple(bool(g) for g in good), weakest, few, why)


def _linear(
    explanation: Explanation, fit: Fit, going: Callable[[], bool] | None
) -> tuple[Tensor, Callable[[Tensor], Tensor], int, Tensor]:
    """Return the whitened Jacobian (m, n), nuisances projected out; the map; equations; chosen coordinates."""
    shape, count = explanation.inputs.shape, explanation.inputs.numel()
    live = (fit.noise.weight > 0).nonzero().flatten()
    most = max(int(_STORED / count), 4 * count)
    if len(live) > most:
        order = torch.randperm(len(live), generator=torch.Generator().manual_seed(explanation.seed))
        live = live[order[:most].to(live.device)]
    weight = fit.noise.weight[live] * fit.factor
    labels = explanation.labels

    def simulated(z: Tensor, y: Tensor) -> Tensor:
        return explanation.simulate(z.reshape(shape), y)[live] * weight

    def whitened(z: Tensor) -> Tensor:
        return simulated(z, labels)

    z = explanation.inputs.flatten()
    J = jacobian(whitened, z, going=going).T
    nuisance = [whitened(z)[:, None]] if fit.free or explanation.simulator.defended else []
    if explanation.free_labels:
        own = jacobian(lambda y: simulated(z, y.reshape(labels.shape)), labels.flatten(), going=going).T.contiguous()
        own = own.view(len(own), *labels.shape)
        if explanation.probabilities:
            own = own[:, :, 1:] - own[:, :, :1]  # they keep their sum
        nuisance.append(own.flatten(1))
    if nuisance:
        Q = torch.linalg.qr(torch.cat(nuisance, 1)).Q
        J = J - Q @ (Q.T @ J)
    return J, whitened, int((J.square().sum(1) > 0).sum()) - sum(n.shape[1] for n in nuisance), live


def _singular(J: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Return singular values (n,), right vectors (n, n), and u ↦ Uᵀ u for rows u (k, m) as (n, k)."""
    n = J.shape[1]
    Q, R = (None, J) if J.shape[0] < n else torch.linalg.qr(J)
    U, values, Vh = torch.linalg.svd(R, full_matrices=Q is None)
    missing = n - len(values)
    if missing > 0:
        values = torch.cat([values, values.new_zeros(missing)])

    def pull(rows: Tensor) -> Tensor:
        inner = rows if Q is None else rows @ Q
        found = U.T @ inner.T
        return torch.cat([found, found.new_zeros(missing, found.shape[1])]) if missing > 0 else found[:n]

    return values, Vh.T, pull


def _folds(
    whitened: Callable[[Tensor], Tensor],
    z: Tensor,
    J: Tensor,
    V: Tensor,
    kept: Tensor,
    along: Tensor,
    fit: Fit,
    size: float,
    tolerance: float,
) -> tuple[Tensor, list[Tensor]]:
    """Check the linearization at finite steps along the weakest directions.

    Returns:
        a mask (n,) of directions along which the map does not keep half of what its linearization promises, and for
        each checked direction what the linearization leaves out at the ends of the error bound ``along`` it, (2, m);
        at last, what it leaves out along several at once beyond that, (k, m).
    """
    mask, remainders = torch.zeros_like(kept, dtype=torch.bool), []
    order = torch.argsort(kept, descending=True)[:_WEAKEST]
    order = order[kept[order] > 0]
    largest = tolerance * size * math.sqrt(len(z))
    steps = [s * f for s in (-1, 1) for f in (0.125, 0.25, 0.5, 1.0)]
    with torch.no_grad():
        base = whitened(z)
        for place in order.tolist():
            radius = 2 * (float(fit.whitened.norm()) + 4 * math.sqrt(len(J))) * float(kept[place])
            lengths = [min(radius, largest) * s for s in steps] + [-float(along[place]), float(along[place])]
            moves = torch.stack([length * V[:, place] for length in lengths])
            reached = torch.stack([whitened(z + move) for move in moves]) - base
            promised = moves @ J.T
            mask[place] = bool((reached.norm(dim=1) < 0.5 * promised.norm(dim=1)).any())
            remainders.append((reached - promised)[-2:])
        if len(order) > 1:
            draw = torch.Generator().manual_seed(len(z))
            signs = torch.randint(0, 2, (_JOINT, len(order)), generator=draw, dtype=torch.int64).to(V) * 2 - 1
            moves = (signs * along[order]) @ V[:, order].T
            joint = torch.stack([whitened(z + move) for move in moves]) - base - moves @ J.T
            alone = torch.stack([(r[0] + r[1]) / 2 for r in remainders]).sum(0)
            remainders.append(joint - alone)
    return mask, remainders
