"""Running a model on dummy inputs without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradleak.errors import NotApplicable, reason

__all__ = ["entering", "linear_inputs", "meets_kinks", "probe_inputs", "run_quietly"]

Tensors = Mapping[str, Tensor]


def probe_inputs(shape: tuple[int, ...], count: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return ``count`` dummy inputs in [0, 1]: noise of every smoothness around random levels, (count, *shape)."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    noise = torch.rand((count, *shape), generator=generator, dtype=torch.float64)
    level = torch.rand((count, *(1,) * len(shape)), generator=generator, dtype=torch.float64)
    mix = torch.linspace(0, 1, count, dtype=torch.float64).view(level.shape)
    return (mix * noise + (1 - mix) * level).to(like)


def run_quietly(model: nn.Module, params: Tensors, inputs: Tensor, buffers: Tensors | None = None) -> Tensor:
    """Run the model; batch statistics go into copies of its buffers, random masks leave the global generator alone.

    Raises:
        NotApplicable: the model cannot be run on such inputs.
    """
    own = {k: b.clone() for k, b in model.named_buffers()}
    devices = [inputs.device] if inputs.device.type == "cuda" and torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
        try:
            return functional_call(model, {**params, **own, **(buffers or {})}, (inputs,))
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise NotApplicable(
                f"The model does not run on {len(inputs)} probing inputs of shape {tuple(inputs.shape[1:])} "
                f"({reason(error)}); describe what it takes, or use an attack that does not look into the model."
            ) from error


_SIDED = frozenset({"relu", "leaky_relu", "prelu", "rrelu", "abs", "hardtanh", "hardswish", "hardsigmoid", "relu6"})
"""Functions with a kink at zero, or at another value that inputs of both signs surround in practice."""


@final
class _Kinks(TorchFunctionMode):
    """Notices functions with kinks that have values on both sides."""

    met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", "")).strip("_")
        if "max_pool" in name:
            self.met = True
        elif name in _SIDED and args and isinstance(args[0], Tensor):
            self.met = self.met or bool((args[0] > 0).any() and (args[0] < 0).any())
        return func(*args, **(kwargs or {}))


def meets_kinks(model: nn.Module, params: Tensors, inputs: Tensor) -> bool:
    """Tell whether ``inputs`` surround a kink (ReLU, max-pooling) inside the model; False says nothing.

    Raises:
        NotApplicable: the model cannot be run on such inputs.
    """
    with torch.no_grad(), _Kinks() as kinks:
        run_quietly(model, params, inputs)
    return kinks.met


def linear_inputs(model: nn.Module, params: Tensors, inputs: Tensor) -> dict[str, list[Tensor]]:
    """Return what every linear layer sees of ``inputs``, by the layer's name, one tensor for each time it runs."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value.detach())

    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            run_quietly(model, params, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Reached(BaseException):
    """Ends a forward pass; not an ``Exception``, which a model might catch."""


def entering(
    model: nn.Module,
    params: Tensors,
    inputs: Tensor,
    modules: Mapping[str, nn.Module],
    accept: Callable[[nn.Module, Tensor], bool],
    buffers: Tensors | None = None,
) -> tuple[str, Tensor] | None:
    """Run the model up to the first of ``modules`` whose input is accepted; return its name and that input.

    None if there is none. What comes behind is not run, so this is quick where it comes early.
    """
    found: list[tuple[str, Tensor]] = []

    def look(name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and accept(module, args[0]):
            found.append((name, args[0].detach()))
            raise _Reached

    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: look(name, m, args)) for name, m in modules.items()
    ]
    try:
        with torch.no_grad():
            if handles:
                run_quietly(model, params, inputs, buffers)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
