"""Opacus: every step of a private optimizer is recorded, after clipping and noise (extra ``dp``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from gradleak.adapters.pytorch import snapshot
from gradleak.adapters.recorder import Recorder
from gradleak.errors import InvalidInput
from gradleak.training import FedSGD
from gradleak.types import Update

try:
    import opacus
    from opacus.optimizers import DPOptimizer
except ImportError as error:
    raise InvalidInput("The adapter for Opacus needs the extra 'dp': pip install 'gradleak[dp]'.") from error

__all__ = ["watch_steps"]


@contextmanager
def watch_steps(
    model: nn.Module, optimizer: DPOptimizer, recorder: Recorder, *, client: str | None = None, first: int = 0
) -> Iterator[None]:
    """Record the gradient of each step inside the block, as the optimizer uses it: clipped, noised, divided.

    Steps are the capture's rounds, counted from ``first``. The number of examples is that of the step's own batch,
    which a server may not know under Poisson sampling. The privacy engine's accountant goes on as before.

    Args:
        model: that the privacy engine returned.
        optimizer: that the privacy engine returned, with one norm for all parameters (flat clipping).
        recorder: writes the updates; what the optimizer does is put before its ``defense``.
        client: name of the client.
        first: number of the first step.

    Raises:
        InvalidInput: the optimizer clips in another way.
        UpdateBlocked: see :meth:`Recorder.record`.
    """
    if type(optimizer) is not DPOptimizer or optimizer.loss_reduction != "mean":
        raise InvalidInput(
            f"Steps of {type(optimizer).__name__} are not known, or not without the mean; use DPOptimizer with flat "
            "clipping and loss_reduction='mean'."
        )
    inner = getattr(model, "_module", model)
    names = {id(p): k for k, p in inner.named_parameters() if p.requires_grad}
    former, step = optimizer.step_hook, first
    private = (
        f"dp_sgd:noise_multiplier={float(optimizer.noise_multiplier)!r},"
        f"max_grad_norm={float(optimizer.max_grad_norm)!r},batch_size={int(optimizer.expected_batch_size)}"
    )
    recorder = replace(recorder, defense=(private, *recorder.defense))

    def record(optim: DPOptimizer) -> None:
        nonlocal step
        if former is not None:
            former(optim)
        update = Update({names[id(p)]: p.grad.detach().clone() for p in optim.params})
        recorder.record(
            snapshot(inner), update, framework=f"Opacus {opacus.__version__}", round=step, client=client,
            examples=len(optim.grad_samples[0]) or None, training=FedSGD(recorder.training.loss),
        )  # fmt: skip
        step += 1

    optimizer.attach_step_hook(record)
    try:
        yield
    finally:
        optimizer.step_hook = former
