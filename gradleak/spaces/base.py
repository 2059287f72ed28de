"""What one example looks like: to the model and the attacker, to the scores, and to a person."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

import gradleak.metrics
from gradleak.errors import InvalidInput
from gradleak.metrics import Metric

__all__ = ["InputSpace", "NullGuess"]

_HIT = 1e-12


@dataclass(frozen=True, eq=False)
class NullGuess:
    """A guess that needs no update: decoded inputs (N, *shape), and what is guessed, for a reader.

    ``oracle`` says whether the private inputs had a say in it, which no attacker can arrange.
    """

    description: str
    inputs: Tensor
    oracle: bool = False


class InputSpace(ABC):
    """The space of one input: candidates are what the model sees, decoded inputs are what a person sees.

    A new space sets the class attributes, says how candidates are decoded, and overrides what is special about it:
    scores, verdict, record and report ask the space and nothing else.

    Attributes:
        kind: name of the modality in records.
        noun: what one example is called.
        nouns: what several are called.
        display: how a report shows examples: as pictures, numbers, text (see :meth:`texts`), or a table of the texts
            under their :attr:`names`.
        reads: which metrics fit, by what they read (``Metric.reads``).
        quoted: the metrics that a headline quotes, the most telling one first.
        error_name: what :meth:`errors` returns, in words.
        margin: largest share of a null guess's error that counts as clearly better. A random guess beats the null guess
            slightly half the time, so half its error is required.
    """

    kind: ClassVar[str]
    noun: ClassVar[str] = "example"
    nouns: ClassVar[str] = "examples"
    display: ClassVar[Literal["pictures", "numbers", "text", "table"]] = "numbers"
    reads: ClassVar[frozenset[str]]
    quoted: ClassVar[tuple[str, ...]]
    error_name: ClassVar[str]
    margin: ClassVar[float] = 0.5

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one candidate, without the batch axis."""

    @property
    def unit(self) -> float | None:
        """Typical size of one model-input value, for tolerances; None where only the values themselves tell."""
        return None

    @property
    def normalization(self) -> str:
        """How decoded inputs become model inputs, in words; empty where they are used as they are."""
        return ""

    # ------------------------------------------------------------------------------------- for model and attacker

    def start(self, count: int, generator: torch.Generator, std: float = 0.1) -> Tensor:
        """Return model inputs (count, *shape), float64, from which a search starts: normal, of deviation ``std``."""
        return torch.randn(count, *self.shape, generator=generator, dtype=torch.float64) * std

    def neutral(self) -> Tensor:
        """Return the model input (*shape), float64, that says least: where a solver starts that needs one point."""
        return torch.zeros(self.shape, dtype=torch.float64)

    @abstractmethod
    def decode(self, candidates: Tensor) -> Tensor:
        """Return what a person sees of ``candidates`` (..., *shape)."""

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Return the model inputs of decoded ``inputs`` (..., *shape)."""

    def show(self, candidates: Tensor) -> tuple[Tensor, str | None]:
        """Return decoded inputs that were solved exactly, and a sentence where they cannot be inputs of this space."""
        return self.decode(candidates), None

    def project(self, candidates: Tensor) -> Tensor:
        """Return the nearest valid candidates."""
        return candidates

    def plausible(self, candidates: Tensor, tolerance: float = 1e-2) -> Tensor:
        """Return which of ``candidates`` (N, *shape) may be examples, (N,), up to ``tolerance`` in model-input units.

        Where a space knows what its inputs look like, as one-hot groups of a table, a mixture of several is none.
        """
        return candidates.flatten(1).isfinite().all(1)

    def check(self, inputs: Tensor) -> None:
        """Check that model inputs (N, *shape) lie in this space, so that decoding them loses nothing.

        Raises:
            InvalidInput: they have another shape, or values that no candidate has.
        """
        if tuple(inputs.shape[1:]) != tuple(self.shape):
            raise InvalidInput(
                f"The inputs have shape {tuple(inputs.shape[1:])}, those of the space {tuple(self.shape)}; pass a "
                "space of the inputs' shape."
            )

    # ------------------------------------------------------------------------------------------------- for scores

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that fit: those of ``gradleak.metrics`` that read what this space holds."""
        named = (getattr(gradleak.metrics, name) for name in gradleak.metrics.__all__)
        return tuple(metric for metric in named if metric.reads in self.reads)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return decoded inputs as scores compare them: on the CPU, in float64."""
        return inputs.detach().to("cpu", torch.float64)

    def alike(self, guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return prepared reconstructions and private inputs in one shape, where sizes may differ."""
        return guess, truth

    def restored(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Return reconstructed ``inputs`` with what their labels say of them, as a person wants them read."""
        return inputs

    def assign(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return for each of N private examples the index of its reconstruction, one to one, −1 for none."""
        return gradleak.metrics.assign(guess, truth)

    @abstractmethod
    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return one error per example, (N,) in float64, by which examples are ordered and success is decided.

        0 is identical; NaN says that there is no usable guess.
        """

    def cells(self, guess: Tensor, truth: Tensor) -> Tensor | None:
        """Return which pieces (N, K) of each example are right, one for each of :attr:`names`; None without pieces."""
        return None

    def null_guesses(self, truth: Tensor, public: Tensor | None = None) -> tuple[NullGuess, ...]:
        """Return what could be guessed of decoded private inputs ``truth`` (N, *shape) without the update.

        Their mean stands for what everybody knows about such data; ``public`` are decoded public examples (M, *shape).
        """
        if public is None:
            return ()
        if public.shape[1:] != truth.shape[1:] or len(public) == 0:
            raise InvalidInput(
                f"The public {self.nouns} have shape {tuple(public.shape)}, the private ones {tuple(truth.shape)}; "
                f"pass public {self.nouns} of the same shape."
            )
        mean = public.detach().to("cpu", torch.float64).mean(0, keepdim=True)
        return (NullGuess(f"the mean of {len(public)} public {self.nouns}", mean.expand_as(truth)),)

    def better(self, guess: Tensor, truth: Tensor, public: Tensor | None = None) -> Tensor:
        """Return for each example, (N,), whether ``guess`` is clearly better than every null guess."""
        errors = self.errors(guess, truth)
        result = torch.isfinite(errors)
        for null in self.null_guesses(truth, public):
            bars = self.errors(null.inputs, truth)
            if bars.mean() > _HIT:  # A mean that is the truth itself, as of one example, is no guess.
                # An example that a guess hits by chance says nothing alone; there the whole batch is compared.
                result &= errors <= self.margin * torch.where(bars > _HIT, bars, bars.mean())
        return result

    @abstractmethod
    def closeness(self, values: Mapping[str, float | None]) -> tuple[int, str]:
        """Return how close an example with these metric values came, and one sentence on what a person makes of it.

        0: nothing came back, 1: a coarse impression, 2: it came back with visible errors, 3: with hardly any, 4: none.
        """

    # ----------------------------------------------------------------------------------------------- for a person

    @property
    def names(self) -> tuple[str, ...]:
        """What the texts of one example are, for a table; empty where they follow each other as in a sentence."""
        return ()

    def texts(self, inputs: Tensor) -> tuple[tuple[str, ...], ...] | None:
        """Return decoded inputs (N, *shape) as pieces of text; None where pictures or plain numbers are shown."""
        return None

    def lines(self, inputs: Tensor) -> tuple[str, ...]:
        """Return each of the decoded inputs as one line of text; empty where they are no text."""
        return ()
