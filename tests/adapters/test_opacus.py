from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradleak.adapters import Recorder
from gradleak.capture import read_capture
from gradleak.data import read_tensors
from gradleak.errors import InvalidInput

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from opacus import PrivacyEngine

    from gradleak.adapters.opacus import watch_steps

pytestmark = pytest.mark.filterwarnings("ignore")  # of Opacus about its random numbers and hooks


def train(folder: str | None, steps: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = TensorDataset(torch.rand(12, 6), torch.arange(12) % 3)
    engine = PrivacyEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, 4),
            noise_multiplier=0.7, max_grad_norm=1.5, noise_generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

        def run() -> None:
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                steps.append({k: p.grad.clone() for k, p in model._module.named_parameters()})

        torch.manual_seed(2)
        if folder is None:
            run()
        else:
            with watch_steps(model, optimizer, Recorder(folder=folder, model="nets:net"), client="a"):
                run()
        return list(model.parameters()), engine.get_epsilon(1e-5)


def test_steps_are_recorded_as_they_are_used(tmp_path) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    plain, epsilon = train(None, [])
    watched, same = train(str(tmp_path), steps)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert epsilon == same > 0
    entries = read_capture(tmp_path).entries
    assert [e.manifest.round for e in entries] == [0, 1, 2]
    for entry, used in zip(entries, steps, strict=True):
        found = read_tensors(entry.path(entry.manifest.update))
        assert all(torch.equal(found[k], v) for k, v in used.items())
        assert entry.manifest.defense == ("dp_sgd:noise_multiplier=0.7,max_grad_norm=1.5,batch_size=4",)


def test_other_optimizers_are_refused() -> None:
    model = nn.Linear(2, 2)
    recorder = Recorder(folder="c", model="nets:net")
    with (
        pytest.raises(InvalidInput, match="flat clipping"),
        watch_steps(model, torch.optim.SGD(model.parameters()), recorder),
    ):
        pass
