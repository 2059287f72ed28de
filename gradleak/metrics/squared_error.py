"""Mean squared error, and the same on a logarithmic scale."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["CEILING", "mse", "psnr"]

CEILING = 200.0
"""Largest PSNR in dB: MSE 1e-20, below what separates two float64 images; keeps identical images finite."""


def _mse(guess: Tensor, truth: Tensor) -> Tensor:
    squared = (guess - truth) ** 2
    return squared.flatten(1).mean(1) if squared.ndim > 1 else squared


mse = Metric(
    "mse",
    "",
    higher_is_better=False,
    fn=_mse,
    meaning="mean squared difference of the values, in squares of their unit; 0 is identical",
)
"""Mean over the entries of one example of (guess − truth)², in squared units of the input (images: [0, 1])."""


def _psnr(guess: Tensor, truth: Tensor) -> Tensor:
    return -10 * torch.log10(_mse(guess, truth).clamp(min=10 ** (-CEILING / 10)))


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
