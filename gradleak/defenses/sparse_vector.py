"""The sparse vector filter that NVFlare ships."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["SparseVector", "svt_privacy"]

_PASSES = 10_000
"""Passes after which too few numbers are above the threshold to go on; the filter of NVFlare would not end."""


@dataclass(frozen=True)
class SparseVector(UpdateDefense):
    """Sending a random share of the numbers that exceed a noised threshold, limited to ±gamma, with Laplacian noise.

    What ``nvflare.app_common.filters.SVTPrivacy`` (2.9) does to weight differences. With c the number that is sent:
    the threshold is tau plus noise of scale gamma / ε₁, every query gets noise of scale 2 c gamma / ε₂ with
    ε₁ : ε₂ = 1 : (2c)^(2/3), passes over the remaining numbers go on until c are accepted, and c of the accepted are
    drawn (``replace``: with replacement, so fewer are sent) and noised with scale 2 gamma / noise_var. Scalars pass.

    Only the release is noised by a fixed amount for each number; which budget a whole update has spent is for NVFlare
    to say, and :func:`gradleak.bounds.upper_bound` states none for it.
    """

    fraction: float = 0.1
    epsilon: float = 0.1
    noise_var: float = 0.1
    gamma: float = 1e-5
    tau: float = 1e-6
    replace: bool = True

    def __post_init__(self) -> None:
        positive = (self.epsilon, self.noise_var, self.gamma)
        if not (0 < self.fraction <= 1 and all(0 < v < math.inf for v in positive) and math.isfinite(self.tau)):
            raise InvalidInput(
                f"The sparse vector filter cannot use fraction={self.fraction}, epsilon={self.epsilon}, "
                f"noise_var={self.noise_var}, gamma={self.gamma}, tau={self.tau}; give a fraction in (0, 1], a finite "
                "tau, and the others above 0."
            )

    @property
    def noise(self) -> float:
        """Scale of the Laplacian noise on every number that is sent."""
        return 2 * self.gamma / self.noise_var

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what is sent; without a generator the limited tensors, of which the attacker sees a random part."""
        limited = {k: t if t.ndim == 0 else t.clamp(-self.gamma, self.gamma) for k, t in tensors.items()}
        if generator is None:
            return limited
        flat = torch.cat([t.clamp(-self.gamma, self.gamma).flatten().double() for t in tensors.values()])
        count = min(math.ceil(len(flat) * self.fraction), len(flat))
        first = self.epsilon / (1 + (2 * count) ** (2 / 3))

        def laplace(scale: float, size: int) -> Tensor:
            drawn = torch.empty((2, size), dtype=flat.dtype, device=flat.device).exponential_(generator=generator)
            return scale * (drawn[0] - drawn[1])

        threshold = self.tau + laplace(self.gamma / first, 1)
        accepted = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        for _ in range(_PASSES):
            if int(accepted.sum()) >= count:
                break
            rest = (~accepted).nonzero().flatten()
            response = flat[rest].abs() + laplace(2 * self.gamma * count / (self.epsilon - first), len(rest))
            accepted[rest[response >= threshold]] = True
        else:
            raise InvalidInput(
                f"Fewer than {count} numbers of the update exceed the threshold, so the sparse vector filter does not "
                "end; give a smaller fraction or tau."
            )
        places = accepted.nonzero().flatten()
        if self.replace:
            draw = torch.randint(len(places), (count,), generator=generator, device=flat.device)
        else:
            draw = torch.randperm(len(places), generator=generator, device=flat.device)[:count]
        chosen = places[draw].unique()
        sent = torch.zeros_like(flat)
        sent[chosen] = flat[chosen] + laplace(self.noise, len(chosen))
        parts = sent.split([t.numel() for t in tensors.values()])
        return {
            k: t if t.ndim == 0 else part.view(t.shape).to(t)
            for (k, t), part in zip(tensors.items(), parts, strict=True)
        }

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed`` where it was sent, and the simulated number elsewhere: a zero says next to nothing."""
        limited = self.transform(simulated)
        return {
            k: o if o.ndim == 0 else torch.where(o != 0, simulated[k].detach() + o - limited[k].detach(), simulated[k])
            for k, o in observed.items()
        }

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the limited simulation minus ``observed`` where something was sent, zero elsewhere."""
        limited = self.transform(simulated)
        return {
            k: limited[k] - o if o.ndim == 0 else torch.where(o != 0, limited[k] - o, 0.0) for k, o in observed.items()
        }

    def centered(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the residual: noise has its mean at the limited number."""
        return self.residual(simulated, observed)

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return that of the noise where a number was sent, and infinity elsewhere."""
        return {
            k: torch.zeros_like(o) if o.ndim == 0 else torch.where(o != 0, 2**0.5 * self.noise, math.inf).to(o)
            for k, o in observed.items()
        }


def svt_privacy(
    *,
    fraction: float = 0.1,
    epsilon: float = 0.1,
    noise_var: float = 0.1,
    gamma: float = 1e-5,
    tau: float = 1e-6,
    replace: bool = True,
) -> SparseVector:
    """Return NVFlare's sparse vector filter, with its own defaults; see :class:`SparseVector` for what they mean."""
    return SparseVector(fraction, epsilon, noise_var, gamma, tau, replace)
