"""The exact attack on vision transformers with learned positions: patches from the embedding's own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from gradleak.attacks.base import Attack, Callback, is_signs, present
from gradleak.errors import NotApplicable
from gradleak.exact.first_layer import agreement, input_scale
from gradleak.exact.labels import one_hot_label
from gradleak.exact.patches import PatchSolution, solve_patches, span_misfit
from gradleak.formats import number_format, storage_deviation
from gradleak.structure.patches import Embedded, PatchLayer, Positions, embed, find_patch_layer, find_positions
from gradleak.structure.probe import entering
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy
from gradleak.types import Construction, Note, NoteKind, Part, Reconstruction, Status, UpdateKind

__all__ = ["PatchEmbedding", "patch_embedding"]

_APART = 0.1
"""Size of the difference, relative to the image's, of two images that a batch must not hide behind one."""
_TOLD = 16.0
"""Times the noise by which the equations must notice such a batch."""
_ROUNDING = 4.0
"""Times the rounding of one simulated example up to which a misfit is rounding."""


@final
@dataclass(frozen=True)
class PatchEmbedding(Attack):
    """Reads an image off the gradients of patch and position embedding; made by :func:`patch_embedding`."""

    requires = Knowledge.BATCH_SIZE

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        return _Reader.of(observation).read(seed)


@dataclass(frozen=True, eq=False)
class _Reader:
    """The embedding of one observation: its layer, the gradients it shares, and the format these are in."""

    observation: Observation
    layer: PatchLayer
    format: torch.dtype

    @classmethod
    def of(cls, observation: Observation) -> _Reader:
        """Return the reader of an observation.

        Raises:
            NotApplicable: there is no such embedding, or its update is no gradient of one example.
        """
        simulator = observation.simulator
        buffers = simulator.buffers(torch.float64)
        layer = find_patch_layer(observation.model, observation.params, tuple(observation.space.shape), buffers)
        if layer is None:
            raise NotApplicable(
                "The closed form of vision transformers needs a trained layer that maps every patch of the input by "
                "itself (a convolution whose stride is its kernel, a linear layer over patches) with nothing but "
                "scaling before it, and this model has none; use recursion() or matching."
            )
        if not layer.held:
            raise NotApplicable(_unplaced(observation, layer, f"{layer.module!r} has no trained position embedding"))
        if observation.batch_size != 1:
            raise NotApplicable(
                f"The gradient of the position embedding is a sum over the {observation.batch_size} examples of the "
                f"batch, so it does not show the gradient at any token of one of them; use matching."
            )
        gradient = observation.gradient
        if not gradient.single and not gradient.scaled:  # Several steps on one image sum up in both tensors alike.
            raise NotApplicable(gradient.reason)
        own = {k: gradient.tensors[k] for k in (layer.weight_name, layer.bias_name, *layer.held) if k is not None}
        if is_signs(own):
            raise NotApplicable(
                "The entries of each tensor all have one size, as signs do and the first step of an adaptive "
                "optimizer, so the update is no multiple of a gradient; use matching with what the client did stated."
            )
        if not bool(own[layer.weight_name].any()):
            raise NotApplicable(
                f"The gradient of {layer.weight_name!r} is zero, as where the last layer starts at zero, so nothing "
                "of the image reaches the update; attack one of a later round."
            )
        return cls(observation, layer, number_format({k: observation.update.tensors[k] for k in own}))

    @property
    def weight(self) -> Tensor:
        """The gradient of the patch embedding's weight, (d, n), float64."""
        return self.observation.gradient.tensors[self.layer.weight_name].double().flatten(1)

    def solve(self, positions: Positions) -> PatchSolution:
        """Return the patches where these are the positions."""
        tokens = positions.of(self.observation.gradient.tensors)
        return solve_patches(tokens, self.weight, rounding=torch.finfo(self.format).eps)

    def image(self, solution: PatchSolution) -> Tensor:
        """Return the model input (1, *shape), float64."""
        return self.layer.assemble(solution.patches).reshape(1, *self.observation.space.shape)

    def read(self, seed: int) -> Reconstruction:
        """Return what the embedding's gradients show."""
        model, params = self.observation.model, self.observation.params
        count, width, held = len(self.layer.order), len(params[self.layer.weight_name]), self.layer.held[0]
        # Special tokens stand first nearly everywhere. A wrong guess costs a second run of the model, and no more.
        rows = params[held].numel() // width
        guess = Positions(held, torch.arange(rows - count, rows, device=self.weight.device), width)
        embedded = self._embed(self.image(self.solve(guess)), seed)
        positions = find_positions(embedded)
        if positions is None:
            raise NotApplicable(
                _unplaced(
                    self.observation,
                    self.layer,
                    f"no parameter's gradient is that of the tokens, so that what {self.layer.module!r} gives is "
                    "not simply added to a learned position embedding",
                )
            )
        solution = self.solve(positions)
        if solution.rank < count:
            return self._short(solution)
        if positions.name != guess.name or not torch.equal(positions.rows, guess.rows):
            embedded = self._embed(self.image(solution), seed)
        inputs = self.image(solution)
        if not self.layer.shows(model, params, self.observation.simulator.buffers(torch.float64), inputs):
            raise NotApplicable(
                "The model limits its input before the patch embedding (clamping, rectifying) just where the solution "
                "lies, or changes it by chance, so the input itself does not show; use matching."
            )
        return self._found(positions, solution, embedded)

    def _embed(self, inputs: Tensor, seed: int) -> Embedded:
        """Return the gradients of two images around ``inputs`` (1, *shape)."""
        size = float(inputs.square().mean().sqrt())
        size = size if 0 < size < math.inf else 1.0
        move = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(inputs)
        around = torch.nan_to_num(torch.cat([inputs + _APART * size * move, inputs - _APART * size * move]))
        simulator = self.observation.simulator
        return embed(self.observation.model, self.observation.params, self.layer, around.to(simulator.dtype), seed)

    def _short(self, solution: PatchSolution) -> Reconstruction:
        """Return the start that an embedding leaves which does not determine its patches."""
        count = len(self.layer.order)
        note = Note(
            f"The gradients of the {count} tokens have rank {solution.rank} above their rounding, so the patches are "
            "not determined; what is shown is the solution of least norm.",
            NoteKind.LIMIT,
        )
        decoded, _ = present(self.observation, self.image(solution), exact=False)
        return Reconstruction(decoded, None, solution.misfit**2, status=Status.STALLED, notes=(note,))

    # --------------------------------------------------------------------------------------------- one image

    def _found(self, positions: Positions, solution: PatchSolution, embedded: Embedded) -> Reconstruction:
        """Return the image that the equations determine, and how they do."""
        tensors, layer = self.observation.gradient.tensors, self.layer
        tokens = positions.of(tensors)
        noise = self._noise(positions, tokens, embedded)
        inputs, factors = self.image(solution), {}
        scale, loose = self._scale(positions, inputs)
        if scale not in (None, 1.0):
            inputs, factors = scale * inputs, {layer.weight_name: 1 / scale}
        total, length = tokens.sum(0), float(tokens.norm(dim=1).sum())
        if layer.bias_name is not None:
            bias = tensors[layer.bias_name].double()
            ratio = float(total @ bias) / max(float(total.square().sum()), 1e-300)
            if float((bias - total).norm()) > noise["bias"] * length >= float((bias - ratio * total).norm()):
                factors[layer.bias_name] = ratio
        # Two images a little apart, as the same equations would see them.
        mixed = solve_patches(embedded.tokens.sum(0), embedded.weight.sum(0), rounding=torch.finfo(self.format).eps)
        alone = mixed.misfit > _TOLD * max(solution.misfit, noise["weight"])
        # Two that differ by so little leave no more than rounding.
        hidden = _APART * (noise["weight"] / max(mixed.misfit, 1e-300)) ** 0.5 * float(inputs.square().mean().sqrt())
        fits = solution.misfit <= noise["weight"]
        scaled = scale is not None and not factors
        decoded, why = present(self.observation, inputs, exact=fits and alone)
        floors = {layer.weight_name: noise["weight"] * float(self.weight.norm())}
        if layer.bias_name is not None:
            floors[layer.bias_name] = noise["bias"] * length

        def simulate(x: Tensor) -> dict[str, Tensor]:
            found = {layer.weight_name: tokens.T @ layer.cut(x)[0]}
            if layer.bias_name is not None:
                found[layer.bias_name] = total
            return {k: factors.get(k, 1.0) * v for k, v in found.items()}

        count, size = layer.order.shape
        error = math.hypot(
            solution.error / float(layer.scale.abs().min()), loose * float(inputs.square().mean().sqrt())
        )
        statement = (
            f"the gradients of the {count} tokens, which {positions.name!r} shows, have full rank, and the patch "
            f"embedding's are linear in {size} values of each patch, with {solution.spare * size:,} equations to spare"
        )
        part = Part(inputs, simulate, floors, (positions.name,), factors, solution.spare, hidden)
        notes = [
            Note(
                f"Gradients of {layer.module!r} and {positions.name!r} alone: neither loss nor label nor dropout masks "
                f"have a part in it; they fit to {solution.misfit:.1e}."
            )
        ]
        if not scaled:
            notes.append(Note(_unscaled(scale, factors), NoteKind.LIMIT))
        return Reconstruction(
            decoded,
            self._label(embedded),
            solution.misfit**2,
            status=Status.EXACT if fits and alone and scale is not None else Status.CONVERGED,
            notes=tuple(notes) if why is None else (why, *notes),
            construction=Construction(inputs.numel(), error, statement, alone=alone, scaled=scaled, part=part),
            solved=torch.tensor([fits and alone and scale is not None]),
        )

    def _noise(self, positions: Positions, tokens: Tensor, embedded: Embedded) -> dict[str, float]:
        """Return the relative misfits that one example leaves, rounded as the client does and as it was captured."""
        layer, update = self.layer, self.observation.update
        ours = embedded.tokens[0].double()
        times = float(tokens.norm()) / max(float(ours.norm()), 1e-300)
        shared = float(update.tensors[positions.name].double().norm())
        step = shared / max(float(self.observation.gradient.tensors[positions.name].double().norm()), 1e-300)
        draw = torch.Generator().manual_seed(0)

        def captured(value: Tensor, weights: Tensor) -> Tensor:
            value = times * value.double()
            if update.kind is UpdateKind.WEIGHT_DELTA:  # a difference of weights, each of them rounded
                spacing = storage_deviation(weights.double(), weights.dtype).reshape(value.shape) * 2**0.5 / step
                value = value + spacing * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value)
            return value.to(self.format).double()

        params = self.observation.params
        seen = captured(ours, positions.of(params))
        one = solve_patches(seen, captured(embedded.weight[0], params[layer.weight_name]), rounding=0.0)
        unit = torch.finfo(self.format).eps
        found = {"weight": _ROUNDING * max(one.misfit, unit), "bias": _ROUNDING * unit}
        if layer.bias_name is not None:
            every = embedded.tokens.double()
            off = (embedded.tensors[layer.bias_name].double() - every.sum((0, 1))).norm() / every.norm(dim=2).sum()
            spare = (captured(ours.sum(0), params[layer.bias_name]) - times * ours.sum(0)).norm() + (
                seen.sum(0) - times * ours.sum(0)
            ).norm()
            found["bias"] = _ROUNDING * max(float(off), float(spare / seen.norm(dim=1).sum()), unit)
        return found

    def _label(self, embedded: Embedded) -> Tensor | None:
        """Return the label as granted, or as the last layer's bias shows it whatever masks were drawn."""
        granted, name = self.observation.labels, embedded.head_bias
        if granted is not None:
            return None if granted.is_floating_point() else granted
        gradient = None if name is None else self.observation.gradient.tensors[name].double()
        if gradient is None or not isinstance(self.observation.simulator.undefended.loss, CrossEntropy):
            return None
        # p − y has one negative entry, and sums to zero.
        if int((gradient < 0).sum()) != 1 or float(gradient.sum().abs()) > 1e-3 * float(gradient.abs().sum()):
            return None
        return torch.tensor([one_hot_label(None, gradient)])

    # ----------------------------------------------------------------------------------------------- its scale

    def _scale(self, positions: Positions, inputs: Tensor) -> tuple[float | None, float]:
        """Return the factor that fixes the image's scale, None if nothing does, and how loosely it does.

        Weight and positions may carry factors of their own (clipping per tensor). The first layer that sees the tokens
        tells: its gradient lies in the span of its inputs, which the tokens' scale changes.
        """
        mismatch = self._forward(positions, inputs)
        close = agreement(self.format)
        if mismatch is not None:
            found = input_scale(mismatch, tolerance=close)
            if found is not None:
                least, beside = mismatch(found), mismatch(1.01 * found)
                return found, 0.01 * least / max(beside - least, 1e-300)
            if mismatch(1.0) > close:
                return None, 0.0
        # Tokens without positions and bias: their scale is normalized away. A clipped tensor is the largest.
        norms = {k: float(t.norm()) for k, t in self.observation.update.tensors.items()}
        clipped = norms[self.layer.weight_name] >= 0.999 * max(norms.values())
        plain = self.observation.update.kind is UpdateKind.GRADIENT and self.observation.simulator.known
        return (1.0 if plain and not clipped else None), 0.0

    def _forward(self, positions: Positions, inputs: Tensor) -> Callable[[float], float] | None:
        """Return the share of a later layer's gradient outside the span of its inputs, by the factor of ``inputs``."""
        model, params, tensors = self.observation.model, self.observation.params, self.observation.gradient.tensors
        names = {id(p): k for k, p in model.named_parameters()}
        weights: dict[int, str] = {}
        readers: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.MultiheadAttention) or name == self.layer.module:
                continue
            key = names.get(id(module.weight if isinstance(module, nn.Linear) else module.in_proj_weight), "")
            if key in tensors:
                readers[name], weights[id(module)] = module, key
        live = tensors[positions.name] != 0

        def takes(module: nn.Module, value: Tensor) -> bool:
            width = tensors[weights[id(module)]].shape[1]
            return value.ndim == 3 and value.shape[-1] == width > value.shape[0] * value.shape[1]

        def mask(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # Where dropout closed a token's value, its gradient is exactly zero.
            assert isinstance(module, _DropoutNd)
            return args[0] * live.reshape(out.shape) / (1 - module.p) if out.numel() == live.numel() else out

        @cache
        def mismatch(t: float) -> float:
            handles = [
                m.register_forward_hook(mask)
                for m in model.modules()
                if isinstance(m, _DropoutNd) and m.training and 0 < m.p < 1
            ]
            try:
                there = entering(model, params, (t * inputs).to(self.observation.simulator.dtype), readers, takes)
            finally:
                for handle in handles:
                    handle.remove()
            assert there is not None
            return span_misfit(tensors[weights[id(readers[there[0]])]], there[1].flatten(0, 1))

        try:
            mismatch(1.0)
        except (AssertionError, NotApplicable):
            return None
        return mismatch


def _unscaled(scale: float | None, factors: dict[str, float]) -> str:
    if scale is None:
        return (
            "Nothing fixes the scale: the patch embedding's weight may carry its own factor (clipping per tensor), "
            "and the image is right up to one factor."
        )
    told = ", ".join(f"{v:.4g} for {k!r}" for k, v in factors.items())
    return f"Tensors carry factors of their own ({told}, beside the position embedding's); the image allows for them."


def _unplaced(observation: Observation, layer: PatchLayer, why: str) -> str:
    """Return why tokens' gradients are not known, and what the patch embedding's gradient says without them."""
    count, size = layer.order.shape
    gradient = observation.gradient.tensors.get(layer.weight_name)
    left = ""
    if gradient is not None and observation.batch_size == 1 and bool(gradient.any()):
        values = torch.linalg.svdvals(gradient.double().flatten(1))
        rank = int((values > 1e3 * torch.finfo(gradient.dtype).eps * values[0]).sum())
        if rank == count < size:
            left = (
                f" Its gradient confines each of the {count} patches to the same {rank} of {size} dimensions, no more."
            )
    return (
        f"The gradients at the tokens are not shared: {why} (positions that are fixed or relative show nothing, and an "
        f"embedding that is normalized before they are added hides it).{left} Use matching."
    )


def patch_embedding() -> PatchEmbedding:
    """Solve a vision transformer's embedding for the image: exact for one example, whatever follows, dropout included.

    Source: APRIL, Lu et al., CVPR 2022, Section 3. Deviations: the gradient at every token is read off the position
    embedding's, which needs no attention layer and no equation per class of model; which parameter and which of its
    rows that is, is found by running the model; least squares has full rank for as many patches as the embedding is
    wide. The image's scale is checked where the first layer sees the tokens. Several examples, positions that are fixed
    or relative, and an embedding that is normalized before they are added are refused.
    """
    return PatchEmbedding()
