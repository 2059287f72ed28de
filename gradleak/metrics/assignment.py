"""Which reconstruction belongs to which private example: decided once, for all metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

__all__ = ["assign", "cheapest", "pair_costs"]


def pair_costs(guess: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of every pair, shape (N truths, M guesses), float64 on the CPU.

    Of integers, which name tokens, it is the share that differs.

    Raises:
        InvalidInput: the examples have different shapes.
    """
    if guess.shape[1:] != truth.shape[1:]:
        raise InvalidInput(
            f"The reconstruction has examples of shape {tuple(guess.shape[1:])}, the truth of "
            f"{tuple(truth.shape[1:])}; score against the batch that was attacked."
        )
    if not guess.is_floating_point() and not truth.is_floating_point():
        guess, truth = (t.detach().cpu().flatten(1) for t in (guess, truth))
        return torch.stack([(guess != example).double().mean(1) for example in truth])
    guess, truth = (t.detach().to("cpu", torch.float64).flatten(1) for t in (guess, truth))
    return torch.stack([((guess - example) ** 2).mean(1) for example in truth])


def assign(guess: Tensor, truth: Tensor) -> Tensor:
    """Return for each of N private examples the index of its reconstruction, one to one, (N,) integers.

    ``guess`` is (M, *shape), ``truth`` (N, *shape). The assignment minimizes the sum of :func:`pair_costs` (Hungarian
    method; Kuhn 1955). What is not finite is given out last; with fewer reconstructions than examples the rest get −1.

    Raises:
        InvalidInput: the examples have different shapes.
    """
    return cheapest(pair_costs(guess, truth))


def cheapest(costs: Tensor) -> Tensor:
    """Return for each of N rows of ``costs`` (N, M) the column it is given, one to one, at the least sum; −1 for none.

    What is not finite is given out last (Hungarian method; Kuhn 1955).
    """
    finite = torch.isfinite(costs)
    # More than any exchange among finite pairs could save, so that a useless guess never displaces a useful one.
    largest = float(costs[finite].max()) if bool(finite.any()) else 0.0
    costs = torch.where(finite, costs, (largest + 1.0) * (len(costs) + 1))
    from scipy.optimize import linear_sum_assignment  # Not at the top: it takes long to import.

    rows, columns = linear_sum_assignment(costs.numpy())
    result = torch.full((len(costs),), -1, dtype=torch.long)
    result[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return result
