"""The exact attack: solve the network backward, layer by layer, for one example or for a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress, is_signs, present
from gradleak.attacks.disaggregation import disaggregate
from gradleak.attacks.labeling import aligned, distance, hides_mixtures, read_labels
from gradleak.attacks.least_squares import Problem, search
from gradleak.attacks.peeling import Separated, separate_batch
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.exact.backward import Walked
from gradleak.exact.one_example import RecursionResult, invert_layers
from gradleak.structure.chain import Affine, Chain, Elementwise
from gradleak.structure.reader import trace_chain
from gradleak.threat import Knowledge, Observation
from gradleak.training import SGD, CrossEntropy, FedAvg
from gradleak.types import Reconstruction

__all__ = ["Recursion", "check", "hides", "invert_batch", "mixtures_fit", "plain_gradient", "recursion", "solved"]


@final
@dataclass(frozen=True)
class Recursion(Attack):
    """Inverts an update layer by layer; made by :func:`recursion`.

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
        if observation.batch_size != 1:
            return invert_batch(observation, seed=seed)[0]
        begin = time.perf_counter()
        check(observation)
        shape = tuple(observation.space.shape)
        chain = trace_chain(observation.model, shape)
        params = {k: p.detach() for k, p in observation.model.named_parameters()}
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
        found = from_layers(observation, result, result.input, chain, begin)
        more = [
            f"The re-simulated gradient agrees to {result.residual:.1e}; "
            f"the update itself deviates from an outer product by {result.noise:.1e}."
        ]
        if found.status != "exact":
            more.append("That is above rounding, so the update is not the plain gradient of one example on this model.")
        return replace(found, notes=(*found.notes, *more))


def from_layers(
    observation: Observation, result: RecursionResult, value: Tensor, chain: Chain | None, begin: float
) -> Reconstruction:
    """Return ``value`` (*shape), which solving layers led to, as a reconstruction; ``begin`` is when the work began.

    It is called exact where the layers' equations hold down to rounding and nothing before them hides the input.
    """
    rounding = torch.finfo(next(iter(observation.update.tensors.values())).dtype).eps
    hidden = None if chain is None else hides(chain, value[None])
    exact = (
        result.input is not None
        and result.noise <= 16 * rounding
        and result.residual <= _FLOOR * rounding
        and hidden is None
    )
    label, soft = None if result.label is None else torch.tensor([result.label]), None
    loss = None if observation.training is None else observation.training.loss
    smoothed = isinstance(loss, CrossEntropy) and loss.label_smoothing > 0
    if exact and (label is None or smoothed):  # Then the signs do not tell it.
        with suppress(InvalidModel):
            label, soft = read_labels(observation, value[None])
    if exact and mixtures_fit(observation, chain):
        # Then only the scale of the update tells one example from a mixture.
        labels = label if soft is None else soft
        exact = (
            labels is not None
            and observation.training is not None
            and distance(observation, value[None], labels) <= _FLOOR * rounding
        )
    decoded, why = present(observation, value[None], exact=exact)
    return Reconstruction(
        decoded,
        label,
        result.residual**2,
        label_probabilities=soft,
        status="exact" if exact else "stalled",
        iterations=result.steps,
        seconds=time.perf_counter() - begin,
        notes=tuple(n for n in (why, hidden, *map(str, result.layers)) if n is not None),
        features=result.features[None] if result.head else None,
    )


def mixtures_fit(observation: Observation, chain: Chain | None) -> bool:
    """Tell whether the layer where the recursion starts gives an outer product for several examples as well."""
    if chain is None or chain.anchor.bias_name is None:
        return False
    bias = observation.update.tensors[chain.anchor.bias_name]
    return len(bias) <= 2 if chain.head and len(bias) != 1 else hides_mixtures(observation, bias)


def hides(chain: Chain, inputs: Tensor) -> str | None:
    """Return which activation before the first layer hides the input at ``inputs`` (N, *shape), None if none does."""
    for step in chain.steps:
        if isinstance(step, Affine):
            return None
        if isinstance(step, Elementwise) and not step.affine:
            flat = inputs.double().reshape(len(inputs), -1)
            slopes = torch.stack([step.derivatives(row)[0] for row in flat])
            if step.rectifies or float(slopes.abs().min()) < _FLAT:
                return f"{step.name!r} stands before the first layer and hides values where it is flat."
        inputs = step.forward(inputs.double(), {})
    return None


_FLAT = 1e-4
"""Derivative of an activation on the input below which float32 does not tell the input any longer."""


def invert_batch(
    observation: Observation, *, seed: int = 0, going: Callable[[], bool] | None = None
) -> tuple[Reconstruction, Walked]:
    """Return every example of a batch where the equations of all layers determine them, and how.

    ``going`` says whether to go on, and is asked where a layer takes long.

    Raises:
        NotApplicable: they do not, as counted beforehand or as solved; the update is not one gradient of
            cross-entropy, how the client trained is not known, or ``going`` said no.

    """
    begin = time.perf_counter()
    if Knowledge.TRAINING not in observation.knows or observation.training is None:
        raise NotApplicable(
            "The recursion of a batch takes the client's loss (TRAINING); grant it in the threat model."
        )
    separated = separate_batch(observation, disaggregate(), seed=seed, whole=True, going=going)
    peeled = separated.peeled
    assert peeled is not None  # Or counting would have refused.
    if peeled.stop is not None:
        raise NotApplicable(
            f"The recursion of {observation.batch_size} examples stops: {peeled.stop}; use feature_matching, which "
            "goes on from there."
        )
    return solved(observation, separated, begin, going), peeled


def solved(
    observation: Observation, separated: Separated, begin: float, going: Callable[[], bool] | None = None
) -> Reconstruction:
    """Return the batch whose layers were all peeled; ``begin`` is when the work began, ``going`` whether to go on."""
    peeled, found = separated.peeled, separated.found
    assert peeled is not None and peeled.stop is None
    assert found.labels is not None and found.features is not None
    x, steps = peeled.known.values.reshape(-1, *observation.space.shape), 0
    residual, order = distance(observation, x, found.labels), aligned(observation.labels, found.labels, None)
    order = torch.arange(len(x)) if order is None else order
    rounding = torch.finfo(next(iter(observation.update.tensors.values())).dtype).eps
    if residual > _ROUGH * rounding:
        # Layer by layer, errors add up; all equations together take most of them back.
        x, steps = _sharpened(observation, x, found.labels, going)
        residual = distance(observation, x, found.labels)
    notes = (*found.notes[:1], *map(str, peeled.layers), f"The re-simulated update agrees to {residual:.1e}.")
    hidden = None if separated.chain is None else hides(separated.chain, x)
    status = "exact" if residual <= _FLOOR * rounding and hidden is None else "stalled"
    decoded, why = present(observation, x[order], exact=status == "exact")
    notes = (*(n for n in (why, hidden) if n is not None), *notes)
    return Reconstruction(
        decoded,
        found.labels[order],
        residual**2,
        status=status,
        iterations=found.iterations + steps,
        seconds=time.perf_counter() - begin,
        notes=notes,
        features=found.features[order],
    )


def _sharpened(
    observation: Observation, inputs: Tensor, labels: Tensor, going: Callable[[], bool] | None
) -> tuple[Tensor, int]:
    """Return model inputs (N, *shape) after Gauss–Newton steps on the whole update, and how many."""
    problem = replace(Problem.of(replace(observation, labels=None), labels, 0, kinks=True), going=going)
    state = search(problem, inputs.to(problem.like).flatten(), iterations=_STEPS)
    return state.z.reshape(inputs.shape), state.steps


_ROUGH = 8.0
"""Residual of a batch, in rounding units, above which steps on the whole update follow."""
_STEPS = 3
"""That many."""

_FLOOR = 100.0
"""Rounding accumulates over the layers: measured, residuals are one to five times the rounding unit."""


def check(observation: Observation) -> None:
    """Check that the update is a multiple of one example's gradient.

    Raises:
        NotApplicable: several examples, several local steps, an adaptive optimizer, or signs only.

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
    if is_signs(observation.update.tensors):
        raise NotApplicable(
            "The entries of each tensor all have one size, as signs do and the first step of an adaptive optimizer, so "
            "the update is no multiple of a gradient; use matching with what the client did stated."
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
    :mod:`gradleak.exact.one_example`. Neither label nor loss nor step size is needed: the system does not change when
    the update is scaled, so a weight delta of one plain step will do.

    A batch takes more: the loss must be known cross-entropy, ``disaggregate`` must prove every example's features, and
    then each layer must determine its inputs for all examples (:mod:`gradleak.exact.peel`): by its gradient alone,
    as a linear layer does up to as many examples as it has outputs, or together with its recovered outputs
    (:mod:`gradleak.exact.joint`), where both kinds of equation are more than the values. Gauss–Newton steps on the
    whole update finish.

    Args:
        polish: finish with Gauss–Newton steps on the whole map, which brings float32 updates to their noise floor.
        quick: take iterative solves where their estimated error is small enough, an order of magnitude above that
            floor in a fraction of the time and memory; otherwise, and with False, factorize.

    """
    return Recursion(polish=polish, quick=quick)
