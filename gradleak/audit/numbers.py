"""How numbers are written for a reader."""

from __future__ import annotations

import math

__all__ = ["duration", "metric_name", "power", "sig"]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(exponent: int) -> str:
    """Return 10 to ``exponent``, typeset."""
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPT)}"


def sig(value: float | None, digits: int = 2) -> str:
    """Return ``value`` with ``digits`` significant digits, in powers of ten where that is shorter; "–" for None."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    # Taken from the rounded text, because rounding may carry: 9.99e-8 with two digits is 1.0e-7.
    mantissa, _, power_of_ten = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power_of_ten)
    if -3 <= exponent < 4:
        text = f"{value:.{max(digits - 1 - exponent, 0)}f}"
    else:
        text = f"{mantissa}\u202f×\u202f{power(exponent)}"
    return text.replace("-", "−") if value < 0 else text


def duration(seconds: float) -> str:
    """Return a duration in words that fit its size."""
    if not math.isfinite(seconds):
        return "a time that was not measured"
    if seconds < 1:
        return f"{seconds:.2f}\u202fs"
    if seconds < 120:
        return f"{seconds:.0f}\u202fs"
    return f"{seconds / 60:.0f}\u202fmin" if seconds < 7200 else f"{seconds / 3600:.1f}\u202fh"


def metric_name(name: str) -> str:
    """Return a metric as a reader sees it: "PSNR", "ROUGE-1", "relative error"."""
    if name.startswith("rouge_"):
        return name.upper().replace("_", "-")
    return name.upper() if len(name) <= 4 else name.replace("_", " ")
