"""Local differential privacy of whole updates, as Flower ships it."""

from __future__ import annotations

import math

from gradleak.defenses.clipping import clip
from gradleak.defenses.composition import Composition, compose
from gradleak.defenses.noise import gaussian_noise
from gradleak.errors import InvalidInput

__all__ = ["local_dp"]


def local_dp(clipping_norm: float, sensitivity: float, epsilon: float, delta: float) -> Composition:
    """Return clipping of the whole update, then Gaussian noise: what ``flwr.clientapp.mod.LocalDpMod`` (1.41) does.

    The standard deviation is sensitivity · √(2 ln(1.25 / delta)) / epsilon (Dwork & Roth 2014, Theorem A.1, which is
    for epsilon below 1). Nothing ties ``sensitivity`` to ``clipping_norm``: what the noise hides is the clipped update,
    and :func:`gradleak.bounds.upper_bound` counts with that.

    Raises:
        InvalidInput: an argument is not above 0, or delta is not below 1.25.
    """
    if not (min(clipping_norm, sensitivity, epsilon, delta) > 0 and delta < 1.25):
        raise InvalidInput(
            f"Local differential privacy cannot use clipping_norm={clipping_norm}, sensitivity={sensitivity}, "
            f"epsilon={epsilon}, delta={delta}; give numbers above 0, and delta below 1."
        )
    return compose(clip(clipping_norm), gaussian_noise(sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon))
