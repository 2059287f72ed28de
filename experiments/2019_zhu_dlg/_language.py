"""Language models, sentences and the training of the small BERT."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from gradleak.integrations.huggingface import MaskedLanguageModel, TokenCrossEntropy, WordPiece
from gradleak.papers.experiment import Lab

PAGE = (
    "Registration, volunteer applications, and student travel application open the first week of September. "
    "Child care will be available."
)
MASKED_SHARE = 0.15  # Devlin et al. 2019, Section 3.1
WINDOW = 48  # tokens of a training sequence, [CLS] and [SEP] among them


def tokenizer(lab: Lab) -> WordPiece:
    return WordPiece(lab.file("bert_base_uncased_vocab.txt"))


def bert(vocabulary: int, width: int, layers: int, seed: int) -> BertForMaskedLM:
    """Return a BERT with random weights: width/64 heads, intermediate size 4 × width, as in the published sizes."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # transformers initializes from the global generator only
        return BertForMaskedLM(config)


def _plain(text: str) -> list[str]:
    """Return the paragraphs of WikiText as plain text, headings left out."""
    kept = [s.strip() for s in text.split("\n") if s.strip() and not s.startswith(" =")]
    return [re.sub(r" @(.)@ ", r"\1", s).replace("<unk>", "[UNK]") for s in kept]


def sentences(lab: Lab, shortest: int = 15, longest: int = 30) -> list[list[int]]:
    """Return every sentence of the WikiText-2 test text of so many tokens without an unknown word, as ids."""
    name = "wikitext2_test.txt"
    return _sentences(lab.text(name), tokenizer(lab).vocabulary, shortest, longest)


@functools.lru_cache(maxsize=2)
def _sentences(text: str, vocabulary: Path, shortest: int, longest: int) -> list[list[int]]:
    encode, found = WordPiece(vocabulary).encode, []
    for paragraph in _plain(text):
        for sentence in re.split(r"(?<= [.!?]) ", paragraph):
            if "[UNK]" not in sentence and sentence.endswith((" .", " !", " ?")):
                ids = encode(sentence)
                if shortest <= len(ids) - 2 <= longest and 100 not in ids:
                    found.append(ids)
    return found


def _windows(lab: Lab, name: str) -> Tensor:
    """Return the whole text as windows (M, WINDOW) of ids between [CLS] and [SEP]."""
    words = tokenizer(lab)
    stream = [i for s in _plain(lab.text(name)) for i in words.encode(s)[1:-1]]
    inner = WINDOW - 2
    body = torch.tensor(stream[: len(stream) // inner * inner]).view(-1, inner)
    edge = torch.ones(len(body), 1, dtype=torch.long)
    return torch.cat([edge * words.id("[CLS]"), body, edge * words.id("[SEP]")], 1)


def _masked(windows: Tensor, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    count = math.ceil(MASKED_SHARE * (WINDOW - 2))
    noise = torch.rand(len(windows), WINDOW - 2, generator=generator)
    positions = noise.topk(count).indices.sort().values + 1
    return windows.scatter(1, positions, mask), positions, windows.gather(1, positions)


def trained(lab: Lab, *, width: int, layers: int, steps: int, seed: int) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Train a BERT on the WikiText-2 validation text; the test text measures the loss (nats per masked token)."""
    words = tokenizer(lab)
    judged = 400 if steps >= 100 else 20
    train, test = _windows(lab, "wikitext2_valid.txt"), _windows(lab, "wikitext2_test.txt")[:judged]
    generator = torch.Generator().manual_seed(seed)
    lm = MaskedLanguageModel(bert(len(words), width, layers, seed), share_embeddings=True)
    loss, batch = TokenCrossEntropy(), 16

    def evaluate(windows: Tensor) -> float:
        lm.eval()
        fixed, total = torch.Generator().manual_seed(0), 0.0
        with torch.no_grad():
            for part in windows.split(40):
                inputs, lm.positions, labels = _masked(part, words.id("[MASK]"), fixed)
                total += float(loss(lm(inputs), labels)) * len(part) / len(windows)
        return total

    before = evaluate(test)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # dropout draws from the global generator only
        lm.train()
        for _ in range(steps):
            part = train[torch.randint(len(train), (batch,), generator=generator)]
            inputs, lm.positions, labels = _masked(part, words.id("[MASK]"), generator)
            optimizer.zero_grad(set_to_none=True)
            loss(lm(inputs), labels).backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    notes = {
        "steps": steps,
        "tokens": steps * batch * WINDOW,
        "loss_before": before,
        "loss_train": evaluate(train[:judged]),
        "loss_test": evaluate(test),
    }
    return lm.model.state_dict(), notes


def language_model(
    lab: Lab, *, width: int, layers: int, steps: int, seed: int
) -> tuple[MaskedLanguageModel, dict[str, Any]]:
    """Return a BERT trained for ``steps`` steps (0: random weights) and its training notes."""
    model = bert(len(tokenizer(lab)), width, layers, seed)
    notes: dict[str, Any] = {}
    if steps:
        state, notes = lab.tensors(trained, width=width, layers=layers, steps=steps, seed=seed)
        model.load_state_dict(state)
    return MaskedLanguageModel(model), notes
