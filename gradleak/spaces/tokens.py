"""Sentences as the attacker sees them: rows of word embeddings, decoded to the nearest token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics import rouge_1, token_accuracy
from gradleak.metrics.assignment import cheapest
from gradleak.spaces.base import InputSpace, NullGuess

__all__ = ["Spelling", "TokenSpace"]

_NO_WORD = -2
_FEW = 4
"""Tokens with which a model of ids is tried out."""
_PHRASES = (
    "The sentence did not come back.",
    "Half of its words are among those read, but not in their places.",
    "Most words stand where they stood.",
    "Nearly every word stands where it stood: a person would read the sentence.",
    "Every word stands where it stood.",
)


class Spelling(Protocol):
    """What turns text into ids and spells ids out, as a tokenizer does."""

    def encode(self, text: str, longest: int | None = None) -> Sequence[int]:
        """Return the ids of ``text`` as a model takes them, cut after ``longest``."""
        ...

    def pieces(self, ids: Sequence[int]) -> Sequence[str]:
        """Return what each token adds to the text; "##" continues the word before."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the sentence in one line."""
        ...


@dataclass(frozen=True, eq=False)
class TokenSpace(InputSpace):
    """Sentences of ``length`` tokens; candidates are embeddings (T, d), decoded inputs are token ids (T,).

    In ids −1 is padding, at the end of sentences that are shorter than others of their batch.

    Attributes:
        table: (V, d) word embeddings of the model that was sent out.
        length: number of tokens T of the longest sentence, special tokens among them; no sentence is longer where
            ``looked_up``.
        excluded: ids that no sentence contains (unused slots), never decoded to.
        words: the text of every id ("##" continues the word before), or what spells ids out, for a reader; ids are
            shown where it is empty.
        special: ids that are no words (padding, beginning, end): neither scored nor shown.
        samples: (M, T) sentences that the model itself writes, a guess that needs no update; none if None.
        looked_up: whether the model takes ids, of any number up to ``length``, and looks them up itself, so that its
            embeddings may be part of the update.
        masked: whether labels that are no −100 are the tokens that stood in their places, as of a masked model.

    Raises:
        InvalidInput: the table is not a matrix, the length is not positive, or no token is left to decode to.
    """

    table: Tensor
    length: int
    excluded: tuple[int, ...] = ()
    words: Sequence[str] | Spelling = ()
    special: tuple[int, ...] = ()
    samples: Tensor | None = None
    looked_up: bool = False
    masked: bool = False

    kind: ClassVar[str] = "tokens"
    noun: ClassVar[str] = "sentence"
    nouns: ClassVar[str] = "sentences"
    display: ClassVar[Literal["pictures", "numbers", "text", "table"]] = "text"
    reads: ClassVar[frozenset[str]] = frozenset({"tokens"})
    quoted: ClassVar[tuple[str, ...]] = ("token_accuracy", "rouge_1", "rouge_2")
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

    def neutral(self) -> Tensor:
        """Return zero embeddings; a few of them where sentences have any length."""
        tokens = min(self.length, _FEW) if self.looked_up else self.length
        return torch.zeros(tokens, self.table.shape[1], dtype=torch.float64)

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
        directions = F.normalize(self.table.to(candidates), dim=1)
        cosine = torch.nan_to_num(candidates) @ directions.T  # a candidate's own norm changes no maximum
        return cosine.masked_fill(~self._usable().to(candidates.device), -torch.inf).argmax(-1)

    def check(self, inputs: Tensor) -> None:
        """Check the shape of embeddings, or the shape and range of ids (N, T)."""
        if inputs.is_floating_point():
            super().check(inputs)
            return
        found = tuple(inputs.shape[1:])
        if found != (self.length,) and not (self.looked_up and len(found) == 1 and 1 <= found[0] <= self.length):
            raise InvalidInput(
                f"The inputs have shape {found}, not {self.length} token ids each; pass a space of their length."
            )
        padding = inputs == -1
        if not bool(((inputs >= -1) & (inputs < len(self.table))).all()) or bool(padding[:, 0].any()):
            raise InvalidInput(
                f"The inputs have ids outside 0 to {len(self.table) - 1}, the rows of the embedding table; pass ids of "
                "the model's own tokenizer, and -1 for padding after a sentence."
            )
        if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            raise InvalidInput("A sentence goes on behind its padding; pass -1 at the end of rows only.")

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the embeddings (..., T, d) of token ids (..., T), zero for padding; the ids where ``looked_up``."""
        if self.looked_up and not inputs.is_floating_point():
            return inputs
        return self.table[inputs.clamp_min(0)] * (inputs >= 0)[..., None]

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return token ids on the CPU, −2 for padding and special ones, as metrics read them; embeddings are decoded.

        Without ``looked_up``, −1 stays: such a place counts for nothing.
        """
        ids = self.decode(inputs.detach()).to("cpu", torch.long)
        no_word = torch.isin(ids, torch.tensor(self.special, dtype=torch.long))
        return ids.masked_fill(no_word | (ids < 0) if self.looked_up else no_word, _NO_WORD)

    def alike(self, guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return both (·, T), as long as the longest sentence of either."""
        width = max(guess.shape[1], truth.shape[1])
        filled = [F.pad(t, (0, width - t.shape[1]), value=_NO_WORD) for t in (guess, truth)]
        return filled[0], filled[1]

    def restored(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Return the sentences (N, T) with the words behind their masks."""
        if not self.masked or labels is None or labels.shape != inputs.shape:
            return inputs
        return torch.where(labels >= 0, labels.to(inputs), inputs)

    def assign(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return for each sentence its reconstruction: by tokens in their places, and by those it has at all."""
        costs = [2 - token_accuracy(guess, t) - rouge_1(guess, t) for t in (t.expand_as(guess) for t in truth)]
        return cheapest(torch.stack(costs))

    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the share of wrong tokens of each sentence, (N,)."""
        return 1 - token_accuracy(guess, truth)

    def null_guesses(self, truth: Tensor, public: Tensor | None = None) -> tuple[NullGuess, ...]:
        """Return the private batch's most frequent token everywhere, and what the model itself writes."""
        truth = self.prepare(truth)
        usual = truth[truth >= 0].mode().values if bool((truth >= 0).any()) else truth.new_tensor(_NO_WORD)
        guesses = [NullGuess("the most frequent token of the private batch, everywhere", usual.expand_as(truth), True)]
        if self.samples is not None and len(self.samples):
            written, _ = self.alike(self.prepare(self.samples)[:, : truth.shape[1]], truth)
            written = written[torch.arange(len(truth)) % len(written)]
            guesses.append(NullGuess("sentences that the model itself writes", written[self.assign(written, truth)]))
        return tuple(guesses)

    def better(self, guess: Tensor, truth: Tensor, public: Tensor | None = None) -> Tensor:
        """Return which sentences are clearly better than every guess: by tokens in their places, or wherever."""
        result = torch.ones(len(truth), dtype=torch.bool)
        for null in self.null_guesses(truth, public):
            clear = [
                1 - metric(guess, truth) <= self.margin * (1 - metric(null.inputs, truth))
                for metric in (token_accuracy, rouge_1)
            ]
            # A guess that is the sentence itself, as of one word repeated, tells nothing.
            result &= clear[0] | clear[1] | (null.inputs == truth).all(1)
        return result

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
        return tuple(tuple(self._spell(row)) for row in self.prepare(inputs).tolist())

    def lines(self, inputs: Tensor) -> tuple[str, ...]:
        """Return each sentence as one line of text."""
        rows = self.prepare(inputs).tolist()
        if isinstance(self.words, Sequence):
            return tuple(" ".join(word for word in self._spell(row) if word).replace(" ##", "") for row in rows)
        return tuple(self.words.decode([token for token in row if token >= 0]) for row in rows)

    def _spell(self, ids: list[int]) -> Sequence[str]:
        words = self.words
        if isinstance(words, Sequence):
            return ["" if t < 0 else words[t] if t < len(words) else str(t) for t in ids]
        spelled = iter(words.pieces([token for token in ids if token >= 0]))
        return ["" if token < 0 else next(spelled) for token in ids]
