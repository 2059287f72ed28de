"""A GPT-2 in miniature with a tokenizer of whole words, for demonstrations and tests (extra ``text``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradleak.errors import InvalidInput
from gradleak.integrations.huggingface import quiet

__all__ = ["write_small_gpt2"]


def write_small_gpt2(
    folder: Path, texts: Sequence[str], seed: int = 0, *, width: int = 64, layers: int = 2
) -> tuple[Any, Any]:
    """Write a GPT-2 with random weights into ``folder``, and a tokenizer of the words of ``texts``; return both.

    It has the shape of GPT-2 (Radford et al. 2019) with 64 positions, no dropout, and the words as its tokens.

    Raises:
        InvalidInput: the extra ``text`` is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        fast: Any = PreTrainedTokenizerFast
    except ImportError as error:
        raise InvalidInput("Text needs the extra 'text': pip install 'gradleak[text]'.") from error
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]"), "isolated")
    words.decoder = decoders.Fuse()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"], show_progress=False))
    tokenizer = fast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=width, n_layer=layers, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with quiet():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model: Any = GPT2LMHeadModel(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer
