"""The gradient of differentially private SGD: every example clipped by itself, then noise on their sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.errors import InvalidInput, InvalidModel
from gradleak.training.base import Tensors, gradient
from gradleak.training.losses import Loss

__all__ = ["PerExample"]

_OPACUS = 1e-6
"""What Opacus adds to every norm."""


@dataclass(frozen=True)
class PerExample:
    """How each local step clips and noises (Abadi et al. 2016, Algorithm 1; numbers as in Opacus 1.6).

    Attributes:
        norm: L2 norm that the gradient of each example is clipped to, all tensors together.
        noise_multiplier: standard deviation of the noise on the sum, over ``norm``.
        batch_size: what the sum is divided by, the expected number of examples (with a loss that is a sum: by 1).
        seed: of the client's noise; None puts it at its mean.
    """

    norm: float
    noise_multiplier: float
    batch_size: int
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.norm < float("inf") and 0 <= self.noise_multiplier < float("inf") and self.batch_size >= 1):
            raise InvalidInput(
                f"DP-SGD cannot use a norm of {self.norm} with noise_multiplier={self.noise_multiplier} and "
                f"batch_size={self.batch_size}; give a norm above 0, noise of at least 0 and at least one example."
            )

    def deviation(self, loss: Loss) -> float:
        """Return the standard deviation of the noise on one coordinate of a step's gradient."""
        return self.noise_multiplier * self.norm / self._divisor(loss)

    def gradient(
        self,
        model: nn.Module,
        loss: Loss,
        params: Tensors,
        inputs: Tensor,
        labels: Tensor,
        buffers: Tensors | None,
        step: int,
    ) -> dict[str, Tensor]:
        """Return the clipped, summed, noised and divided gradient of one step, by name; differentiable.

        Raises:
            InvalidModel: an example's gradient depends on the others (BatchNorm in training mode).
        """
        if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
            raise InvalidModel(
                "BatchNorm in training mode mixes the examples, so none of them can be clipped by itself; use "
                "GroupNorm, as opacus.validators.ModuleValidator.fix does."
            )

        def one(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return gradient(model, loss, params, x[None], y[None], buffers)[0]

        each = vmap(one)(inputs, labels)
        square = torch.stack([g.flatten(1).square().sum(1) for g in each.values()]).sum(0)
        size = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
        factor = (self.norm / (size + _OPACUS)).clamp(max=1.0)
        total = {k: torch.einsum("i,i...->...", factor.to(g), g) for k, g in each.items()}
        if self.seed is not None and self.noise_multiplier > 0:
            first = next(iter(total.values()))
            generator = torch.Generator(first.device).manual_seed(self.seed + 7_919 * step)
            scale = self.noise_multiplier * self.norm
            total = {
                k: t + scale * torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
                for k, t in total.items()
            }
        return {k: t / self._divisor(loss) for k, t in total.items()}

    def _divisor(self, loss: Loss) -> int:
        return 1 if getattr(loss, "reduction", "mean") == "sum" else self.batch_size
