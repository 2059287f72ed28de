"""The patch embedding of a vision transformer and its learned positions, found by running the model, not by names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.structure.probe import entering, run_quietly
from gradleak.training import output_tensors

__all__ = ["Embedded", "PatchLayer", "Positions", "embed", "find_patch_layer", "find_positions"]

Tensors = Mapping[str, Tensor]
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Holders = nn.Embedding | nn.ParameterList | nn.ParameterDict
_FAR = 64.0
"""Spread of the probe: far beyond usual inputs, so that what clamps, rectifies or folds them shows."""
_DRAWS = 12
"""Random numbers under which the model must treat its input alike."""
_SAME = 1e-4
"""Relative distance at which two rows of a gradient are the same row, summed in another order."""


@dataclass(frozen=True, eq=False)
class PatchLayer:
    """A linear map of every patch of the input, whose T patches of n values hold each input value once.

    Attributes:
        module: name of the layer, as in ``model.get_submodule``.
        weight_name: name of its weight, (d, ...) with n values a row.
        bias_name: name of its bias, None where it has none that is trained.
        order: (T, n) index into the flattened input of every value that the layer sees.
        scale: (T, n), float64, by which the model multiplies them before.
        shift: (T, n), float64, that it adds.
        held: names of the parameters that can hold a vector of d values for each patch, likeliest first.

    """

    module: str
    weight_name: str
    bias_name: str | None
    order: Tensor
    scale: Tensor
    shift: Tensor
    held: tuple[str, ...]

    def cut(self, inputs: Tensor) -> Tensor:
        """Return what the layer sees of model inputs (N, *shape), (N, T, n) in float64."""
        return inputs.double().flatten(1)[:, self.order] * self.scale + self.shift

    def assemble(self, patches: Tensor) -> Tensor:
        """Return the flattened input of which the layer sees ``patches`` (T, n)."""
        flat = patches.new_empty(patches.numel())
        flat[self.order.flatten()] = ((patches - self.shift) / self.scale).flatten()
        return flat

    def shows(self, model: nn.Module, params: Tensors, buffers: Tensors, inputs: Tensor) -> bool:
        """Tell whether the layer sees model inputs (N, *shape) as it is taken to, there, around, and every time."""
        step = 1e-2 * inputs.abs().clamp_min(float(inputs.abs().mean()) + 1e-30)
        around = torch.cat([inputs, inputs + step, inputs - step])
        for seed in range(_DRAWS):  # A flip or a crop by chance shows only where chance falls differently.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                seen = _read(model, params, buffers, self.module, around if seed == 0 else inputs)
            if seen is None or not _alike(seen, self.cut(around if seed == 0 else inputs)):
                return False
        return True


def find_patch_layer(model: nn.Module, params: Tensors, shape: tuple[int, ...], buffers: Tensors) -> PatchLayer | None:
    """Return the first layer that maps every patch of the input by itself, None if there is none.

    That is a convolution whose stride is its kernel, or a linear layer over patches; what stands before it may move
    values about, scale and shift them (normalization inside the model). The model is run up to that layer only.
    ``buffers`` are those of the model and its frozen parameters, in float64.
    """
    names = {id(p): k for k, p in model.named_parameters()}
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    wanted = {
        k: m
        for k, m in model.named_modules()
        if isinstance(m, nn.Linear | _Convolution)
        and names.get(id(m.weight)) in params
        and uses[id(m.weight)] == 1
        and _tiles(m, math.prod(shape))
    }
    like = next(iter(params.values()))
    probe = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)).to(like)
    found = entering(model, params, probe, wanted, lambda m, x: _cut(m, x) is not None)
    if found is None:
        return None
    name, module = found[0], cast(nn.Linear, wanted[found[0]])
    placed = _places(model, params, buffers, name, shape)
    if placed is None:
        return None
    bias = None if module.bias is None else names.get(id(module.bias))
    held = _vectors(model, params, len(placed[0]), len(module.weight))
    return PatchLayer(name, names[id(module.weight)], bias if bias in params else None, *placed, held)


def _tiles(module: nn.Linear | _Convolution, size: int) -> bool:
    """Tell whether patches of the layer's size can make up an input of ``size`` values."""
    if not isinstance(module, nn.Linear):
        plain = module.kernel_size == module.stride and set(module.dilation) == {1} == {module.groups}
        if not plain or math.prod(module.kernel_size) == 1 or module.padding == "same" or set(module.padding) - {0}:
            return False
    n = module.weight[0].numel()
    return size % n == 0 and size // n > 1


def _vectors(model: nn.Module, params: Tensors, count: int, width: int) -> tuple[str, ...]:
    """Return the parameters that can hold ``count`` or more vectors of ``width`` values, likeliest first."""
    names = {id(p): k for k, p in model.named_parameters()}
    found = set()
    for module in model.modules():
        layer = type(module) is not nn.Module and type(module).__module__.startswith("torch.nn.modules")
        if layer and not isinstance(module, _Holders):
            continue  # Weights of layers multiply, they are not added.
        keys = {names[id(p)] for p in module.parameters(recurse=False)} & set(params)
        found |= {k for k in keys if any(len(v) >= count for v in _rows(params[k], width))}
    return tuple(sorted(found, key=lambda k: (params[k].numel(), k)))


def _rows(tensor: Tensor, width: int) -> list[Tensor]:
    """Return the ways (R, width) to read a tensor as vectors."""
    shape = [s for s in tensor.shape if s > 1]
    ways = [tensor.reshape(-1, width)] if len(shape) > 1 and shape[-1] == width else []
    return ways + ([tensor.reshape(width, -1).T] if len(shape) > 1 and shape[0] == width else [])


def _cut(module: nn.Module, value: Tensor) -> Tensor | None:
    """Return what a layer sees, (N, ...), patch by patch (N, T, n); None where its patches do not tile that."""
    if isinstance(module, nn.Linear):
        return value.reshape(len(value), -1, module.in_features) if value.ndim > 2 else None
    assert isinstance(module, _Convolution)
    dims = len(module.kernel_size)
    if value.ndim != dims + 2 or any(s % k for s, k in zip(value.shape[2:], module.kernel_size, strict=True)):
        return None
    sizes = [v for s, k in zip(value.shape[2:], module.kernel_size, strict=True) for v in (s // k, k)]
    grid, taps = [2 + 2 * i for i in range(dims)], [3 + 2 * i for i in range(dims)]
    cut = value.reshape(*value.shape[:2], *sizes).permute(0, *grid, 1, *taps)
    return cut.reshape(len(value), -1, math.prod(module.kernel_size) * value.shape[1])


def _read(model: nn.Module, params: Tensors, buffers: Tensors, name: str, inputs: Tensor) -> Tensor | None:
    """Return what layer ``name`` sees of model inputs (N, *shape), (N, T, n) in float64."""
    module = model.get_submodule(name)
    for dtype in (torch.float64, next(iter(params.values())).dtype):
        cast = {k: b.to(dtype) if b.is_floating_point() else b for k, b in buffers.items()}
        try:  # What comes before the layer seldom has parameters, whose type would be another one.
            found = entering(model, params, inputs.to(dtype), {name: module}, lambda _m, _x: True, cast)
        except NotApplicable:
            continue
        return None if found is None else _cut(module, found[1].double())
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def _places(
    model: nn.Module, params: Tensors, buffers: Tensors, name: str, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return where the input's values are in the patches, and their scale and shift; None where these vary."""
    count, like = math.prod(shape), next(iter(params.values()))
    draw = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(count, generator=draw, dtype=torch.float64).to(like.device)
    ratio = 1 + torch.arange(count, device=like.device).double() / count  # every value tells its place
    far = _FAR * (torch.rand(2, count, generator=draw, dtype=torch.float64).to(like.device) - 0.5)
    probe = torch.cat([torch.stack([torch.zeros_like(base), base, base * ratio]), far])
    seen = _read(model, params, buffers, name, probe.reshape(-1, *shape))
    if seen is None or len(seen) != len(probe) or seen[0].numel() != count:
        return None
    lead = seen[1] - seen[0]
    place = ((seen[2] - seen[0]) / lead - 1) * count
    if not bool(torch.isfinite(place).all()) or float(place.abs().max()) > count:
        return None
    order = place.round().long()
    if not torch.equal(order.flatten().sort().values, torch.arange(count, device=order.device)):
        return None
    scale, shift = lead / base[order], seen[0]
    return (order, scale, shift) if _alike(seen[3:], far[:, order] * scale + shift) else None


# ------------------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True, eq=False)
class Positions:
    """A learned position embedding: parameter ``name``, one of whose vectors is added to every token.

    Attributes:
        rows: (T,) vector of each token.
        width: values of a vector, d.
        way: which way the parameter is read as vectors.
    """

    name: str
    rows: Tensor
    width: int
    way: int = 0

    def of(self, tensors: Tensors) -> Tensor:
        """Return the tokens' vectors (T, d) of an update, in float64."""
        return _rows(tensors[self.name].double(), self.width)[self.way][self.rows]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Gradients of a random sum of the model's outputs, for a few examples, in the client's arithmetic.

    Attributes:
        tokens: (N, T, d) at the patch layer's output.
        weight: (N, d, n) of its weight, example by example.
        tensors: of all examples, by name: the layer's own and what may be position embeddings.
        head_bias: name of the bias of the layer that gives the outputs, None where there is none.
    """

    tokens: Tensor
    weight: Tensor
    tensors: dict[str, Tensor]
    head_bias: str | None


def embed(model: nn.Module, params: Tensors, layer: PatchLayer, inputs: Tensor, seed: int = 0) -> Embedded:
    """Run the model forward and backward on ``inputs`` (N, *shape), in its own mode; nothing in it changes.

    Raises:
        NotApplicable: the model does not run on them, runs the layer twice, or its outputs do not depend on it.
    """
    module = model.get_submodule(layer.module)
    count, width = layer.order.shape[0], len(params[layer.weight_name])
    names = [layer.weight_name, *layer.held]
    names += [] if layer.bias_name is None else [layer.bias_name]
    leaves = {k: p.detach().requires_grad_() if k in names else p.detach() for k, p in params.items()}
    seen: list[Tensor] = []
    last: dict[int, nn.Linear] = {}
    handles = [module.register_forward_hook(lambda _m, _a, out: seen.append(out))]
    handles += [
        m.register_forward_hook(lambda m, _a, out: last.update({id(out): m}))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    try:
        with torch.enable_grad():
            outputs = run_quietly(model, leaves, inputs)
    finally:
        for handle in handles:
            handle.remove()
    draw = torch.Generator().manual_seed(seed)
    found = [o for o in output_tensors(outputs) if o.requires_grad]
    if len(seen) != 1 or not found:
        raise NotApplicable(
            f"The patch embedding {layer.module!r} runs {len(seen)} times or does not reach the model's outputs, so "
            "its gradient is not that of one image; use matching."
        )
    value = torch.stack([(o * torch.randn(o[:1].shape, generator=draw).to(o)).sum() for o in found]).sum()
    sources = [seen[0], *(leaves[k] for k in names)]
    gradients = torch.autograd.grad(value, sources, allow_unused=True, materialize_grads=True, retain_graph=True)
    with torch.enable_grad():  # Through this layer only, whose own arithmetic is asked for.
        alone = [(seen[0][i] * gradients[0][i]).sum() for i in range(len(inputs))]
    each = [torch.autograd.grad(v, leaves[layer.weight_name], retain_graph=True)[0] for v in alone]
    tokens = gradients[0] if isinstance(module, nn.Linear) else gradients[0].flatten(2).transpose(1, 2)
    head = last.get(id(outputs))
    bias = None if head is None else {id(p): k for k, p in model.named_parameters()}.get(id(head.bias))
    return Embedded(
        tokens.reshape(len(inputs), count, width),
        torch.stack(each).flatten(2),
        dict(zip(names, gradients[1:], strict=True)),
        bias if bias in params else None,
    )


def find_positions(embedded: Embedded) -> Positions | None:
    """Return the parameter that has, vector by vector, the gradient of every token, None if there is none.

    A parameter that is added to the patch embedding's output, and nothing else, has that gradient for any input.
    """
    wanted = embedded.tokens.double().sum(0)
    for name, gradient in list(embedded.tensors.items())[1:]:  # The first is the layer's own weight.
        for way, vectors in enumerate(_rows(gradient.double(), wanted.shape[1])):
            if len(vectors) < len(wanted):
                continue
            near = torch.cdist(wanted, vectors, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            if bool((near.values <= _SAME * wanted.norm(dim=1)).all()) and len(near.indices.unique()) == len(wanted):
                return Positions(name, near.indices, wanted.shape[1], way)
    return None
