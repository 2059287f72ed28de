"""The forward map: local training as a differentiable function of the private batch.

The client runs it, the attacker inverts it, a defense wraps it. It is written once, with ``torch.func``, so that it
can be differentiated, vmapped over restarts and observations, and compiled as a whole.
"""

from gradleak.training.base import (
    CrossEntropy,
    LocalTraining,
    Loss,
    Tensors,
    batch_statistics,
    check_reproducible,
    gradient,
    parameters,
    soft_labels,
    tracks_statistics,
)
from gradleak.training.fedavg import FedAvg
from gradleak.training.fedsgd import FedSGD
from gradleak.training.optimizers import SGD, Adam, Optimizer

__all__ = [
    "SGD",
    "Adam",
    "CrossEntropy",
    "FedAvg",
    "FedSGD",
    "LocalTraining",
    "Loss",
    "Optimizer",
    "Tensors",
    "batch_statistics",
    "check_reproducible",
    "gradient",
    "parameters",
    "soft_labels",
    "tracks_statistics",
]
