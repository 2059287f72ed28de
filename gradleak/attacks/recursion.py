"""The exact attack on one example: solve the network backward, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.analytic.graph import trace_chain
from gradleak.analytic.recursion import invert_layers
from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.errors import NotApplicable
from gradleak.threat import Knowledge, Observation
from gradleak.training import SGD, FedAvg
from gradleak.types import Reconstruction

__all__ = ["Recursion", "check", "plain_gradient", "recursion"]


@final
@dataclass(frozen=True)
class Recursion(Attack):
    """Inverts the update of one example layer by layer; made by :func:`recursion`.

    Attributes:
        polish: whether to finish with Gauss–Newton steps on the whole map.
        quick: whether to try the iterative way first.

    """

    polish: bool = True
    quick: bool = True

    requires = Knowledge.BATCH_SIZE

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        results: list[Reconstruction] = []
        for number, observation in enumerate(observations):
            results.append(self._one(observation, seed))
            if callback is not None:
                callback(Progress(number + 1, len(observations), results[-1].objective, results[-1].status))
        return results

    def _one(self, observation: Observation, seed: int) -> Reconstruction:
        begin = time.perf_counter()
        check(observation)
        shape = tuple(observation.space.shape)
        chain = trace_chain(observation.model, shape)
        params = {k: p.detach() for k, p in observation.model.named_parameters()}
        tensors = observation.update.tensors
        result = invert_layers(
            observation.model,
            params,
            plain_gradient(observation),
            shape,
            chain=chain,
            polish=self.polish,
            quick=self.quick,
            seed=seed,
        )
        if result.input is None:
            start = "" if result.start is None else ", which can start from there"
            raise NotApplicable(f"The recursion stops: {result.stopped_at}; use matching{start}.")
        dtype = torch.promote_types(next(iter(tensors.values())).dtype, torch.float32)
        notes = [str(report) for report in result.layers]
        notes.append(
            f"The re-simulated gradient agrees to {result.residual:.1e}; "
            f"the update itself deviates from an outer product by {result.noise:.1e}."
        )
        rounding = torch.finfo(next(iter(tensors.values())).dtype).eps
        exact = result.noise <= 16 * rounding and result.residual <= _FLOOR * rounding
        if not exact:
            notes.append(
                "That is above rounding, so the update is not the plain gradient of one example on this model."
            )
        return Reconstruction(
            observation.space.decode(result.input[None].to(dtype)),
            None if result.label is None else torch.tensor([result.label]),
            result.residual**2,
            status="exact" if exact else "stalled",
            iterations=result.steps,
            seconds=time.perf_counter() - begin,
            notes=tuple(notes),
            features=result.features[None] if chain.head else None,
        )


_FLOOR = 100.0
"""Rounding accumulates over the layers: measured, residuals are one to five times the rounding unit."""


def check(observation: Observation) -> None:
    """Check that the update is a multiple of one example's gradient.

    Raises:
        NotApplicable: several examples, several local steps, or an adaptive optimizer.

    """
    if observation.batch_size != 1:
        raise NotApplicable(
            f"The recursion inverts the update of one example, but this one has {observation.batch_size}; "
            "use matching, or disaggregate the batch first."
        )
    training = observation.training
    if isinstance(training, FedAvg) and (training.count(1) > 1 or not isinstance(training.rule, SGD)):
        raise NotApplicable(
            "The recursion inverts one gradient, but the client took several steps or used an adaptive optimizer, so "
            "its update is no multiple of one; use matching, which unrolls the training."
        )


def plain_gradient(observation: Observation) -> Mapping[str, Tensor]:
    """Return a multiple of the gradient: weight decay, where it is known, is taken out of a weight delta."""
    tensors, training = observation.update.tensors, observation.training
    if not isinstance(training, FedAvg) or not isinstance(training.rule, SGD) or not training.rule.weight_decay:
        return tensors
    rule = training.rule
    factor = rule.lr * (1 + rule.momentum * rule.nesterov)
    params = observation.params
    return {k: -d.double() / factor - rule.weight_decay * params[k].double() for k, d in tensors.items()}


def recursion(*, polish: bool = True, quick: bool = True) -> Recursion:
    """Solve the network backward, layer by layer: exact where every layer is determined, and said so where not.

    Sources: Zhu & Blaschko, *R-GAP*, ICLR 2021, Section 3; *R-CONV*, arXiv 2406.04227. Deviations: see
    :mod:`gradleak.analytic.recursion`. Neither label nor loss nor step size is needed: the system does not change when
    the update is scaled, so a weight delta of one plain step will do.

    Args:
        polish: finish with Gauss–Newton steps on the whole map, which brings float32 updates to their noise floor.
        quick: take iterative solves where their estimated error is small enough, an order of magnitude above that
            floor in a fraction of the time and memory; otherwise, and with False, factorize.

    """
    return Recursion(polish=polish, quick=quick)
