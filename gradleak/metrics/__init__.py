"""Metrics: examples are assigned one to one once, then every metric gives one value per example.

A new metric is one file and one import line here; scores and reports take every metric that ``__all__`` names.
"""

from gradleak.metrics.labels import label_accuracy
from gradleak.metrics.null_guess_ratio import null_guess_ratio
from gradleak.metrics.peak_signal import psnr
from gradleak.metrics.relative_error import relative_error
from gradleak.metrics.squared_error import mse
from gradleak.metrics.structural import ssim
from gradleak.metrics.tokens import (
    exact_match,
    rouge_1,
    rouge_2,
    rouge_l,
    token_accuracy,
    token_precision,
    token_recall,
)

__all__ = [
    "exact_match",
    "label_accuracy",
    "mse",
    "null_guess_ratio",
    "psnr",
    "relative_error",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "ssim",
    "token_accuracy",
    "token_precision",
    "token_recall",
]

from gradleak.metrics.assignment import assign as assign
from gradleak.metrics.assignment import pair_costs as pair_costs
from gradleak.metrics.base import Metric as Metric
from gradleak.metrics.relative_error import scales as scales
