"""Plain PyTorch: a block of training code is watched from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.adapters.recorder import Recorder
from gradleak.errors import InvalidInput
from gradleak.inspection import Inspection
from gradleak.training import SGD, Adam, FedAvg, FedSGD, LocalTraining, Optimizer, parameters
from gradleak.types import Update, UpdateKind

__all__ = ["Watched", "optimizer_of", "snapshot", "watch"]


@dataclass
class Watched:
    """What was seen of a block of training code, once it has ended.

    Attributes:
        steps: of the optimizer.
        examples: that entered the first forward pass in training.
        update: that was recorded.
        found: by the inspection, if the policy asked for one.
    """

    steps: int = 0
    examples: int | None = None
    update: Update | None = None
    found: Inspection | None = None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict, which training does not change."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def optimizer_of(optimizer: torch.optim.Optimizer) -> Optimizer | None:
    """Return an optimizer of torch's as gradleak simulates it; None if it is another one, or has several groups."""
    groups = optimizer.param_groups
    if len(groups) != 1 or groups[0].get("maximize") or groups[0].get("amsgrad") or groups[0].get("dampening"):
        return None
    group: Mapping[str, Any] = groups[0]
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if type(optimizer) is torch.optim.SGD:
        return SGD(lr, float(group["momentum"]), decay, bool(group["nesterov"]))
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = type(optimizer) is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
        return Adam(lr, tuple(map(float, group["betas"])), float(group["eps"]), decay, decoupled)  # type: ignore[arg-type]
    return None


@contextmanager
def watch(
    model: nn.Module,
    recorder: Recorder,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    round: int | None = None,
    client: str | None = None,
    examples: int | None = None,
) -> Iterator[Watched]:
    """Record what the training inside the block would share.

    After steps of ``optimizer`` that is the weights' difference, after minus before; without a step it is the gradient
    that ``loss.backward()`` left. Model, optimizer and random numbers stay as they are, and the update is the one that
    would have been without the block.

    Args:
        model: that is trained.
        recorder: writes the update; its ``training`` gives the loss, or the whole of local training.
        optimizer: the client's; its rule and the number of its steps are recorded, if gradleak knows it.
        round: number of the round.
        client: name of the client.
        examples: number of the client's examples; those of one forward pass where there is at most one step.

    Raises:
        InvalidInput: nothing was trained in the block.
        UpdateBlocked: see :meth:`Recorder.record`.
    """
    seen, before, rates = Watched(), snapshot(model), set[float]()
    resumed = optimizer is not None and bool(optimizer.state)

    def count(_module: nn.Module, inputs: tuple[object, ...]) -> None:
        if seen.examples is None and torch.is_grad_enabled() and inputs and isinstance(inputs[0], Tensor):
            seen.examples = len(inputs[0])

    def step(rule: torch.optim.Optimizer, *_: object) -> None:
        seen.steps += 1
        rates.update(float(group["lr"]) for group in rule.param_groups)

    handles = [model.register_forward_pre_hook(count)]
    if optimizer is not None:
        handles.append(optimizer.register_step_post_hook(step))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    names = list(parameters(model))
    now = dict(model.named_parameters())
    training = recorder.training
    if seen.steps or any(not torch.equal(now[k], before[k]) for k in names):
        seen.update = Update({k: now[k].detach() - before[k] for k in names}, UpdateKind.WEIGHT_DELTA)
        training = _stated(training, optimizer, seen)
        examples = examples if examples is not None or seen.steps != 1 else seen.examples
    else:
        gradients = {k: now[k].grad for k in names}
        if not any(g is not None for g in gradients.values()):
            raise InvalidInput("Nothing was trained inside the block; put loss.backward() into it.")
        seen.update = Update({k: torch.zeros_like(now[k]) if g is None else g.clone() for k, g in gradients.items()})
        training = FedSGD(training.loss)
        examples = seen.examples if examples is None else examples
    more: dict[str, object] = {"learning_rates": sorted(rates)} if len(rates) > 1 else {}
    if resumed and seen.steps and not (isinstance(training, FedAvg) and training.rule == SGD(training.rule.lr)):
        more["optimizer_state"] = "kept from before"
    seen.found = recorder.record(
        before, seen.update, framework=f"PyTorch {torch.__version__}", round=round, client=client, examples=examples,
        training=training, more=more,
    )  # fmt: skip


def _stated(training: LocalTraining, optimizer: torch.optim.Optimizer | None, seen: Watched) -> LocalTraining:
    """Return the local training: as stated, or as it was seen."""
    rule = None if optimizer is None else optimizer_of(optimizer)
    if isinstance(training, FedAvg):
        return training
    if rule is None:
        raise InvalidInput(
            "The weights changed, but not by an optimizer that gradleak knows; hand over optimizer=…, or state the "
            "training with Recorder(training=FedAvg(…))."
        )
    plain = FedAvg(optimizer=rule, steps=max(seen.steps, 1), batch_size=seen.examples, loss=training.loss)
    return replace(plain, lr=rule.lr, optimizer=None) if rule == SGD(rule.lr) else plain
