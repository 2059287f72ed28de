"""The whole chain as one map, from its input to features and layer gradients, and Gauss–Newton steps on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.analytic.graph import Affine, Chain, Step
from gradleak.analytic.layers import Factor, Rows, conjugate_gradients
from gradleak.analytic.outer import OuterProduct

__all__ = ["Linearization", "Polished", "WholeMap", "feature_scale", "newton_steps"]

Tensors = Mapping[str, Tensor]

STEPS = 8
"""Gauss–Newton steps that finish a recursion."""


@final
@dataclass(frozen=True, eq=False)
class Linearization:
    """The map's value and derivative at one point."""

    residual: Tensor
    descent: Tensor
    product: Rows


class WholeMap:
    """The map from the input of ``steps`` to features and layer gradients for the seen output gradient, weighted."""

    def __init__(
        self, chain: Chain, steps: tuple[Step, ...], params: Tensors, seen: Tensors, outer: OuterProduct
    ) -> None:
        self.steps, self.params, self.features = steps, params, outer.features
        wanted = [n for s in steps if isinstance(s, Affine) for n in (s.weight_name, s.bias_name) if n is not None]
        self.names = [n for n in wanted if n in seen and float(seen[n].square().sum()) > 0]
        self.pull = outer.delta @ params[chain.anchor.weight_name]
        self.feature_scale = feature_scale(self.features)
        self.scales = {n: float(seen[n].square().mean().rsqrt()) for n in self.names}
        self.target = torch.cat(
            [self.features * self.feature_scale] + [(seen[n] * self.scales[n]).flatten() for n in self.names]
        )

    def outputs(self, x: Tensor, *, graph: bool) -> Tensor:
        """Return the weighted equations' left sides at ``x`` (*shape)."""
        leaves = {n: self.params[n].detach().requires_grad_() for n in self.names}
        params = {**self.params, **leaves}
        features = x[None]
        for step in self.steps:
            features = step.forward(features, params)
        features = features.flatten()
        parts = [features * self.feature_scale]
        if leaves:
            grads = torch.autograd.grad(features @ self.pull, list(leaves.values()), create_graph=graph)
            parts += [(g * self.scales[n]).flatten() for n, g in zip(self.names, grads, strict=True)]
        return torch.cat(parts)

    def relative(self, x: Tensor) -> float:
        """Return the relative distance of the weighted equations at ``x``."""
        with torch.enable_grad():
            return float((self.outputs(x, graph=False).detach() - self.target).norm() / self.target.norm())

    @torch.enable_grad()
    def linearize(self, value: Tensor) -> Linearization:
        """Return residual r, Jᵀ r (n,) and v (k, n) → Jᵀ J v at ``value`` (n,)."""
        leaf = value.detach().reshape(self.steps[0].in_shape).requires_grad_()
        left = self.outputs(leaf, graph=True)
        dummy = torch.zeros_like(left, requires_grad=True)
        (pulled,) = torch.autograd.grad(left, leaf, dummy, create_graph=True)

        def pull(u: Tensor) -> Tensor:
            return torch.autograd.grad(left, leaf, u, retain_graph=True)[0].flatten()

        def product(v: Tensor) -> Tensor:
            # Jᵀ u is linear in u, so its derivative with respect to u is J.
            rows = [torch.autograd.grad(pulled, dummy, row.reshape(leaf.shape), retain_graph=True)[0] for row in v]
            return torch.stack([pull(row) for row in rows])

        residual = (self.target - left).detach()
        return Linearization(residual, pull(residual), product)


@final
@dataclass(frozen=True, eq=False)
class Polished:
    """Where Gauss–Newton steps ended: estimated mean squared error, relative residual, whether no step helps more."""

    value: Tensor
    steps: int
    spread: float
    residual: float
    done: bool


def feature_scale(features: Tensor) -> Tensor:
    """Return one over the size of every feature (d,), bounded where they are near zero."""
    floor = float(0.05 * features.square().mean().sqrt()) + 1e-300
    return features.abs().clamp(min=floor).reciprocal()


def newton_steps(
    whole: WholeMap,
    value: Tensor,
    factor: Factor,
    probe: Tensor,
    *,
    limit: int = STEPS,
    stale: int = 60,
    halvings: int = 0,
    tolerance: float = 1e-2,
    floor: float = 0.0,
) -> Polished:
    """Take Gauss–Newton steps on the whole map until they are below the noise that the residual shows.

    Args:
        whole: the map.
        value: where the steps begin, (n,).
        factor: of its normal matrix nearby, which preconditions.
        probe: (k, n) signs, for the estimate of the error: one could miss the direction that is known worst.
        limit: steps.
        stale: conjugate gradient steps beyond which the factor no longer serves.
        halvings: how often a step that does not help is halved.
        tolerance: relative accuracy of a step, in energy.
        floor: relative residual below which a step that does not halve it is the last.

    """
    response, n = float((probe * factor.solve(probe)).sum()) / probe.numel(), len(value)
    local, steps, served = whole.linearize(value), 0, True
    norm = float(local.residual.square().sum())
    while True:
        variance = max(norm, 1e-300) / max(len(local.residual) - n, 1)
        right = local.descent[None]
        ready = factor.solve(right)
        decrement = float((right * ready).sum())
        done = decrement < 1e-2 * variance * n
        if done or steps >= limit or not served:
            break
        step, taken, _ = conjugate_gradients(
            local.product, right, factor.solve, tolerance=tolerance, limit=60, ready=ready
        )
        served = taken <= stale
        for halving in range(halvings + 1):
            moved = value + step[0] / 2**halving
            there = whole.linearize(moved)
            fallen = float(there.residual.square().sum())
            if fallen < norm:
                break
        else:
            done = True
            break
        gained, norm, value, local, steps = norm - fallen, fallen, moved, there, steps + 1
        low = norm <= (floor * float(whole.target.norm())) ** 2
        if gained < (3 if low else 1e-3) * norm:
            done = True
            break
    variance = norm / max(len(whole.target) - n, 1)
    return Polished(value, steps, variance * response, math.sqrt(norm) / float(whole.target.norm()), done)
