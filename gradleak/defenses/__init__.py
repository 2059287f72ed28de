"""Defenses: wrappers of the forward map. Adding one is a file and an import line here."""

from gradleak.defenses.base import Defended, Defense, UpdateDefense
from gradleak.defenses.clamping import Clamping, clamp
from gradleak.defenses.clipping import Clipping, clip
from gradleak.defenses.composition import Composition, compose
from gradleak.defenses.noise import GaussianNoise, LaplacianNoise, gaussian_noise, laplacian_noise
from gradleak.defenses.pruning import Pruning, prune, top_k
from gradleak.defenses.quantization import Quantization, int8
from gradleak.defenses.rounding import Rounding, bfloat16, half_precision
from gradleak.defenses.signs import Sign, sign

__all__ = [
    "Clamping",
    "Clipping",
    "Composition",
    "Defended",
    "Defense",
    "GaussianNoise",
    "LaplacianNoise",
    "Pruning",
    "Quantization",
    "Rounding",
    "Sign",
    "UpdateDefense",
    "bfloat16",
    "clamp",
    "clip",
    "compose",
    "gaussian_noise",
    "half_precision",
    "int8",
    "laplacian_noise",
    "prune",
    "sign",
    "top_k",
]
