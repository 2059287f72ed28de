from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradleak.audit.records import (
    SCHEMA,
    Aggregate,
    AttackRun,
    AttemptRecord,
    CertificateRecord,
    Curves,
    Example,
    FindingRecord,
    Lift,
    Match,
    Outcome,
    Record,
    Shown,
    Subject,
    Success,
    Threat,
    Verdict,
    from_json,
    to_json,
)
from gradleak.errors import InvalidFile

RECORD = Record(
    subject=Subject("lenet", "LeNet", 10, 2, "image", (3, 4, 4), 5, 2, "gradient", "float32", "FedSGD"),
    threat=Threat(("BATCH_SIZE",), ("LABELS",)),
    attack=AttackRun("dlg", {"lr": 0.1, "restarts": 2, "box": True, "solver": "lbfgs", "dtype": None}, 3),
    outcome=Outcome(
        "budget",
        1e-3,
        5,
        7,
        1.5,
        (1, 0),
        ("a note",),
        ("limit",),
        attack="recursion",
        findings=(FindingRecord("labels", "Both.", True, 2, 2),),
        attempts=(AttemptRecord("recursion", True, "matched", "why"), AttemptRecord("dlg", False, None, "no time")),
        solved=(1,),
    ),
    verdict=Verdict("leaked", "It came back.", "Because.", ("x",), ("y", "z")),
    match=Match(1e-3, 1e-7),
    certificate=CertificateRecord(
        "matched", 1e-8, 1e-7, 3, 4, ("matched", "matched"), "why", 2.0, 1e-9, True, True, {"fc.weight": 2.0}
    ),
    examples=(Example(1, 0, 1, 1, {"mse": 0.5, "psnr": None}, True, 2, "Words."), Example(0, None, None, None, {})),
    aggregates=(Aggregate("mse", "", 2, 0.1, None, 0.0, 0.1, 0.2),),
    success=Success(1e-3, 1, 2, 0.1, 0.9, None),
    lifts=(Lift("gray", 10.0, None, True),),
    curves=Curves((0, 5), (1.0, math.inf), {"fc.weight": (1.0, 0.5)}, (0.5, 0.25)),
    shown=Shown(("age",), (("39",), ("40",)), (("39",), ("41",))),
    command="gradleak demo",
    environment={"torch": "2"},
    created="2026-01-01T00:00:00+00:00",
)


def test_round_trip_keeps_every_field() -> None:
    assert from_json(to_json(RECORD)) == RECORD


def test_the_file_is_strict_json() -> None:
    text = to_json(RECORD)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert json.loads(text)["curves"]["objectives"] == [1.0, "Infinity"]


@given(st.floats())
def test_every_float_survives(value: float) -> None:
    objective = from_json(to_json(replace(RECORD, outcome=replace(RECORD.outcome, objective=value)))).outcome.objective
    assert objective == value or (math.isnan(objective) and math.isnan(value))


def test_ints_are_read_as_floats_where_floats_belong() -> None:
    data = json.loads(to_json(RECORD))
    data["outcome"]["seconds"] = 2
    assert isinstance(from_json(json.dumps(data)).outcome.seconds, float)


def damaged(path: str, value: object) -> str:
    data = json.loads(to_json(RECORD))
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("schema", SCHEMA + 1, "schema"),
        ("subject", [], "subject is not an object"),
        ("subject.parameters", "many", "subject.parameters is not a number"),
        ("subject.parameters", True, "subject.parameters is not a number"),
        ("subject.input_shape", 3, "subject.input_shape is not a list"),
        ("subject.evil", 1, "unknown field 'evil'"),
        ("outcome.labels", ["0"], "outcome.labels"),
        ("attack.options", {"lr": [1]}, "attack.options.lr"),
        ("curves.layers", [], "curves.layers is not an object"),
        ("verdict.headline", None, "verdict.headline is not of type str"),
        ("examples.0.values", {"mse": "small"}, "values.mse"),
        ("outcome.findings.0.proved", 1, "proved is not of type bool"),
        ("subject.parameters", 2**63, "larger than any number"),
        ("outcome.seconds", 10**400, "larger than any number"),
    ],
)
def test_damage_is_named(path: str, value: object, says: str) -> None:
    with pytest.raises(InvalidFile, match=says):
        from_json(damaged(path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"schema": 1}'])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidFile):
        from_json(text)


def test_version_1_is_told_what_to_do() -> None:
    with pytest.raises(
        InvalidFile, match=r"schema 2, but an earlier version wrote it \(schema 1\); run its command again"
    ):
        from_json(damaged("schema", 1))


def test_a_long_name_makes_no_long_message() -> None:
    with pytest.raises(InvalidFile) as caught:
        from_json(damaged("x" * 100_000, 1))
    assert len(str(caught.value)) < 3000


def test_the_documented_schema_names_every_field() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "result-schema.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]*)`", text))))
    kinds = [Record, Subject, Threat, AttackRun, Outcome, Verdict, Match, CertificateRecord, Example, Aggregate]
    kinds += [FindingRecord, AttemptRecord, Shown]
    for kind in [*kinds, Success, Lift, Curves]:
        assert {f.name for f in fields(kind)} - words == set(), kind.__name__
    assert f"version of this schema: {SCHEMA}" in text
