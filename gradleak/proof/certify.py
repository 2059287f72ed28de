"""What an update alone proves about a reconstruction: is it explained down to rounding, and by nothing else nearby?

Two questions, both answered without the truth.

*Matched*: the re-simulated update equals the seen one up to the noise of its number format. That noise is more than
the spacing of the format: the client's own arithmetic accumulates rounding, and where p − y nearly cancels it can lose
every digit. So it is measured, per tensor, by simulating in the client's precision and in float64 at inputs jittered by
a millionth around the solution; the differences are samples n⁽ᵏ⁾ of the noise.

*Unique*: with J the Jacobian of the update with respect to all inputs, rows divided by the noise, the error of example
i that the noise can cause is ‖(J⁺ n)_i‖. It is bounded by the measured samples and by the isotropic part
‖(J⁺)_i‖_F, and the linearization is checked at finite steps along the weakest directions: two nearly equal examples of
one class, for instance, have a Jacobian that is regular but says little, because the map folds there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gradleak.formats import FORMATS, finest, number_format, storage_deviation
from gradleak.training import FedAvg, FedSGD, LocalTraining, check_reproducible
from gradleak.types import Certificate, Construction, UpdateKind

__all__ = ["Evidence", "certify", "examine", "jacobian"]

Tensors = Mapping[str, Tensor]

_SAMPLES = 6
"""Realizations of the client's rounding; all of one update's errors may share one factor, so one is not enough."""
_TOGETHER = 1 << 20
"""Parameters up to which these are simulated together."""
_MATCHED = 4.0
"""Whitened root mean square residual up to which an update counts as explained."""
_TENSOR = 6.0
"""The same for every single tensor, where fewer numbers are averaged."""
_SAFETY = 16.0
"""Factor between a measured sample of the error and the bound that is stated."""
_WEAKEST = 6
"""Number of singular directions along which the linearization is checked."""
_CHECKED = 256
"""Unknowns up to which the error bound of a construction is checked against the Jacobian's."""
_JOINT = 8
"""Moves along all weak directions at once by which their interplay is measured."""
_STORED = 4e7
"""Numbers of the Jacobian kept at most; further rows are left out, which can only weaken the verdict."""
_NEAR = 1e-4
"""How far from the solution examples are drawn to count independent numbers, relative to the inputs' size."""
_SPAN = 1e-12
"""Distance from a span, relative to an update, from which on an update counts as independent of it."""


@final
@dataclass(frozen=True)
class Evidence:
    """A certificate with the figures behind it.

    Attributes:
        certificate: the verdict.
        errors: per example, the bound on the root mean square error (model-input units); infinite where not unique,
            NaN where it was not computed.
        factor: by which the simulated update was multiplied to match, 1 where the client's scale is known.
        excess: whitened root mean square residual; 1 is the expected noise.

    """

    certificate: Certificate
    errors: tuple[float, ...] = ()
    factor: float = 1.0
    excess: float = math.inf


def certify(
    model: nn.Module,
    update: Tensors,
    inputs: Tensor,
    labels: Tensor,
    *,
    training: LocalTraining | None = None,
    construction: Construction | None = None,
    uniqueness: bool | None = None,
    scale: float | None = None,
    tolerance: float = 0.1,
    seed: int = 0,
) -> Certificate:
    """Return what ``update`` proves about a reconstruction; arguments and errors as :func:`examine`."""
    return examine(
        model,
        update,
        inputs,
        labels,
        training=training,
        construction=construction,
        uniqueness=uniqueness,
        scale=scale,
        tolerance=tolerance,
        seed=seed,
    ).certificate


def examine(
    model: nn.Module,
    update: Tensors,
    inputs: Tensor,
    labels: Tensor,
    *,
    training: LocalTraining | None = None,
    construction: Construction | None = None,
    uniqueness: bool | None = None,
    largest: int = 1024,
    scale: float | None = None,
    tolerance: float = 0.1,
    seed: int = 0,
) -> Evidence:
    """Return a certificate with the figures behind it, from the re-simulated update only.

    Args:
        model: as it was sent out, in the client's mode.
        update: what was seen, by parameter name, in the dtype in which it was shared.
        inputs: reconstructed model inputs, (N, *shape).
        labels: (N,) class indices or (N, C) probabilities; probabilities count as unknowns of their own.
        training: the forward map as the attacker knows it, defended or not; None stands for one gradient of the
            cross-entropy up to an unknown factor.
        construction: a proof of uniqueness that came with the solution.
        uniqueness: whether to compute the Jacobian; None does so up to ``largest`` unknowns. The error bound of a
            construction is checked against it in any case, where that is cheap.
        largest: see ``uniqueness``.
        scale: size of a typical input value; None takes the root mean square of ``inputs``.
        tolerance: largest error bound, relative to ``scale``, that is still called a proof.
        seed: of the jitter.

    Raises:
        InvalidModel: the update cannot be re-simulated (active dropout, changing batch statistics).

    """
    check_reproducible(model)
    problem = _Problem(model, update, inputs, labels, training, seed)
    fit = problem.fit()
    if fit is None:
        return _unproved(len(inputs), math.inf, 0.0, "The update is zero or not finite, so it proves nothing.")
    floor = _MATCHED * fit.noise.relative
    cause = f"rounding, {str(problem.format).removeprefix('torch.')}"
    if problem.defended:
        cause += ", and the known defense"
    if not fit.matched:
        reason = (
            f"The re-simulated update differs from the seen one by {fit.residual:.1e} ({cause}: {floor:.1e}), most in "
            f"{fit.worst!r}, by {fit.times:.1e} times the noise there; the reconstruction is wrong or inexact, or the "
            "client did something else (noise, pruning, another loss, more steps)."
        )
        return _unproved(len(inputs), fit.residual, floor, reason, fit)
    told = f"The re-simulated update agrees with the seen one to {fit.residual:.1e} ({cause}: {floor:.1e})"
    if fit.free:
        told += f", up to a common factor of {fit.factor:.4g}"
    if construction is not None:
        return _constructed(problem, fit, floor, told, construction, scale, tolerance)
    unknowns = inputs.numel()
    if uniqueness is False or (uniqueness is None and unknowns > largest):
        why = "was not asked" if uniqueness is False else f"takes a Jacobian of {unknowns} columns"
        reason = f"{told}; whether it is the only explanation nearby is unknown, since that {why} (uniqueness=True)."
        verdicts = ("matched",) * len(inputs)
        certificate = Certificate("matched", fit.residual, floor, None, unknowns, verdicts, reason, fit.factor)
        return Evidence(certificate, (math.nan,) * len(inputs), fit.factor, fit.excess)
    return _judge(problem, fit, floor, told, scale, tolerance)


def _unproved(count: int, residual: float, floor: float, reason: str, fit: _Fit | None = None) -> Evidence:
    factor, excess = (1.0, math.inf) if fit is None else (fit.factor, fit.excess)
    certificate = Certificate("unproved", residual, floor, None, None, ("unproved",) * count, reason, factor)
    return Evidence(certificate, (math.nan,) * count, factor, excess)


def _constructed(
    problem: _Problem, fit: _Fit, floor: float, told: str, proof: Construction, scale: float | None, tolerance: float
) -> Evidence:
    bound = _SAFETY * proof.error * max(1.0, fit.excess)
    size = problem.scale(scale)
    count = len(problem.inputs)
    doubt = problem.reversed(fit)
    if doubt is None and fit.free and not proof.alone:
        doubt = "up to a factor a mixture of several examples would be explained as well (one output that can vary)"
    if problem.inputs.numel() <= _CHECKED:
        # The noise of this very update, where measuring it is cheap. Folds say nothing here, free directions do.
        own = _judge(problem, fit, floor, told, scale, tolerance, folds=False).errors
        bound = max([bound, *(math.inf if math.isnan(e) else e for e in own)])
        if doubt is None and bound <= tolerance * size:
            doubt = problem.shortage(fit)
    verdict = "proved" if bound <= tolerance * size and doubt is None else "matched"
    if verdict == "proved":
        tail = (
            f"{proof.statement}, so no other {'input nearby' if proof.local else 'single input'} explains it; error "
            f"at most {bound:.1e} (root mean square, model-input units)."
        )
    elif doubt is not None:
        tail = f"{proof.statement}, but {doubt}."
    else:
        tail = f"{proof.statement}, but the noise leaves an error of up to {bound:.1e}, too much for a proof."
    rank = proof.unknowns if verdict == "proved" else None
    certificate = Certificate(
        verdict, fit.residual, floor, rank, proof.unknowns, (verdict,) * count, f"{told}; {tail}", fit.factor
    )
    return Evidence(certificate, (bound,) * count, fit.factor, fit.excess)


@final
@dataclass(frozen=True, eq=False)
class _Noise:
    """What the noise of an update is like, coordinate by coordinate.

    Attributes:
        weight: one over the deviation (m,), zero where it has none.
        deviations: measured rounding (k, m).
        extra: deviation of what comes beside rounding (m,).
        relative: norm of the deviations relative to the update.
        seed: of the samples.

    """

    weight: Tensor
    deviations: Tensor
    extra: Tensor
    relative: float
    seed: int

    @cached_property
    def samples(self) -> Tensor:
        """Whitened samples of the noise, (k, m)."""
        draw = torch.Generator().manual_seed(self.seed)
        draws = torch.randn(self.deviations.shape, generator=draw, dtype=torch.float64).to(self.weight)
        return (
            self.deviations * self.weight
            + draws * torch.where(torch.isfinite(self.extra), self.extra, 0.0) * self.weight
        )


@final
@dataclass(frozen=True, eq=False)
class _Fit:
    """The residual, whitened, and whether it is noise; ``worst`` is the tensor that differs by most ``times``."""

    noise: _Noise
    whitened: Tensor
    residual: float
    excess: float
    matched: bool
    worst: str
    times: float
    factor: float
    free: bool


class _Problem:
    """One update and one candidate explanation of it."""

    def __init__(
        self,
        model: nn.Module,
        update: Tensors,
        inputs: Tensor,
        labels: Tensor,
        training: LocalTraining | None,
        seed: int,
    ) -> None:
        self.model, self.seed = model, seed
        self.known = training is not None
        self.training = FedSGD() if training is None else training
        self.map = self.training.undefended
        self.defended = self.map is not self.training
        self.kind = self.training.kind
        self.steps = self.map.count(len(inputs)) if isinstance(self.map, FedAvg) else 1
        self.inputs = inputs.detach()
        self.labels = labels.detach().double() if labels.is_floating_point() else labels.detach()
        self.params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
        self.others = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
        self.others |= dict(model.named_buffers())
        self.names = [k for k in self.params if k in update]
        self.update = {k: update[k].detach() for k in self.names}
        self.observed = {k: t.double() for k, t in self.update.items()}
        self.sizes = [t.numel() for t in self.observed.values()]
        self.format = number_format(self.update)
        own = finest(self.params)
        coarser = min((own, self.format), key=lambda d: FORMATS[d][0])
        self.arithmetic = torch.float64 if coarser is torch.float64 else torch.float32
        self._wide: tuple[Tensors, Tensors] = (_cast(self.params, torch.float64), _cast(self.others, torch.float64))
        self._narrow: tuple[Tensors, Tensors] = (_cast(self.params, torch.float32), _cast(self.others, torch.float32))

    def simulate(self, x: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensors:
        params, buffers = self._wide if dtype is torch.float64 else self._narrow
        y = labels.to(dtype) if labels.is_floating_point() else labels
        found = self.map.tensors(self.model, params, x.to(dtype), y, buffers=buffers)
        return {k: found[k].to(torch.float64) for k in self.names}

    def _simulate_all(self, near: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the flat updates of inputs (k, N, *shape), together where that is quicker, (k, m)."""

        def one(x: Tensor) -> Tensor:
            return self.flat(self.simulate(x, self.labels, dtype))

        if sum(self.sizes) <= _TOGETHER:
            try:
                return vmap(one)(near)
            except RuntimeError:  # an operation that knows no batches of its own
                pass
        return torch.stack([one(x) for x in near])

    def flat(self, tensors: Tensors) -> Tensor:
        return torch.cat([tensors[k].flatten() for k in self.names])

    def scale(self, given: float | None) -> float:
        return float(self.inputs.double().square().mean().sqrt()) if given is None else given

    @torch.no_grad()
    def samples(self) -> Tensor | None:
        """Measure the client's rounding around the candidate, (k, m); None where it is not finite."""
        draw = torch.Generator().manual_seed(self.seed)
        x = self.inputs.double()
        size = float(x.square().mean().sqrt())
        jitter = torch.randn((_SAMPLES, *x.shape), generator=draw, dtype=torch.float64).to(x)
        near = (x + 1e-6 * size * jitter).float()
        deviations = self._simulate_all(near, torch.float32).sub_(self._simulate_all(near, torch.float64))
        if self.arithmetic is torch.float64:
            deviations.mul_(2.0**-29)
        # A sum is not finite where one of its terms is not.
        return deviations if math.isfinite(float(deviations.sum())) else None

    def noise(self, deviations: Tensor, simulated: Tensor, factor: float) -> _Noise:
        """Return the noise of an update that is ``factor`` times the simulated one."""
        seen = self.flat(self.observed)
        norm, eps = float(seen.norm()), torch.finfo(self.arithmetic).eps
        if factor != 1:
            deviations, simulated = deviations * abs(factor), simulated * abs(factor)
        parts = []
        for part, value in zip(deviations.split(self.sizes, 1), simulated.split(self.sizes), strict=True):
            rms = max(float(part.square().mean(1).sqrt().max()), 0.5 * eps * float(value.square().mean().sqrt()))
            parts.append(torch.full((part.shape[1],), rms, dtype=torch.float64, device=seen.device))
        tau = torch.cat(parts).clamp(min=1e-6 * eps * norm / math.sqrt(len(seen)))
        extra = torch.zeros_like(tau)
        if self.defended:
            extra = self.flat({k: v.double() for k, v in self.training.deviation(self.observed).items()})
        if self.kind is UpdateKind.WEIGHT_DELTA:
            # A captured delta is a difference of weights, each rounded to the model's format.
            own = finest(self.params)
            spacing = self.flat({k: storage_deviation(self.params[k].double(), own) for k in self.names})
            extra = torch.hypot(extra, spacing * math.sqrt(2 * self.steps))
        if FORMATS[self.format][0] < FORMATS[self.arithmetic][0]:
            extra = torch.maximum(extra, storage_deviation(seen, self.format))
        tau = torch.hypot(tau, extra)
        weight = torch.where(torch.isfinite(tau), 1 / tau, 0.0)
        finite = torch.where(torch.isfinite(tau), tau, 0.0)
        return _Noise(weight, deviations, extra, float(finite.norm()) / norm, self.seed + 1)

    def fit(self) -> _Fit | None:
        """Compare, with the scale the training tells, and with a free one where that fails or is unknown."""
        norm = float(self.flat(self.observed).norm())
        deviations = self.samples() if 0 < norm < math.inf else None
        if deviations is None:
            return None
        with torch.no_grad():
            simulated = self.flat(self.simulate(self.inputs.double(), self.labels))
        fits = []
        if self.known:
            fits.append(self._compare(self.noise(deviations, simulated, 1.0), simulated, 1.0, free=False))
            if fits[0].matched:
                return fits[0]
        seen, power = self.flat(self.observed), float(simulated.square().sum())
        factor = float(simulated @ seen) / power if power > 0 else 0.0
        if factor != 0 and math.isfinite(factor):
            noise = self.noise(deviations, simulated, factor)
            ours = simulated * noise.weight
            factor = float(ours @ (seen * noise.weight)) / max(float(ours.square().sum()), 1e-300)
            fits.append(self._compare(noise, simulated * factor, factor, free=True))
        return next((f for f in fits if f.matched), fits[0] if fits else None)

    def _compare(self, noise: _Noise, simulated: Tensor, factor: float, *, free: bool) -> _Fit:
        parts = simulated.split(self.sizes)
        ours = {k: p.view_as(self.observed[k]) for k, p in zip(self.names, parts, strict=True)}
        residual = self.flat(self.training.residual(ours, self.observed))
        whitened = residual * noise.weight
        live = noise.weight > 0
        excess = float((whitened.square().sum() / live.sum().clamp(min=1)).sqrt())
        relative = float((residual * live).norm() / self.flat(self.observed).norm())
        # A handful of numbers has a heavier tail than thousands.
        ratios = [float(p.square().mean().sqrt()) / (1 + 2 / math.sqrt(len(p))) for p in whitened.split(self.sizes)]
        times = max(ratios)
        matched = excess <= _MATCHED and times <= _TENSOR and relative <= _MATCHED * noise.relative
        worst = self.names[ratios.index(times)]
        return _Fit(noise, whitened, relative, excess, matched, worst, times, factor, free)

    def reversed(self, fit: _Fit) -> str | None:
        """Return what speaks against a proof where the update points against what the stated training gives."""
        if not self.known or fit.factor > 0:
            return None
        return (
            "the update has the opposite sign of what the stated training gives, as weights before minus after, or as "
            "another label of two"
        )

    @torch.no_grad()
    def shortage(self, fit: _Fit) -> str | None:
        """Return what speaks against a proof where any mixture of examples would be explained as well.

        Updates of all batches may lie in a space that is hardly larger than the number of unknowns: with two classes
        and activations of the same slopes, one input and a factor explain the update of any batch. The dimension of
        that space is the rank of updates near the solution, with random labels.
        """
        unknowns = self.inputs.numel() + (self.labels.numel() if self.labels.is_floating_point() else 0)
        # With the client's own scale, one equation more than unknowns is evidence to all the digits of that scale.
        wanted = unknowns + 1 if not fit.free and self.known else int(1.25 * unknowns) + 9
        draw = torch.Generator().manual_seed(self.seed + 2)
        x = self.inputs.double()
        count = wanted + 8
        moves = torch.randn((count, *x.shape), generator=draw, dtype=torch.float64).to(x)
        others = x + _NEAR * float(x.square().mean().sqrt()) * moves
        if self.labels.is_floating_point():
            drawn = torch.rand((count, *self.labels.shape), generator=draw, dtype=torch.float64)
            labels = (drawn / drawn.sum(-1, keepdim=True)).to(self.labels)
        else:
            params, buffers = self._wide
            classes = int(functional_call(self.model, {**params, **buffers}, (x,)).shape[-1])
            labels = torch.randint(0, classes, (count, *self.labels.shape), generator=draw).to(self.labels.device)
        live = (fit.noise.weight > 0).nonzero().flatten()
        order = torch.randperm(len(live), generator=draw)[: 4 * count]
        live = live[order.to(live.device)]

        def one(o: Tensor, y: Tensor) -> Tensor:
            return self.flat(self.simulate(o, y))[live]

        try:
            parts = [vmap(one)(o, y) for o, y in zip(others.split(64), labels.split(64), strict=True)]
            updates = torch.cat(parts)
        except RuntimeError:  # an operation that knows no batches of its own
            updates = torch.stack([one(o, y) for o, y in zip(others, labels, strict=True)])
        updates = updates * fit.noise.weight[live]
        updates = updates / updates.norm(dim=1, keepdim=True).clamp_min(1e-300)
        if updates.shape[1] > count:
            mixed = torch.randn(updates.shape[1], count, generator=draw, dtype=torch.float64).to(updates)
            updates = updates @ mixed / math.sqrt(count)
        # The diagonal of R is how far each is from the span of those before.
        rank = int((torch.linalg.qr(updates.T, mode="r").R.diagonal().abs() > _SPAN).sum())
        if rank >= wanted:
            return None
        return (
            f"the updates of all batches nearby have only {rank} independent numbers for {unknowns} unknowns"
            f"{' and a factor' if fit.free else ''}, so mixtures of examples would be explained as well"
        )

    def linear(self, fit: _Fit) -> tuple[Tensor, Callable[[Tensor], Tensor], int, Tensor]:
        """Return the whitened Jacobian (m, n), nuisances projected out; the map; equations; chosen coordinates."""
        shape, count = self.inputs.shape, self.inputs.numel()
        noise = fit.noise
        live = (noise.weight > 0).nonzero().flatten()
        most = max(int(_STORED / count), 4 * count)
        if len(live) > most:
            order = torch.randperm(len(live), generator=torch.Generator().manual_seed(self.seed))
            live = live[order[:most].to(live.device)]
        weight = noise.weight[live] * fit.factor
        joint = self.labels.is_floating_point()

        def simulated(z: Tensor, y: Tensor) -> Tensor:
            return self.flat(self.simulate(z.reshape(shape), y))[live] * weight

        def whitened(z: Tensor) -> Tensor:
            return simulated(z, self.labels)

        z = self.inputs.double().flatten()
        J = jacobian(whitened, z).T
        nuisance = [whitened(z)[:, None]] if fit.free or self.defended else []
        if joint:
            flat = self.labels.flatten()
            own = jacobian(lambda y: simulated(z, y.reshape(self.labels.shape)), flat).T.contiguous()
            own = own.view(len(own), *self.labels.shape)
            nuisance.append((own[..., 1:] - own[..., :1]).flatten(1))  # probabilities keep their sum
        if nuisance:
            Q = torch.linalg.qr(torch.cat(nuisance, 1)).Q
            J = J - Q @ (Q.T @ J)
        return J, whitened, int((J.square().sum(1) > 0).sum()) - sum(n.shape[1] for n in nuisance), live


def jacobian(function: Callable[[Tensor], Tensor], z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the transposed Jacobian (n, m) of ``function`` at ``z`` (n,), column by column, in ``dtype``.

    Jᵀ u is linear in u, so its transpose is J: the function is linearized once, and only that transpose is vmapped.
    """
    value, pull, *_ = vjp(function, z)
    push = vjp(lambda u: pull(u)[0], torch.zeros_like(value))[1]
    eye = torch.eye(len(z), dtype=z.dtype, device=z.device)
    with torch.no_grad():
        parts = [vmap(lambda v: push(v, retain_graph=True)[0])(rows).to(dtype or z.dtype) for rows in eye.split(64)]
    return torch.cat(parts)


def _judge(
    problem: _Problem,
    fit: _Fit,
    floor: float,
    told: str,
    scale: float | None,
    tolerance: float,
    *,
    folds: bool = True,
) -> Evidence:
    """Return what the Jacobian at the solution tells; without ``folds``, directions where the map folds stay closed."""
    J, whitened, rows, live = problem.linear(fit)
    count, unknowns = len(problem.inputs), problem.inputs.numel()
    size = problem.scale(scale)
    if not bool(torch.isfinite(J).all()):
        return _unproved(count, fit.residual, floor, f"{told}; but its Jacobian is not finite.", fit)
    values, V, pull = _singular(J)
    top = float(values.max())
    rank = int((values > 1e-11 * top).sum()) if top > 0 else 0
    inverse = torch.where(values > 1e-11 * top, 1 / values.clamp(min=1e-300), torch.inf)

    # Directions that the noise leaves free by more than the tolerance, and what each example has to do with them.
    share = V.view(count, -1, unknowns)
    level = max(1.0, fit.excess)
    free = inverse * level * _SAFETY > tolerance * size * math.sqrt(unknowns)
    kept = torch.where(free, torch.zeros_like(inverse), inverse)
    residual = fit.whitened[live]
    shifts = kept[:, None] * pull(torch.cat([residual[None], fit.noise.samples[:, live]]))
    errors = (V @ shifts).view(count, -1, shifts.shape[1]).norm(dim=1)
    spread = (share * kept).square().sum((1, 2)).sqrt()
    bound = errors[:, 0] + _SAFETY * (errors[:, 1:].amax(1) + 0.5 * level * spread)
    along = shifts[:, 0].abs() + _SAFETY * (shifts[:, 1:].abs().amax(1) + 0.5 * level * kept)
    bent, remainders = _folds(whitened, problem.inputs.double().flatten(), J, V, kept, along, fit, size, tolerance)
    # What the linearization leaves out along weak directions reaches the other examples too.
    for pair in remainders:
        bound = bound + (V @ (kept[:, None] * pull(pair))).view(count, -1, len(pair)).norm(dim=1).amax(1)
    open_ = free | bent if folds else free
    reach = size * math.sqrt(unknowns)
    touched = (share.norm(dim=1) * reach * open_ > 0.1 * tolerance * size * math.sqrt(unknowns / count)).any(1)
    bounds = bound / math.sqrt(unknowns / count)
    good = ~touched & (bounds <= tolerance * size)
    doubt = problem.reversed(fit)
    if doubt is None and rows < 1.25 * unknowns + 8:
        doubt = f"{rows} equations for {unknowns} unknowns leave nothing to show that the update is undistorted"
    if doubt is None and folds and bool(good.any()):  # Without folds only the errors are wanted.
        doubt = problem.shortage(fit)
    verdicts = tuple("proved" if bool(g) and doubt is None else "matched" for g in good)
    shown = tuple(float(b) if not bool(t) else math.inf for b, t in zip(bounds, touched, strict=True))
    weakest = float(values.min()) / top if top > 0 else 0.0
    if all(v == "proved" for v in verdicts):
        verdict = "proved"
        tail = (
            f"its Jacobian has full rank {rank} (weakest direction {weakest:.1e}), so nothing nearby explains it as "
            f"well; error at most {max(shown):.1e} (root mean square, model-input units)."
        )
    else:
        verdict = "matched"
        sure = sum(v == "proved" for v in verdicts)
        if doubt is not None:
            why = doubt
        elif rank < unknowns:
            why = f"its Jacobian has rank {rank} of {unknowns}, so others nearby explain it as well"
        elif bool(bent.any()):
            why = "the map folds nearby (nearly equal examples, or a kink), so others nearby may explain it as well"
        elif bool(free.any()):
            why = f"{int(free.sum())} of {unknowns} directions are weaker than the noise"
        else:
            why = f"the noise leaves an error of up to {max(shown):.1e}, too much for a proof"
        tail = f"{why}; {sure} of {count} examples are determined." if count > 1 else f"{why}."
    certificate = Certificate(verdict, fit.residual, floor, rank, unknowns, verdicts, f"{told}; {tail}", fit.factor)
    return Evidence(certificate, shown, fit.factor, fit.excess)


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
    fit: _Fit,
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
            radius = 2 * (float(fit.whitened.norm()) + _MATCHED * math.sqrt(len(J))) * float(kept[place])
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


def _cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
