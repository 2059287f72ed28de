from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.adapters import LeakWarning, Recorder
from gradleak.adapters.pytorch import optimizer_of, watch
from gradleak.capture import read_capture
from gradleak.data import read_tensors
from gradleak.errors import InvalidInput, UpdateBlocked
from gradleak.training import SGD, Adam

SPACE = gl.TensorSpace((6,))
MODULE = """
import torch
from torch import nn
def make():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A factory in a module of the user's own, in the current folder."""
    import importlib

    (tmp_path / "own_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    import sys

    sys.modules.pop("own_net", None)
    return importlib.import_module("own_net").make


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, steps: int = 1, size: int = 2) -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        model.zero_grad()
        x = torch.rand(size, 6, generator=draw)
        nn.functional.cross_entropy(model(x), torch.arange(size) % 3).backward()
        if optimizer is not None:
            optimizer.step()


def built(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def test_training_is_what_it_is_without_the_adapter(make, tmp_path) -> None:
    plain, watched = built(make), built(make)
    train(plain, torch.optim.Adam(plain.parameters()), 3)
    state = torch.get_rng_state()
    optimizer = torch.optim.Adam(watched.parameters())
    with watch(watched, Recorder(folder="c", model=make), optimizer=optimizer):
        train(watched, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not watched._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_local_steps_are_recorded(make, tmp_path) -> None:
    model = built(make)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with watch(model, Recorder(folder="c", model=make, space=SPACE), optimizer=optimizer, round=2, client="a") as seen:
        train(model, optimizer, 3)
    entry = read_capture("c").entry(2, "a")
    options = entry.options()
    wanted = {"model": "own_net:make", "kind": "weight_delta", "lr": "0.1", "momentum": "0.5", "local_steps": "3",
              "local_batch_size": "2", "input_shape": "6"}  # fmt: skip
    assert {k: options[k] for k in wanted} == wanted
    assert "batch_size" not in options  # how many examples three steps had is not known
    after = read_tensors(options["update"])
    assert all(torch.equal(after[k], p.detach() - before[k]) for k, p in model.named_parameters())
    assert all(torch.equal(read_tensors(options["weights"])[k], v) for k, v in before.items())
    assert seen.steps == 3
    assert entry.notes == ()


def test_a_gradient_is_recorded_and_attacked(make, tmp_path, monkeypatch, capsys) -> None:
    import sys

    from gradleak import cli

    model = built(make)
    with watch(model, Recorder(folder="c", model=make, space=SPACE)) as seen:
        train(model, None)
    assert seen.update.kind is gl.UpdateKind.GRADIENT
    assert seen.examples == 2
    monkeypatch.setattr(sys, "argv", ["gradleak", "attack", "c", "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    found = read_tensors("out/reconstruction.safetensors")["inputs"]
    truth = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    distance = torch.cdist(found, truth).min(1).values
    assert float(distance.max()) < 1e-4


def test_what_gradleak_does_not_simulate_is_named(make, tmp_path) -> None:
    model = built(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    train(model, optimizer)
    recorder = Recorder(folder="c", model=make)
    with watch(model, recorder, optimizer=optimizer):
        train(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.01
        train(model, optimizer)
    assert set(read_capture("c").entry().manifest.more) == {"learning_rates", "optimizer_state"}


def test_policies(make, tmp_path) -> None:
    def leak(policy: str, size: int = 1) -> None:
        model = built(make)
        with watch(model, Recorder(folder=policy, model=make, space=SPACE, policy=policy)):
            train(model, None, size=size)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leak("observe")
    with pytest.warns(LeakWarning, match="gives inputs away: linear_inversion solves all of 1"):
        leak("warn")
    with pytest.raises(UpdateBlocked, match="it was not sent"):
        leak("block")
    assert read_capture("block").entry().manifest.batch_size == 1
    leak("block", size=64)


def test_what_cannot_be_inspected_is_blocked(make, tmp_path) -> None:
    model = built(make)
    recorder = Recorder(folder="c", model=make, space=gl.TensorSpace((7,)), policy="block")
    with pytest.raises(UpdateBlocked), watch(model, recorder):
        train(model, None)


def test_recorders_that_cannot_work_are_refused_before_training(make, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="space="):
        Recorder(folder="c", model=make, policy="block")
    with pytest.raises(InvalidInput, match="no defense named"):
        Recorder(folder="c", model=make, defense=("rot13",))
    with pytest.raises(ValueError, match="shout"):
        Recorder(folder="c", model=make, policy="shout")
    with pytest.raises(InvalidInput, match="no name by which"):
        Recorder(folder="c", model=lambda: nn.Linear(2, 2)).spec  # noqa: B018


def test_nothing_trained(make, tmp_path) -> None:
    model = built(make)
    recorder = Recorder(folder="c", model=make)
    with pytest.raises(InvalidInput, match=r"loss\.backward"), watch(model, recorder):
        pass
    with pytest.raises(InvalidInput, match="optimizer="), watch(model, recorder), torch.no_grad():
        model[0].bias += 1
    with pytest.raises(RuntimeError, match="mine"), watch(model, recorder):
        raise RuntimeError("mine")
    assert not (tmp_path / "c").exists()


def test_optimizers_of_torch() -> None:
    parameters = [torch.zeros(2, requires_grad=True)]
    assert optimizer_of(torch.optim.SGD(parameters, lr=0.1, nesterov=True, momentum=0.9)) == SGD(0.1, 0.9, 0.0, True)
    assert optimizer_of(torch.optim.Adam(parameters)) == Adam()
    assert optimizer_of(torch.optim.AdamW(parameters, lr=0.1)) == Adam(0.1, weight_decay=0.01, decoupled=True)
    assert optimizer_of(torch.optim.RMSprop(parameters)) is None
    assert optimizer_of(torch.optim.Adam(parameters, amsgrad=True)) is None
