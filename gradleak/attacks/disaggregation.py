"""The exact attack on the classification head: the features and labels of every example of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.labeling import estimate_labels
from gradleak.errors import NotApplicable
from gradleak.exact.features import EXACT, NOT_IDENTIFIABLE, Disaggregation
from gradleak.exact.features import disaggregate as separate
from gradleak.exact.labels import neighbors
from gradleak.structure.first_layer import find_input_layer
from gradleak.structure.head import find_head
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy
from gradleak.types import Certificate, Finding, FindingKind, Note, Reconstruction, Shows, Status, Verdict

__all__ = ["FeatureDisaggregation", "disaggregate"]


@final
@dataclass(frozen=True)
class FeatureDisaggregation(Attack):
    """Separates the features of a batch; made by :func:`disaggregate`, which says its options."""

    restarts: int = 4
    iterations: int = 150
    tolerance: float = 1e-2

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        assert observation.training is not None and observation.batch_size is not None
        loss, shape = observation.training.loss, tuple(observation.space.shape)
        if not isinstance(loss, CrossEntropy) or loss.weight is not None:
            other = "cross-entropy with class weights" if isinstance(loss, CrossEntropy) else type(loss).__name__
            raise NotApplicable(
                f"Disaggregation solves the gradient of plain softmax cross-entropy, not of {other}; use matching."
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
        tensors = observation.gradient.require_single()
        generator = torch.Generator().manual_seed(seed)
        estimate = estimate_labels(observation, generator, head=head)
        gw = tensors[head.weight_name].reshape(head.classes, -1)
        gb = None if head.bias_name is None else tensors[head.bias_name]
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
        return self._result(observation, best)

    def _result(self, observation: Observation, found: Disaggregation) -> Reconstruction:
        exact = torch.tensor([v == EXACT for v in found.verdicts])
        simulator, count = observation.simulator, len(found.verdicts)
        matched = found.residual <= found.floor
        more = matched and found.rank > count  # Then there are more examples than were stated.
        proved = matched and not more and not simulator.defended and observation.batch_size_stated
        verdicts = tuple(
            Verdict.UNPROVED if not matched else Verdict.PROVED if proved and bool(e) else Verdict.MATCHED
            for e in exact
        )
        reason = found.reason
        if more:
            reason += f" Rank {found.rank} says that more than {count} examples are behind it; state their number."
        certificate = Certificate(
            min(verdicts, key=lambda v: v.strength),
            found.residual,
            found.floor,
            None,
            count**2,
            verdicts,
            "Of the features, from the gradient of the head alone: " + reason,
            local=True,
        )
        dtype = next(iter(observation.update.tensors.values())).dtype
        features = found.features.to(torch.promote_types(dtype, torch.float32))
        sure = verdicts.count(Verdict.PROVED)
        shape = tuple(observation.space.shape)
        layer = find_input_layer(observation.model, observation.params, shape)
        head = find_head(observation.model, observation.params, shape)
        # The head may be the whole model; then its inputs are the client's.
        direct = layer is not None and head is not None and layer.weight_name == head.weight_name
        inputs = observation.space.decode(features.reshape(-1, *shape)) if direct else features
        findings = (
            Finding(
                FindingKind.FEATURES,
                f"What the last layer saw of {count if proved and sure == count else sure} of {count} examples follows "
                "from its gradient.",
                proved=sure > 0,
                count=sure,
                of=count,
            ),
            Finding(
                FindingKind.LABELS,
                f"The classes of {count} of {count} examples were read off the last layer's gradient.",
                proved=proved,
                count=count if matched else 0,
                of=count,
            ),
        )
        counted = found.verdicts.count(NOT_IDENTIFIABLE) < count
        status = Status.CONVERGED if matched and counted else Status.STALLED
        return Reconstruction(
            inputs,
            found.labels,
            found.residual**2,
            status=Status.EXACT if proved and bool(exact.all()) else status,
            iterations=found.iterations,
            notes=(Note(reason),),
            certificate=certificate,
            features=features,
            solved=exact & matched,
            findings=tuple(f for f in findings if f.count),
            shows=Shows.INPUTS if direct else Shows.FEATURES,
        )


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
