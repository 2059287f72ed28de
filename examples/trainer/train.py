"""A Hugging Face ``Trainer`` adapts a vision transformer by LoRA; the adapter's gradients are captured step by step.

From this folder, with ``pip install 'gradleak[text]' accelerate``; ``python train.py full`` trains all parameters::

    python train.py full
    gradleak attack captured --round 0 --mode eval --out result
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.trainer import CaptureCallback


class Pixels(nn.Module):
    """A vision transformer as gradleak wants it, logits out, and as ``Trainer`` wants it, where there are labels."""

    def __init__(self, *, lora: bool) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=16, patch_size=4, num_labels=10, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        self.model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])) if lora else model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> object:
        """Return logits (N, 10) of pictures (N, 3, 16, 16), with the loss where there are labels."""
        logits = self.model(pixel_values=pixel_values).logits
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_net(lora: bool = False) -> nn.Module:
    """Return the model that everybody trains."""
    return Pixels(lora=lora)


def main(lora: bool) -> None:
    """Train for two steps of one picture each."""
    torch.random.default_generator.manual_seed(0)
    rows = [{"pixel_values": torch.rand(3, 16, 16), "labels": torch.tensor(i)} for i in range(2)]
    recorder = Recorder(
        folder="captured", model=make_net, model_arg={"lora": lora}, space=gl.ImageSpace((3, 16, 16)), mode="eval"
    )
    args = TrainingArguments(
        output_dir="trainer", per_device_train_batch_size=1, num_train_epochs=1, report_to=[], use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    Trainer(make_net(lora), args, train_dataset=rows, callbacks=[CaptureCallback(recorder)]).train()


if __name__ == "__main__":
    main(lora=sys.argv[1:] != ["full"])
