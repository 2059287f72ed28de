"""Hugging Face language models as gradleak models (extra ``text``)."""

from __future__ import annotations

import copy
import enum
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import InvalidFile, InvalidInput, InvalidModel, reason
from gradleak.spaces import TokenSpace
from gradleak.spaces.tokens import Spelling
from gradleak.training import CrossEntropy, FedSGD, Loss, MeanSquaredError, TargetKind
from gradleak.types import Batch

__all__ = [
    "LanguageModel",
    "MaskedLanguageModel",
    "Task",
    "TokenCrossEntropy",
    "WordPiece",
    "from_pretrained",
    "load_adapter",
    "load_folder",
    "quiet",
    "sample",
    "wrap_lora",
]


@dataclass(frozen=True)
class TokenCrossEntropy:
    """Mean cross-entropy over predicted tokens, in nats; the masked-language-model loss (Devlin et al. 2019, 3.1).

    Targets are ids (N, K), of which ``ignore`` counts for nothing, or probabilities (N, K, V), of which zero rows
    count for nothing. With ``shift`` of 1 the output at a position predicts the next one's target, as causal models
    do: targets are then the sentences themselves.
    """

    ignore: int = -100
    shift: int = 0

    targets = TargetKind.CLASSES
    class_axis = -1

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the loss of logits ``outputs`` (N, K, V)."""
        outputs, targets = outputs[:, : outputs.shape[1] - self.shift], targets[:, self.shift :]
        if outputs.dtype in (torch.float16, torch.bfloat16):  # as the Hugging Face losses do
            outputs = outputs.float()
        if not targets.is_floating_point():
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=self.ignore)
        losses = -(targets * outputs.log_softmax(-1)).sum(-1)
        counted = (targets.detach().sum(-1) > 0).to(losses)
        return (losses * counted).sum() / counted.sum()


class Task(enum.StrEnum):
    """What a language model is trained for."""

    CAUSAL = "causal"
    """Predict each next token."""
    MASKED = "masked"
    """Predict the tokens behind masks."""
    CLASSIFICATION = "classification"
    """One class (or one number) for each sentence."""
    TOKEN_CLASSIFICATION = "token-classification"
    """One class for each token."""

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads such models."""
        return f"AutoModelFor{_HEADS[self]}"


_HEADS = {
    Task.CAUSAL: "CausalLM",
    Task.MASKED: "MaskedLM",
    Task.CLASSIFICATION: "SequenceClassification",
    Task.TOKEN_CLASSIFICATION: "TokenClassification",
}
_CAUSAL = "LMHeadModel"
"""What some causal models (GPT-2) are called instead."""


class LanguageModel(nn.Module):
    """A Hugging Face language model (or one with PEFT adapters) as a gradleak model, in evaluation mode.

    It shares modules and parameters with the model it was made of, so that ``named_parameters()`` gives the very names
    of that model. Attention is eager, since fused attention has no second derivative. What is trainable is left as it
    is: of a PEFT model that is A and B of its adapters (and what they save besides).

    An input is a row of token ids (T,); shorter sentences of a batch are filled up with −1 at their end, which no token
    attends to and which counts for nothing, whatever the client's own padding token is. Rows of embeddings (T, d) are
    taken, too, for attacks that search them. Outputs are logits: (N, T, V) of a causal or masked model, (N, C) of a
    classifier, (N, T, C) of a token classifier. Labels are, as :attr:`loss` takes them and :meth:`batch` makes them:
    the sentences themselves with −100 for −1 (causal), the ids behind the masks with −100 elsewhere (masked), classes
    (N,), or classes (N, T) with −100 elsewhere.

    Args:
        model: a Hugging Face model with a head for ``task``, or a PEFT model around one.
        task: what it is trained for; None takes it from the model's class.

    Raises:
        InvalidModel: it is no such model, or its class does not say what it is trained for.

    Example:
        >>> model = load_folder("my-model")                                    # doctest: +SKIP
        >>> batch = model.batch([tokenizer(t)["input_ids"] for t in texts])    # doctest: +SKIP
        >>> update = model.local_training(model, batch)                        # doctest: +SKIP
        >>> seen = gl.ThreatModel().observe(                                   # doctest: +SKIP
        ...     model, update, space=model.space(), training=model.local_training, batch_size=len(texts)
        ... )
        >>> gl.attacks.read_sentences().reconstruct(seen).inputs               # doctest: +SKIP
    """

    inner: Any
    task: Task

    def __init__(self, model: nn.Module, task: Task | str | None = None) -> None:
        super().__init__()
        inner: Any = model
        try:
            config, table = inner.config, inner.get_input_embeddings()
            inner.set_attn_implementation("eager")
        except (AttributeError, NotImplementedError) as error:
            raise InvalidModel(
                f"{type(model).__name__} is not a Hugging Face language model ({error}); pass one such as "
                "GPT2LMHeadModel or BertForSequenceClassification."
            ) from error
        if not isinstance(table, nn.Embedding):
            raise InvalidModel(f"{type(model).__name__} looks no tokens up; pass a model of token ids.")
        base = getattr(inner, "get_base_model", lambda: inner)()
        self.task = _task_of(type(base).__name__) if task is None else Task(task)
        # The same dictionaries, not the module: names stay those of the model, and what replaces a parameter for one
        # call (torch.func.functional_call) replaces it there, too.
        object.__setattr__(self, "inner", inner)
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self._pad: int = 0 if config.pad_token_id is None else int(config.pad_token_id)
        self._classes = int(getattr(config, "num_labels", 2))
        self.positions_limit: int = _limit(config, len(table.weight))
        self.eval()

    def train(self, mode: bool = True) -> LanguageModel:
        """Set the mode of the model and of everything in it."""
        self.inner.training = mode
        super().train(mode)
        return self

    @property
    def embeddings(self) -> Tensor:
        """The word embeddings (V, d), detached."""
        table: Tensor = self.inner.get_input_embeddings().weight
        return table.detach()

    @property
    def loss(self) -> Loss:
        """The loss of the task, as the Hugging Face model computes it from ``labels``."""
        if self.task is Task.CLASSIFICATION:
            return CrossEntropy() if self._classes > 1 else MeanSquaredError()
        return TokenCrossEntropy(shift=int(self.task is Task.CAUSAL))

    @property
    def local_training(self) -> FedSGD:
        """One gradient of :attr:`loss`, the honest client's plain case."""
        return FedSGD(self.loss)

    def space(
        self,
        length: int | None = None,
        words: Sequence[str] | Spelling = (),
        special: Sequence[int] = (),
    ) -> TokenSpace:
        """Return the space of sentences of at most ``length`` tokens (None: as many as the model has positions for).

        ``words`` and ``special`` are those of :class:`TokenSpace`.
        """
        limit = length or self.positions_limit
        return TokenSpace(self.embeddings, limit, words=words, special=tuple(special), looked_up=True)

    def batch(self, sentences: Sequence[Sequence[int]], labels: Any = None) -> Batch:
        """Return sentences of any lengths as a batch, filled up with −1, with labels as :attr:`loss` takes them.

        ``labels`` are classes for each sentence, or for each token of each sentence; a causal model's are the sentences
        themselves.

        Raises:
            InvalidInput: there are no sentences or no labels, or they do not fit.
        """
        ids = _padded(sentences, -1)
        if labels is None and self.task is Task.CAUSAL:
            return Batch(ids, ids.masked_fill(ids < 0, -100))
        if labels is None:
            raise InvalidInput(
                f"A {self.task} model learns from labels, which its sentences do not show; pass labels=."
            )
        if self.task is Task.CLASSIFICATION:
            return Batch(ids, torch.as_tensor(labels))
        return Batch(ids, _padded(labels, -100))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of ids (N, T), where −1 is padding, or of word embeddings (N, T, d)."""
        if inputs.is_floating_point():
            # Not as inputs_embeds, which some classifiers take only with a warning: as what the table gives.
            filler = 1 if self._pad == 0 else 0
            hook = self.inner.get_input_embeddings().register_forward_hook(lambda *_: inputs)
            try:
                return self.inner(input_ids=inputs.new_full(inputs.shape[:2], filler, dtype=torch.long)).logits
            finally:
                hook.remove()
        told = inputs >= 0
        ids = torch.where(told, inputs, self._pad)
        return self.inner(input_ids=ids, attention_mask=told.long()).logits


def _task_of(name: str) -> Task:
    """Return what a model's class is trained for.

    Raises:
        InvalidModel: its name does not say.
    """
    for task, head in _HEADS.items():
        if name.endswith(f"For{head}") or (task is Task.CAUSAL and name.endswith(_CAUSAL)):
            return task
    raise InvalidModel(f"{name} does not say what the model is trained for; state the task ({', '.join(_HEADS)}).")


def _limit(config: Any, otherwise: int) -> int:
    """Return how many tokens a sentence may have at most."""
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((int(n) for n in found if n), otherwise)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) == 0:
        raise InvalidInput("A batch takes sentences of at least one token each; leave empty ones out.")
    filled = [[*map(int, row), *[filler] * (max(lengths) - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long)


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
    return MaskedLanguageModel(_load(name, Task.MASKED, local=False), share_embeddings=share_embeddings)


def load_folder(path: str | Path, task: Task | str | None = None) -> LanguageModel:
    """Load a language model from a folder that ``save_pretrained`` wrote; nothing is fetched from a network.

    Only safetensors weights are read; nothing is unpickled and no code of the checkpoint is run. ``task`` is what the
    model was trained for; None takes it from the class that ``config.json`` names.

    Raises:
        InvalidInput: the extra ``text`` is not installed.
        InvalidModel: ``config.json`` does not name a class with a task.
        InvalidFile: there is no such folder, it cannot be read safely, or weights are missing.
    """
    folder = Path(path)
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise InvalidFile(
            f"The weights in {str(path)!r} are pickled ({pickled[0]}), which is never read; load the model where you "
            "trust it, and write it again with save_pretrained()."
        )
    if not (folder / "config.json").is_file():
        raise InvalidFile(f"{str(path)!r} has no config.json; pass a folder that save_pretrained() wrote.")
    if task is None:
        try:
            named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
            name = str(named[0]) or "A model without architectures in config.json"
        except (ValueError, AttributeError, LookupError) as error:
            raise InvalidFile(f"{folder / 'config.json'} is no configuration of a model; save it anew.") from error
        task = _task_of(name)
    return LanguageModel(_load(folder, Task(task), local=True), task)


@torch.no_grad()
def sample(
    model: LanguageModel, count: int, length: int, generator: torch.Generator, mask: int | None = None
) -> Tensor | None:
    """Return ``count`` sentences (N, ≤ length) that the model itself writes; None of a classifier, which writes none.

    A causal model draws token after token, a masked one all tokens behind tokens ``mask`` at once.
    """
    config, length = model.inner.config, min(length, model.positions_limit)
    device = model.embeddings.device

    def draw(logits: Tensor) -> Tensor:
        chances = logits.double().softmax(-1).cpu().flatten(0, -2)
        return torch.multinomial(chances, 1, generator=generator).view(logits.shape[:-1]).to(device)

    if model.task is Task.MASKED and mask is not None:
        return draw(model(torch.full((count, length), mask, device=device)))
    if model.task is not Task.CAUSAL:
        return None
    begin = getattr(config, "bos_token_id", None)
    first = torch.randint(len(model.embeddings), (count, 1), generator=generator)
    ids = (first if begin is None else torch.full_like(first, int(begin))).to(device)
    step, past = ids, None
    while ids.shape[1] < length:
        out = model.inner(input_ids=step, attention_mask=torch.ones_like(ids), past_key_values=past, use_cache=True)
        step, past = draw(out.logits[:, -1:]), out.past_key_values
        ids = torch.cat([ids, step], 1)
    return ids


def load_adapter(model: LanguageModel, path: str | Path) -> LanguageModel:
    """Return ``model`` with the PEFT adapter of a folder that ``save_pretrained`` wrote, whose A and B are trained.

    The base model is changed in place: PEFT replaces the layers that it adapts.

    Raises:
        InvalidInput: the extra ``text`` is not installed.
        InvalidFile: there is no such adapter, it does not fit the model, or its weights are pickled.
    """
    folder = Path(path)
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise InvalidFile(
            f"{str(path)!r} has no adapter_config.json with adapter_model.safetensors; pass a folder that PEFT's "
            "save_pretrained() wrote."
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InvalidInput("Adapters need the extra 'text': pip install 'gradleak[text]'.") from error
    try:
        with warnings.catch_warnings():  # of PEFT about transformers' names
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model.inner, str(folder), is_trainable=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InvalidFile(
            f"The adapter in {str(path)!r} does not fit the model ({reason(error)}); pass the base model that it was "
            "made for."
        ) from error
    return LanguageModel(adapted, model.task)


def wrap_lora(model: LanguageModel, rank: int, targets: Sequence[str] | str | None = None) -> LanguageModel:
    """Return ``model`` with LoRA of this rank (Hu et al. 2022) in the layers ``targets`` (None: PEFT's own choice).

    A is random and B zero, as a first round has them. The base model is changed in place: PEFT replaces its layers.

    Raises:
        InvalidInput: the extra ``text`` is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InvalidInput("Adapters need the extra 'text': pip install 'gradleak[text]'.") from error
    chosen = targets if targets is None or isinstance(targets, str) else list(targets)
    try:
        with warnings.catch_warnings():  # PEFT sees by itself which way round a layer's weight is, and says so.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model.inner, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen))
        return LanguageModel(adapted, model.task)
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"LoRA cannot be put into {targets!r} ({reason(error)}); name its linear layers.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from telling: its bars and tables say less than one sentence does."""
    import transformers

    telling: Any = transformers.utils.logging
    shown, level = telling.is_progress_bar_enabled(), telling.get_verbosity()
    telling.disable_progress_bar()
    telling.set_verbosity_error()
    try:
        yield
    finally:
        telling.set_verbosity(level)
        if shown:
            telling.enable_progress_bar()


def _load(name: str | Path, task: Task, *, local: bool) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InvalidInput("Hugging Face models need the extra 'text': pip install 'gradleak[text]'.") from error
    try:
        with quiet():
            model, info = getattr(transformers, task.auto_class).from_pretrained(
                name,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidFile(
            f"No {task} language model can be loaded from {str(name)!r}; pass a folder with config.json and "
            f"model.safetensors, or a hub name on a machine with a network ({reason(error)[:200]})."
        ) from error
    lacking = sorted({*info["missing_keys"], *(k for k, *_ in info["mismatched_keys"])})
    if lacking:
        raise InvalidFile(
            f"The weights in {str(name)!r} do not fit their config.json: {', '.join(map(repr, lacking[:3]))}"
            f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''} would be random; save the whole model."
        )
    return model


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
