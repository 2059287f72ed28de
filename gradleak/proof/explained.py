"""Does a reconstruction explain the update, down to the noise that the update must carry?

That noise is more than the spacing of the number format: the client's own arithmetic accumulates rounding, and where
p − y nearly cancels it can lose every digit. So it is measured, per tensor, by simulating in the client's precision and
in float64 at inputs jittered by a millionth around the solution; the differences are samples of the noise.

The scale of an update is evidence where the training is known. Where it does not fit, one common factor is tried, then
one factor for each tensor (clipping per tensor, step sizes per group), and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from gradleak.formats import FORMATS, finest, number_format, storage_deviation
from gradleak.solve.mapping import mapped
from gradleak.training import FedAvg, Simulator, TargetKind, Tensors
from gradleak.types import UpdateKind

__all__ = ["Explanation", "Fit", "Noise"]

_SAMPLES = 6
"""Realizations of the client's rounding; all of one update's errors may share one factor, so one is not enough."""
_TOGETHER = 1 << 20
"""Parameters up to which these are simulated together."""
_ROUNDING = 4.0
"""Whitened root mean square residual up to which an update counts as explained, where rounding is measured."""
_STATED = 1.5
"""The same where nearly all of the noise is that of a known defense, whose size is told."""
_TENSOR = 1.5
"""By how much a single tensor may exceed that, since fewer numbers are averaged."""
_MUCH = 0.1
"""Share of the residual that free factors must leave at most to count as the better explanation."""
_HIDDEN = 0.5
"""Floor from which on an update says too little to tell a match from a guess: guesses leave a residual of about 1."""


@final
@dataclass(frozen=True, eq=False)
class Noise:
    """What the noise of an update is like, coordinate by coordinate.

    Attributes:
        weight: one over the deviation (m,), zero where it has none.
        deviations: measured rounding (k, m).
        extra: deviation of what comes beside rounding (m,).
        relative: norm of the deviations relative to the update.
        allowed: whitened root mean square residual that counts as noise.
        seed: of the samples.

    """

    weight: Tensor
    deviations: Tensor
    extra: Tensor
    relative: float
    allowed: float
    seed: int

    @property
    def floor(self) -> float:
        """Relative residual up to which the update is explained."""
        return self.allowed * self.relative

    @cached_property
    def samples(self) -> Tensor:
        """Whitened samples of the noise, (k, m)."""
        draw = torch.Generator().manual_seed(self.seed)
        draws = torch.randn(self.deviations.shape, generator=draw, dtype=torch.float64).to(self.weight)
        known = torch.where(torch.isfinite(self.extra), self.extra, 0.0)
        return self.deviations * self.weight + draws * known * self.weight


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """How well a candidate explains the update.

    Attributes:
        noise: of the update.
        simulated: the candidate's update, times the factors (m,).
        whitened: the residual over its deviation (m,).
        residual: relative norm of the residual.
        excess: root mean square of ``whitened``; 1 is the expected noise.
        matched: whether the residual is noise.
        worst: the tensor that differs most.
        times: by how many deviations it does.
        factor: by which the simulated update was multiplied.
        factors: tensor name → factor, where each tensor needed its own.
        free: whether the factor was fitted, so that the scale is no evidence.

    """

    noise: Noise
    simulated: Tensor
    whitened: Tensor
    residual: float
    excess: float
    matched: bool
    worst: str
    times: float
    factor: float = 1.0
    factors: dict[str, float] = field(default_factory=dict)
    free: bool = False

    @property
    def hidden(self) -> bool:
        """Whether the noise is so large that nothing can be told."""
        return self.noise.floor >= _HIDDEN


class Explanation:
    """One update and one candidate explanation of it.

    Attributes:
        simulator: of the client.
        names: the tensors compared, in order.
        observed: the update in float64.
        inputs: (N, *shape) candidate model inputs.
        labels: as the client's loss takes them; floating-point ones count as unknowns unless ``granted``.
        granted: whether the threat model grants the labels.
        format: the coarsest number format that holds the update.

    """

    def __init__(
        self,
        simulator: Simulator,
        update: Tensors,
        inputs: Tensor,
        labels: Tensor,
        *,
        granted: bool = False,
        seed: int = 0,
    ) -> None:
        self.simulator, self.seed, self.granted = simulator, seed, granted
        params = simulator.params()
        self.names = [k for k in params if k in update]
        self.observed = {k: update[k].detach().double() for k in self.names}
        self.sizes = [t.numel() for t in self.observed.values()]
        self.inputs = inputs.detach().double() if inputs.is_floating_point() else inputs.detach()
        self.labels = labels.detach().double() if labels.is_floating_point() else labels.detach()
        self.format = number_format({k: update[k].detach() for k in self.names})
        self.own = finest(params)
        coarser = min((self.own, self.format), key=lambda d: FORMATS[d][0])
        self.arithmetic = torch.float64 if coarser is torch.float64 else torch.float32

    @property
    def free_labels(self) -> bool:
        """Whether the labels are real numbers that were fitted to the update; zeros and ones are no such numbers."""
        if self.granted or not self.labels.is_floating_point():
            return False
        whole = bool(((self.labels == 0) | (self.labels == 1)).all())
        return not (whole and getattr(self.simulator.undefended.loss, "targets", None) is TargetKind.BINARY)

    @property
    def probabilities(self) -> bool:
        """Whether the labels are probabilities of classes, which keep their sum."""
        told = getattr(self.simulator.undefended.loss, "targets", TargetKind.CLASSES)
        return self.labels.is_floating_point() and self.labels.ndim > 1 and told is TargetKind.CLASSES

    @property
    def size(self) -> float:
        """Root mean square of the inputs."""
        return float(self.inputs.square().mean().sqrt())

    def flat(self, tensors: Tensors) -> Tensor:
        """Return tensors by name as one vector (m,)."""
        return torch.cat([tensors[k].flatten() for k in self.names])

    def spread(self, values: Mapping[str, float]) -> Tensor:
        """Return one value per tensor as one per coordinate (m,)."""
        like = self.observed[self.names[0]]
        return torch.cat([like.new_full((n,), values[k]) for k, n in zip(self.names, self.sizes, strict=True)])

    def simulate(self, inputs: Tensor, labels: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the flat update (m,) of ``inputs`` in float64, computed in ``dtype``."""
        found = self.simulator.update(inputs, self.labels if labels is None else labels, dtype)
        return self.flat(found).to(torch.float64)

    def simulate_all(self, near: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the flat updates (k, m) of inputs (k, N, *shape), together where that is quicker."""
        if sum(self.sizes) <= _TOGETHER:
            return mapped(lambda x: self.simulate(x, dtype=dtype), near)
        return torch.stack([self.simulate(x, dtype=dtype) for x in near])

    @torch.no_grad()
    def fit(self) -> Fit | None:
        """Compare, with the scale that the training tells, then with free ones; None where nothing is finite."""
        seen = self.flat(self.observed)
        norm = float(seen.norm())
        deviations = self._deviations() if 0 < norm < math.inf else None
        if deviations is None:
            return None
        simulated = self.simulate(self.inputs)
        if self.arithmetic is not torch.float64:
            # Where p − y nearly cancels, single precision is off in the same way every time: that is no noise, but what
            # the client computes.
            shift, count = deviations.mean(0), len(deviations)
            simulated, deviations = simulated + shift, (deviations - shift) * math.sqrt(count / max(count - 1, 1))
        fits: list[Fit | None] = []
        if self.simulator.known:
            plain = self.compare(simulated, self._noise(deviations, simulated))
            if plain.matched:
                return plain
            fits.append(plain)
        factor = _ratio(simulated, seen)
        if factor != 0 and math.isfinite(factor):
            noise = self._noise(abs(factor) * deviations, factor * simulated)
            factor = _ratio(simulated * noise.weight, seen * noise.weight)
            common = self.compare(factor * simulated, noise, factor=factor)
            fits.append(common)
            if not common.matched and len(self.sizes) > 1 and not self.simulator.defended:
                fits.append(self._by_tensor(deviations, simulated, seen))
        tried = [f for f in fits if f is not None]
        matched = next((f for f in tried if f.matched), None)
        if matched is not None or not tried:
            return matched
        # Free factors always explain more; they count where they explain nearly all of what the plain scale leaves.
        free = min(tried, key=lambda f: f.residual)
        return free if free.residual <= _MUCH * tried[0].residual else tried[0]

    def _by_tensor(self, deviations: Tensor, simulated: Tensor, seen: Tensor) -> Fit | None:
        """Return the comparison with a factor for each tensor; None where a factor is not positive."""
        pairs = zip(simulated.split(self.sizes), seen.split(self.sizes), strict=True)
        factors = {k: _ratio(ours, theirs) for k, (ours, theirs) in zip(self.names, pairs, strict=True)}
        signs = {f > 0 for f in factors.values() if f != 0}
        if len(signs) != 1 or not all(map(math.isfinite, factors.values())):
            return None
        each = self.spread(factors)
        noise = self._noise(deviations * each.abs(), simulated * each)
        return self.compare(simulated * each, noise, factor=1.0, factors=factors)

    def compare(
        self, simulated: Tensor, noise: Noise, *, factor: float | None = None, factors: dict[str, float] | None = None
    ) -> Fit:
        """Return how well an update (m,), which was scaled by ``factor`` or ``factors``, explains the seen one."""
        parts = simulated.split(self.sizes)
        ours = {k: p.view_as(self.observed[k]) for k, p in zip(self.names, parts, strict=True)}
        residual = self.flat(self.simulator.residual(ours, self.observed))
        whitened, live = residual * noise.weight, noise.weight > 0
        excess = float((whitened.square().sum() / live.sum().clamp(min=1)).sqrt())
        relative = float((residual * live).norm() / self.flat(self.observed).norm())
        # A handful of numbers has a heavier tail than thousands.
        ratios = [float(p.square().mean().sqrt()) / (1 + 2 / math.sqrt(len(p))) for p in whitened.split(self.sizes)]
        times = max(ratios)
        matched = excess <= noise.allowed and times <= _TENSOR * noise.allowed and relative <= noise.floor
        matched = matched and noise.floor < _HIDDEN
        return Fit(
            noise,
            simulated,
            whitened,
            relative,
            excess,
            matched,
            self.names[ratios.index(times)],
            times,
            1.0 if factor is None else factor,
            factors or {},
            factor is not None,
        )

    def _deviations(self) -> Tensor | None:
        """Measure the client's rounding around the candidate, (k, m); None where it is not finite."""
        draw = torch.Generator().manual_seed(self.seed)
        jitter = torch.randn((_SAMPLES, *self.inputs.shape), generator=draw, dtype=torch.float64).to(self.inputs)
        near = (self.inputs + 1e-6 * self.size * jitter).float()
        deviations = self.simulate_all(near, torch.float32) - self.simulate_all(near, torch.float64)
        if self.arithmetic is torch.float64:
            deviations.mul_(2.0**-29)
        # A sum is not finite where one of its terms is not.
        return deviations if math.isfinite(float(deviations.sum())) else None

    def _noise(self, deviations: Tensor, simulated: Tensor) -> Noise:
        """Return the noise of an update that is expected to be ``simulated`` (m,)."""
        seen = self.flat(self.observed)
        norm, eps = float(seen.norm()), torch.finfo(self.arithmetic).eps
        parts = []
        for part, value in zip(deviations.split(self.sizes, 1), simulated.split(self.sizes), strict=True):
            rms = max(float(part.square().mean(1).sqrt().max()), 0.5 * eps * float(value.square().mean().sqrt()))
            parts.append(torch.full((part.shape[1],), rms, dtype=torch.float64, device=seen.device))
        tau = torch.cat(parts).clamp(min=1e-6 * eps * norm / math.sqrt(len(seen)))
        extra = torch.zeros_like(tau)
        training = self.simulator.training
        if self.simulator.defended:
            extra = self.flat({k: v.double() for k, v in training.deviation(self.observed).items()})
        stated = torch.where(torch.isfinite(extra), extra, 0.0)
        if training.kind is UpdateKind.WEIGHT_DELTA:
            # A captured delta is a difference of weights, each rounded to the model's format.
            params, undefended = self.simulator.params(), self.simulator.undefended
            steps = undefended.count(len(self.inputs)) if isinstance(undefended, FedAvg) else 1
            spacing = self.flat({k: storage_deviation(params[k].double(), self.own) for k in self.names})
            extra = torch.hypot(extra, spacing * math.sqrt(2 * steps))
        if FORMATS[self.format][0] < FORMATS[self.arithmetic][0]:
            extra = torch.maximum(extra, storage_deviation(seen, self.format))
        tau = torch.hypot(tau, extra)
        finite = torch.where(torch.isfinite(tau), tau, 0.0)
        weight = torch.where(torch.isfinite(tau), 1 / tau, 0.0)
        told = float(stated.norm()) >= 0.95 * float(finite.norm()) > 0
        allowed = _STATED if told else _ROUNDING
        return Noise(weight, deviations, extra, float(finite.norm()) / norm, allowed, self.seed + 1)


def _ratio(ours: Tensor, seen: Tensor) -> float:
    """Return the factor by which ``ours`` comes nearest to ``seen``, zero where there is none."""
    power = float(ours.square().sum())
    return float(ours @ seen) / power if power > 0 else 0.0
