from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

from gradleak.errors import InvalidFile, InvalidInput, InvalidModel  # noqa: E402
from gradleak.integrations.huggingface import (  # noqa: E402
    MaskedLanguageModel,
    TokenCrossEntropy,
    WordPiece,
    from_pretrained,
)
from gradleak.training import FedSGD, check_reproducible, parameters  # noqa: E402
from gradleak.types import Batch  # noqa: E402

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=20)).double()


def roberta() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, max_position_embeddings=20)).double()


def distilbert() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        config = transformers.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        return transformers.DistilBertForMaskedLM(config).double()


IDS = torch.tensor([[2, 11, 12, 13, 4, 3], [2, 21, 4, 23, 24, 3]])
POSITIONS = torch.tensor([[4, 1], [2, 3]])
LABELS = torch.tensor([[14, 11], [22, 23]])


@pytest.mark.parametrize("factory", [bert, roberta, distilbert])
def test_predicts_what_the_model_predicts(factory: object) -> None:
    model = factory().eval()  # type: ignore[operator]
    before = copy.deepcopy(model.state_dict())
    lm = MaskedLanguageModel(model)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.allclose(lm(IDS), expected, atol=1e-12)
        table = lm.embeddings
        assert torch.allclose(lm(table[IDS]), expected, atol=1e-12)
        chosen = torch.stack([expected[i, POSITIONS[i]] for i in range(2)])
        assert torch.allclose(lm.at(POSITIONS)(IDS), chosen, atol=1e-12)
        assert torch.allclose(lm.at(POSITIONS[:1])(IDS), torch.stack([e[POSITIONS[0]] for e in expected]), atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not lm.model.get_output_embeddings()._forward_pre_hooks
    check_reproducible(lm)


def test_shares_everything_but_the_word_embeddings() -> None:
    model = bert()
    lm, all_of_it = MaskedLanguageModel(model), MaskedLanguageModel(model, share_embeddings=True)
    assert set(parameters(all_of_it)) - set(parameters(lm)) == {"model.bert.embeddings.word_embeddings.weight"}
    assert "model.cls.predictions.bias" in parameters(lm)


@pytest.mark.parametrize("factory", [bert, roberta, distilbert])
def test_update_is_the_models_own_gradient(factory: object) -> None:
    model = factory().eval()  # type: ignore[operator]
    lm = MaskedLanguageModel(model)
    update = FedSGD(TokenCrossEntropy())(lm.at(POSITIONS), Batch(IDS, LABELS)).tensors
    everywhere = torch.full_like(IDS, -100).scatter(1, POSITIONS, LABELS)
    model(IDS, labels=everywhere).loss.backward()
    own = {f"model.{k}": p.grad for k, p in model.named_parameters()}
    for name, tensor in update.items():
        assert torch.allclose(tensor, own[name], atol=1e-12), name
    full = FedSGD(TokenCrossEntropy())(lm, Batch(IDS, everywhere)).tensors
    assert all(torch.allclose(full[k], v, atol=1e-12) for k, v in update.items())


def test_gradient_matching_differentiates_twice() -> None:
    lm = MaskedLanguageModel(bert()).at(POSITIONS)
    training, params = FedSGD(TokenCrossEntropy()), parameters(lm)
    x = lm.embeddings[IDS].requires_grad_()
    y = torch.randn(2, 2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sum(v.square().sum() for v in training.tensors(lm, params, x, y.softmax(-1)).values())  # type: ignore[return-value]

    assert torch.autograd.gradcheck(distance, (x, y), fast_mode=True)


def test_loss_ignores_and_takes_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 6], [-100, 0, 3]])
    loss = TokenCrossEntropy()
    expected = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    soft = torch.nn.functional.one_hot(targets.clamp_min(0), 7).double() * (targets >= 0)[..., None]
    assert loss(outputs, targets) == pytest.approx(float(expected), abs=1e-14)
    assert loss(outputs, soft) == pytest.approx(float(expected), abs=1e-14)


def test_from_pretrained_reads_a_saved_checkpoint(tmp_path: Path) -> None:
    model = bert().eval()
    model.save_pretrained(tmp_path / "checkpoint")
    lm = from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.allclose(lm.double()(IDS), model(IDS).logits, atol=1e-6)
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "checkpoint" / "pytorch_model.bin")  # pickled: refused
    with pytest.raises(InvalidFile, match=r"model\.safetensors"):
        from_pretrained(tmp_path / "checkpoint")


def test_other_models_are_refused() -> None:
    with pytest.raises(InvalidModel, match="not a Hugging Face masked language model"):
        MaskedLanguageModel(torch.nn.Linear(2, 2))
    config = transformers.BertConfig(**SMALL)
    with pytest.raises(InvalidModel, match="predicts no tokens"):
        MaskedLanguageModel(transformers.BertForSequenceClassification(config))


def test_missing_extra_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InvalidInput, match=r"gradleak\[text\]"):
        from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers.implementations", None)
    with pytest.raises(InvalidInput, match=r"gradleak\[text\]"):
        WordPiece(tmp_path)


TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "read", "##able", "the", "gradient", "."]


def test_wordpiece(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    words = WordPiece(tmp_path / "vocab.txt")
    ids = words.encode("The Gradient readable .")
    assert [TOKENS[i] for i in ids] == ["[CLS]", "the", "gradient", "read", "##able", ".", "[SEP]"]
    assert words.decode(ids) == "the gradient readable ."
    assert len(words) == 10
    assert words.id("read") == 5
    masked, positions, labels = words.mask(ids, 0.3, torch.Generator().manual_seed(0))
    assert len(positions) == 2
    assert (masked[positions] == 4).all()
    assert torch.equal(masked.scatter(0, positions, labels), torch.tensor(ids))
    assert ((positions > 0) & (positions < len(ids) - 1)).all()
    with pytest.raises(InvalidInput, match="no token 'xyz'"):
        words.id("xyz")


@pytest.mark.parametrize("text", ["a\nb\n", "\n".join([*TOKENS, "the"]), ""])
def test_bad_vocabularies(tmp_path: Path, text: str) -> None:
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(InvalidFile, match="no WordPiece vocabulary"):
        WordPiece(tmp_path / "vocab.txt")
    with pytest.raises(InvalidFile, match="cannot be read"):
        WordPiece(tmp_path / "absent.txt")


@pytest.mark.data
def test_real_vocabulary(data_dir: Path) -> None:
    words = WordPiece(data_dir / "bert_base_uncased_vocab.txt")
    text = (
        "Registration, volunteer applications, and student travel application open the first week of September. "
        "Child care will be available."
    )
    ids = words.encode(text)
    assert len(words) == 30522
    assert len(ids) == 24
    assert (ids[0], ids[-1]) == (101, 102)
