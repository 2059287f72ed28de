"""The forward map: local training as a differentiable function of the private batch.

The client runs it, the attacker inverts it, a defense wraps it. It is written once, with ``torch.func``, so that it
can be differentiated, vmapped over restarts and observations, and compiled as a whole.
"""

from gradleak.training.aggregated import Aggregated
from gradleak.training.base import (
    LocalTraining,
    Tensors,
    batch_statistics,
    check_repeatable,
    check_reproducible,
    gradient,
    output_tensors,
    parameters,
    tracks_statistics,
)
from gradleak.training.fedavg import FedAvg
from gradleak.training.fedsgd import FedSGD
from gradleak.training.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    MeanSquaredError,
    TargetKind,
    as_loss,
    class_axis,
    harden,
    relax,
    soft_labels,
    target_kind,
)
from gradleak.training.optimizers import SGD, Adam, Optimizer
from gradleak.training.private import PerExample
from gradleak.training.simulate import Gradient, Simulator

__all__ = [
    "SGD",
    "Adam",
    "Aggregated",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "FedAvg",
    "FedSGD",
    "Gradient",
    "LocalTraining",
    "Loss",
    "MeanSquaredError",
    "Optimizer",
    "PerExample",
    "Simulator",
    "TargetKind",
    "Tensors",
    "as_loss",
    "batch_statistics",
    "check_repeatable",
    "check_reproducible",
    "class_axis",
    "gradient",
    "harden",
    "output_tensors",
    "parameters",
    "relax",
    "soft_labels",
    "target_kind",
    "tracks_statistics",
]
