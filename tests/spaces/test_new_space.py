"""A new modality is one file and one import line: scores, verdict, record and report need no change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.audit.build import build_record
from gradleak.audit.records import from_json, to_json
from gradleak.audit.scores import score
from gradleak.report import picture, render
from gradleak.spaces import InputSpace
from gradleak.types import Batch, Reconstruction


@dataclass(frozen=True)
class Patients(InputSpace):
    """Toy: a patient is an age in decades and one of three wards, one-hot."""

    shape: tuple[int, ...] = (4,)

    kind: ClassVar[str] = "patients"
    noun: ClassVar[str] = "patient"
    nouns: ClassVar[str] = "patients"
    display: ClassVar[Literal["pictures", "numbers", "text", "table"]] = "table"
    reads: ClassVar[frozenset[str]] = frozenset({"inputs"})
    quoted: ClassVar[tuple[str, ...]] = ("mse",)
    error_name: ClassVar[str] = "share of wrong columns"
    WARDS: ClassVar[tuple[str, ...]] = ("surgery", "oncology", "births")

    def decode(self, candidates: Tensor) -> Tensor:
        ward = nn.functional.one_hot(candidates[..., 1:].argmax(-1), 3).to(candidates)
        return torch.cat([candidates[..., :1], ward], -1)

    def encode(self, inputs: Tensor) -> Tensor:
        return inputs

    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        age = (guess[:, 0] - truth[:, 0]).abs() > 0.05
        ward = (guess[:, 1:] != truth[:, 1:]).any(1)
        wrong = (age.double() + ward.double()) / 2
        return torch.where(torch.isfinite(guess).all(1), wrong, torch.nan)

    def closeness(self, values: Mapping[str, float | None]) -> tuple[int, str]:
        error = values.get("mse")
        return (3, "A colleague would know the patient.") if error is not None and error < 1e-3 else (0, "Nobody.")

    @property
    def names(self) -> tuple[str, ...]:
        return ("age", "ward")

    def texts(self, inputs: Tensor) -> tuple[tuple[str, ...], ...]:
        return tuple((f"{10 * float(row[0]):.0f}", self.WARDS[int(row[1:].argmax())]) for row in inputs)


@pytest.fixture(scope="module")
def exchange():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    truth = Batch(torch.tensor([[4.2, 0.0, 1.0, 0.0], [6.7, 1.0, 0.0, 0.0]]), torch.tensor([0, 2]))
    client = gl.Client(model, truth)
    observation = gl.ThreatModel().observe(
        model, client.send(), space=Patients(), training=client.training, batch_size=2
    )
    return observation, truth


def build(exchange, inputs: Tensor, *, with_truth: bool = True):
    observation, truth = exchange
    found = Reconstruction(inputs, torch.tensor([0, 2]), 0.0)
    scores = score(found, truth, observation.space) if with_truth else None
    return build_record(observation, found, attack="auto", scores=scores, truth=truth if with_truth else None)


def test_what_came_back_is_told_in_the_spaces_own_words(exchange) -> None:
    swapped = exchange[1].inputs.flip(0)
    folder = build(exchange, swapped)
    record = from_json(to_json(folder.record))
    assert record.subject.input_kind == "patients"
    assert record.verdict.headline == "Both private patients came back."
    assert "A colleague would know the patient." in record.verdict.reason
    assert record.success.error == "share of wrong columns"
    assert (record.success.successes, [e.guess for e in record.examples]) == (2, [1, 0])
    html = render(record, picture(record, folder.inputs, folder.truth))
    assert '<tr><th scope="row">ward</th><td>oncology</td><td>oncology</td></tr>' in html
    assert "2 of 2 patients count as recovered: share of wrong columns at most" in html
    assert "image" not in html.split("<body")[1].replace('role="img"', "").split("<footer")[0].split("private {")[0]


def test_what_did_not(exchange) -> None:
    wrong = exchange[1].inputs + torch.tensor([2.0, 0.0, 0.0, 0.0])
    record = build(exchange, wrong).record
    assert record.verdict.grade == "not_recovered"
    assert record.verdict.headline == "None of the 2 private patients came back."
    assert record.examples[0].words == "Nobody."


def test_without_truth_the_words_stay_the_spaces_own(exchange) -> None:
    folder = build(exchange, exchange[1].inputs, with_truth=False)
    assert "patients" in folder.record.verdict.headline
    html = render(folder.record, picture(folder.record, folder.inputs))
    assert "oncology" in html
