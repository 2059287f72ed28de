"""Hugging Face masked language models as gradleak models (extra ``text``)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import InvalidFile, InvalidInput, InvalidModel
from gradleak.spaces import TokenSpace
from gradleak.training import TargetKind

__all__ = ["MaskedLanguageModel", "TokenCrossEntropy", "WordPiece", "from_pretrained"]


@dataclass(frozen=True)
class TokenCrossEntropy:
    """Mean cross-entropy over predicted tokens, in nats; the masked-language-model loss (Devlin et al. 2019, 3.1).

    Targets are ids (N, K), of which ``ignore`` counts for nothing, or probabilities (N, K, V), of which zero rows
    count for nothing.
    """

    ignore: int = -100

    targets = TargetKind.CLASSES
    class_axis = -1

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the loss of logits ``outputs`` (N, K, V)."""
        if not targets.is_floating_point():
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=self.ignore)
        losses = -(targets * outputs.log_softmax(-1)).sum(-1)
        counted = (targets.detach().sum(-1) > 0).to(losses)
        return (losses * counted).sum() / counted.sum()


class MaskedLanguageModel(nn.Module):
    """A masked language model that takes token ids or embeddings and predicts some or all positions.

    The word embeddings, to which the decoder is tied, are not trained unless ``share_embeddings``: the non-zero rows
    of their gradient would give the bag of tokens away. Attention is eager, because fused attention has no second
    derivative, and the copy is in evaluation mode (no dropout).

    Args:
        model: any Hugging Face masked language model; it is copied, not changed.
        positions: (N, K) positions to predict (the masked ones), or (K,) the same for every sentence; None for all.
            Kept as a buffer, which is empty for all.
        share_embeddings: train (and so share) the word embeddings, too.

    Raises:
        InvalidModel: the model has no input or no output embeddings.
    """

    model: Any
    positions: Tensor

    def __init__(self, model: nn.Module, positions: Tensor | None = None, *, share_embeddings: bool = False) -> None:
        super().__init__()
        inner: Any = copy.deepcopy(model).eval()
        self.model = inner
        try:
            table, decoder = inner.get_input_embeddings(), inner.get_output_embeddings()
            inner.set_attn_implementation("eager")
        except (AttributeError, NotImplementedError) as error:
            raise InvalidModel(
                f"{type(model).__name__} is not a Hugging Face masked language model ({error}); pass one such as "
                "BertForMaskedLM."
            ) from error
        if not isinstance(table, nn.Embedding) or not isinstance(decoder, nn.Linear):
            raise InvalidModel(
                f"{type(model).__name__} predicts no tokens through a linear decoder; pass a model with a masked "
                "language-model head, such as BertForMaskedLM."
            )
        table.weight.requires_grad_(share_embeddings)
        decoder.weight.requires_grad_(share_embeddings)
        self.register_buffer("positions", torch.zeros(0, 0, dtype=torch.long) if positions is None else positions)

    @property
    def embeddings(self) -> Tensor:
        """The word embeddings (V, d), detached."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table.detach()

    def at(self, positions: Tensor | None) -> MaskedLanguageModel:
        """Return a copy that predicts ``positions`` (N, K) or (K,) only, or all if None."""
        other = copy.deepcopy(self)
        other.positions = self.positions.new_zeros(0, 0) if positions is None else positions.clone()
        return other

    def space(self, length: int, excluded: Sequence[int] = (), words: Sequence[str] = ()) -> TokenSpace:
        """Return the space of sentences of ``length`` tokens; ``words`` are the texts of all ids, for a reader."""
        return TokenSpace(self.embeddings, length, tuple(excluded), words)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (N, K, V) for ids (N, T) or word embeddings (N, T, d)."""
        embedded = inputs if inputs.is_floating_point() else self.model.get_input_embeddings()(inputs)
        if self.positions.numel() == 0:
            return self.model(inputs_embeds=embedded).logits

        def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
            # Before the vocabulary-sized decoder: predicting unmasked positions would cost most of the time.
            hidden = arguments[0]
            index = self.positions.expand(hidden.shape[0], -1)
            return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

        # First of all hooks, so that others see what the decoder sees.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(select, prepend=True)
        try:
            return self.model(inputs_embeds=embedded).logits
        finally:
            hook.remove()


def from_pretrained(name: str | Path, *, share_embeddings: bool = False) -> MaskedLanguageModel:
    """Load a masked language model from a folder, or by name from the Hugging Face hub, as a gradleak model.

    Only safetensors weights are read; nothing is unpickled and no code of the checkpoint is run.

    Raises:
        InvalidInput: the extra ``text`` is not installed.
        InvalidFile: there is no such checkpoint, or it cannot be read safely.
    """
    try:
        from transformers import AutoModelForMaskedLM
    except ImportError as error:
        raise InvalidInput("Hugging Face models need the extra 'text': pip install 'gradleak[text]'.") from error
    try:
        model = AutoModelForMaskedLM.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidFile(
            f"No masked language model can be loaded from {str(name)!r}; pass a folder with config.json and "
            f"model.safetensors, or a hub name on a machine with a network ({type(error).__name__}: {error})."
        ) from error
    return MaskedLanguageModel(model, share_embeddings=share_embeddings)


@dataclass(frozen=True, eq=False)
class WordPiece:
    """The uncased WordPiece tokenizer of BERT, from its vocabulary file (one token a line; the line is the id).

    Raises:
        InvalidFile: the file is not such a vocabulary.
        InvalidInput: the extra ``text`` is not installed.
    """

    vocabulary: Path

    def __post_init__(self) -> None:
        try:
            from tokenizers.implementations import BertWordPieceTokenizer  # type: ignore[attr-defined]
        except ImportError as error:
            raise InvalidInput("Text needs the extra 'text': pip install 'gradleak[text]'.") from error
        try:
            text = Path(self.vocabulary).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidFile(f"{self.vocabulary} cannot be read as a vocabulary ({error}); pass vocab.txt.") from error
        # Not splitlines(): some tokens are characters that Unicode calls line separators.
        tokens = text.removesuffix("\n").split("\n")
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        lacking = [s for s in special if s not in tokens]
        if lacking or len(set(tokens)) != len(tokens):
            raise InvalidFile(
                f"{self.vocabulary} is no WordPiece vocabulary (it lacks {', '.join(lacking) or 'distinct tokens'}); "
                "pass the vocab.txt of a BERT model."
            )
        ids = {token: i for i, token in enumerate(tokens)}
        object.__setattr__(self, "_tokens", tokens)
        object.__setattr__(self, "_ids", ids)
        object.__setattr__(self, "_tokenizer", BertWordPieceTokenizer(vocab=ids, lowercase=True))

    _tokens: Any = None
    _ids: Any = None
    _tokenizer: Any = None

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` between [CLS] and [SEP]."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the tokens as readable text: continuation pieces joined, special tokens left out."""
        kept = [self._tokens[i] for i in ids if self._tokens[i] not in ("[PAD]", "[CLS]", "[SEP]")]
        return " ".join(kept).replace(" ##", "")

    def id(self, token: str) -> int:
        """Return the id of ``token``.

        Raises:
            InvalidInput: it is not in the vocabulary.
        """
        if token not in self._ids:
            raise InvalidInput(f"The vocabulary has no token {token!r}; encode() splits unknown words into pieces.")
        return int(self._ids[token])

    def mask(self, ids: Sequence[int], share: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Replace a random ``share`` of the tokens between [CLS] and [SEP], rounded up, by [MASK].

        Deviation: Devlin et al. (2019) leave a tenth of the chosen tokens unchanged and randomize another tenth.

        Returns:
            masked ids (T,), chosen positions (K,) ascending, and the tokens that stood there (K,).
        """
        original = torch.tensor(ids)
        count = max(1, math.ceil(share * (len(ids) - 2)))
        positions = (torch.randperm(len(ids) - 2, generator=generator)[:count] + 1).sort().values
        masked = original.clone()
        masked[positions] = self.id("[MASK]")
        return masked, positions, original[positions]
