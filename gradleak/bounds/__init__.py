"""Bounds: what no attacker can beat, whatever it knows. Adding one is a file and an import line here."""

from gradleak.bounds.accounting import privacy_budget
from gradleak.bounds.fisher import fisher_information
from gradleak.bounds.robustness import reconstruction_robustness
from gradleak.bounds.upper import Bound, upper_bound

__all__ = ["Bound", "fisher_information", "privacy_budget", "reconstruction_robustness", "upper_bound"]
