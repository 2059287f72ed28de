"""Stand-ins for what other parts of the package are about to provide; each goes when the real one is there."""

from __future__ import annotations

from typing import Any

import torch

from gradleak.audit.build import build_record
from gradleak.audit.folder import Folder
from gradleak.threat import Observation
from gradleak.types import Note, NoteKind, Reconstruction, Status


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
