"""Does a reconstruction explain the update, down to the noise that the update must carry?

That noise is more than the spacing of the number format: the client's own arithmetic accumulates rounding, and where
p − y nearly cancels it can lose every digit. So it is measured, per tensor, by simulating in the client's precision and
in float64 at inputs jittered by a millionth around the solution; the differences are samples of the noise.

The scale of an update is evidence where the training is known. Where it does not fit, one common factor is tried, then
one factor for each tensor (clipping per tensor, step sizes per group), and the result says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, final

import torch
from torch import Tensor

from gradleak.formats import FORMATS, finest, number_format, storage_deviation
from gradleak.training import FedAvg, Simulator, TargetKind, Tensors
from gradleak.types import UpdateKind

__all__ = ["Explanation", "Fit", "Noise", "Parts", "times_noise"]

Parts = list[Tensor]
"""An update, one vector (n,) for each of its tensors."""

_SAMPLES = (1, 3, 6)
"""Realizations of the client's rounding. One tells what no noise explains; three what it does, since all of one
update's errors may share one factor; six go into bounds of errors."""
_FAR = 1000.0
"""Residual, in floors by one realization, from which on no other would explain it."""
_ROUNDING = 4.0
"""Whitened root mean square residual up to which an update counts as explained, where rounding is measured."""
_STATED = 1.5
"""The same where nearly all of the noise is that of a known defense, whose size is told."""
_TENSOR = 1.5
"""By how much a single tensor may exceed that, since fewer numbers are averaged."""
_FAINT = 4.0
"""Size of a tensor, in deviations of its rounding, up to which it is taken for rounding."""
_MUCH = 0.1
"""Share of the residual that free factors must leave at most to count as the better explanation."""
_HIDDEN = 0.5
"""Floor from which on an update says too little to tell a match from a guess: guesses leave a residual of about 1."""
_SHOWN = 0.05
"""Share of an update's norm up to which its comparable numbers say too little."""


@final
@dataclass(frozen=True, eq=False)
class Noise:
    """What the noise of an update is like, coordinate by coordinate.

    Attributes:
        weights: one over the deviation, zero where it has none: for each tensor one number (), or (n,).
        deviations: measured rounding of the update without its factors, k samples.
        factors: by which each tensor was multiplied.
        extra: deviation of what comes beside rounding, None where nothing does.
        relative: norm of the deviations relative to the update.
        allowed: whitened root mean square residual that counts as noise.
        seed: of the samples.
        shown: share of the update's norm that its comparable numbers have; the others are limited, or unknown.

    """

    weights: Parts
    deviations: list[Parts]
    factors: list[float]
    extra: Parts | None
    relative: float
    allowed: float
    seed: int
    shown: float = 1.0

    @property
    def hides(self) -> bool:
        """Whether a match cannot be told from a guess."""
        return self.floor >= _HIDDEN or self.limited

    @property
    def limited(self) -> bool:
        """Whether a known defense left hardly any numbers as they were."""
        return self.shown <= _SHOWN

    @property
    def floor(self) -> float:
        """Relative residual up to which the update is explained."""
        return self.allowed * self.relative

    @property
    def most(self) -> float:
        """Deviations, root mean square, up to which a single tensor is explained."""
        return _TENSOR * self.allowed

    @cached_property
    def weight(self) -> Tensor:
        """One over the deviation (m,)."""
        return torch.cat([w.expand(d.shape) for w, d in zip(self.weights, self.deviations[0], strict=True)])

    @cached_property
    def samples(self) -> Tensor:
        """Whitened samples of the noise, (k, m)."""
        samples = torch.stack([torch.cat(_each(torch.mul, sample, self.factors)) for sample in self.deviations])
        if self.extra is not None:
            draw = torch.Generator().manual_seed(self.seed)
            known = torch.cat(self.extra)
            draws = torch.randn(samples.shape, generator=draw, dtype=torch.float64).to(samples)
            samples = samples + draws * torch.where(torch.isfinite(known), known, 0.0)
        return samples * self.weight


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """How well a candidate explains the update.

    Attributes:
        noise: of the update.
        simulated: the candidate's update, times the factors.
        left: the residual over its deviation.
        residual: relative norm of the residual.
        excess: root mean square of ``left``; 1 is the expected noise.
        matched: whether the residual is noise.
        worst: the tensor that differs most.
        times: by how many deviations it does.
        factor: by which the simulated update was multiplied.
        factors: tensor name → factor, where each tensor needed its own.
        free: whether the factor was fitted, so that the scale is no evidence.

    """

    noise: Noise
    simulated: Parts
    left: Parts
    residual: float
    excess: float
    matched: bool
    worst: str
    times: float
    factor: float = 1.0
    factors: dict[str, float] = field(default_factory=dict)
    free: bool = False

    @cached_property
    def whitened(self) -> Tensor:
        """The residual over its deviation (m,)."""
        return torch.cat(self.left)

    @property
    def hidden(self) -> bool:
        """Whether the noise is so large that nothing can be told."""
        return self.noise.hides


class Explanation:
    """One update and one candidate explanation of it.

    Attributes:
        simulator: of the client.
        names: the tensors compared, in order.
        observed: the update in float64.
        seen: the same as vectors.
        norm: its norm.
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
        self.names = [k for k in params if k in update and update[k].numel()]
        self.observed = {k: update[k].detach().double() for k in self.names}
        self.seen = self.parts(self.observed)
        self.norm = math.hypot(*map(_norm, self.seen))
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

    def parts(self, tensors: Tensors) -> Parts:
        """Return tensors by name as vectors in float64."""
        return [tensors[k].flatten().double() for k in self.names]

    def update(self, inputs: Tensor, dtype: torch.dtype = torch.float64) -> Parts:
        """Return the update of ``inputs``, computed in ``dtype``."""
        return self.parts(self.simulator.update(inputs, self.labels, dtype))

    def simulate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the update of ``inputs`` and ``labels`` as one vector (m,)."""
        return torch.cat(self.parts(self.simulator.update(inputs, labels)))

    @torch.no_grad()
    def fit(self, *, thorough: bool = False) -> Fit | None:
        """Compare, with the scale that the training tells, then with free ones; None where nothing is finite.

        The cheap question comes first: whether the residual is far above any noise. ``thorough`` measures the noise as
        bounds of errors need it.
        """
        if not 0 < self.norm < math.inf:
            return None
        simulated, rounding = self.update(self.inputs), self._rounding()
        deviations: list[Parts] = []
        fit: Fit | None = None
        for count in (_SAMPLES[0], _SAMPLES[-1]) if thorough else _SAMPLES:
            deviations.extend(islice(rounding, count - len(deviations)))
            fit = self._fitted(simulated, deviations)
            if fit is None or (fit.residual > _FAR * fit.noise.floor if count == 1 else fit.matched):
                break
        return fit

    def _rounding(self) -> Iterator[Parts]:
        """Yield samples of the client's rounding around the candidate."""
        draw = torch.Generator().manual_seed(self.seed)
        scale = 2.0**-29 if self.arithmetic is torch.float64 else 1.0
        while True:
            jitter = torch.randn(self.inputs.shape, generator=draw, dtype=torch.float64).to(self.inputs)
            near = (self.inputs + 1e-6 * self.size * jitter).float()
            pairs = zip(self.update(near, torch.float32), self.update(near), strict=True)
            yield [single.sub_(double).mul_(scale) for single, double in pairs]

    def _fitted(self, simulated: Parts, deviations: list[Parts]) -> Fit | None:
        """Return the comparison of an update by samples of its rounding; None where these are not finite."""
        count, eps = len(deviations), torch.finfo(self.arithmetic).eps
        if count > 1 and self.arithmetic is not torch.float64:
            # Where p − y nearly cancels, single precision is off in the same way every time: that is no noise, but what
            # the client computes.
            shift = [sum(samples[1:], samples[0]) / count for samples in zip(*deviations, strict=True)]
            simulated, grown = _each(torch.add, simulated, shift), math.sqrt(count / (count - 1))
            deviations = [[d.sub(h).mul_(grown) for d, h in zip(sample, shift, strict=True)] for sample in deviations]
        norms = [[_norm(d) for d in sample] for sample in deviations]
        if not all(map(math.isfinite, chain(*norms))):
            return None
        rms = [
            max(*measured, 0.5 * eps * _norm(p)) / math.sqrt(len(p))
            for p, *measured in zip(simulated, *norms, strict=True)
        ]
        least = 1e-6 * eps * self.norm / math.sqrt(sum(map(len, self.seen)))

        def noise(factors: list[float]) -> Noise:
            tau = [p.new_full((), max(abs(f) * r, least)) for p, f, r in zip(simulated, factors, rms, strict=True)]
            return self._noise(tau, deviations, factors)

        tried: list[Fit] = []
        if self.simulator.known:
            tried.append(self.compare(simulated, noise([1.0] * len(rms))))
            if tried[0].matched:
                return tried[0]
        factor = _ratio(simulated, self.seen)
        if factor != 0 and math.isfinite(factor):
            common = noise([factor] * len(rms))
            factor = _ratio(*(_each(torch.mul, u, common.weights) for u in (simulated, self.seen)))
            tried.append(self.compare([factor * p for p in simulated], common, factor=factor))
            if not tried[-1].matched and len(rms) > 1 and not self.simulator.defended:
                # What is all rounding (the biases of attention's keys) shows no factor of its own.
                each = [
                    _ratio([ours], [theirs]) if _norm(ours) > _FAINT * r * math.sqrt(len(ours)) else factor
                    for ours, theirs, r in zip(simulated, self.seen, rms, strict=True)
                ]
                if len({f > 0 for f in each if f != 0}) == 1 and all(map(math.isfinite, each)):
                    scaled = [f * p for f, p in zip(each, simulated, strict=True)]
                    by_name = dict(zip(self.names, each, strict=True))
                    tried.append(self.compare(scaled, noise(each), factor=1.0, factors=by_name))
        matched = next((f for f in tried if f.matched), None)
        if matched is not None or not tried:
            return matched
        # Free factors always explain more; they count where they explain nearly all of what the plain scale leaves.
        free = min(tried, key=lambda f: f.residual)
        return free if free.residual <= _MUCH * tried[0].residual else tried[0]

    def compare(
        self, simulated: Parts, noise: Noise, *, factor: float | None = None, factors: dict[str, float] | None = None
    ) -> Fit:
        """Return how well an update, which was scaled by ``factor`` or ``factors``, explains the seen one."""
        if self.simulator.defended:
            shaped = {k: p.view_as(self.observed[k]) for k, p in zip(self.names, simulated, strict=True)}
            residual = self.parts(self.simulator.residual(shaped, self.observed))
        else:
            residual = _each(torch.sub, simulated, self.seen)
        left = _each(torch.mul, residual, noise.weights)
        live = sum(int(w.count_nonzero()) * len(r) // w.numel() for r, w in zip(residual, noise.weights, strict=True))
        excess = math.hypot(*map(_norm, left)) / math.sqrt(max(1, live))
        seen = (r if w.ndim == 0 else r * (w > 0) for r, w in zip(residual, noise.weights, strict=True))
        relative = math.hypot(*map(_norm, seen)) / self.norm
        ratios = [times_noise(p) for p in left]
        times = max(ratios)
        matched = excess <= noise.allowed and times <= noise.most and relative <= noise.floor
        matched = matched and not noise.hides
        return Fit(
            noise,
            simulated,
            left,
            relative,
            excess,
            matched,
            self.names[ratios.index(times)],
            times,
            1.0 if factor is None else factor,
            factors or {},
            factor is not None,
        )

    def _noise(self, rounding: Parts, deviations: list[Parts], factors: list[float]) -> Noise:
        """Return the noise of an update whose rounding has these deviations (), as measured by samples."""
        extra, stated = self._extra
        tau = rounding if extra is None else _each(torch.hypot, extra, rounding)
        finite = (t.where(t.isfinite(), 0.0).expand_as(p) for t, p in zip(tau, self.seen, strict=True))
        norm = math.hypot(*map(_norm, finite))
        allowed = _STATED if stated >= 0.95 * norm > 0 else _ROUNDING
        # What is infinitely uncertain weighs nothing.
        shown = math.hypot(*(_norm(p.where(t.isfinite(), 0.0)) for t, p in zip(tau, self.seen, strict=True)))
        weights, share = [1 / t for t in tau], shown / self.norm
        return Noise(weights, deviations, factors, extra, norm / self.norm, allowed, self.seed + 1, share)

    @cached_property
    def _extra(self) -> tuple[Parts | None, float]:
        """What comes beside rounding: its deviations, None without any; the norm of what a known defense states."""
        extra, stated, training = [torch.zeros_like(p) for p in self.seen], 0.0, self.simulator.training
        if self.simulator.defended:
            extra = self.parts(training.deviation(self.observed))
            stated = math.hypot(*(_norm(e[e.isfinite()]) for e in extra))
        if training.kind is UpdateKind.WEIGHT_DELTA:
            # A captured delta is a difference of weights, each rounded to the model's format.
            params, undefended = self.simulator.params(), self.simulator.undefended
            steps = undefended.count(len(self.inputs)) if isinstance(undefended, FedAvg) else 1
            spacing = self.parts({k: storage_deviation(params[k].double(), self.own) for k in self.names})
            extra = [torch.hypot(e, s * math.sqrt(2 * steps)) for e, s in zip(extra, spacing, strict=True)]
        if FORMATS[self.format][0] < FORMATS[self.arithmetic][0]:
            extra = [torch.maximum(e, storage_deviation(s, self.format)) for e, s in zip(extra, self.seen, strict=True)]
        return extra if any(bool(e.any()) for e in extra) else None, stated


def times_noise(left: Tensor) -> float:
    """Return the root mean square of a tensor's residual in deviations; few numbers have a heavier tail than many."""
    return _norm(left) / (math.sqrt(len(left)) + 2)


def _norm(vector: Tensor) -> float:
    return float(vector.norm())


def _each(function: Callable[[Tensor, Any], Tensor], one: Parts, other: Sequence[Tensor | float]) -> Parts:
    return [function(a, b) for a, b in zip(one, other, strict=True)]


def _ratio(ours: Parts, seen: Parts) -> float:
    """Return the factor by which ``ours`` comes nearest to ``seen``, zero where there is none."""
    power = sum(float(a @ a) for a in ours)
    return sum(float(a @ b) for a, b in zip(ours, seen, strict=True)) / power if power > 0 else 0.0
