"""What every forward map is, and the gradient all of them are made of."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedParameter

from gradleak.errors import GradleakError, InvalidInput, InvalidModel, reason
from gradleak.training.losses import CrossEntropy, Loss
from gradleak.types import Batch, Update, UpdateKind

__all__ = [
    "LocalTraining",
    "Tensors",
    "batch_statistics",
    "check_repeatable",
    "check_reproducible",
    "gradient",
    "output_tensors",
    "parameters",
    "tracks_statistics",
]

Tensors = Mapping[str, Tensor]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters of ``model`` by name, detached; tied parameters appear once.

    Raises:
        InvalidModel: a lazy layer has no parameters yet, or the model is wrapped or compiled.
    """
    for path, module in model.named_modules():
        inner = _wrapped(module)
        if inner is not None:
            raise InvalidModel(
                f"{path or 'The model'} is wrapped as {type(module).__name__}, through which no second derivatives "
                f"pass; give {inner}."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise InvalidModel(
                f"Parameter {name!r} belongs to a lazy layer and has no values yet; run the model once on an input."
            )
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def _wrapped(module: nn.Module) -> str | None:
    """Return what to give in place of a compiled, scripted or replicated ``module``; None if it is plain Python."""
    if isinstance(module, torch.jit.ScriptModule):
        return "the Python module that was scripted or traced"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "the model inside, its attribute module"
    if "_orig_mod" in module._modules:  # torch.compile's class, whose import takes a second
        return "the model that was compiled, its attribute _orig_mod"
    return None


def check_reproducible(model: nn.Module, *, masks: bool = True) -> None:
    """Check that the model computes the same function for the attacker as for the client; ``masks`` of dropout count.

    Raises:
        InvalidModel: a dropout layer is active, or BatchNorm uses (and changes) batch statistics.
    """
    for name, module in model.named_modules():
        if masks and isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise InvalidModel(
                f"Module {name!r} is active dropout, whose random mask the attacker cannot reproduce; "
                "put the model into evaluation mode with model.eval() (command line: --mode eval)."
            )
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            raise InvalidModel(
                f"Module {name!r} is BatchNorm in training mode, whose running statistics an attack would change; if "
                "the client trained in that mode, attack gradleak.training.batch_statistics(model), which computes "
                "the same (command line: --mode batch); else put it into evaluation mode with model.eval() (command "
                "line: --mode eval)."
            )


def check_repeatable(model: nn.Module, inputs: Tensor) -> None:
    """Check, by running it twice on ``inputs`` (N, *shape), that the model gives the same outputs every time.

    Raises:
        InvalidModel: it draws random numbers, cannot be run on such inputs, or returns no tensors.
    """
    before = {k: b.clone() for k, b in model.named_buffers()}
    devices = [inputs.device] if inputs.device.type == "cuda" and torch.cuda.is_available() else []
    runs: list[list[Tensor]] = []
    for seed in (0, 1):
        own = {k: b.clone() for k, b in before.items()}
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                torch.default_generator.manual_seed(seed)
                outputs = functional_call(model, own, (inputs,))
        except GradleakError:
            raise
        except Exception as error:
            raise InvalidModel(_misfit(model, inputs, error)) from error
        runs.append(output_tensors(outputs))
    if not runs[0]:
        raise InvalidModel(
            f"The model returns a {type(outputs).__name__} without tensors; wrap it so that it returns its logits."
        )
    if not all(torch.equal(a, b) or bool((a.isnan() & b.isnan()).any()) for a, b in zip(*runs, strict=True)):
        raise InvalidModel(
            "The model's outputs differ from run to run, as with active dropout in its forward (F.dropout(x, "
            "training=self.training)), whose random mask the attacker cannot reproduce; put the model into evaluation "
            "mode with model.eval() (command line: --mode eval)."
        )


def output_tensors(outputs: object) -> list[Tensor]:
    """Return the tensors of a model's outputs: one, or those of a tuple, list or mapping, however nested."""
    if isinstance(outputs, Tensor):
        return [outputs]
    items = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (list, tuple)) else ()
    return [tensor for item in items for tensor in output_tensors(item)]


def batch_statistics(model: nn.Module) -> nn.Module:
    """Return a copy in training mode whose BatchNorm uses its batch's statistics and stores none.

    It computes what the model in training mode computes, and can be attacked.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def tracks_statistics(model: nn.Module) -> bool:
    """Tell whether a forward pass of ``model`` changes running statistics."""
    return any(m.training and isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())


def gradient(
    model: nn.Module, loss: Loss, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ∂loss/∂params by name, and the buffers after the forward pass; nothing is changed in place.

    Arguments are those of :meth:`LocalTraining.run`, and a ``loss``: (outputs, labels) → scalar.
    """
    tracks = tracks_statistics(model)
    before = dict(model.named_buffers()) if buffers is None and tracks else dict(buffers or {})

    def objective(p: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        # Running statistics change in place: torch.func allows that only to tensors born inside the function.
        after = {k: b.clone() for k, b in before.items()} if tracks else before
        # Fused attention has no double backward: only the math kernel can be inverted.
        with sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(model, {**p, **after}, (inputs,))
        return loss(outputs, labels), after

    if torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled():
        gradients, after = grad(objective, has_aux=True)(dict(params))
        return dict(gradients), dict(after)
    # Outside torch.func, plain autograd gives the same numbers with less overhead.
    others = (p for k, p in model.named_parameters() if k not in params)
    sources = (inputs, labels, *params.values(), *before.values(), *others)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    with torch.enable_grad():
        leaves = {k: p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        value, after = objective(leaves)
        if not value.requires_grad:
            raise InvalidModel(
                "The loss does not depend on any trainable parameter (as after argmax, rounding or detach()), so there "
                "is no gradient to share; pass the loss and the outputs that the client trains with."
            )
        found = torch.autograd.grad(
            value, list(leaves.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
    return dict(zip(params, found, strict=True)), dict(after)


@contextmanager
def _explained(model: nn.Module, batch: Batch, loss: Loss) -> Iterator[None]:
    """Turn PyTorch's errors about a batch that does not fit its model into one sentence with the remedy."""
    passed = False

    def look(module: nn.Module, arguments: tuple[Tensor, ...], outputs: object) -> None:
        nonlocal passed
        # In a hook: a pass of its own would cost time and draw dropout masks, and on a GPU a label out of range must
        # not reach the loss. Labels are those of all steps, so once is enough.
        if not passed and isinstance(loss, CrossEntropy):
            _check_outputs(outputs, len(arguments[0]), batch.labels)
        passed = True

    hook = model.register_forward_hook(look)
    try:
        yield
    except (GradleakError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if passed:
            raise
        raise InvalidInput(_misfit(model, batch.inputs, error)) from error
    finally:
        hook.remove()


def _misfit(model: nn.Module, inputs: Tensor, error: Exception) -> str:
    like = next(model.parameters(), inputs)
    shape, given, own = tuple(inputs.shape), str(inputs.dtype).split(".")[-1], str(like.dtype).split(".")[-1]
    if inputs.device != like.device:
        return f"The inputs are on {inputs.device}, the model is on {like.device}; pass batch.to({str(like.device)!r})."
    if inputs.dtype == torch.uint8:
        return f"The model does not take bytes ({reason(error)}); pass inputs.to(torch.{own}) / 255."
    if inputs.is_floating_point() and inputs.dtype != like.dtype:
        return f"The inputs are {given}, the model is {own}; pass batch.to(torch.{own})."
    return (
        f"The model does not take {given} inputs of shape {shape} ({reason(error)}); pass inputs of the type and shape "
        "that it was made for, examples along the first axis."
    )


def _check_outputs(outputs: object, examples: int, labels: Tensor) -> None:
    """Check that ``CrossEntropy`` can compare ``outputs`` with ``labels``."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or len(outputs) != examples:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise InvalidModel(
            f"The model returns {found} for {examples} examples, where logits (examples, classes) are needed; wrap it "
            "so that it returns them, such as the .logits of a Hugging Face model."
        )
    if outputs.ndim > 2:  # one label for each of many places: whatever the loss allows
        return
    classes = outputs.shape[1]
    if classes == 1:
        raise InvalidModel(
            "The model returns one logit, over which cross-entropy is constant; give the training the client's own "
            "loss, such as FedSGD(loss=...)."
        )
    if labels.device != outputs.device:
        raise InvalidInput(f"The labels are on {labels.device}, the outputs on {outputs.device}; move the whole batch.")
    if labels.is_floating_point():
        if tuple(labels.shape[1:]) != (classes,):
            raise InvalidInput(
                f"Float labels are probabilities of shape (N, {classes}), not {tuple(labels.shape)}; "
                "pass those, or class indices as labels.long()."
            )
        return
    if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.uint8):
        raise InvalidInput(
            f"Class indices are int64 of shape (N,), not {str(labels.dtype).split('.')[-1]} of shape "
            f"{tuple(labels.shape)}; pass labels.flatten().long(), or float probabilities."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InvalidInput(
            f"The labels name class {low if low < 0 else high}, but the model's classes run from 0 to {classes - 1}; "
            "correct the labels, or the model's number of classes."
        )


class LocalTraining(ABC):
    """What a client does with its batch between receiving a model and sending an update.

    ``run`` is the map itself: pure, differentiable with respect to inputs and soft labels, and traceable by
    ``torch.func``; ``tensors`` is its first half. Calling the object runs it on a :class:`~gradleak.types.Batch` and
    returns an ``Update``.
    """

    loss: Loss
    kind: UpdateKind
    """What the returned numbers mean."""

    @abstractmethod
    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the update's tensors by name, and the buffers after training.

        Args:
            model: supplies the computation and every parameter and buffer not overridden.
            params: the trainable parameters, by name; each may carry vmapped or traced values.
            inputs: (N, *shape).
            labels: (N,) class indices or (N, C) probabilities.
            buffers: buffer values to use instead of the model's own.
        """

    def tensors(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, *, buffers: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return the update's tensors by name; pure and differentiable in ``inputs`` and floating ``labels``."""
        return self.run(model, params, inputs, labels, buffers)[0]

    def __call__(self, model: nn.Module, batch: Batch, *, params: Tensors | None = None) -> Update:
        """Run local training on ``batch`` and return the update, detached; ``model`` is left untouched.

        Raises:
            InvalidInput: the model does not take such inputs, or the loss is ``CrossEntropy`` and the labels are
                neither class indices nor probabilities.
            InvalidModel: the loss is ``CrossEntropy`` and the model does not return logits.
        """
        params = parameters(model) if params is None else params
        with _explained(model, batch, self.loss):
            tensors, buffers = self.run(model, params, batch.inputs, batch.labels, dict(model.named_buffers()))
        shared = {k: b.detach().clone() for k, b in buffers.items()} if tracks_statistics(model) else None
        return Update({k: v.detach() for k, v in tensors.items()}, self.kind, shared)

    @property
    def undefended(self) -> LocalTraining:
        """The same training without its defenses: what an attacker believes who does not know of them."""
        return self

    @property
    def simulated(self) -> LocalTraining:
        """What an attacker simulates who knows the defenses: those of the finished update are left to ``residual``."""
        return self.undefended

    def known(self, *, order: bool = False) -> LocalTraining:
        """Return the map as known to somebody who has none of the client's private seeds.

        ``order`` says whether the order in which examples enter the local steps is known.
        """
        return self

    def reseed(self, seed: int) -> LocalTraining:
        """Return the map with private randomness (noise, shuffling) drawn from ``seed``; itself where there is none."""
        return self

    def distort(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return what this map's defenses make of an undefended update, with the noise at its mean; differentiable."""
        return dict(tensors)

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return what an attacker who knows this map drives to zero, by name.

        ``simulated`` is what ``self.undefended.tensors(...)`` gives for a candidate batch, ``observed`` what the client
        sent.
        """
        return {k: simulated[k] - observed[k] for k in observed}

    def centered(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``residual`` with the center of each spread that ``deviation`` tells in place of its nearest number.

        Weighted by the spreads, its squares are what linear estimation lowers.
        """
        return self.residual(simulated, observed)

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the standard deviation per coordinate that the defenses leave between update and ``observed``."""
        return {k: torch.zeros_like(o) for k, o in observed.items()}
