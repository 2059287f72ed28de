"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["CEILING", "psnr"]

CEILING = 200.0
"""Largest PSNR in dB: MSE 1e-20, below what separates two float64 images; keeps identical images finite."""


def _psnr(guess: Tensor, truth: Tensor) -> Tensor:
    error = ((guess - truth) ** 2).flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=10 ** (-CEILING / 10)))


psnr = Metric(
    "psnr",
    "dB",
    higher_is_better=True,
    fn=_psnr,
    reads="images",
    meaning="the MSE on a logarithmic scale; above 20 dB a person usually recognizes the picture, above 30 dB "
    "differences are hard to see, above 54 dB they are smaller than half a gray level of a screen",
)
"""−10 log₁₀ MSE of each image (peak value 1), in dB, at most :data:`CEILING`.

Always per image: of a whole batch it would say 13 dB for two images with errors 1e-6 and 0.1, whose mean is 35 dB.
"""
