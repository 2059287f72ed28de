"""Defenses: wrappers of the forward map. Adding one is a file and an import line here."""

from gradleak.defenses.adaptive_clipping import AdaptiveClipping, adaptive_clip
from gradleak.defenses.base import Defended, Defense, UpdateDefense
from gradleak.defenses.clamping import Clamping, clamp
from gradleak.defenses.clipping import Clipping, clip
from gradleak.defenses.composition import Composition, InTurn, compose
from gradleak.defenses.dp_sgd import DPSGD, dp_sgd
from gradleak.defenses.exclusion import Exclusion, exclude_vars
from gradleak.defenses.local_dp import local_dp
from gradleak.defenses.noise import GaussianNoise, LaplacianNoise, gaussian_noise, laplacian_noise
from gradleak.defenses.percentile import PercentilePrivacy, percentile_privacy
from gradleak.defenses.pruning import Pruning, prune, top_k
from gradleak.defenses.quantization import Quantization, int8
from gradleak.defenses.rounding import Rounding, bfloat16, half_precision
from gradleak.defenses.secure_aggregation import SecureAggregation, secure_aggregation
from gradleak.defenses.signs import Sign, sign
from gradleak.defenses.sparse_vector import SparseVector, svt_privacy

__all__ = [
    "DPSGD",
    "AdaptiveClipping",
    "Clamping",
    "Clipping",
    "Composition",
    "Defended",
    "Defense",
    "Exclusion",
    "GaussianNoise",
    "InTurn",
    "LaplacianNoise",
    "PercentilePrivacy",
    "Pruning",
    "Quantization",
    "Rounding",
    "SecureAggregation",
    "Sign",
    "SparseVector",
    "UpdateDefense",
    "adaptive_clip",
    "bfloat16",
    "clamp",
    "clip",
    "compose",
    "dp_sgd",
    "exclude_vars",
    "gaussian_noise",
    "half_precision",
    "int8",
    "laplacian_noise",
    "local_dp",
    "percentile_privacy",
    "prune",
    "secure_aggregation",
    "sign",
    "svt_privacy",
    "top_k",
]
