"""Fisher information of a noised update about each number of the private batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput, NotApplicable
from gradleak.training import LocalTraining, Simulator, Tensors
from gradleak.types import Batch

__all__ = ["fisher_information"]


def fisher_information(
    model: nn.Module, training: LocalTraining, batch: Batch, *, samples: int = 64, seed: int = 0
) -> Tensor:
    """Return the diagonal of the Fisher information about the inputs (N, *shape), in float64, as an estimate.

    With J the Jacobian of the defended update and σ the noise of the stated defenses, it is the sum of J² / σ² over the
    update. An *unbiased* attacker who knows all else errs on number i by at least 1 / √I_i (root mean square); an
    attacker with a prior is biased and may do better, so this is no bound on all of them. Numbers that a defense hides
    count for nothing. Its spread over draws is √(2 / samples) of it at most.

    Sources: Hannun, Guo, van der Maaten, *Measuring Data Leakage in Machine-Learning Models with Fisher Information*,
    UAI 2021, Section 3; Guo et al., *Bounding Training Data Reconstruction in Private (Deep) Learning*, ICML 2022,
    Theorem 1; Hutchinson's estimator with random signs on the update instead of on the inputs, which gives every number
    its own value in one backward pass a draw. Deviation: all noise is taken for Gaussian; where it is Laplacian, the
    information is twice what is returned.

    Args:
        model: that was sent out.
        training: the client's forward map with its defenses.
        batch: private examples, or examples like them; no attack sees them.
        samples: draws.
        seed: of the draws.

    Raises:
        InvalidInput: ``samples`` is below 1.
        NotApplicable: part of the update comes without noise, which tells without limit.
    """
    if samples < 1:
        raise InvalidInput(f"Fisher information cannot be estimated from {samples} draws; give at least 1.")
    simulator = Simulator(model, training.known())
    inputs = batch.inputs.detach().double().requires_grad_()
    with torch.enable_grad():
        sent: Tensors = simulator.training.distort(simulator.update(inputs, batch.labels))
    spread = training.deviation({k: t.detach() for k, t in sent.items()})
    if any(bool((d == 0).any()) for d in spread.values()):
        raise NotApplicable(
            "Part of the update comes without noise, so its Fisher information is infinite; state defenses that add "
            "noise to every number."
        )
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(inputs)
    for _ in range(samples):
        signs = [
            (2.0 * torch.randint(0, 2, t.shape, generator=generator) - 1).to(t) / spread[k] for k, t in sent.items()
        ]
        (pulled,) = torch.autograd.grad(list(sent.values()), inputs, signs, retain_graph=True)
        total += pulled.square()
    return (total / samples).detach()
