from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

import gradleak as gl  # noqa: E402
from gradleak.integrations.huggingface import LanguageModel  # noqa: E402
from gradleak.types import Update  # noqa: E402

SENTENCES = [[3, 9, 11, 20, 7], [5, 14, 30]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    shape = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        return LanguageModel(transformers.GPT2LMHeadModel(config))


def certify(model: LanguageModel, factors: dict[str, float] | float) -> gl.Certificate:
    tensors = dict(model.local_training(model, model.batch(SENTENCES)).tensors)
    each = dict.fromkeys(tensors, factors) if isinstance(factors, float) else dict.fromkeys(tensors, 1.0) | factors
    scaled = Update({k: each[k] * t for k, t in tensors.items()})
    observation = gl.ThreatModel().observe(
        model, scaled, space=model.space(), training=model.local_training, batch_size=len(SENTENCES)
    )
    found = gl.attacks.read_sentences().reconstruct(observation)
    assert {tuple(t for t in row if t >= 0) for row in found.inputs.tolist()} == set(map(tuple, SENTENCES))
    assert found.certificate is not None
    return found.certificate


@pytest.mark.parametrize("factor", [1.0, 7 / 8])  # a mean over more tokens, as that of a Trainer
def test_a_common_factor_is_told_and_proves(model: LanguageModel, factor: float) -> None:
    proof = certify(model, factor)
    assert proof.verdict == "proved"
    assert proof.factor == pytest.approx(factor, rel=1e-5)
    assert ("common factor" in proof.reason) == (factor != 1)


def test_a_factor_of_one_tensor_proves_nothing(model: LanguageModel) -> None:
    proof = certify(model, {"transformer.h.1.mlp.c_fc.weight": 1.01})
    assert (proof.verdict, proof.factor) == ("unproved", 1.0)
