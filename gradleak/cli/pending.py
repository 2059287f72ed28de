"""Stand-ins for what other parts of the package are about to provide; each goes when the real one is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradleak.audit.build import build_record
from gradleak.audit.folder import Folder
from gradleak.spaces import InputSpace
from gradleak.threat import Observation
from gradleak.training import LocalTraining
from gradleak.types import Note, NoteKind, Reconstruction, Status, Update


@dataclass(frozen=True)
class CountedExamples:
    """Count."""

    count: int | None
    proved: bool
    reason: str


def count_examples(model: nn.Module, update: Update, training: LocalTraining, space: InputSpace) -> CountedExamples:
    """Count."""
    return CountedExamples(1, False, "Nothing in the update says how many there are.")


def build_refusal(observation: Observation, error: Exception, status: Status | None = None, **about: Any) -> Folder:
    """Refuse."""
    name = {"NotApplicable": Status.NOT_APPLICABLE, "MissingKnowledge": Status.MISSING_KNOWLEDGE}
    found = Reconstruction(
        torch.zeros(observation.batch_size or 1, *observation.space.shape),
        None,
        float("inf"),
        status=status or name[type(error).__name__],
        notes=(Note(str(error), NoteKind.ATTEMPT),),
    )
    return build_record(observation, found, **about)
