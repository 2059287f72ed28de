"""``torch.distributed``: the gradient that one process hands to the others, before it is averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gradleak.adapters.pytorch import snapshot
from gradleak.adapters.recorder import Recorder
from gradleak.training import FedSGD
from gradleak.types import Update

__all__ = ["capture_hook"]


def capture_hook(
    model: nn.Module, recorder: Recorder, *, examples: int | None = None, every: int = 1
) -> Callable[[Any, Any], torch.futures.Future[Tensor]]:
    """Return a communication hook of ``DistributedDataParallel`` that records this process's own gradient.

    It is what leaves the process: of two, the other one has it when it subtracts its own from the sum; in a ring,
    neighbors see partial sums. ``wrapped.register_comm_hook(None, capture_hook(wrapped.module, recorder))``. Gradients
    are then averaged as without the hook. Without DDP, :func:`gradleak.adapters.pytorch.watch` around
    ``loss.backward()`` sees the same before ``all_reduce``. Where the recorder's policy blocks a step,
    ``UpdateBlocked`` is raised before the last bucket has left; to keep all of it, wrap the model with a
    ``bucket_cap_mb`` that holds it in one.

    Args:
        model: the module inside the wrapper.
        recorder: writes the updates; steps are the capture's rounds, ranks its clients.
        examples: number of examples of a step.
        every: record each so manieth step.
    """
    names = {id(p): k for k, p in model.named_parameters()}
    seen: dict[str, Tensor] = {}
    steps = 0

    # DDP compares annotations with classes of its own, so that there are none.
    def hook(group, bucket):  # type: ignore[no-untyped-def]
        nonlocal steps
        if steps % every == 0:
            pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
            seen.update((names[id(p)], g.detach().clone().view_as(p)) for p, g in pairs)
        if bucket.is_last():
            step, steps = steps, steps + 1
            if seen:
                update = Update(dict(seen))
                seen.clear()
                recorder.record(
                    snapshot(model), update, framework=f"torch.distributed {torch.__version__}", round=step,
                    client=f"rank-{dist.get_rank()}", examples=examples, training=FedSGD(recorder.training.loss),
                )  # fmt: skip
        return allreduce_hook(group, bucket)

    return hook
