from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

import gradleak as gl  # noqa: E402
from gradleak.exact.attention import companions  # noqa: E402
from gradleak.integrations.huggingface import LanguageModel  # noqa: E402
from gradleak.types import Reconstruction  # noqa: E402

VOCABULARY, MASK = 200, 4


def build(name: str, moved: float = 0.0) -> LanguageModel:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = LanguageModel(getattr(transformers, name)(config))
        for p in model.parameters():  # as far from their start as training would move them
            p.data += moved * torch.randn_like(p)
    return model


def private(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [[2, *torch.randint(5, VOCABULARY, (n - 2,), generator=draw).tolist(), 3] for n in lengths]


def read(model: LanguageModel, sentences: list[list[int]], labels: list[int] | list[list[int]]) -> Reconstruction:
    update = model.local_training(model, model.batch(sentences, labels))
    observation = gl.ThreatModel().observe(
        model, update, space=model.space(), training=model.local_training, batch_size=len(sentences)
    )
    return gl.attacks.read_sentences().reconstruct(observation)


def rows(found: Reconstruction) -> list[tuple[int, ...]]:
    return [tuple(t for t in row if t >= 0) for row in found.inputs.tolist()]


@pytest.mark.parametrize("moved", [0.0, 0.02])
def test_a_classifiers_sentences_of_any_lengths_are_told_apart_and_proved(moved: float) -> None:
    sentences, labels = private([9, 6, 11, 8]), [0, 1, 1, 0]
    found = read(build("BertForSequenceClassification", moved), sentences, labels)
    assert found.labels is not None
    assert found.certificate is not None
    guess = zip(rows(found), found.labels.tolist(), strict=True)
    assert Counter(guess) == Counter(zip(map(tuple, sentences), labels, strict=True))
    assert found.certificate.verdict == "proved", found.certificate.reason


def test_two_sentences_that_differ_in_one_word_both_come_back() -> None:
    first = private([9])[0]
    sentences = [first, [*first[:4], 77, *first[5:]]]
    found = read(build("BertForSequenceClassification"), sentences, [0, 1])
    assert Counter(rows(found)) == Counter(map(tuple, sentences))
    assert found.certificate is not None
    assert found.certificate.verdict == "proved", found.certificate.reason


def test_masked_words_are_read_in_a_batch() -> None:
    sentences = private([9, 8, 7])
    labels = [[-100] * len(s) for s in sentences]
    for s, row, at in zip(sentences, labels, (2, 2, 5), strict=True):
        row[at], s[at] = s[at], MASK
    found = read(build("BertForMaskedLM"), sentences, labels)
    assert found.labels is not None
    assert found.certificate is not None
    assert Counter(rows(found)) == Counter(map(tuple, sentences))
    assert found.certificate.verdict == "proved", found.certificate.reason
    wanted = dict(zip(map(tuple, sentences), labels, strict=True))
    for row, got in zip(rows(found), found.labels.tolist(), strict=True):
        assert got[: len(row)] == wanted[row]


def test_companions_are_found_among_many() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(4, 120, 16, generator=draw, dtype=torch.float64)
    positions = torch.arange(120) % 12
    members = [3, 16, 41, 66, 103]
    weights = torch.randn(4, 5, generator=draw, dtype=torch.float64)
    delta = torch.einsum("hm,hmd->hd", weights, keys[:, members])
    chosen, left = companions([delta], [keys], positions, 12)
    assert sorted(chosen) == members
    assert left < 1e-10
