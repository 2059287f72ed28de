from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradleak import cli
from gradleak.audit.records import Record, from_json
from gradleak.exchange import Client
from gradleak.training import FedAvg, FedSGD, LocalTraining
from gradleak.types import Batch

MODULE = """
import sys
import torch
import torch.nn.functional as F
from torch import nn


def small(classes=5, p=0.0, norm=False, width=6, track=True):
    layers = [nn.Conv2d(1, width, 3, padding=1, stride=2)]
    layers += [nn.BatchNorm2d(width, track_running_stats=track)] if norm else []
    layers += [nn.Sigmoid(), nn.Flatten(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(width * 16, classes))


def rows():
    return nn.Sequential(nn.Linear(7, 9), nn.Sigmoid(), nn.Linear(9, 3))


def single():
    return nn.Sequential(nn.Linear(7, 1))


def tokens():
    return nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(12, 5))


def frozen():
    return small().requires_grad_(False)


def sequence():
    return nn.Sequential(nn.Conv2d(1, 3, 3))


def broken():
    raise RuntimeError("no such checkpoint")


def quits():
    sys.exit(0)


def damaged():
    model = small()
    nn.init.constant_(model[0].weight, float("nan"))
    return model


class Strange(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.how = small(), how

    def forward(self, x):
        x = self.inner(x)
        if self.how == "quits":
            sys.exit(0)
        if self.how == "dropout":
            return F.dropout(x, 0.5, self.training)
        if self.how == "numpy":
            return torch.from_numpy(x.numpy())
        return x + torch.empty(2**50, dtype=torch.uint8).sum()


def strange(how):
    return Strange(how)


def wrong(outputs, targets):
    raise ValueError("not this one")
"""


def small() -> nn.Module:
    """Return the same model as ``victim:small``, with seeded weights."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(96, 5)
    )
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    return model


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Case:
    """A captured update on disk, and a way to run the command line where it lies."""

    folder: Path
    run: Callable[..., Said]

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / name)
        return self.folder / name

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / name)

    def record(self, out: str = "out") -> Record:
        return from_json((self.folder / out / "result.json").read_text(encoding="utf-8"))

    def attack(self, *more: str, **changed: str | None) -> Said:
        """Run ``gradleak attack`` with the right options, some of them changed (None: left out)."""
        options: dict[str, str | None] = {
            "model": "victim:small",
            "weights": "weights.safetensors",
            "update": "update.safetensors",
            "input_shape": "1,8,8",
            "classes": "5",
            "batch_size": "1",
            "attack": "dlg",
            "out": "out",
        } | changed
        words = [w for k, v in options.items() if v is not None for w in (f"--{k.replace('_', '-')}", v)]
        return self.run("attack", *words, *more)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., Said]:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["gradleak", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        caught = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0, caught.out, caught.err)

    return go


@pytest.fixture
def case(tmp_path, run) -> Case:
    (tmp_path / "victim.py").write_text(MODULE, encoding="utf-8")
    sys.modules.pop("victim", None)
    made = Case(tmp_path, run)
    share(made, FedSGD())
    return made


def share(case: Case, training: LocalTraining, n: int = 1) -> None:
    """Write weights, one update and the private batch behind it."""
    model = small()
    generator = torch.Generator().manual_seed(1)
    batch = Batch(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) + 3)
    case.write("weights.safetensors", dict(model.state_dict()))
    case.write("update.safetensors", dict(Client(model, batch, training).send().tensors))
    case.write("truth.safetensors", {"inputs": batch.inputs, "labels": batch.labels})


@pytest.fixture
def delta(case) -> Case:
    """The same, where the client shared the weight difference of two local steps."""
    share(case, FedAvg(lr=0.1, epochs=2))
    return case


@pytest.fixture
def pair(case) -> Case:
    """The same with two private examples."""
    share(case, FedSGD(), n=2)
    return case
