"""Bounds: what no attacker can beat, whatever it knows. Adding one is a file and an import line here."""

from gradleak.bounds.robustness import reconstruction_robustness

__all__ = ["reconstruction_robustness"]
