from __future__ import annotations

import json

WORDS = (
    "--model", "victim:small", "--weights", "weights.safetensors", "--update", "update.safetensors",
    "--input-shape", "1,8,8", "--classes", "5",
)  # fmt: skip


def test_text(case) -> None:
    done = case.run("inspect", *WORDS)
    assert done.code == 0, done.err
    assert "Layers" in done.out
    assert "recursion" in done.out
    assert "one example assumed" in done.out
    assert not any(p.is_dir() for p in case.folder.iterdir() if p.name != "__pycache__")


def test_json_of_a_capture(case) -> None:
    from gradleak.capture import Manifest, write_capture

    manifest = Manifest(model="victim:small", input_shape=(1, 8, 8), classes=5, batch_size=1, more={"own": 1})
    write_capture(case.folder / "c", manifest, case.tensors("weights.safetensors"), case.tensors("update.safetensors"))
    done = case.run("inspect", "c", "--json", "--out", "out", "--budget", "5s")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told == json.loads((case.folder / "out" / "inspection.json").read_text())
    assert (told["schema"], told["version"], told["examples"]) == ("gradleak-inspection", 1, 1)
    assert [layer["name"] for layer in told["layers"]] == ["0", "4"]
    assert "'own'" in told["notes"][0]


def test_what_cannot_be_read_is_refused(case) -> None:
    done = case.run("inspect", *WORDS, "--mode", "evil")
    assert (done.code, done.err.count("\n")) == (2, 1)
    done = case.run("inspect", "absent")
    assert done.code == 2
    assert "name that of a capture" in done.err
