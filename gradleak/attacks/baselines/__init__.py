"""Earlier attacks that the paper compares itself with; none of them reads the update."""

from gradleak.attacks.baselines.model_inversion import ModelInversion, model_inversion

__all__ = ["ModelInversion", "model_inversion"]
