"""Sentences as the attacker sees them: rows of word embeddings, decoded to the nearest token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics import token_accuracy
from gradleak.spaces.base import InputSpace, NullGuess

__all__ = ["TokenSpace"]

_PHRASES = (
    "The sentence did not come back.",
    "Half of its words are among those read, but not in their places.",
    "Most words stand where they stood.",
    "Nearly every word stands where it stood: a person would read the sentence.",
    "Every word stands where it stood.",
)


@dataclass(frozen=True, eq=False)
class TokenSpace(InputSpace):
    """Sentences of ``length`` tokens; candidates are embeddings (T, d), decoded inputs are token ids (T,).

    Attributes:
        table: (V, d) word embeddings of the model that was sent out.
        length: number of tokens T, special tokens among them.
        excluded: ids that no sentence contains (padding, unused slots), never decoded to.
        words: the text of every id, for a reader; ids are shown where it is empty.

    Raises:
        InvalidInput: the table is not a matrix, the length is not positive, or no token is left to decode to.
    """

    table: Tensor
    length: int
    excluded: tuple[int, ...] = ()
    words: Sequence[str] = ()

    kind: ClassVar[str] = "tokens"
    noun: ClassVar[str] = "sentence"
    nouns: ClassVar[str] = "sentences"
    display: ClassVar[Literal["pictures", "numbers", "text", "table"]] = "text"
    reads: ClassVar[frozenset[str]] = frozenset({"tokens"})
    quoted: ClassVar[tuple[str, ...]] = ("token_accuracy",)
    error_name: ClassVar[str] = "share of wrong tokens"

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.length < 1:
            raise InvalidInput(
                f"A token space needs a (V, d) embedding table and a positive length, not shape "
                f"{tuple(self.table.shape)} and {self.length}; pass the model's word embeddings."
            )
        if not bool(torch.isfinite(self.table).all()) or not bool(self._usable().any()):
            raise InvalidInput("The embedding table has no finite non-zero row to decode to; pass a usable model.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, d)."""
        return (self.length, int(self.table.shape[1]))

    def _usable(self) -> Tensor:
        # The cosine to a zero row ([PAD] of a fresh table) is 0/0 and would win every maximum.
        usable = self.table.norm(dim=1) > 0
        usable[list(self.excluded)] = False
        return usable

    def decode(self, candidates: Tensor) -> Tensor:
        """Return the ids (..., T) of the tokens whose embeddings have the largest cosine with ``candidates``.

        Ids are returned as they are.
        """
        if not candidates.is_floating_point():
            return candidates
        directions = torch.nn.functional.normalize(self.table.to(candidates), dim=1)
        cosine = torch.nan_to_num(candidates) @ directions.T  # a candidate's own norm changes no maximum
        return cosine.masked_fill(~self._usable().to(candidates.device), -torch.inf).argmax(-1)

    def check(self, inputs: Tensor) -> None:
        """Check the shape of embeddings, or the shape and range of ids (N, T)."""
        if inputs.is_floating_point():
            super().check(inputs)
        elif tuple(inputs.shape[1:]) != (self.length,):
            raise InvalidInput(
                f"The inputs have shape {tuple(inputs.shape[1:])}, not {self.length} token ids each; pass a space of "
                "their length."
            )
        elif not bool(((inputs >= 0) & (inputs < len(self.table))).all()):
            raise InvalidInput(
                f"The inputs have ids outside 0 to {len(self.table) - 1}, the rows of the embedding table; pass ids of "
                "the model's own tokenizer."
            )

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the embeddings (..., T, d) of token ids (..., T)."""
        return self.table[inputs]

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return token ids on the CPU; embeddings are decoded, −1 stays: it counts for nothing."""
        return self.decode(inputs.detach()).to("cpu", torch.long)

    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the share of wrong tokens of each sentence, (N,)."""
        return 1 - token_accuracy(guess, truth)

    def null_guesses(self, truth: Tensor, public: Tensor | None = None) -> tuple[NullGuess, ...]:
        """Return none: no sentence guessed without the update has half of its words in their places."""
        return ()

    def closeness(self, values: Mapping[str, float | None]) -> tuple[int, str]:
        """Return 4 for every token in its place, 3 from nine tenths on, 2 from half, 1 where half occur at all."""
        placed, known = values.get("token_accuracy"), values.get("token_recall")
        if placed is not None and placed >= 0.5:
            level = 2 + (placed >= 0.9) + (placed >= 1)
        else:
            level = int(known is not None and known >= 0.5)
        return level, _PHRASES[level]

    def texts(self, inputs: Tensor) -> tuple[tuple[str, ...], ...]:
        """Return the words of each sentence (ids where no words are known); an empty one where nothing counts."""

        def word(token: int) -> str:
            return "" if token < 0 else self.words[token] if token < len(self.words) else str(token)

        return tuple(tuple(map(word, row)) for row in self.prepare(inputs).tolist())
