"""gradleak: what a shared gradient gives away, seen with your own eyes, and what would stop it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradleak import attacks, audit, bounds, defenses, errors, metrics, models
    from gradleak.auditing import run_audit
    from gradleak.exchange import Client, Exchange, simulate
    from gradleak.inspection import Inspection, inspect
    from gradleak.spaces import ImageSpace, InputSpace, TableSpace, TensorSpace, TokenSpace
    from gradleak.threat import Knowledge, Observation, ThreatModel
    from gradleak.training import BinaryCrossEntropy, CrossEntropy, FedAvg, FedSGD, LocalTraining, MeanSquaredError
    from gradleak.types import Batch, Certificate, Reconstruction, Status, Trace, Update, UpdateKind, Verdict

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BinaryCrossEntropy",
    "Certificate",
    "Client",
    "CrossEntropy",
    "Exchange",
    "FedAvg",
    "FedSGD",
    "ImageSpace",
    "InputSpace",
    "Inspection",
    "Knowledge",
    "LocalTraining",
    "MeanSquaredError",
    "Observation",
    "Reconstruction",
    "Status",
    "TableSpace",
    "TensorSpace",
    "ThreatModel",
    "TokenSpace",
    "Trace",
    "Update",
    "UpdateKind",
    "Verdict",
    "attacks",
    "audit",
    "bounds",
    "defenses",
    "errors",
    "inspect",
    "metrics",
    "models",
    "run_audit",
    "simulate",
]

# Public names are imported when they are first used: the command line answers --help, and reports are rendered,
# without torch (PEP 562).
_PACKAGES = ("attacks", "audit", "bounds", "defenses", "errors", "metrics", "models")
_HOMES = {
    "auditing": ("run_audit",),
    "exchange": ("Client", "Exchange", "simulate"),
    "inspection": ("Inspection", "inspect"),
    "spaces": ("ImageSpace", "InputSpace", "TableSpace", "TensorSpace", "TokenSpace"),
    "threat": ("Knowledge", "Observation", "ThreatModel"),
    "training": ("BinaryCrossEntropy", "CrossEntropy", "FedAvg", "FedSGD", "LocalTraining", "MeanSquaredError"),
    "types": ("Batch", "Certificate", "Reconstruction", "Status", "Trace", "Update", "UpdateKind", "Verdict"),
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"gradleak.{name}")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"gradleak.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'gradleak' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
