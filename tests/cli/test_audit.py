"""The command ``gradleak audit``: plans and captures in, evidence and exit codes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gradleak as gl
from gradleak.capture import Manifest, describe_training, write_capture
from gradleak.cli import main


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gradleak", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture") / "captured"
    model = gl.models.perceptron(width=32, depth=1, classes=4, in_channels=1, image_size=4, seed=0)
    options = {"width": 32, "depth": 1, "classes": 4, "in_channels": 1, "image_size": 4}
    for client in range(3):
        inputs = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(client))
        training = gl.FedSGD()
        batch = gl.Batch(inputs, torch.tensor([client]))
        told = Manifest(model="perceptron", model_arg=options, round=1, client=f"c{client}", batch_size=1,
                        **describe_training(training))  # fmt: skip
        truth = batch if client else None
        write_capture(
            folder, told, model.state_dict(), training(model, batch), space=gl.ImageSpace((1, 4, 4)), truth=truth
        )
    return folder


def test_a_capture_is_audited_by_what_its_updates_prove(captured: Path, tmp_path: Path, monkeypatch) -> None:
    assert command(monkeypatch, "audit", captured, "--out", tmp_path / "out", "--fail-above", "0.5") == 1
    found = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert found["verdict"]["grade"] == "above"
    rows = {r["case"]: r for r in found["lower_bound"]}
    assert rows["round 1 of client 'c0'"]["recovered"]["share"] is None
    assert rows["round 1 of client 'c1'"]["recovered"]["count"] == 1
    assert all(r["proved"]["count"] == 1 for r in rows.values())
    page = (tmp_path / "out" / "evidence.html").read_text()
    assert "not known" in page
    # The same update attacked by itself proves the same.
    where = ["--round", "1", "--client", "c0", "--out", tmp_path / "one"]
    assert command(monkeypatch, "attack", captured, *where) == 0
    alone = json.loads((tmp_path / "one" / "result.json").read_text())
    trial = next(t for t in found["trials"] if t["case"].endswith("'c0'"))
    assert (alone["certificate"]["verdict"], alone["certificate"]["reason"]) == (trial["certificate"], trial["reason"])
    monkeypatch.setattr("gradleak.cli.audit_captures._measure", None)
    assert command(monkeypatch, "audit", captured, "--out", tmp_path / "out") == 0


def test_what_cannot_run_ends_with_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "plan.toml").write_text("[[case]]\nmodel = 'perceptron'\ndata = 'nowhere'\n")
    assert command(monkeypatch, "audit", tmp_path / "plan.toml", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("gradleak: Line 3 of 'plan.toml': ")
    assert said.count("\n") == 1
    assert command(monkeypatch, "audit", tmp_path / "plan.toml", "--out", tmp_path / "out", "--fail-above", "7") == 2
    assert command(monkeypatch, "audit", tmp_path, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
