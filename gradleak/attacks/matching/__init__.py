"""Gradient matching: one loop, whose parts make the papers."""

from gradleak.attacks.matching.coordinates import Coordinates, NaturalImages
from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.objectives import BalancedError, Cosine, Objective, SquaredError
from gradleak.attacks.matching.papers import dlg, idlg, inverting_gradients, prior_matching, tableak
from gradleak.attacks.matching.priors import ColorVariation, Context, GroupPrior, Prior, TotalVariation
from gradleak.solve import LBFGS, Adam, Constant, CosineDecay, GradientDescent, Schedule, Solver, StepDecay

__all__ = [
    "LBFGS",
    "Adam",
    "BalancedError",
    "ColorVariation",
    "Constant",
    "Context",
    "Coordinates",
    "Cosine",
    "CosineDecay",
    "GradientDescent",
    "GradientMatching",
    "GroupPrior",
    "NaturalImages",
    "Objective",
    "Prior",
    "Schedule",
    "Solver",
    "SquaredError",
    "StepDecay",
    "TotalVariation",
    "dlg",
    "idlg",
    "inverting_gradients",
    "prior_matching",
    "tableak",
]
