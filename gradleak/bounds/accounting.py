"""Differential privacy of noised steps, by the accountants of Opacus."""

from __future__ import annotations

import warnings

from gradleak.errors import InvalidInput, NotApplicable

__all__ = ["privacy_budget"]

_LOOSE = 50.0
"""ε above which the tightest accountant is not asked: its grid grows with ε."""


def privacy_budget(
    *, noise_multiplier: float, steps: int = 1, sampling_rate: float = 1.0, delta: float = 1e-5, accountant: str = "prv"
) -> float:
    """Return ε of differential privacy at ``delta`` for one example that is added or left out, as Opacus counts it.

    Args:
        noise_multiplier: standard deviation of Gaussian noise over the L2 norm that one example is clipped to.
        steps: number of noised steps.
        sampling_rate: probability with which an example is in each of them (Poisson sampling), in (0, 1].
        delta: δ, in (0, 1).
        accountant: "prv", the tightest, or "rdp". From an ε of 50 on, where the former takes gigabytes and nothing is
            private any more, the latter counts in either case.

    Raises:
        InvalidInput: an argument is out of its range.
        NotApplicable: Opacus is not installed.
    """
    good = noise_multiplier > 0 and steps >= 1 and 0 < sampling_rate <= 1 and 0 < delta < 1
    if not good or accountant not in ("prv", "rdp"):
        raise InvalidInput(
            f"No ε for noise_multiplier={noise_multiplier}, steps={steps}, sampling_rate={sampling_rate}, "
            f"delta={delta}, accountant={accountant!r}; give noise above 0, at least one step, a rate in (0, 1], a "
            "delta in (0, 1), and 'prv' or 'rdp'."
        )
    with warnings.catch_warnings():  # Opacus warns about orders and about its own imports.
        warnings.simplefilter("ignore")
        try:
            from opacus.accountants import create_accountant
        except ImportError as error:
            raise NotApplicable("ε is counted by Opacus; install gradleak[dp].") from error

        def counted(name: str) -> float:
            made = create_accountant(name)
            made.history = [(noise_multiplier, sampling_rate, steps)]
            return float(made.get_epsilon(delta=delta))

        epsilon = counted("rdp")
        return epsilon if accountant == "rdp" or epsilon > _LOOSE else min(epsilon, counted(accountant))
