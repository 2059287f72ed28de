"""Structural similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["ssim"]

_SIGMA, _WINDOW, _K1, _K2 = 1.5, 11, 0.01, 0.03


def _ssim(guess: Tensor, truth: Tensor) -> Tensor:
    n, channels, height, width = truth.shape
    largest = min(_WINDOW, height, width)
    size = largest - (largest + 1) % 2
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = weights / weights.sum()

    def blur(image: Tensor) -> Tensor:
        rows = F.conv2d(image.reshape(n * channels, 1, height, width), window.view(1, 1, -1, 1))
        return F.conv2d(rows, window.view(1, 1, 1, -1))

    mean_g, mean_t = blur(guess), blur(truth)
    var_g, var_t = blur(guess**2) - mean_g**2, blur(truth**2) - mean_t**2
    covariance = blur(guess * truth) - mean_g * mean_t
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_g * mean_t + c1) / (mean_g**2 + mean_t**2 + c1)
    structure = (2 * covariance + c2) / (var_g + var_t + c2)
    return (luminance * structure).reshape(n, -1).mean(1)


ssim = Metric(
    "ssim",
    "",
    higher_is_better=True,
    fn=_ssim,
    reads="images",
    meaning="structural similarity; 1 is identical, 0 unrelated",
)
"""Mean structural similarity of each image in [0, 1] (Wang et al. 2004, Equation 13), averaged over channels; ≤ 1.

Gaussian window of 11 pixels with σ = 1.5, K₁ = 0.01, K₂ = 0.03, population covariance, windows inside the image only:
scikit-image's ``structural_similarity`` with ``gaussian_weights=True, use_sample_covariance=False``. Deviation: an
image smaller than 11 pixels, which scikit-image refuses, gets the largest odd window that fits, of the same σ.
"""
