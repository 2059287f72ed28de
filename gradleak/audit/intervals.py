"""How certain a measured rate is."""

from __future__ import annotations

import math

from scipy.special import ndtri

from gradleak.errors import InvalidInput

__all__ = ["wilson"]


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate (Wilson 1927), within [0, 1]; (0, 1) for n = 0.

    Raises:
        InvalidInput: more successes than trials, or a confidence outside (0, 1).

    >>> [round(bound, 3) for bound in wilson(31, 32)]
    [0.843, 0.994]

    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise InvalidInput(
            f"There is no interval for {successes} of {n} at confidence {confidence}; "
            "pass 0 ≤ successes ≤ n and a confidence in (0, 1)."
        )
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri((1 + confidence) / 2))
    rate = successes / n
    center = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the formula gives exactly 0 or 1, up to rounding.
    low = 0.0 if successes == 0 else (center - spread) / scale
    high = 1.0 if successes == n else (center + spread) / scale
    return low, high
