"""Gradient matching: one loop, whose parts make the papers."""

from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.objectives import BalancedError, Cosine, Objective, SquaredError
from gradleak.attacks.matching.papers import dlg, idlg, inverting_gradients
from gradleak.attacks.matching.priors import Prior, TotalVariation
from gradleak.solve import LBFGS, Adam, GradientDescent, Solver

__all__ = [
    "LBFGS",
    "Adam",
    "BalancedError",
    "Cosine",
    "GradientDescent",
    "GradientMatching",
    "Objective",
    "Prior",
    "Solver",
    "SquaredError",
    "TotalVariation",
    "dlg",
    "idlg",
    "inverting_gradients",
]
