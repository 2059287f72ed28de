from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

import gradleak as gl  # noqa: E402
from gradleak.attacks.sentences import ReadSentences  # noqa: E402
from gradleak.errors import NotApplicable  # noqa: E402
from gradleak.integrations.huggingface import MaskedLanguageModel, TokenCrossEntropy, from_pretrained  # noqa: E402
from gradleak.spaces import TensorSpace  # noqa: E402
from gradleak.threat import Observation, ThreatModel  # noqa: E402
from gradleak.training import FedSGD  # noqa: E402
from gradleak.types import Batch, Update, UpdateKind  # noqa: E402

MASK = 4
TRAINING = FedSGD(TokenCrossEntropy())


def model(width: int = 64, layers: int = 2, trained: bool = False) -> MaskedLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(3)
        config = transformers.BertConfig(
            vocab_size=300,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=16,
        )
        own = transformers.BertForMaskedLM(config)
        if trained:  # weights and biases as far from their start as training would move them
            for p in own.parameters():
                p.data += 0.05 * torch.randn_like(p)
    return MaskedLanguageModel(own)


def private(size: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (size, length), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3
    positions = torch.stack([torch.randperm(length - 2, generator=generator)[:2] + 1 for _ in range(size)])
    labels = ids.gather(1, positions)
    return ids.scatter(1, positions, MASK), positions, labels


def observe(lm: MaskedLanguageModel, ids: Tensor, positions: Tensor, labels: Tensor) -> Observation:
    update = TRAINING(lm.at(positions), Batch(ids, labels))
    return ThreatModel().observe(lm, update, space=lm.space(ids.shape[1]), training=TRAINING, batch_size=len(ids))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_reads_sentences_and_labels(size: int, dtype: torch.dtype, trained: bool) -> None:
    lm = model(trained=trained).to(dtype)
    ids, positions, labels = private(size, 10, seed=size)
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    state = torch.random.get_rng_state()
    found = ReadSentences(mask=MASK).reconstruct(observe(lm, ids, positions, labels))
    assert found.labels is not None
    assert found.certificate is not None
    truth = [(tuple(s), tuple(y)) for s, y in zip(ids.tolist(), _everywhere(ids, positions, labels), strict=True)]
    guess = [(tuple(s), tuple(y)) for s, y in zip(found.inputs.tolist(), found.labels.tolist(), strict=True)]
    assert sorted(guess) == sorted(truth)
    assert found.certificate.verdict == "proved"
    assert found.certificate.residual < 1e3 * torch.finfo(dtype).eps
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in lm.state_dict().items())
    assert not any(m._forward_pre_hooks for m in lm.modules())


def _everywhere(ids: Tensor, positions: Tensor, labels: Tensor) -> list[list[int]]:
    return torch.full_like(ids, -100).scatter(1, positions, labels).tolist()


def test_the_mask_token_is_found_and_auto_reads() -> None:
    lm = model(trained=True)
    ids, positions, labels = private(1, 10, seed=4)
    seen = observe(lm, ids, positions, labels)
    everywhere = torch.tensor(_everywhere(ids, positions, labels))
    for attack in (gl.attacks.read_sentences(), gl.attacks.auto()):
        found = attack.reconstruct(seen)
        assert torch.equal(found.inputs, ids)
        assert found.labels is not None
        assert torch.equal(found.labels, everywhere)
        assert found.certificate is not None
        assert found.certificate.verdict == "proved"


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_says_which_positions_it_predicts(size: int) -> None:
    lm = model()
    ids, positions, labels = private(size, 10, seed=5)
    client = gl.Client(lm.at(positions), Batch(ids, labels), TRAINING)
    leak = gl.simulate(client, gl.attacks.read_sentences(), space=lm.space(10))
    found = leak.reconstruction
    assert torch.equal(found.inputs[gl.metrics.assign(found.inputs, leak.truth.inputs)], ids)
    if size == 1:
        assert found.labels is not None
        assert torch.equal(found.labels, labels)
        assert found.certificate is not None
        assert found.certificate.verdict == "proved"


FAMILIES = {
    "Albert": {"embedding_size": 32},
    "Bert": {},
    "Electra": {"embedding_size": 64},
    "Roberta": {},
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_any_checkpoint(family: str, size: int, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        **FAMILIES[family],
    )
    own = getattr(transformers, f"{family}ForMaskedLM")(config)
    generator = torch.Generator().manual_seed(0)
    for p in own.parameters():
        # Norms scale by about one, and biases are nowhere near their start of zero.
        p.data = 0.05 * torch.randn(p.shape, generator=generator) + (p.ndim == 1)
    own.save_pretrained(tmp_path)
    observation = observe(from_pretrained(tmp_path), *(private_ := private(size, 10, seed=7)))
    if family == "Albert" and size > 1:
        with pytest.raises(NotApplicable, match="the same one throughout"):
            gl.attacks.read_sentences().reconstruct(observation)
        return
    found = gl.attacks.read_sentences().reconstruct(observation)
    assert torch.equal(found.inputs[gl.metrics.assign(found.inputs, private_[0])], private_[0])
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"


def test_noise_is_not_read_as_text() -> None:
    lm = model()
    observation = observe(lm, *private(1, 10, seed=0))
    generator = torch.Generator().manual_seed(0)
    noisy = {k: v + v.std() * torch.randn(v.shape, generator=generator) for k, v in observation.update.tensors.items()}
    seen = ThreatModel().observe(lm, Update(noisy), space=lm.space(10), training=TRAINING, batch_size=1)
    for attack in (ReadSentences(mask=MASK), gl.attacks.auto()):
        with pytest.raises(NotApplicable, match="use matching"):
            attack.reconstruct(seen)


def test_a_changed_update_is_not_proved() -> None:
    lm = model()
    observation = observe(lm, *private(1, 10, seed=0))
    changed = dict(observation.update.tensors)
    name = next(k for k in changed if "layer.1.output.dense.weight" in k)
    changed[name] = changed[name] * 1.5  # a layer that the reading does not look at
    found = ReadSentences(mask=MASK).reconstruct(
        ThreatModel().observe(lm, Update(changed), space=lm.space(10), training=TRAINING, batch_size=1)
    )
    assert found.certificate is not None
    assert found.certificate.verdict == "matched"
    assert found.certificate.factors[name] == pytest.approx(1.5, rel=1e-4)


def test_where_it_does_not_apply() -> None:
    lm = model()
    ids, positions, labels = private(1, 10, seed=0)
    observation = observe(lm, ids, positions, labels)
    threat, update = ThreatModel(), observation.update
    delta = Update(update.tensors, UpdateKind.WEIGHT_DELTA)
    with pytest.raises(NotApplicable, match="weight delta"):
        ReadSentences().reconstruct(threat.observe(lm, delta, space=lm.space(10), training=TRAINING, batch_size=1))
    with pytest.raises(NotApplicable, match="TokenSpace"):
        ReadSentences().reconstruct(
            threat.observe(lm, update, space=TensorSpace((10, 64)), training=TRAINING, batch_size=1)
        )
    with pytest.raises(NotApplicable, match="single attention layer"):
        ReadSentences(mask=MASK).reconstruct(observe(model(layers=1), *private(2, 10, seed=0)))
    with pytest.raises(NotApplicable, match="full rank"):
        ReadSentences(mask=MASK).reconstruct(observe(model(width=16), *private(4, 10, seed=0)))
