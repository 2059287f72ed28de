"""The client as an attacker simulates it: the one place for number types, buffers, frozen parameters and step sizes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.errors import InvalidModel, NotApplicable, reason
from gradleak.training.aggregated import Aggregated
from gradleak.training.base import LocalTraining, Tensors, check_repeatable, check_reproducible, parameters
from gradleak.training.fedavg import FedAvg
from gradleak.training.fedsgd import FedSGD
from gradleak.training.optimizers import SGD
from gradleak.types import Update, UpdateKind

__all__ = ["Gradient", "Simulator"]


@dataclass(frozen=True, eq=False)
class Gradient:
    """An update as a gradient: step size, momentum and weight decay undone as far as they are known.

    ``single`` says whether it is a multiple of one gradient at the weights that were sent out, ``scaled`` whether it
    has the scale of the client's (mean) gradient, ``reason`` why not; empty where it is both.
    """

    tensors: Tensors
    single: bool
    scaled: bool
    reason: str = ""

    def require_single(self) -> Tensors:
        """Return the tensors.

        Raises:
            NotApplicable: the update is no multiple of one gradient.
        """
        if not self.single:
            raise NotApplicable(self.reason)
        return self.tensors


class Simulator:
    """Computes what a client would send, in any number type, for candidate inputs and labels.

    The model is not changed. A training that is not ``known`` is taken to be one gradient of the cross-entropy.
    """

    def __init__(self, model: nn.Module, training: LocalTraining | None = None) -> None:
        self.model = model
        self.known = training is not None
        self.training: LocalTraining = FedSGD() if training is None else training
        self.undefended = self.training.simulated
        """What is simulated: the training without known defenses of the finished update."""
        self._params: dict[torch.dtype | None, Tensors] = {None: parameters(model)}
        frozen = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
        # Copies: some models write into their buffers.
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        self._buffers: dict[torch.dtype | None, Tensors] = {None: frozen | buffers}

    @property
    def defended(self) -> bool:
        """Whether a defense is known."""
        return self.training.undefended is not self.training

    @property
    def dtype(self) -> torch.dtype:
        """The model's own number type."""
        return next(iter(self._params[None].values())).dtype

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(iter(self._params[None].values())).device

    def params(self, dtype: torch.dtype | None = None) -> Tensors:
        """Return the trainable parameters by name, as ``dtype``; their own type if None."""
        if dtype not in self._params:
            self._params[dtype] = cast(self._params[None], dtype)
        return self._params[dtype]

    def buffers(self, dtype: torch.dtype | None = None) -> Tensors:
        """Return buffers and frozen parameters by name, floats as ``dtype``."""
        if dtype not in self._buffers:
            self._buffers[dtype] = cast(self._buffers[None], dtype)
        return self._buffers[dtype]

    def check(self, inputs: Tensor) -> None:
        """Check that the client can be simulated at model inputs (N, *shape): nothing is random, nothing is stored.

        Raises:
            InvalidModel: active dropout, running statistics, or a model that cannot be run on such inputs.
        """
        check_reproducible(self.model)
        check_repeatable(self.model, cast_one(inputs, self.dtype).to(self.device))

    def outputs(self, inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the model's outputs at model inputs (N, *shape), computed in ``dtype``.

        Raises:
            NotApplicable: the model computes in its own number type only.
        """
        values = {**self.params(dtype), **self.buffers(dtype)}
        try:
            with sdpa_kernel(SDPBackend.MATH), _asserting():
                return functional_call(self.model, values, (cast_one(inputs, dtype or self.dtype).to(self.device),))
        except RuntimeError as error:
            if dtype in (None, self.dtype) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotApplicable(
                f"The model does not compute in {str(dtype).removeprefix('torch.')} ({reason(error)}); use "
                "x.to(weight.dtype) instead of casts to one number type in its forward, or an attack that "
                "searches (dlg, idlg)."
            ) from error

    def update(self, inputs: Tensor, labels: Tensor, dtype: torch.dtype | None = torch.float64) -> dict[str, Tensor]:
        """Return the undefended update by name, computed in ``dtype`` (the model's own if None).

        It is traceable by torch.func and differentiable in model inputs (N, *shape) and in labels, which are as the
        client's loss takes them.
        """
        with _asserting():
            return self.undefended.tensors(
                self.model,
                self.params(dtype),
                cast_one(inputs, dtype or self.dtype).to(self.device),
                cast_one(labels, dtype or self.dtype).to(self.device),
                buffers=self.buffers(dtype),
            )

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return what a candidate leaves unexplained, by name, heeding known defenses."""
        return self.training.residual(simulated, observed)

    def relative(self, inputs: Tensor, labels: Tensor, observed: Tensors) -> float:
        """Return the relative distance of the update simulated in float64 to the seen one; infinite if that is zero."""
        seen = cast(observed, torch.float64)
        with torch.no_grad():
            ours = self.update(inputs, labels)
        left = self.residual({k: ours[k] for k in seen}, seen)
        total = sum(float(t.square().sum()) for t in seen.values())
        return math.sqrt(sum(float(t.square().sum()) for t in left.values()) / total) if total > 0 else math.inf

    def as_gradient(self, update: Update, batch_size: int | None, names: Collection[str] | None = None) -> Gradient:
        """Return ``update``, or its tensors of these ``names``, as a gradient, in its own number format.

        ``batch_size`` decides the number of local steps.
        """
        tensors = {k: t for k, t in update.tensors.items() if names is None or k in names}
        training = self.undefended
        if isinstance(training, Aggregated):
            batch_size = batch_size and batch_size // training.clients
            training = training.inner.simulated
        clipped = getattr(training, "private", None) is not None
        why = "Every example was clipped by itself, so the update is a gradient up to factors"
        if update.kind is UpdateKind.GRADIENT:
            return Gradient(tensors, single=True, scaled=not clipped, reason=f"{why}; use matching." if clipped else "")
        if not self.known or not isinstance(training, FedAvg):
            unknown = "The step size of the weight delta is not known, so it is a gradient up to a factor"
            return Gradient(tensors, single=True, scaled=False, reason=f"{unknown}; state the client's training.")
        rule, steps = training.rule, training.count(batch_size or 1)
        if not isinstance(rule, SGD):
            return Gradient(
                tensors,
                single=False,
                scaled=False,
                reason="The client's optimizer is adaptive and rescales every entry, so its update is no multiple of "
                "a gradient; use matching, which simulates it.",
            )
        params = self.params()
        factor = -rule.lr * (1 + rule.momentum * rule.nesterov if steps == 1 else steps)
        # In the update's own number format, which tells how large its rounding is.
        found = {k: t / factor - rule.weight_decay * params[k].to(t) for k, t in tensors.items()}
        if steps == 1:
            reason = f"{why}; use matching." if clipped else ""
            return Gradient(found, single=True, scaled=not clipped, reason=reason)
        why = f"The client took {steps} local steps, so its update is no single gradient"
        return Gradient(found, False, True, f"{why}; use matching, which unrolls the training.")


@contextmanager
def _asserting() -> Iterator[None]:
    """Say in one sentence where the model asserts what a candidate does not keep."""
    try:
        yield
    except AssertionError as error:
        told = f" ({error})" if str(error) else ""
        raise InvalidModel(
            f"The model asserts something of its inputs that a candidate does not keep{told}; take the assertion out "
            "of its forward, which changes no gradient."
        ) from error


def cast(tensors: Tensors, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return ``tensors`` with floats as ``dtype``; integers stay."""
    return {k: cast_one(t, dtype) for k, t in tensors.items()}


def cast_one(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a floating-point tensor as ``dtype``, any other as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
