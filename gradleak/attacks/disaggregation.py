"""The exact attack on the classification head: the features and labels of every example of a batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.errors import NotApplicable
from gradleak.exact.features import EXACT, NOT_IDENTIFIABLE, Disaggregation
from gradleak.exact.features import disaggregate as separate
from gradleak.exact.labels import neighbors, recover_labels
from gradleak.structure.head import find_head
from gradleak.threat import Knowledge, Observation
from gradleak.training import SGD, CrossEntropy, FedAvg
from gradleak.types import Certificate, Reconstruction, UpdateKind

__all__ = ["FeatureDisaggregation", "disaggregate", "one_gradient"]


@final
@dataclass(frozen=True)
class FeatureDisaggregation(Attack):
    """Separates the features of a batch; made by :func:`disaggregate`.

    Attributes:
        restarts: starts where classes occur more than once.
        iterations: at most so many per start.
        tolerance: predicted error, relative to the spread between examples, up to which features count as exact.

    """

    restarts: int = 4
    iterations: int = 150
    tolerance: float = 1e-2

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

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
        assert observation.training is not None and observation.batch_size is not None
        loss, shape = observation.training.loss, tuple(observation.space.shape)
        if not isinstance(loss, CrossEntropy):
            raise NotApplicable(
                f"Disaggregation solves the gradient of softmax cross-entropy, not of {type(loss).__name__}; "
                "use matching."
            )
        head = find_head(observation.model, observation.params, shape)
        if head is None or head.shared:
            raise NotApplicable(
                "Disaggregation needs a trained linear layer as the model's output whose weight serves nothing else; "
                "use matching."
            )
        bound = min(head.classes - 1, head.width)
        if observation.batch_size > bound:
            raise NotApplicable(
                f"The head's gradient has rank at most {bound} (classes less one, or features), so "
                f"{observation.batch_size} examples cannot be told apart from it; use matching."
            )
        tensors = one_gradient(observation, [n for n in (head.weight_name, head.bias_name) if n is not None])
        generator = torch.Generator().manual_seed(seed)
        estimate = recover_labels(
            observation.model,
            observation.params,
            tensors,
            shape,
            observation.batch_size,
            loss,
            generator,
            head=head,
        )
        gw, gb = tensors[head.weight_name].reshape(head.classes, -1), None
        if head.bias_name is not None:
            gb = tensors[head.bias_name]
        best: Disaggregation | None = None
        for candidate in (estimate, *neighbors(estimate, 8)):
            found = separate(
                gw,
                gb,
                head,
                candidate,
                loss=loss,
                restarts=self.restarts,
                iterations=self.iterations,
                tolerance=self.tolerance,
                generator=generator,
            )
            best = found if best is None or found.residual < best.residual else best
            # Right counts are recognized by the residual; trying others for many examples costs more than it gives.
            if best.residual <= best.floor or observation.batch_size > 16:
                break
        assert best is not None
        return self._result(observation, best, time.perf_counter() - begin)

    def _result(self, observation: Observation, found: Disaggregation, seconds: float) -> Reconstruction:
        exact = found.verdicts.count(EXACT)
        matched = found.residual <= found.floor
        training = observation.training
        assert training is not None
        proved = exact == len(found.verdicts) and training is training.undefended
        verdict = "unproved" if not matched else "proved" if proved else "matched"
        certificate = Certificate(
            verdict,
            found.residual,
            found.floor,
            None,
            len(found.verdicts) ** 2,
            found.verdicts,
            "Of the features, from the gradient of the head alone: " + found.reason,
        )
        dtype = next(iter(observation.update.tensors.values())).dtype
        features = found.features.to(torch.promote_types(dtype, torch.float32))
        fits = tuple(observation.space.shape) == tuple(features.shape[1:])
        notes = [found.reason]
        if not fits:
            notes.append("The inputs of this reconstruction are the head's inputs (features), not the client's.")
        counted = found.verdicts.count(NOT_IDENTIFIABLE) < len(found.verdicts)
        return Reconstruction(
            observation.space.decode(features) if fits else features,
            found.labels,
            found.residual**2,
            status="exact" if verdict == "proved" else "converged" if matched and counted else "stalled",
            iterations=found.iterations,
            seconds=seconds,
            notes=tuple(notes),
            certificate=certificate,
            features=features,
        )


def one_gradient(observation: Observation, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return these tensors of the update as a gradient; a weight delta of one plain step is scaled by its rate.

    Raises:
        NotApplicable: the update is no gradient and no delta of one plain step.

    """
    tensors = {k: observation.update.tensors[k] for k in names}
    if observation.update.kind is UpdateKind.GRADIENT:
        return tensors
    assert observation.training is not None and observation.batch_size is not None
    training = observation.training.undefended
    if not isinstance(training, FedAvg):
        raise NotApplicable(
            f"Disaggregation turns a weight delta into a gradient only for FedAvg, not for {type(training).__name__}; "
            "use matching, which simulates the training."
        )
    rule = training.rule
    if training.count(observation.batch_size) > 1 or not isinstance(rule, SGD):
        raise NotApplicable(
            "Disaggregation solves one gradient, but the client took several steps or used an adaptive optimizer; "
            "use matching, which unrolls the training."
        )
    factor = rule.lr * (1 + rule.momentum * rule.nesterov)
    params = observation.params
    return {k: -t / factor - rule.weight_decay * params[k] for k, t in tensors.items()}


def disaggregate(*, restarts: int = 4, iterations: int = 150, tolerance: float = 1e-2) -> FeatureDisaggregation:
    """Separate a batch at the classification head: exact features and labels of every example, where they show.

    Source: the published relative is gradient inversion with embeddings (GIE, ICME 2024); see
    :mod:`gradleak.exact.features` for the equations. Batches up to the number of classes less one (and of
    features); softmax cross-entropy with hard labels and known smoothing; gradients, or the delta of one step of SGD.
    ``Reconstruction.inputs`` are the features themselves unless the model is its own head, ``certificate.examples``
    holds one verdict per example.

    Args:
        restarts: starts that differ in how examples of one class are split; one is enough where no class repeats.
        iterations: at most so many per start (fewer in all for more than 40 examples).
        tolerance: predicted error, relative to the spread between examples, up to which features count as exact.

    """
    return FeatureDisaggregation(restarts, iterations, tolerance)
