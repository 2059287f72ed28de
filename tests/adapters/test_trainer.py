from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from gradleak.adapters import Recorder
from gradleak.capture import read_capture
from gradleak.data import read_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    from gradleak.adapters.trainer import CaptureCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of its own future


def small() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(small(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))


class Keep(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        trained = ((k, p) for k, p in kwargs["model"].named_parameters() if p.requires_grad)
        self.steps.append({k: p.grad.clone() for k, p in trained if p.grad is not None})


def train(model: nn.Module, folder, *callbacks: TrainerCallback) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(30, (5,), generator=draw), "labels": torch.tensor(i % 2)} for i in range(5)]
    args = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=2, num_train_epochs=1, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=3, max_grad_norm=0.5,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model, args, train_dataset=rows, callbacks=list(callbacks)).train()


@pytest.mark.parametrize("make", [small, adapted])
def test_steps_are_recorded_as_they_are_used(tmp_path, make) -> None:
    plain, watched, keep = make(), make(), Keep()
    torch.manual_seed(7)
    train(plain, tmp_path)
    torch.manual_seed(7)
    recorder = Recorder(folder=tmp_path / "c", model="nets:net")
    train(watched, tmp_path, CaptureCallback(recorder, client="a"), keep)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not watched._forward_pre_hooks
    entries = read_capture(tmp_path / "c").entries
    assert [(e.manifest.round, e.manifest.batch_size) for e in entries] == [(0, 2), (1, 2), (2, 1)]
    trained = {k for k, p in watched.named_parameters() if p.requires_grad}
    assert (len(trained) == 2) is (make is adapted)
    for entry, used in zip(entries, keep.steps, strict=True):
        found = read_tensors(entry.path(entry.manifest.update))
        assert set(found) == trained
        assert all(torch.equal(found[k], v) for k, v in used.items())
        assert entry.manifest.defense == ("clip:norm=0.5",)
