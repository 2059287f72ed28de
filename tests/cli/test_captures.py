from __future__ import annotations

import dataclasses
import json

import pytest

from gradleak.capture import MANIFEST, Manifest, write_capture
from gradleak.types import Update, UpdateKind

QUICK = ("--attack-option", "iterations=40", "--attack", "dlg")


@pytest.fixture
def captured(case):
    """Write the update of ``case`` as a capture and return a function that attacks it."""

    def write(manifest: Manifest | None = None, kind: UpdateKind = UpdateKind.GRADIENT, **changed: object):
        manifest = manifest or Manifest(model="victim:small", input_shape=(1, 8, 8), classes=5, batch_size=1)
        update = Update(case.tensors("update.safetensors"), kind)
        write_capture(
            case.folder / "c", dataclasses.replace(manifest, **changed), case.tensors("weights.safetensors"), update
        )
        return lambda *more, out="out": case.run("attack", "c", "--out", out, *more)

    return write


def told(case, out: str) -> dict[str, object]:
    found = json.loads((case.folder / out / "result.json").read_text())
    for volatile in ("command", "created", "artifacts"):
        found.pop(volatile, None)
    found["outcome"].pop("seconds")
    return found


def test_a_capture_is_the_same_attack(case, captured) -> None:
    assert case.attack(*QUICK, out="spelled").code == 0
    done = captured()(*QUICK)
    assert done.code == 0, done.err
    assert told(case, "out") == told(case, "spelled")
    assert case.tensors("out/reconstruction.safetensors")["inputs"].equal(
        case.tensors("spelled/reconstruction.safetensors")["inputs"]
    )


def test_local_training_and_filters_of_a_capture(delta, captured) -> None:
    trained = {"lr": 0.1, "local_epochs": 2, "defense": ("clip:norm=100",)}
    stated = captured(kind=UpdateKind.WEIGHT_DELTA, **trained)
    spelled = delta.attack(
        *QUICK, out="spelled", kind="weight_delta", lr="0.1", local_epochs="2", defense="clip:norm=100"
    )
    assert spelled.code == 0, spelled.err
    assert stated(*QUICK).code == 0
    assert told(delta, "out") == told(delta, "spelled")


def test_the_command_line_overrides(case, captured) -> None:
    attack = captured(lr=0.5, kind=UpdateKind.WEIGHT_DELTA, batch_size=3, defense=("clip:norm=1e-9",))
    done = attack(*QUICK, "--kind", "gradient", "--batch-size", "1", "--defense", "clip:norm=100")
    assert done.code == 0, done.err
    assert case.attack(*QUICK, out="spelled", defense="clip:norm=100").code == 0
    assert told(case, "out") == told(case, "spelled")


def test_rounds_and_clients_are_chosen(case, captured) -> None:
    captured(round=0, client="a")
    attack = captured(round=1, client="a")
    done = attack(*QUICK)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "2 such updates (round 0 of client 'a'; round 1 of client 'a'); choose one" in done.err
    assert attack(*QUICK, "--round", "1").code == 0
    done = case.run("attack", "--round", "1", "--model", "lenet", "--update", "u", "--out", "x")
    assert "--round and --client choose from a capture" in done.err


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("mode", "evil", "'mode' in the manifest of 'c' cannot be used"),
        ("lr", -1, "'lr' in the manifest of 'c' cannot be used: '-1.0' is not a number above 0"),
        ("input_shape", [0], "'input_shape' in the manifest"),
        ("batch_size", 10**9, "'batch_size' in the manifest"),
        ("model", "os:system", "captures run no other; if you trust it, say --model os:system yourself."),
        ("weights", "../weights.safetensors", "lies outside of the capture"),
        ("defense", ["rot13"], "There is no defense named 'rot13'"),
        ("version", 9, "update gradleak"),
    ],
)
def test_manifests_that_cannot_be_used(case, captured, field: str, value: object, said: str) -> None:
    attack, path = captured(), case.folder / "c" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    done = attack()
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err
    assert not (case.folder / "out").exists()


def test_unknown_fields_are_named_in_the_result(case, captured) -> None:
    done = captured(more={"secure_aggregation": "SecAgg+"})(*QUICK)
    assert done.code == 0
    assert any("'secure_aggregation'" in n for n in case.record().outcome.notes)


def test_nothing_to_attack(case) -> None:
    for words in (("--out", "x"), ("--out", "x", "--model", "lenet")):
        done = case.run("attack", *words)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "or the folder of a capture" in done.err


def test_a_manifest_knows_every_option_that_describes_a_client(case) -> None:
    from typer.main import get_command

    from gradleak.cli.commands import app

    own = {"out", "capture", "attack", "attack_option", "labels", "data", "seed", "budget", "device", "dtype", "help"}
    options = {p.name for p in get_command(app).commands["attack"].params} - own
    assert options == {f.name for f in dataclasses.fields(Manifest)} - {
        "framework", "number_format", "unknown_filters", "created", "more",
    }  # fmt: skip
