from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")

import gradleak as gl  # noqa: E402
from gradleak.errors import InvalidFile, InvalidInput, InvalidModel  # noqa: E402
from gradleak.integrations.huggingface import LanguageModel, Task, load_adapter, load_folder, wrap_lora  # noqa: E402

SENTENCES = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA = {**BERT, "num_key_value_heads": 1, "pad_token_id": 0}
MASKED = [[-100, 6, -100, -100], [-100, 9, 10, -100, -100, -100]]
CASES: list[tuple[str, str, dict[str, Any], Task, Sequence[Any] | None]] = [
    ("GPT2", "GPT2LMHeadModel", GPT2, Task.CAUSAL, None),
    ("GPT2", "GPT2ForSequenceClassification", GPT2, Task.CLASSIFICATION, [1, 0]),
    ("Llama", "LlamaForCausalLM", LLAMA, Task.CAUSAL, None),
    ("Bert", "BertForMaskedLM", BERT, Task.MASKED, MASKED),
    ("Bert", "BertForTokenClassification", BERT, Task.TOKEN_CLASSIFICATION, [[0, 1, 0, 1], [0, 0, 1, 1, 0, 1]]),
]


def build(family: str, name: str, options: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**options)).eval()


def gpt2() -> LanguageModel:
    return LanguageModel(build("GPT2", "GPT2LMHeadModel", GPT2))


@pytest.mark.parametrize(("family", "name", "options", "task", "labels"), CASES)
def test_a_saved_model_gives_its_own_gradient_with_padding(
    family: str, name: str, options: dict[str, Any], task: Task, labels: Sequence[Any] | None, tmp_path: Path
) -> None:
    own = build(family, name, options)
    own.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    assert model.task is task
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in own.named_parameters()]
    batch = model.batch(SENTENCES, labels)
    found = model.local_training(model, batch).tensors
    told = batch.inputs >= 0
    own(input_ids=batch.inputs.clamp_min(0), attention_mask=told.long(), labels=batch.labels).loss.backward()
    for k, p in own.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(found[k], expected, atol=1e-6 * float(expected.abs().max()) + 1e-9), k
    seen = gl.ThreatModel().observe(
        model, found, space=model.space(), training=model.local_training, batch_size=len(SENTENCES)
    )
    assert seen.misfit is None


def test_a_copy_is_whole_and_embeddings_are_taken() -> None:
    model = gpt2()
    other = copy.deepcopy(model)
    ids = torch.tensor(SENTENCES[:1])
    next(other.parameters()).data.zero_()
    with torch.no_grad():
        assert not other(ids).any()
        assert torch.allclose(model(ids), model(model.embeddings[ids]), atol=1e-6)


def test_only_a_and_b_are_shared_of_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = wrap_lora(gpt2(), 2, ["c_attn"])
    update = model.local_training(model, model.batch(SENTENCES)).tensors
    assert len(update) == 4
    assert all("lora_" in k for k in update)
    model.inner.save_pretrained(tmp_path)
    again = load_adapter(gpt2(), tmp_path)
    ours, theirs = dict(again.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[k], p) and ours[k].requires_grad == p.requires_grad for k, p in theirs.items())
    with pytest.raises(InvalidInput, match="name its linear layers"):
        wrap_lora(gpt2(), 2, ["nowhere"])
    with pytest.raises(InvalidFile, match="adapter_model"):
        load_adapter(gpt2(), tmp_path / "nowhere")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"config\.json"):
        load_folder(tmp_path)
    build("GPT2", "GPT2LMHeadModel", GPT2).save_pretrained(tmp_path)
    with pytest.raises(InvalidFile, match="would be random"):
        load_folder(tmp_path, "classification")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2Model"]}))
    with pytest.raises(InvalidModel, match="state the task"):
        load_folder(tmp_path)
    with pytest.raises(InvalidModel, match="Hugging Face"):
        LanguageModel(torch.nn.Linear(2, 2), "causal")


def test_batches_and_spaces_say_what_they_take() -> None:
    model = gpt2()
    space, batch = model.space(8), model.batch(SENTENCES)
    space.check(batch.inputs)
    assert batch.inputs[0].tolist() == [5, 6, 7, 8, -1, -1]
    assert batch.labels[0].tolist() == [5, 6, 7, 8, -100, -100]
    with pytest.raises(InvalidInput, match="behind its padding"):
        space.check(batch.inputs.flip(1).roll(1, 1))
    with pytest.raises(InvalidInput, match="at least one token"):
        model.batch([[]])
    with pytest.raises(InvalidInput, match="pass labels="):
        LanguageModel(build("Bert", "BertForMaskedLM", BERT)).batch(SENTENCES)
