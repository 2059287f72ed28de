"""What linear algebra reads off an update: pure functions on tensors."""

from gradleak.analytic.disaggregate import Disaggregation, disaggregate
from gradleak.analytic.head import Head, features_and_logits, find_head
from gradleak.analytic.labels import LabelEstimate, class_counts, one_hot_label, recover_labels, round_counts
from gradleak.analytic.linear import InputLayer, find_input_layer, invert_linear, single_example_inputs
from gradleak.analytic.ranks import RankBound, in_span, numerical_rank, rank_bound

__all__ = [
    "Disaggregation",
    "Head",
    "InputLayer",
    "LabelEstimate",
    "RankBound",
    "class_counts",
    "disaggregate",
    "features_and_logits",
    "find_head",
    "find_input_layer",
    "in_span",
    "invert_linear",
    "numerical_rank",
    "one_hot_label",
    "rank_bound",
    "recover_labels",
    "round_counts",
    "single_example_inputs",
]
