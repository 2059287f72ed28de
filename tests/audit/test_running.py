"""Audits: shares with intervals, trials measured once, failures kept, and words that promise nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gradleak
import gradleak.audit.trials
from gradleak.audit.running import exit_code, run
from gradleak.audit.store import read_case

PLAN = """
[audit]
title = "A toy"
seeds = 3
budget = 5
attacks = ["linear_inversion"]

[[case]]
name = "open"
model = "perceptron"
model_arg = { width = 32, depth = 1 }
data = "synthetic"
input_shape = [1, 4, 4]
classes = 4
examples = 60
utility = { rounds = 5, seeds = 2 }

[[case]]
name = "noised"
model = "perceptron"
model_arg = { width = 32, depth = 1 }
data = "synthetic"
input_shape = [1, 4, 4]
classes = 4
examples = 60
stages = [3]
filters = ["clip:norm=1", "gaussian_noise:sigma=1"]
utility = { rounds = 5, seeds = 2 }

[[remedy]]
filters = ["clip:norm=1", "gaussian_noise:sigma=2"]
"""


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("audit")
    (folder / "plan.toml").write_text(PLAN)
    return folder, run(folder / "plan.toml", folder / "out", fail_above=0.5, command="gradleak audit plan.toml")


def test_the_evidence_has_the_names_that_others_script_against(audited) -> None:
    folder, audit = audited
    stored = json.loads((folder / "out" / "evidence.json").read_text())
    assert stored == json.loads(json.dumps(audit.evidence))
    names = ["schema", "verdict", "lower_bound", "upper_bound", "utility", "trials", "plan", "versions"]
    assert list(stored) == names
    assert stored["plan"]["text"] == PLAN
    assert {len(c["model_sha256"]) for c in stored["plan"]["cases"]} == {64}


def test_the_worst_comes_first_with_its_interval(audited) -> None:
    _, audit = audited
    worst, best = audit.evidence["lower_bound"]
    assert (worst["case"], worst["recovered"]["count"], worst["proved"]["count"]) == ("open", 3, 3)
    assert worst["recovered"]["low"] == pytest.approx(0.4385, abs=1e-4)
    assert (best["case"], best["stage"], best["recovered"]["count"]) == ("noised", 3, 0)
    assert audit.evidence["trials"][0]["case"] == "open"
    assert audit.evidence["verdict"]["grade"] == "above"
    assert exit_code(audit.evidence) == 1


def test_bounds_costs_and_remedies_are_measured(audited) -> None:
    _, audit = audited
    none, some = audit.evidence["upper_bound"]
    assert none["share"] is None
    assert 0 < some["share"] < 0.5
    cost = {u["case"]: u for u in audit.evidence["utility"]}
    assert cost["noised"]["without"]["trainings"] == 2
    assert cost["noised"]["without"] == cost["open"]["with"]
    (remedy,) = audit.evidence["verdict"]["remedies"]
    assert remedy["case"] == "open"
    assert remedy["reached"]
    assert not remedy["sure"]


def test_nothing_is_measured_twice_and_what_is_damaged_is(audited, monkeypatch) -> None:
    folder, audit = audited
    ran = []
    monkeypatch.setattr("gradleak.audit.running.attempt", lambda t: ran.append(t) or gradleak.audit.trials.attempt(t))
    again = run(folder / "plan.toml", folder / "out", fail_above=0.5, command="gradleak audit plan.toml")
    assert not ran
    trial = audit.measured[0][0]
    trial.path(folder / "out" / "trials").write_text("{")
    again = run(folder / "plan.toml", folder / "out", fail_above=0.5)
    assert ran == [trial]
    for part in ("lower_bound", "upper_bound", "utility"):
        assert again.evidence[part] == audit.evidence[part]


def failing() -> nn.Module:
    """Return a model that fails on batches of three."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 3:
                raise ZeroDivisionError("a batch of three")
            return self.layer(x)

    return Failing()


def test_failures_are_kept_and_retried_on_request(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "plan.toml").write_text(
        f"""
        [audit]
        seeds = 1
        budget = 5
        [[case]]
        model = "{__file__}:failing"
        data = "synthetic"
        input_shape = [4]
        classes = 2
        examples = 20
        batch_sizes = [3]
        """
    )
    first = run(tmp_path / "plan.toml", tmp_path / "out", fail_above=0.1)
    (trial,) = first.evidence["trials"]
    assert "ZeroDivisionError" in trial["traceback"] or "three" in trial["error"]
    assert first.evidence["verdict"]["grade"] == "nothing_measured"
    assert exit_code(first.evidence) == 1
    ran = []
    monkeypatch.setattr("gradleak.audit.running.attempt", lambda t: ran.append(t) or gradleak.audit.trials.attempt(t))
    run(tmp_path / "plan.toml", tmp_path / "out")
    assert not ran
    run(tmp_path / "plan.toml", tmp_path / "out", retry_failed=True)
    assert len(ran) == 1


def test_a_clean_audit_says_what_was_tried_and_never_private(tmp_path: Path) -> None:
    clean = PLAN.split("[[case]]")[0] + "[[case]]" + PLAN.split("[[case]]")[2].split("[[remedy]]")[0]
    (tmp_path / "plan.toml").write_text(clean)
    found = run(tmp_path / "plan.toml", tmp_path / "out").evidence["verdict"]
    assert found["grade"] == "nothing_came_back"
    assert found["headline"].startswith("In what was tried, none of 3 images came back; up to 56 % cannot be excluded")
    said = json.dumps(found).lower()
    assert not [w for w in ("private", "safe", "secure", "no risk") if w in said]
    found = run(tmp_path / "plan.toml", tmp_path / "out", fail_above=0.1).evidence
    assert found["verdict"]["grade"] == "undecided"
    assert exit_code(found) == 0


def test_the_package_is_called_and_writes_the_page(audited, tmp_path: Path) -> None:
    folder, audit = audited
    found = gradleak.audit(folder / "plan.toml", folder / "out", fail_above=0.5)
    assert found.evidence["lower_bound"] == audit.evidence["lower_bound"]
    page = (folder / "out" / "evidence.html").read_text()
    assert found.evidence["verdict"]["headline"] in page
    assert page.count("data:image/png") == 6


def test_equal_trials_have_equal_names_and_others_do_not(audited) -> None:
    _, audit = audited
    names = [t["id"] for t in audit.evidence["trials"]]
    trained_alike = 2  # both cases without filters are one
    assert len(names) - len(set(names)) == trained_alike
    assert read_case(Path("nowhere"), {}) is None
