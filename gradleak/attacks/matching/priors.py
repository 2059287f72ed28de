"""What plausible inputs look like, as penalties on candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.training import Tensors

__all__ = ["ColorVariation", "Context", "GroupPrior", "Normalized", "Prior", "TotalVariation"]


@dataclass(frozen=True, eq=False)
class Normalized:
    """What one BatchNorm layer sees of a candidate batch, and what it stored of the training data; all (C,).

    The variance is biased; running values are None where the layer stores none.
    """

    mean: Tensor
    variance: Tensor
    running_mean: Tensor | None
    running_variance: Tensor | None


class Context:
    """The model and what it makes of a candidate batch, for priors that ask; one forward pass, and only if asked.

    ``params`` are in the number type of the search, ``targets`` as the loss takes them.
    """

    def __init__(self, model: nn.Module, params: Tensors, buffers: Tensors, inputs: Tensor, targets: Tensor) -> None:
        """Remember the candidate; nothing is computed yet."""
        self.model, self.params, self.targets = model, params, targets
        self._tensors, self._inputs = {**params, **buffers}, inputs

    @property
    def outputs(self) -> Any:
        """What the model returns for the candidate batch."""
        return self._pass[0]

    @property
    def features(self) -> Tensor | None:
        """The input of the linear layer that ran last, (N, ..., d); None in a model without linear layers."""
        return self._pass[1]

    @property
    def statistics(self) -> Mapping[str, Normalized]:
        """What every BatchNorm layer sees, by module name."""
        return self._pass[2]

    @cached_property
    def _pass(self) -> tuple[Any, Tensor | None, dict[str, Normalized]]:
        features: list[Tensor] = []
        statistics: dict[str, Normalized] = {}
        hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])))
            elif isinstance(module, _BatchNorm):

                def look(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    channels = inputs[0].transpose(0, 1).flatten(1)
                    stored = layer.running_mean, layer.running_var
                    statistics[name] = Normalized(channels.mean(1), channels.var(1, unbiased=False), *stored)  # type: ignore[arg-type]

                hooks.append(module.register_forward_pre_hook(look))
        try:
            with sdpa_kernel(SDPBackend.MATH):  # The others have no second derivative.
                outputs = functional_call(self.model, self._tensors, (self._inputs,))
        finally:
            for hook in hooks:
                hook.remove()
        return outputs, features[-1] if features else None, statistics


class Prior(ABC):
    """A penalty on one candidate batch."""

    @abstractmethod
    def __call__(self, inputs: Tensor, context: Context) -> Tensor:
        """Return the weighted scalar penalty of model inputs (N, *shape), differentiable.

        It sees the whole batch, so that it may compare examples, and may ask ``context`` for outputs and features.
        """


class GroupPrior(ABC):
    """A penalty that ties the restarts of one observation to each other; it takes a first-order solver."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the weighted penalty (R,) of each of R candidate batches (R, N, *shape).

        The search follows the gradient of their sum.
        """


@dataclass(frozen=True)
class TotalVariation(Prior):
    """Anisotropic total variation: mean absolute difference of vertical and of horizontal neighbors, summed.

    Source: Geiping et al. 2020, Equation 4 (Rudin, Osher, Fatemi 1992).
    """

    weight: float

    def __call__(self, inputs: Tensor, context: Context | None = None) -> Tensor:
        """Return the penalty of images (N, C, H, W), zero for other inputs; the model has no say in it."""
        if inputs.ndim < 4:
            return inputs.new_zeros(())
        down = (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean()
        right = (inputs[..., :, 1:] - inputs[..., :, :-1]).abs().mean()
        return self.weight * (down + right)


@dataclass(frozen=True)
class ColorVariation(Prior):
    """Isotropic total variation of the colors and of their differences.

    The mean of √(∂ₓ² + ∂ᵧ² + ε²) over red, green, blue and their three differences: edges of natural images are edges
    of all colors at once.

    Source: double-opponent total variation (Åström, Åkesson, Heyden 2016), with equal weights.
    """

    weight: float
    epsilon: float = 1e-3

    def __call__(self, inputs: Tensor, context: Context | None = None) -> Tensor:
        """Return the penalty of images (N, C, H, W), zero for other inputs; other than three channels stand alone."""
        if inputs.ndim != 4:
            return inputs.new_zeros(())
        if inputs.shape[1] == 3:
            inputs = torch.cat([inputs, inputs - inputs.roll(1, 1)], 1)
        down = F.pad(inputs[..., 1:, :] - inputs[..., :-1, :], (0, 0, 0, 1))
        right = F.pad(inputs[..., :, 1:] - inputs[..., :, :-1], (0, 1))
        return self.weight * (down.square() + right.square() + self.epsilon**2).sqrt().mean()
