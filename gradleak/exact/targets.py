"""Targets of examples whose inputs are known: what the labels were, under any loss.

The gradient of the usual losses is affine in their targets (p − y for cross-entropy, σ(z) − t for its binary form,
2 (z − t) for the squared error), and so is one gradient of all parameters: G(t) = G₀ + Σ_j t_j G_j. Known inputs leave
the targets as the only unknowns, which follow by least squares, together with a factor where the update's scale is not
known. Where the loss takes class indices only, all classes of one example are tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.training import Simulator, TargetKind, Tensors, class_axis, target_kind

__all__ = ["fit_targets", "try_classes"]

_MOST = 256
"""Target numbers that are solved for, and classes that are tried, at most."""
_EXPLAINED = 0.01
"""Share of the update that solved targets may leave unexplained."""
_AFFINE = 1e-6
"""Relative deviation from an affine dependence that rounding may cause."""


@torch.no_grad()
def fit_targets(simulator: Simulator, inputs: Tensor, seen: Tensors, *, scaled: bool) -> Tensor | None:
    """Return the targets (N, ...) that explain one gradient best, None where that does not determine them.

    Args:
        simulator: of the client.
        inputs: (N, *shape) model inputs.
        seen: one gradient by parameter name, in the scale of a gradient if ``scaled``.
        scaled: whether the scale is known.
    """
    outputs = simulator.outputs(inputs, torch.float64)
    if not isinstance(outputs, Tensor) or outputs.numel() > _MOST:
        return None
    names = list(seen)
    wanted = torch.cat([seen[k].double().flatten() for k in names])

    def gradient(targets: Tensor) -> Tensor:
        found = simulator.update(inputs, targets.view_as(outputs))
        return torch.cat([found[k].flatten() for k in names])

    zero = torch.zeros(outputs.numel(), dtype=torch.float64, device=outputs.device)
    try:
        start = gradient(zero)
        columns = torch.stack([gradient(row) - start for row in torch.eye(len(zero)).to(zero)], 1)
        trial = torch.rand(len(zero), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(zero)
        bent = gradient(trial) - start - columns @ trial
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # The loss takes other targets than numbers of the outputs' shape.
    if not float(bent.norm()) <= _AFFINE * float((start + columns @ trial).norm()):
        return None
    if scaled:
        targets = _solve(columns, wanted - start)
        explained = start + columns @ targets
    else:
        both = _solve(torch.cat([start[:, None], columns], 1), wanted)
        if float(both[0].abs()) == 0.0:
            return None
        targets, explained = both[1:] / both[0], start * both[0] + columns @ both[1:]
    if float((explained - wanted).norm()) > _EXPLAINED * float(wanted.norm()):
        return None
    found = targets.view_as(outputs)
    if target_kind(simulator.undefended.loss, outputs) is TargetKind.CLASSES:
        axis = class_axis(simulator.undefended.loss)
        shifted = columns @ torch.ones_like(zero)
        if float(shifted.norm()) <= _AFFINE * float(columns.norm()):
            # Adding the same number to all classes changes nothing; probabilities sum to one.
            found = found + (1 - found.sum(axis, keepdim=True)) / outputs.shape[axis]
    return found


def _solve(columns: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.lstsq(columns.cpu(), right.cpu()[:, None], driver="gelsd").solution[:, 0].to(columns.device)


@torch.no_grad()
def try_classes(
    simulator: Simulator, inputs: Tensor, seen: Tensors, *, signed: bool, least: float = -1.0
) -> Tensor | None:
    """Return the class (1,) of one example under which the update points most nearly as the seen one does.

    None where the model has no classes, too many, the loss takes no class indices, or none gives a cosine of ``least``.

    Args:
        simulator: of the client.
        inputs: (1, *shape) model inputs.
        seen: the update by parameter name.
        signed: whether the sign of the update is known.
        least: the cosine that a class must reach.
    """
    outputs = simulator.outputs(inputs)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not 1 < outputs.shape[1] <= _MOST:
        return None
    target = torch.cat([t.flatten() for t in seen.values()]).to(outputs)
    scores = []
    for label in range(outputs.shape[1]):
        try:
            found = simulator.update(inputs, torch.tensor([label], device=outputs.device), None)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        ours = torch.cat([found[k].flatten() for k in seen])
        cosine = float(ours @ target / (ours.norm() * target.norm()).clamp(min=1e-30))
        scores.append(cosine if signed else abs(cosine))
    best = max(range(len(scores)), key=scores.__getitem__)
    return torch.tensor([best]) if scores[best] >= least else None
