from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.audit.build import build_record, build_refusal
from gradleak.audit.folder import read_folder, write_folder
from gradleak.audit.records import from_json, to_json
from gradleak.audit.scores import score
from gradleak.errors import MissingKnowledge, NotApplicable
from gradleak.report import picture, render
from gradleak.types import (
    Attempt,
    Batch,
    Certificate,
    Finding,
    FindingKind,
    Note,
    NoteKind,
    Reconstruction,
    Shows,
    Status,
    Trace,
    Verdict,
)


def observed(model=None, space=None, inputs=None, labels=None, training=None, **grants):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = torch.randn(2, 6) if inputs is None else inputs
    batch = Batch(inputs, torch.tensor([0, 2][: len(inputs)]) if labels is None else labels)
    client = gl.Client(model, batch, training or gl.FedSGD())
    observation = gl.ThreatModel(**grants).observe(
        model, client.send(), space=space or gl.TensorSpace((6,)), training=client.training, batch_size=len(inputs)
    )
    return observation, batch


def test_the_true_batch_explains_its_update() -> None:
    observation, batch = observed()
    record = build_record(observation, Reconstruction(batch.inputs, batch.labels, 0.0), attack="x").record
    assert record.match.residual < 1e-6
    other = build_record(observation, Reconstruction(batch.inputs + 1, batch.labels, 0.0), attack="x").record
    assert other.match.residual > 0.1


def test_frozen_parameters_and_weighted_losses_are_simulated() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    training = gl.FedSGD(gl.CrossEntropy(label_smoothing=0.1, weight=(1.0, 2.0, 3.0)))
    observation, batch = observed(model, training=training)
    record = build_record(observation, Reconstruction(batch.inputs, batch.labels, 0.0), attack="x").record
    assert record.match.residual < 1e-6
    assert record.subject.training.startswith("mean cross-entropy with label smoothing 0.1 with class weights")


def test_features_as_wide_as_the_input_are_no_inputs() -> None:
    """A head as wide as the input: the shapes agree, and what the last layer saw was called the private input."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    observation, batch = observed(model)
    features = model[:2](batch.inputs).detach()
    proof = Certificate(Verdict.PROVED, 0.0, 1e-7, examples=(Verdict.PROVED,) * 2, reason="Of the features.")
    found = Reconstruction(features, batch.labels, 0.0, certificate=proof, shows=Shows.FEATURES)
    folder = build_record(observation, found, attack="disaggregate")
    assert folder.record.match is None
    assert folder.record.outcome.shows == "features"
    assert folder.record.verdict.headline == "The update proves what the last layer saw of all 2 examples."
    assert "what the last layer saw" in render(folder.record, picture(folder.record, folder.inputs))


def test_the_trace_of_another_attack_is_no_obstacle() -> None:
    """A search for features, finished by another attack: its curves name what is no parameter."""
    observation, batch = observed()
    trace = Trace((0, 5), (1.0, 0.1), {"features of the head": (1.0, 0.5)}, torch.zeros(2, 2, 4))
    found = Reconstruction(batch.inputs, batch.labels, 1e-9, trace=trace)
    folder = build_record(observation, found, attack="feature_matching")
    assert folder.snapshots is None
    assert folder.record.curves.layers == {"features of the head": (1.0, 0.5)}
    longer = build_record(observation, replace(found, trace=replace(trace, snapshots=None)), attack="x")
    assert longer.record.curves.iterations == (0, 5, 6)
    from_json(to_json(longer.record))
    mixed = replace(trace, snapshots=torch.zeros(2, 2, 6))
    scores = score(found, batch, observation.space)
    third = build_record(observation, replace(found, trace=mixed), attack="x", scores=scores, truth=batch)
    assert third.snapshots.shape == (3, 2, 6)
    assert third.record.curves.mse[-1] == 0


def test_what_an_attack_says_is_recorded_in_fields() -> None:
    observation, batch = observed()
    found = Reconstruction(
        batch.inputs,
        batch.labels,
        0.0,
        status=Status.EXACT,
        attack="linear_inversion",
        notes=("plain", Note("The solved inputs run from 0 to 9.", NoteKind.RANGE)),
        solved=torch.tensor([True, False]),
        findings=(Finding(FindingKind.LABELS, "Both classes were read.", True, 2, 2),),
        attempts=(Attempt("recursion", False, None, "too narrow"), Attempt("dlg", True, Verdict.UNPROVED, "far")),
        certificate=Certificate(
            Verdict.MATCHED,
            1e-8,
            1e-7,
            bound=1e-9,
            local=True,
            mixture=True,
            factors={"0.weight": 2.0},
            part=("0.weight",),
        ),
    )
    record = from_json(to_json(build_record(observation, found, attack="auto", notes=("added",)).record))
    outcome, certificate = record.outcome, record.certificate
    assert (record.attack.name, outcome.attack, outcome.status) == ("auto", "linear_inversion", "exact")
    assert outcome.notes == ("plain", "The solved inputs run from 0 to 9.", "added")
    assert outcome.note_kinds == ("method", "range", "method")
    assert outcome.told("range") == ("The solved inputs run from 0 to 9.",)
    assert outcome.solved == (0,)
    assert [(f.kind, f.count, f.of) for f in outcome.findings] == [("labels", 2, 2)]
    assert [(a.attack, a.taken, a.verdict) for a in outcome.attempts] == [
        ("recursion", False, None), ("dlg", True, "unproved")
    ]  # fmt: skip
    assert (certificate.verdict, certificate.bound, certificate.local, certificate.mixture) == (
        "matched",
        1e-9,
        True,
        True,
    )
    assert certificate.factors == {"0.weight": 2.0}
    assert certificate.part == ("0.weight",)
    assert record.match is None  # The rest may hold random masks.


@pytest.mark.parametrize("source", ["stated", "assumed"])
def test_where_the_batch_size_comes_from(source: str) -> None:
    observation, batch = observed()
    record = build_record(
        observation, Reconstruction(batch.inputs, batch.labels, 0.0), attack="x", batch_size_source=source
    )
    assert record.record.subject.batch_size_source == source


def test_sentences_are_recorded_as_tokens_with_their_words() -> None:
    space = gl.TokenSpace(torch.eye(6), 2, words=("a", "b", "c", "d", "e", "f"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    ids = torch.tensor([[0, 1], [4, 5]])
    observation, _ = observed(model, space, torch.eye(6)[ids])
    truth = Batch(ids, torch.tensor([0, 2]))
    found = Reconstruction(ids.flip(0), torch.tensor([2, 0]), 0.0)
    scores = score(found, truth, space)
    folder = build_record(observation, found, attack="x", scores=scores, truth=truth)
    record = from_json(to_json(folder.record))
    assert (record.subject.input_kind, record.subject.display) == ("tokens", "text")
    assert record.verdict.headline == "Both private sentences came back, word for word."
    assert record.shown.guess == (("e", "f"), ("a", "b"))
    assert record.shown.lines == ("e f", "a b")
    assert record.shown.truth == (("a", "b"), ("e", "f"))
    assert record.match.residual < 1e-6


class TestRefusals:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (NotApplicable("Two outputs; name one."), "not_applicable"),
            (MissingKnowledge("No size; state it."), "missing_knowledge"),
        ],
    )
    def test_are_recorded_written_read_and_rendered(self, tmp_path, error, status: str) -> None:
        observation, _ = observed()
        folder = build_refusal(observation, error, attack="recursion", seed=3, command="gradleak attack …")
        assert folder.record.outcome.status == folder.record.verdict.grade == status
        assert folder.record.verdict.reason == str(error)
        assert folder.inputs.shape == (0, 6)
        html = render(folder.record, picture(folder.record, folder.inputs))
        write_folder(tmp_path / "out", folder, html)
        read = read_folder(tmp_path / "out")
        assert to_json(replace(read.record, files={})) == to_json(folder.record)
        assert render(read.record, picture(read.record, read.inputs)) == html
        assert "the attack did not run" in html

    def test_with_what_was_found(self) -> None:
        observation, _ = observed()
        error = NotApplicable("Two outputs; name one.")
        error.findings = (Finding(FindingKind.LABELS, "Both classes were read.", True, 2, 2),)
        record = build_refusal(observation, error, attack="auto").record
        assert (record.verdict.grade, record.verdict.headline) == ("partly", "Both classes were read.")
        assert record.outcome.status == "not_applicable"

    def test_without_an_observation(self) -> None:
        subject = build_refusal(observed()[0], NotApplicable("No."), attack="x").record.subject
        folder = build_refusal(subject, MissingKnowledge("Say more."), attack="auto")
        assert folder.record.subject == subject
        assert folder.record.threat.granted == ()
