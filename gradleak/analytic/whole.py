"""The whole chain as one map, from its input to features and layer gradients, and Gauss–Newton steps on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.analytic.graph import Affine, Chain, Elementwise, Fixed, Step
from gradleak.analytic.layers import Factor, Rows, conjugate_gradients
from gradleak.analytic.outer import OuterProduct

__all__ = ["Linearization", "Polished", "WholeMap", "feature_scale", "newton_steps"]

Tensors = Mapping[str, Tensor]

_BLOCK = 1 << 20
"""Numbers up to which a layer's gradient equations are kept as a matrix."""

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

    def outputs(self, x: Tensor) -> Tensor:
        """Return the weighted equations' left sides at ``x`` (*shape)."""
        return self._at(x).outputs

    def relative(self, x: Tensor) -> float:
        """Return the relative distance of the weighted equations at ``x``."""
        return float((self.outputs(x) - self.target).norm() / self.target.norm())

    def linearize(self, value: Tensor) -> Linearization:
        """Return residual r, Jᵀ r (n,) and v (k, n) → Jᵀ J v, in the precision of v, at ``value`` (n,)."""
        point = self._at(value.detach().reshape(self.steps[0].in_shape))
        residual = self.target - point.outputs
        own = _Tangents(self, point, value.dtype)
        tangents = {value.dtype: own}

        def product(v: Tensor) -> Tensor:
            if v.dtype not in tangents:
                tangents[v.dtype] = _Tangents(self, point, v.dtype)
            return torch.stack([tangents[v.dtype].product(row) for row in v])

        return Linearization(residual, own.pull(*self._split(residual)), product)

    @torch.no_grad()
    def _at(self, x: Tensor) -> _Point:
        inputs = [x[None]]
        for step in self.steps:
            inputs.append(step.forward(inputs[-1], self.params))
        delta, deltas = self.pull[None], [self.pull[None]]
        gradients: dict[str, Tensor] = {}
        slopes: dict[int, tuple[Tensor, Tensor]] = {}
        patches: dict[int, Tensor] = {}
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            if isinstance(step, Elementwise):
                slopes[index] = step.derivatives(inputs[index].flatten())
                delta = delta * slopes[index][0]
            elif isinstance(step, Affine):
                weight = self.params[step.weight_name]
                patches[index] = step.patches(inputs[index], weight)
                maps = delta.reshape(step.groups, -1, patches[index].shape[-1])
                gradients[step.weight_name] = maps @ patches[index].mT
                if step.bias_name is not None:
                    gradients[step.bias_name] = maps.sum(-1)
                delta = step.adjoint(delta, weight)
            elif isinstance(step, Fixed):
                delta = step.adjoint(delta)
            deltas.append(delta)
        parts = [inputs[-1].flatten() * self.feature_scale]
        parts += [(gradients[n] * self.scales[n]).flatten() for n in self.names]
        return _Point(torch.cat(parts), deltas[-2::-1], slopes, patches)

    def _split(self, u: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the features' part of ``u`` and every layer's, as :class:`_Tangents` holds gradients."""
        parts = u.split([self.features.numel(), *(self.params[n].numel() for n in self.names)])
        named = dict(zip(self.names, parts[1:], strict=True))
        kernels: list[Tensor | None] = []
        for step in self.steps:
            if not isinstance(step, Affine):
                kernels.append(None)
                continue
            outs, groups = step.out_shape[0], step.groups
            taps = self.params[step.weight_name][0].numel()
            weight = named.get(step.weight_name, u.new_zeros(outs * taps)).view(groups, outs // groups, taps)
            bias = named.get(step.bias_name or "", u.new_zeros(outs)).view(groups, outs // groups, 1)
            kernels.append(torch.cat([weight, bias], 2).mT)
        return parts[0], kernels


@final
@dataclass(frozen=True, eq=False)
class _Point:
    """What the derivatives at one point are made of, step by step.

    Attributes:
        outputs: the weighted equations' left sides.
        deltas: gradient at every step's output, (1, m).
        slopes: first and second derivative of every activation, by index.
        patches: input values under every tap of every layer, by index.

    """

    outputs: Tensor
    deltas: list[Tensor]
    slopes: dict[int, tuple[Tensor, Tensor]]
    patches: dict[int, Tensor]


class _Tangents:
    """Derivatives of features and gradients at a point, written out: a third of what differentiating twice takes.

    A change t of the input passes forward, its effect d on the output gradients passes back, and a layer's gradient
    changes by δ ⊗ t + d ⊗ x. The transpose passes the same way: what d gave takes p forward, what t gave takes q back.
    A layer's gradient is held as (groups, channels · taps + 1, outputs), the bias last, and times its scale.
    """

    def __init__(self, whole: WholeMap, point: _Point, dtype: torch.dtype) -> None:
        self.feature_scale = whole.feature_scale.to(dtype)
        self.forward: list[Rows] = []
        self.backward: list[Rows] = []
        self.bends: list[Tensor | None] = []
        self.layers: list[_Layer | None] = []
        for index, step in enumerate(whole.steps):
            delta, bend, layer = point.deltas[index].to(dtype), None, None
            if isinstance(step, Affine):
                weight = whole.params[step.weight_name].to(dtype)
                self.forward.append(partial(step.apply, weight=weight))
                self.backward.append(step.transposed(weight))
                scales = (whole.scales.get(step.weight_name, 0.0), whole.scales.get(step.bias_name or "", 0.0))
                layer = _Layer(step, weight, delta, point.patches[index], scales)
            elif isinstance(step, Elementwise):
                first, second = point.slopes[index]
                slope = first.to(dtype)
                self.forward.append(slope.mul)
                self.backward.append(slope.mul)
                bend = second.to(dtype) * delta if bool(second.any()) else None
            elif isinstance(step, Fixed):
                self.forward.append(step.apply)
                self.backward.append(step.adjoint)
            self.bends.append(bend)
            self.layers.append(layer)

    @torch.no_grad()
    def product(self, v: Tensor) -> Tensor:
        """Return Jᵀ J v for v (n,)."""
        return self.pull(*self._push(v))

    def _push(self, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the change of the features and of every layer's gradient with the input."""
        changes, t = [], v[None]
        for forward in self.forward:
            changes.append(t)
            t = forward(t)
        d: Tensor | None = None
        kernels: list[Tensor | None] = [None] * len(self.layers)
        for index in range(len(self.layers) - 1, -1, -1):
            bend, layer = self.bends[index], self.layers[index]
            if layer is not None:
                kernels[index] = layer.push(changes[index], d)
            if d is not None and index > 0:
                d = self.backward[index](d)
            if bend is not None:
                d = bend * changes[index] if d is None else d.addcmul(bend, changes[index])
        return t[0] * self.feature_scale, kernels

    @torch.no_grad()
    def pull(self, features: Tensor, kernels: list[Tensor | None]) -> Tensor:
        """Return the transpose of the change for ``features`` (d,) and every layer's gradient, (n,)."""
        p: Tensor | None = None
        own: list[Tensor | None] = []
        for index, (forward, bend, layer) in enumerate(zip(self.forward, self.bends, self.layers, strict=True)):
            kernel, before = kernels[index], p
            p = None if p is None else forward(p)
            if layer is not None and kernel is not None:
                back, onward = layer.pull(kernel)
                own.append(back)
                p = onward if p is None else p + onward
            else:
                own.append(None if bend is None or before is None else bend * before)
        q = (features * self.feature_scale)[None]
        for index in range(len(self.layers) - 1, -1, -1):
            q, here = self.backward[index](q), own[index]
            q = q if here is None else q + here
        return q[0]


class _Layer:
    """How a layer's gradient, in the form that :class:`_Tangents` says, changes with its input and output gradient."""

    def __init__(
        self, step: Affine, weight: Tensor, delta: Tensor, patches: Tensor, scales: tuple[float, float]
    ) -> None:
        self.step, self.weight, self.delta, self.scale = step, weight, delta, scales[0]
        ones = torch.full_like(patches[:, :1], scales[1])
        self.patches = torch.cat([patches * self.scale, ones], 1).to(delta)
        self.groups, self.block = step.groups, None
        if not step.linear and weight[:, 0].numel() * step.positions <= _BLOCK:
            # Many small products beat one convolution whose kernel is as large as its image.
            block = step.gradient_block(delta[0], weight).unflatten(1, (-1, weight[0, 0].numel()))  # (g, o, t, p)
            self.block = block.transpose(1, 2).flatten(1, 2) * self.scale
            self.across = self.block.mT.contiguous()  # Read in order, it takes half the time.

    def push(self, t: Tensor, d: Tensor | None) -> Tensor:
        """Return the change for changes t (1, n) of the input and d (1, m) of the output gradient."""
        rows, length = self.patches.shape[1:]
        if self.block is None:
            columns = self.step.patches(t, self.weight)
            own = columns @ self.delta.view(self.groups, -1, length).mT * self.scale
        else:
            own = (t.view(self.groups, -1, self.step.positions) @ self.across).view(self.groups, rows - 1, -1)
        if d is None:
            return F.pad(own, (0, 0, 0, 1))
        whole = self.patches @ d.view(self.groups, -1, length).mT
        whole[:, :-1] += own
        return whole

    def pull(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transpose: what goes back to the input (1, n), and on to the output (1, m)."""
        onward = (kernel.mT @ self.patches).reshape(1, -1)
        weight = kernel[:, :-1]
        if self.block is None:
            back = self.step.adjoint(self.delta, (weight.mT * self.scale).reshape(self.weight.shape))
        else:
            back = (weight.reshape(self.groups, self.weight.shape[1], -1) @ self.block).view(1, -1)
        return back, onward


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
    going: Callable[[float, int], bool] | None = None,
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
        going: (relative residual, steps so far) → whether to go on.

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
        if going is not None and not going(math.sqrt(norm) / float(whole.target.norm()), steps):
            break
        low = norm <= (floor * float(whole.target.norm())) ** 2
        if gained < (3 if low else 1e-3) * norm:
            done = True
            break
    variance = norm / max(len(whole.target) - n, 1)
    return Polished(value, steps, variance * response, math.sqrt(norm) / float(whole.target.norm()), done)
