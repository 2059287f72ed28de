"""gradleak: what a shared gradient gives away, seen with your own eyes, and what would stop it."""

from gradleak import attacks, defenses, metrics, models
from gradleak.exchange import Client, Exchange, simulate
from gradleak.inputs import ImageSpace, InputSpace, TensorSpace
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.training import CrossEntropy, FedAvg, FedSGD, LocalTraining
from gradleak.types import Batch, Certificate, Reconstruction, Trace, Update, UpdateKind

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Certificate",
    "Client",
    "CrossEntropy",
    "Exchange",
    "FedAvg",
    "FedSGD",
    "ImageSpace",
    "InputSpace",
    "Knowledge",
    "LocalTraining",
    "Observation",
    "Reconstruction",
    "TensorSpace",
    "ThreatModel",
    "Trace",
    "Update",
    "UpdateKind",
    "attacks",
    "defenses",
    "metrics",
    "models",
    "simulate",
]
