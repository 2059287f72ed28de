"""A chain of layers as one map from its input to features and layer gradients, with derivatives, as least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.exact.outer_product import OuterProduct
from gradleak.solve.cholesky import Factor
from gradleak.solve.conjugate_gradients import conjugate_gradients
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed, Step

__all__ = ["ChainMap", "Linearized", "Point", "feature_scale"]

Tensors = Mapping[str, Tensor]

_TOLERANCE = 1e-3
"""Relative accuracy of a Gauss–Newton step, in the norm of the normal matrix."""
_LIMIT = 100
"""Conjugate gradient steps for one Gauss–Newton step."""
_STALE = 60
"""The same beyond which a new factor of the normal matrix is the quicker way."""


class ChainMap:
    """The weighted map from the input of ``steps`` to features and layer gradients, for one example.

    The gradient at the last output is taken as seen. Every equation is divided by its size, since rounding is relative.

    Attributes:
        steps: the map's operations.
        shape: of its input.
        names: the parameters whose gradients are used.
        target: the weighted equations' right sides.
        size: norm of the target, never zero.

    """

    def __init__(
        self,
        chain: Chain,
        params: Tensors,
        seen: Tensors,
        outer: OuterProduct,
        *,
        first: int = 0,
        factorize: Callable[[ChainMap, Tensor], Factor] | None = None,
    ) -> None:
        """Keep the equations.

        Args:
            chain: whose steps from ``first`` on are the map.
            params: float64 parameters by name.
            seen: float64 gradients by name.
            outer: features and output gradient of the linear layer behind.
            first: index of the first step.
            factorize: (this map, an input (n,)) → a factor of its normal matrix there, which preconditions steps.

        """
        self.steps: tuple[Step, ...] = chain.steps[first:]
        self.shape = self.steps[0].in_shape if self.steps else (outer.features.numel(),)
        self.params, self.features, self.factorize = params, outer.features, factorize
        wanted = [n for s in self.steps if isinstance(s, Affine) for n in (s.weight_name, s.bias_name) if n is not None]
        self.names = [n for n in wanted if n in seen and float(seen[n].square().sum()) > 0]
        self.pull = outer.delta @ params[chain.anchor.weight_name]
        self.feature_scale = feature_scale(self.features)
        self.scales = {n: float(seen[n].square().mean().rsqrt()) for n in self.names}
        self.target = torch.cat(
            [self.features * self.feature_scale] + [(seen[n] * self.scales[n]).flatten() for n in self.names]
        )

        self.size = max(float(self.target.norm()), 1e-300)

    def outputs(self, x: Tensor) -> Tensor:
        """Return the weighted equations' left sides at ``x`` (*shape)."""
        return self.at(x).outputs

    def relative(self, x: Tensor) -> float:
        """Return the relative distance of the weighted equations at ``x``."""
        return float((self.outputs(x) - self.target).norm()) / self.size

    def cost(self, z: Tensor) -> float:
        """Return the sum of squares at ``z`` (n,)."""
        return float((self.outputs(z.view(self.shape)) - self.target).square().sum())

    def linearize(self, z: Tensor, former: Linearized | None = None) -> Linearized:
        """Return the map linearized at ``z`` (n,); ``former`` lends its factor where that still serves."""
        if self.factorize is None or (former is not None and former.served):
            factor = None if former is None else former.factor
        else:
            factor = self.factorize(self, z)
        return Linearized(self, z, factor)

    def variance(self, cost: float) -> float:
        """Return the squared noise of one weighted equation, as ``cost`` at the solution shows it."""
        return max(cost, 1e-300) / max(len(self.target) - math.prod(self.shape), 1)

    @torch.no_grad()
    def at(self, x: Tensor) -> Point:
        """Return what the derivatives at ``x`` (*shape) are made of."""
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
                patches[index] = step.patches(inputs[index])
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
        return Point(torch.cat(parts), deltas[-2::-1], slopes, patches)

    def split(self, u: Tensor) -> tuple[Tensor, list[Tensor | None]]:
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
class Point:
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

    def __init__(self, whole: ChainMap, point: Point, dtype: torch.dtype) -> None:
        self.feature_scale = whole.feature_scale.to(dtype)
        self.maps: list[_Layer | _Diagonal | _Other] = []
        for index, step in enumerate(whole.steps):
            delta = point.deltas[index].to(dtype)
            if isinstance(step, Affine):
                weight = whole.params[step.weight_name].to(dtype)
                scales = (whole.scales.get(step.weight_name, 0.0), whole.scales.get(step.bias_name or "", 0.0))
                self.maps.append(_Layer(step, weight, delta, point.patches[index], scales))
            elif isinstance(step, Elementwise):
                first, second = point.slopes[index]
                self.maps.append(_Diagonal(first.to(dtype), second.to(dtype) * delta if bool(second.any()) else None))
            else:
                assert isinstance(step, Fixed)
                self.maps.append(_Other(step))

    @torch.no_grad()
    def product(self, v: Tensor) -> Tensor:
        """Return Jᵀ J v for v (n,)."""
        return self.pull(*self._push(v))

    def _push(self, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the change of the features and of every layer's gradient with the input."""
        changes, t = [], v[None]
        for step in self.maps:
            t, kept = step.forward(t)
            changes.append(kept)
        d: Tensor | None = None
        kernels: list[Tensor | None] = [None] * len(self.maps)
        for index in range(len(self.maps) - 1, -1, -1):
            step = self.maps[index]
            if isinstance(step, _Layer):
                kernels[index] = step.push(changes[index], d)
            if d is not None and index > 0:
                d = step.backward(d)
            if isinstance(step, _Diagonal) and step.bend is not None:
                d = step.bend * changes[index] if d is None else d.addcmul(step.bend, changes[index])
        return t[0] * self.feature_scale, kernels

    @torch.no_grad()
    def pull(self, features: Tensor, kernels: list[Tensor | None]) -> Tensor:
        """Return the transpose of the change for ``features`` (d,) and every layer's gradient, (n,)."""
        p: Tensor | None = None
        own: list[Tensor | None] = []
        for step, kernel in zip(self.maps, kernels, strict=True):
            before = p
            p = None if p is None else step.forward(p)[0]
            if isinstance(step, _Layer) and kernel is not None:
                onward = step.onward(kernel)
                p = onward if p is None else p + onward
                own.append(kernel)
            elif isinstance(step, _Diagonal) and step.bend is not None and before is not None:
                own.append(step.bend * before)
            else:
                own.append(None)
        q = (features * self.feature_scale)[None]
        for step, here in zip(reversed(self.maps), reversed(own), strict=True):
            if isinstance(step, _Layer):
                q = step.backward(q, here)
            else:
                q = step.backward(q) if here is None else step.backward(q) + here
        return q[0]


@final
@dataclass(frozen=True, eq=False)
class _Other:
    """A map without parameters."""

    step: Fixed

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.step.apply(t), t

    def backward(self, q: Tensor) -> Tensor:
        return self.step.adjoint(q)


@final
@dataclass(frozen=True, eq=False)
class _Diagonal:
    """An activation: its slope (n,), and how the output gradient before it changes with its input, if at all."""

    slope: Tensor
    bend: Tensor | None

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t * self.slope, t

    def backward(self, q: Tensor) -> Tensor:
        return q * self.slope


@final
class _Layer:
    """A layer, and how its gradient, in the form that :class:`_Tangents` says, changes with input and output gradient.

    Everything is a product with the input values under every tap, so these are laid out once for all uses: for one row,
    that takes less time than any convolution of the library.
    """

    def __init__(
        self, step: Affine, weight: Tensor, delta: Tensor, patches: Tensor, scales: tuple[float, float]
    ) -> None:
        groups, self.step, self.weight = step.groups, step, weight
        self.matrix = weight.reshape(groups, len(weight) // groups, -1)  # (g, o, t)
        self.transposed = self.matrix.mT.contiguous()
        ones = torch.full_like(patches[:, :1], scales[1])
        self.patches = torch.cat([patches * scales[0], ones], 1).to(delta)  # (g, t + 1, l)
        self.delta = delta.view(groups, -1, patches.shape[-1]) * scales[0]

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the change of the output (1, m) for a change ``t`` (1, n) of the input, and the latter by taps."""
        columns = self.step.patches(t)
        return (self.matrix @ columns).view(1, -1), columns

    def backward(self, q: Tensor, kernel: Tensor | None = None) -> Tensor:
        """Return the transpose for ``q`` (1, m), and for a change of the gradient if there is one, (1, n)."""
        columns = self.transposed @ q.view(*self.delta.shape)
        if kernel is not None:
            columns = torch.baddbmm(columns, kernel[:, :-1], self.delta)
        return self.step.folded(columns)

    def push(self, columns: Tensor, d: Tensor | None) -> Tensor:
        """Return the gradient's change for a change of the input, by taps, and ``d`` (1, m) of the output gradient."""
        own = columns @ self.delta.mT
        if d is None:
            return F.pad(own, (0, 0, 0, 1))
        whole = self.patches @ d.view(*self.delta.shape).mT
        whole[:, :-1] += own
        return whole

    def onward(self, kernel: Tensor) -> Tensor:
        """Return the transpose of what :meth:`push` does with the output gradient, (1, m)."""
        return (kernel.mT @ self.patches).reshape(1, -1)


@final
class Linearized:
    """The map linearized at one point, for :func:`gradleak.solve.least_squares.minimize`.

    Attributes:
        residual: target less outputs.
        descent: Jᵀ residual, (n,).
        factor: of the normal matrix here or nearby.
        served: whether the factor still preconditions well.

    """

    def __init__(self, whole: ChainMap, z: Tensor, factor: Factor | None) -> None:
        self.whole, self.factor, self.served, self.evaluations = whole, factor, True, 1
        self.point = whole.at(z.detach().view(whole.shape))
        self.residual = whole.target - self.point.outputs
        self._tangents = {z.dtype: _Tangents(whole, self.point, z.dtype)}
        self.descent = self._tangents[z.dtype].pull(*whole.split(self.residual))

    def product(self, v: Tensor) -> Tensor:
        """Return Jᵀ J v for rows v (k, n), in their precision."""
        if v.dtype not in self._tangents:
            self._tangents[v.dtype] = _Tangents(self.whole, self.point, v.dtype)
        return torch.stack([self._tangents[v.dtype].product(row) for row in v])

    def solve(self, right: Tensor, damping: float, tolerance: float = _TOLERANCE) -> tuple[Tensor, bool]:
        """Return (JᵀJ + damping · D)⁻¹ right for rows (k, n), D the normal matrix' diagonal, and whether it ended."""
        assert self.factor is not None
        shift = damping * self.factor.scale.square().reciprocal()
        x, steps, done = conjugate_gradients(
            lambda v: self.product(v) + shift * v, right, self.factor.solve, tolerance=tolerance, limit=_LIMIT
        )
        self.served = self.served and done and steps <= _STALE
        return x, done

    def step(self, damping: float) -> Tensor:
        """Return the damped step."""
        return self.solve(self.descent[None], damping)[0][0]

    def decrease(self, change: Tensor) -> float:
        """Return by how much the linear model falls."""
        return float(2 * self.descent @ change - change @ self.product(change[None])[0])


def feature_scale(features: Tensor) -> Tensor:
    """Return one over the size of every feature (d,), bounded where they are near zero."""
    floor = float(0.05 * features.square().mean().sqrt()) + 1e-300
    return features.abs().clamp(min=floor).reciprocal()
