"""Training a model out of updates, so that a defense's price in accuracy can be measured."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput, InvalidUpdate
from gradleak.training import Adam, FedSGD, LocalTraining, Optimizer, parameters
from gradleak.types import Batch, UpdateKind

__all__ = ["accuracy", "fit"]


def fit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    training: LocalTraining | None = None,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    callback: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Return a trained copy of ``model``: every minibatch is a client whose (defended) update the server applies.

    Every client draws its private randomness anew. The server feeds gradients, or negated weight deltas, to its
    optimizer; with deltas ``SGD(lr=1.0)`` is plain federated averaging of one client a round. The model keeps its mode.

    Args:
        model: the starting point, left untouched.
        inputs: (M, *shape) model inputs.
        labels: (M,) class indices or (M, C) probabilities.
        training: what each client does; one gradient by default.
        epochs: passes over the data.
        batch_size: examples per client; the last client of an epoch may have fewer.
        optimizer: the server's; Adam with step size 1e-3 by default.
        seed: of the order of the examples and of the clients' seeds.
        callback: called with the number of finished epochs (from 0, before the first) and a model of its own.

    Raises:
        InvalidUpdate: the parameters are no longer finite.
        InvalidInput: a count below 1, or unequal numbers of inputs and labels.
    """
    if epochs < 1 or batch_size < 1:
        raise InvalidInput(f"fit cannot train {epochs} epochs of batches of {batch_size}; give numbers of at least 1.")
    data = Batch(inputs, labels)
    training, optimizer = training or FedSGD(), optimizer or Adam()
    sign = 1.0 if training.kind is UpdateKind.GRADIENT else -1.0
    generator = torch.Generator().manual_seed(seed)
    work = copy.deepcopy(model)
    params = {k: p.clone() for k, p in parameters(work).items()}
    buffers = {k: b.clone() for k, b in work.named_buffers()}
    state, step = optimizer.start(params), 0
    if callback is not None:
        callback(0, _with(model, params, buffers))
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data), generator=generator).to(inputs.device)
        for chosen in order.split(batch_size):
            client = training.reseed(int(torch.randint(2**31, (), generator=generator)))
            update, buffers = client.run(work, params, data.inputs[chosen], data.labels[chosen], buffers)
            change, state = optimizer.step(step, params, {k: sign * v.detach() for k, v in update.items()}, state)
            params = {k: p + change[k] for k, p in params.items()}
            step += 1
        if not all(bool(torch.isfinite(p).all()) for p in params.values()):
            raise InvalidUpdate(
                f"Parameters became infinite or NaN in epoch {epoch}; take a smaller step size, or a weaker defense."
            )
        if callback is not None:
            callback(epoch, _with(model, params, buffers))
    return _with(model, params, buffers)


def _with(model: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> nn.Module:
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in result.named_parameters():
            if name in params:
                p.copy_(params[name])
        for name, b in result.named_buffers():
            b.copy_(buffers[name])
    return result


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """Return the share of examples, in [0, 1], whose largest output is their label; in evaluation mode.

    ``inputs`` are (M, *shape), ``labels`` (M,) class indices; ``batch_size`` examples share a forward pass.
    """
    data, work = Batch(inputs, labels), copy.deepcopy(model).eval()
    with torch.no_grad():
        right = [
            (work(x).argmax(-1) == y).sum()
            for x, y in zip(data.inputs.split(batch_size), data.labels.split(batch_size), strict=True)
        ]
    return int(torch.stack(right).sum()) / len(data)
