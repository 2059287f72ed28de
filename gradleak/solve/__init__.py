"""Solvers that know nothing of gradients of models or of privacy."""

from gradleak.solve.base import Outcome, Project, Referee, Solver
from gradleak.solve.first_order import Adam, GradientDescent
from gradleak.solve.lbfgs import LBFGS
from gradleak.solve.schedules import Constant, CosineDecay, Schedule, StepDecay

__all__ = [
    "LBFGS",
    "Adam",
    "Constant",
    "CosineDecay",
    "GradientDescent",
    "Outcome",
    "Project",
    "Referee",
    "Schedule",
    "Solver",
    "StepDecay",
]
