"""What linear algebra reads off an update: pure functions on tensors."""

from gradleak.analytic.head import Head, features_and_logits, find_head
from gradleak.analytic.labels import LabelEstimate, class_counts, one_hot_label, recover_labels, round_counts

__all__ = [
    "Head",
    "LabelEstimate",
    "class_counts",
    "features_and_logits",
    "find_head",
    "one_hot_label",
    "recover_labels",
    "round_counts",
]
