from __future__ import annotations

import sys

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.flower import CaptureMod, CaptureStrategy, defenses_of
from gradleak.capture import read_capture
from gradleak.data import read_tensors
from gradleak.errors import InvalidInput, UpdateBlocked


def make() -> nn.Module:
    return gl.models.perceptron(classes=3, in_channels=1, image_size=(1, 6), width=8, depth=1, seed=0)


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch) -> None:
    for name in ("task", "run", "node"):
        monkeypatch.setattr(TaskIdentity, f"_{name}_id", 1)


SPACE = gl.TensorSpace((6,))


def message(kind: str = "train", number: int = 4) -> Message:
    arrays = ArrayRecord(make().state_dict())
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": number})})
    return Message(content=content, message_type=kind, dst_node_id=7)


def context(**config: int) -> Context:
    return Context(1, 7, config, RecordDict(), {})


def train(asked: Message, _: Context) -> Message:
    state = asked.content["arrays"].to_torch_state_dict()
    arrays = ArrayRecord({k: v + 0.5 for k, v in state.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 12})})
    return Message(content=content, reply_to=asked)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A recorder of a model in the current folder."""
    (tmp_path / "flower_net.py").write_text(
        "import gradleak as gl\ndef make():\n    return gl.models.perceptron(classes=3, in_channels=1, "
        "image_size=(1, 6), width=8, depth=1, seed=0)\n"
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("flower_net", None)
    return lambda **more: Recorder(folder="c", model="flower_net:make", training=gl.FedAvg(lr=0.1), **more)


def test_the_mod_records_what_leaves_and_changes_nothing(own) -> None:
    asked = message()
    wanted = train(asked, context()).content["arrays"].to_torch_state_dict()
    reply = CaptureMod(own())(asked, context(**{"partition-id": 3}), train)
    found = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
    entry = read_capture("c").entry(4, "3")
    assert entry.manifest.batch_size == 12
    assert entry.manifest.framework.startswith("Flower 1.")
    options = entry.options()
    before = make().state_dict()
    update = read_tensors(options["update"])
    assert set(update) == {k for k, _ in make().named_parameters()}
    assert all(torch.equal(v, wanted[k] - before[k]) for k, v in update.items())
    assert all(torch.equal(read_tensors(options["weights"])[k], v) for k, v in before.items())


def test_the_first_mod_sees_what_later_ones_made(own) -> None:
    private = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=50.0, delta=1e-5)
    mods = [CaptureMod(own(defense=defenses_of([private]))), private]
    reply = mods[0](message(), context(), lambda m, c: private(m, c, train))
    entry = read_capture("c").entry()
    left = reply.content["arrays"].to_torch_state_dict()
    before = make().state_dict()
    update = read_tensors(entry.options()["update"])
    assert all(torch.equal(v, left[k] - before[k]) for k, v in update.items())
    assert entry.manifest.client == "7"
    clip, noise = entry.manifest.defense
    assert clip == "clip:norm=1.0"
    assert float(noise.removeprefix("gaussian_noise:sigma=")) == pytest.approx((2 * 11.7360690162) ** 0.5 / 50)
    with pytest.raises(InvalidInput, match="is not known"):
        defenses_of([lambda m, c, n: n(m, c)])


def test_other_messages_and_errors_pass(own, tmp_path) -> None:
    from flwr.app import Error

    asked = message("evaluate")
    assert CaptureMod(own())(asked, context(), lambda m, c: asked) is asked
    failed = Message(Error(code=1), reply_to=message())
    assert CaptureMod(own())(message(), context(), lambda m, c: failed) is failed
    assert not (tmp_path / "c").exists()


def test_a_policy_blocks(own) -> None:
    with pytest.raises(UpdateBlocked):  # inputs of 5 numbers cannot be inspected
        CaptureMod(own(space=gl.TensorSpace((5,)), policy="block"))(message(), context(), train)
    with pytest.raises(InvalidInput, match="has left already"):
        CaptureStrategy(FedAvg(), own(space=SPACE, policy="block"))


def test_the_server_records_what_arrives(own) -> None:
    asked = message(number=9)

    class Fixed(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return [asked]

        def aggregate_train(self, server_round, replies):
            return list(replies), server_round

    strategy = CaptureStrategy(Fixed(), own())
    (sent,) = strategy.configure_train(9, None, None, None)
    assert sent is asked
    reply = train(asked, context())
    replies, number = strategy.aggregate_train(9, iter([reply]))
    assert (replies, number) == ([reply], 9)
    assert read_capture("c").entry(9, str(reply.metadata.src_node_id)).manifest.batch_size == 12
