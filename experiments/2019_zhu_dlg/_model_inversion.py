"""Model inversion: the input that the model is surest about; it tells a class, not an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.clock import TimeSpent
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.threat import Knowledge, Observation
from gradleak.training import check_reproducible, soft_labels
from gradleak.types import Note, NoteKind, Reconstruction, Status

__all__ = ["ModelInversion", "model_inversion"]

_REPORTED = 50
"""Steps between two reports of progress, at which the run can be stopped."""


@final
@dataclass(frozen=True)
class ModelInversion(Attack):
    """Gradient descent on one minus the confidence in a class; made by :func:`model_inversion`.

    Attributes:
        iterations: most steps.
        lr: step size, in model-input units.
        patience: steps after which a cost that did not fall ends the run.
        confidence: mean confidence at which the run ends.

    """

    iterations: int = 5000
    lr: float = 0.1
    patience: int = 100
    confidence: float = 0.99

    requires = Knowledge.LABELS

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.patience < 1 or not self.lr > 0 or not 0 < self.confidence <= 1:
            raise InvalidInput(
                f"model_inversion cannot run {self.iterations} steps of {self.lr} with patience {self.patience} to "
                f"confidence {self.confidence}; give counts of at least 1, lr > 0, and a confidence in (0, 1]."
            )

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        check_reproducible(observation.model)
        labels, space = observation.labels, observation.space
        assert labels is not None
        simulator = observation.simulator
        dtype, device = simulator.dtype, simulator.device
        x = space.encode(torch.zeros(len(labels), *space.shape, dtype=dtype, device=device))
        with torch.no_grad():
            outputs = simulator.outputs(x)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
            found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise NotApplicable(
                f"model_inversion climbs the confidence in a class, but the model returns {found}; use an attack that "
                "reads the update (gradleak list attacks)."
            )
        target = soft_labels(labels.to(device), outputs.shape[1], dtype)

        def confidences(x: Tensor) -> Tensor:
            return (simulator.outputs(x).softmax(1) * target).sum(1)

        best, best_cost, costs, status, step = x, float("inf"), list[float](), Status.BUDGET, 0
        for step in range(self.iterations + 1):
            leaf = x.detach().requires_grad_()
            # The sum: examples do not know of each other, so each takes the step it would take alone.
            loss = (1 - confidences(leaf)).sum()
            (slope,) = torch.autograd.grad(loss, leaf)
            costs.append(float(loss.detach()) / len(labels))
            if costs[-1] < best_cost:
                best, best_cost = leaf.detach(), costs[-1]
            try:
                if step % _REPORTED == 0:
                    callback(Progress(step, self.iterations, best_cost))
            except KeyboardInterrupt as stop:
                status = Status.BUDGET if isinstance(stop, TimeSpent) else Status.INTERRUPTED
                break
            if best_cost <= 1 - self.confidence:
                status = Status.CONVERGED
                break
            if step >= self.patience and costs[-1] >= max(costs[-1 - self.patience : -1]):
                status = Status.STALLED
                break
            x = space.project(leaf.detach() - self.lr * slope)
        return Reconstruction(
            space.decode(best),
            labels.argmax(-1) if labels.is_floating_point() else labels,
            best_cost,
            status=status,
            iterations=step,
            evaluations=len(costs),
            notes=(
                Note(
                    "Only the model and the labels were used, not the update: this shows a class, not an example.",
                    NoteKind.LIMIT,
                ),
            ),
        )


def model_inversion(
    *, iterations: int = 5000, lr: float = 0.1, patience: int = 100, confidence: float = 0.99
) -> ModelInversion:
    """Climb the model's confidence in the label from a black image.

    Source: Fredrikson, Jha, Ristenpart, *Model Inversion Attacks that Exploit Confidence Information*, CCS 2015,
    Algorithm 1 (MI-Face) with its constants.

    Deviations: no auxiliary term and no denoising of iterates; they are clipped to valid images instead.

    Args:
        iterations: most steps (α).
        lr: step size (λ).
        patience: steps without a smaller cost that end the run (β).
        confidence: confidence that ends the run (1 − γ of the cost).

    """
    return ModelInversion(iterations, lr, patience, confidence)
