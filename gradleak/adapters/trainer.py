"""Hugging Face ``Trainer``, with PEFT or without: the gradient of every step (extra ``text``, and accelerate)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradleak.adapters.pytorch import snapshot
from gradleak.adapters.recorder import Recorder
from gradleak.errors import InvalidInput
from gradleak.training import FedSGD
from gradleak.types import Update

try:
    import transformers
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise InvalidInput(
        "The adapter for Trainer needs the extra 'text' and accelerate: pip install 'gradleak[text]' accelerate."
    ) from error

__all__ = ["CaptureCallback"]


class CaptureCallback(TrainerCallback):
    """A callback that records the gradient of each optimizer step, as it is after clipping, of the trained parameters.

    With PEFT these are the adapter's. ``Trainer(…, callbacks=[CaptureCallback(recorder)])``; ``max_grad_norm`` of the
    arguments is put before the recorder's ``defense``. Steps are the capture's rounds. Half precision and several
    devices are recorded as what gradleak does not simulate.
    """

    def __init__(self, recorder: Recorder, *, client: str | None = None, every: int = 1) -> None:
        """Prepare: ``every`` says that each so manieth step is recorded, ``client`` is the client's name."""
        self.recorder, self.client, self.every = recorder, client, every
        self._examples = 0
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count examples."""

        def count(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next((v for v in (*inputs, *named.values()) if isinstance(v, Tensor) and v.ndim > 0), None)
            if first is not None and torch.is_grad_enabled():
                self._examples += len(first)

        self._examples = 0
        self._handle = kwargs["model"].register_forward_pre_hook(count, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the gradient that the optimizer is about to use.

        Raises:
            UpdateBlocked: see :meth:`Recorder.record`.
        """
        model: nn.Module = kwargs["model"]
        examples, self._examples = self._examples, 0
        if state.global_step % self.every:
            return
        clipped = (f"clip:norm={float(args.max_grad_norm)!r}",) if args.max_grad_norm else ()
        recorder = replace(self.recorder, defense=(*clipped, *self.recorder.defense))
        more = {k: True for k in ("fp16", "bf16") if getattr(args, k, False)}
        more |= {"devices": args.n_gpu} if args.n_gpu > 1 else {}
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        update = {k: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for k, p in trained.items()}
        recorder.record(
            snapshot(model), Update(update), framework=f"transformers {transformers.__version__}",
            round=state.global_step, client=self.client, examples=examples or None,
            training=FedSGD(self.recorder.training.loss), more=more,
        )  # fmt: skip

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
