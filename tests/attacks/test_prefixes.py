from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

import gradleak as gl  # noqa: E402
from gradleak.attacks.reading import bag_of_tokens  # noqa: E402
from gradleak.errors import NotApplicable  # noqa: E402
from gradleak.integrations.huggingface import LanguageModel, wrap_lora  # noqa: E402
from gradleak.types import FindingKind, Reconstruction, Update  # noqa: E402

VOCABULARY = 200
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA),
}


def build(name: str, seed: int = 0) -> LanguageModel:
    config, options = SHAPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return LanguageModel(getattr(transformers, name)(getattr(transformers, config)(**options)))


def private(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [[3, *torch.randint(5, VOCABULARY, (n - 1,), generator=draw).tolist()] for n in lengths]


def labels_of(model: LanguageModel, count: int) -> list[int] | None:
    return [i % 2 for i in range(count)] if model.task == "classification" else None


def read(
    model: LanguageModel, sentences: list[list[int]], stated: int | None = None, labels: list[int] | None = None
) -> Reconstruction:
    batch = model.batch(sentences, labels or labels_of(model, len(sentences)))
    observation = gl.ThreatModel().observe(
        model,
        model.local_training(model, batch),
        space=model.space(),
        training=model.local_training,
        batch_size=stated or len(sentences),
    )
    return gl.attacks.read_sentences().reconstruct(observation)


def rows(found: Reconstruction) -> list[tuple[int, ...]]:
    return [tuple(t for t in row if t >= 0) for row in found.inputs.tolist()]


@pytest.mark.parametrize("name", SHAPES)
def test_reads_sentences_of_any_lengths_with_their_last_tokens_and_proves_them(name: str) -> None:
    model = build(name)
    sentences = private(1, [9, 5, 7])
    found = read(model, sentences)
    assert Counter(rows(found)) == Counter(map(tuple, sentences))
    assert found.certificate is not None
    assert found.certificate.verdict == "proved", found.certificate.reason
    if model.task == "classification":
        assert found.labels is not None
        truth = dict(zip(map(tuple, sentences), [0, 1, 0], strict=True))
        assert [truth[row] for row in rows(found)] == found.labels.tolist()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPT2ForSequenceClassification"])
def test_one_word_and_repetitions_are_told_apart_and_a_wrong_number_is_not_proved(name: str) -> None:
    model = build(name)
    first = private(2, [7])[0]
    other = [*first[:4], 17, *first[5:]]
    sentences = [first, first, other]
    labels = [0, 0, 1] if model.task == "classification" else None
    found = read(model, sentences, labels=labels)
    assert Counter(rows(found)) == Counter(map(tuple, sentences))
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    for stated in (2, 4):
        wrong = read(model, sentences, stated, labels).certificate
        assert wrong is not None
        assert wrong.verdict == "unproved"
    # A batch in which everything occurs twice has the very same update.
    twice = read(model, sentences, 6, labels).certificate
    assert twice is not None
    assert twice.verdict == "matched"
    assert Counter(twice.examples)["proved"] == 2


def test_a_full_span_and_noise_are_refused_in_words() -> None:
    model = build("GPT2ForSequenceClassification")
    with pytest.raises(NotApplicable, match=r"At least 6\d tokens, width 64: the span .* is full"):
        read(model, private(3, [30, 29, 31]))
    batch = model.batch(private(3, [8]), [1])
    update = model.local_training(model, batch).tensors
    draw = torch.Generator().manual_seed(0)
    noisy = {k: t + 0.3 * t.std() * torch.randn(t.shape, generator=draw) for k, t in update.items()}
    observation = gl.ThreatModel().observe(
        model, noisy, space=model.space(), training=model.local_training, batch_size=1
    )
    with pytest.raises(NotApplicable, match=r"full|no clear rank|not of such"):
        gl.attacks.read_sentences().reconstruct(observation)


def test_the_embedding_names_the_bag_of_tokens() -> None:
    model = build("GPT2ForSequenceClassification")
    sentences = private(4, [6, 8])
    update: Update = model.local_training(model, model.batch(sentences, [0, 1]))
    observation = gl.ThreatModel().observe(
        model, update, space=model.space(), training=model.local_training, batch_size=2
    )
    assert bag_of_tokens(observation, model.space()) == sorted({t for s in sentences for t in s})


def test_bfloat16_updates_are_read_and_findings_say_so() -> None:
    model = build("GPT2ForSequenceClassification")
    batch = model.batch(sentences := private(5, [6]), [0])
    update = {k: t.bfloat16().float() for k, t in model.local_training(model, batch).tensors.items()}
    observation = gl.ThreatModel().observe(
        model, update, space=model.space(), training=model.local_training, batch_size=1
    )
    found = gl.attacks.read_sentences().reconstruct(observation)
    assert Counter(rows(found)) == Counter(map(tuple, sentences))
    assert found.findings[0].kind is FindingKind.TOKENS


@pytest.mark.parametrize("moved", [False, True])
def test_lora_gives_a_sentence_away_in_the_first_round_and_later(moved: bool) -> None:
    pytest.importorskip("peft")
    model = wrap_lora(build("GPT2LMHeadModel"), 12, ["c_attn"])
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if moved and "lora_B" in name:
            p.data = 0.02 * torch.randn(p.shape, generator=draw)
    sentences = private(6, [8])
    found = read(model, sentences)
    assert rows(found) == [tuple(sentences[0])]
    assert found.certificate is not None
    assert found.certificate.verdict == "proved", found.certificate.reason
    with pytest.raises(NotApplicable, match=r"full|no clear rank|not of such"):
        read(model, private(7, [20]))
