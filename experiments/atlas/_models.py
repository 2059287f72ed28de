"""The models that people federate, each with a batch of the data that it is made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.papers.experiment import Lab
from gradleak.spaces import Category, Number, TableSpace
from gradleak.training import CrossEntropy, Loss, batch_statistics

TOKENS = 12
"""Most tokens of a sentence; shorter ones are filled up."""
Case = tuple[nn.Module, gl.Batch, gl.InputSpace, Loss]
"""Model, private batch, what an input is, and the client's loss."""


def _pictures(lab: Lab, name: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = lab.images(name, "test")
    chosen = lab.sample(len(x), n, seed=seed)
    return x[chosen].float(), y[chosen]


def _seeded(seed: int, *layers: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # noqa: TID251 - layers draw from it; it is put back
        return nn.Sequential(*(make() for make in layers))


def _images(name: str, make: Callable[[int], nn.Module], side: int = 32) -> Callable[[Lab, int, int], Case]:
    def case(lab: Lab, n: int, seed: int) -> Case:
        x, y = _pictures(lab, name, n, seed)
        return make(seed).eval(), gl.Batch(x, y), gl.ImageSpace((x.shape[1], side, side)), CrossEntropy()

    return case


def _fedavg_cnn(seed: int) -> nn.Module:
    """Return the network of McMahan et al. 2017 for MNIST (Section 3): two convolutions with pooling, 512 units."""
    return _seeded(
        seed,
        lambda: nn.Conv2d(1, 32, 5, padding=2), nn.ReLU, lambda: nn.MaxPool2d(2),
        lambda: nn.Conv2d(32, 64, 5, padding=2), nn.ReLU, lambda: nn.MaxPool2d(2),
        nn.Flatten, lambda: nn.Linear(64 * 49, 512), nn.ReLU, lambda: nn.Linear(512, 10),
    )  # fmt: skip


def _tutorial_cnn(seed: int) -> nn.Module:
    """Return the network of PyTorch's and Flower's tutorials: 6 and 16 channels, three linear layers."""
    return _seeded(
        seed,
        lambda: nn.Conv2d(3, 6, 5), nn.ReLU, lambda: nn.MaxPool2d(2),
        lambda: nn.Conv2d(6, 16, 5), nn.ReLU, lambda: nn.MaxPool2d(2),
        nn.Flatten, lambda: nn.Linear(400, 120), nn.ReLU, lambda: nn.Linear(120, 84), nn.ReLU,
        lambda: nn.Linear(84, 10),
    )  # fmt: skip


class _Recurrent(nn.Module):
    """An LSTM that reads a picture of 28 × 28 row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10) of (N, 1, 28, 28)."""
        logits: Tensor = self.head(self.lstm(x.flatten(1, 2))[0][:, -1])
        return logits


def _adult(lab: Lab, n: int, seed: int) -> Case:
    arrays = lab.arrays("adult.npz", ("x_train_num", "x_train_cat", "y_train"))
    told = json.loads(lab.text("adult.json"))
    numbers = arrays["x_train_num"].astype(np.float64)
    columns: list[Number | Category] = [
        Number(name, "", float(v.min()), float(v.max()), float(v.mean()), float(v.std()), 0)
        for name, v in zip(told["numeric_columns"], numbers.T, strict=True)
    ]
    columns += [Category(k, tuple(told["categories"][k])) for k in told["categorical_columns"]]
    space = TableSpace(tuple(columns))
    chosen = lab.sample(len(numbers), n, seed=seed)
    rows = torch.tensor(np.concatenate([numbers, arrays["x_train_cat"]], 1))[chosen]
    size = (1, space.shape[0])
    model = gl.models.perceptron(width=100, classes=2, in_channels=1, image_size=size, seed=seed)
    labels = torch.tensor(arrays["y_train"])[chosen].long()
    return model, gl.Batch(space.encode(rows).float(), labels), space, CrossEntropy()


def _text(kind: str) -> Callable[[Lab, int, int], Case]:
    def case(lab: Lab, n: int, seed: int) -> Case:
        from gradleak.integrations import huggingface as hf

        tokenizer = hf.WordPiece(lab.file("bert_base_uncased_vocab.txt"))
        lines = [line.split(",", 1)[-1] for line in lab.text("cola.csv").splitlines()[1:]]
        chosen = [tokenizer.encode(lines[i])[:TOKENS] for i in lab.sample(len(lines), n, seed=seed)]
        model: Any = hf.LanguageModel(_language_model(kind, len(tokenizer), seed))
        if kind == "lora":
            model = hf.wrap_lora(model, 16, ["c_attn"])
        labels = None if kind in ("gpt2", "lora") else [i % 2 for i in range(n)]
        return model, model.batch(chosen, labels), model.space(TOKENS), model.loss

    return case


def _language_model(kind: str, words: int, seed: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # noqa: TID251 - as above
        if kind == "bert":
            shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
            return BertForSequenceClassification(BertConfig(vocab_size=words, **shape))
        return GPT2LMHeadModel(GPT2Config(vocab_size=words, n_positions=64, n_embd=128, n_layer=2, n_head=2))


MODELS: dict[str, Callable[[Lab, int, int], Case]] = {
    "logistic regression": _images("cifar10", lambda s: _seeded(s, nn.Flatten, lambda: nn.Linear(3072, 10))),
    "Adult MLP": _adult,
    "LeNet": _images("cifar100", lambda s: gl.models.lenet(seed=s)),
    "FedAvg CNN": _images("mnist", _fedavg_cnn, 28),
    "tutorial CNN": _images("cifar10", _tutorial_cnn),
    "ResNet-18, evaluation": _images("cifar10", lambda s: gl.models.resnet18(classes=10, seed=s)),
    "ResNet-18, training": _images("cifar10", lambda s: batch_statistics(gl.models.resnet18(classes=10, seed=s))),
    "ViT": _images(
        "cifar10",
        lambda s: gl.models.vision_transformer(patch=4, width=128, depth=4, classes=10, image_size=32, seed=s),
    ),
    "BERT": _text("bert"),
    "GPT-2": _text("gpt2"),
    "GPT-2 with LoRA": _text("lora"),
    "LSTM": _images("mnist", lambda s: _seeded(s, _Recurrent), 28),
}
