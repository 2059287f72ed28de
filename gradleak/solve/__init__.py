"""Solvers that know nothing of gradients of models or of privacy."""

from gradleak.solve.base import Outcome, Project, Referee, Solver
from gradleak.solve.first_order import Adam, GradientDescent
from gradleak.solve.lbfgs import LBFGS

__all__ = ["LBFGS", "Adam", "GradientDescent", "Outcome", "Project", "Referee", "Solver"]
