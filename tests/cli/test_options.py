"""What the options mean: the job that each of them makes, before anything runs."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.cli.running import Job
from gradleak.defenses import compose
from gradleak.threat import Knowledge
from gradleak.training import SGD, Adam, BinaryCrossEntropy, CrossEntropy, FedAvg, FedSGD, MeanSquaredError
from gradleak.types import NoteKind

PAGE = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"
DELTA = ("--kind", "weight_delta", "--lr", "0.1")


@pytest.fixture
def job(case, monkeypatch) -> Callable[..., Job]:
    """Return the job that the options make; it is not run."""
    made: list[Job] = []

    def keep(job: Job, watch: object) -> int:
        made.append(job)
        return 0

    monkeypatch.setattr("gradleak.cli.attack.run", keep)
    monkeypatch.setattr("gradleak.cli.attack.choose_threads", lambda work: 1)

    def go(*more: str, **changed: str | None) -> Job:
        done = case.attack(*more, **changed)
        assert done.code == 0, done.err
        return made.pop()

    return go


@pytest.fixture
def single(case) -> dict[str, str]:
    """A model with one output, an update of its binary cross-entropy, and what the command is told."""
    model = nn.Sequential(nn.Linear(7, 1))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    x = torch.randn(1, 7, generator=generator)
    loss = nn.functional.binary_cross_entropy_with_logits(model(x), torch.ones(1, 1))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    case.write("w.safetensors", dict(model.state_dict()))
    case.write("u.safetensors", dict(zip(["0.weight", "0.bias"], gradients, strict=True)))
    case.write("t.safetensors", {"inputs": x, "labels": torch.ones(1, dtype=torch.long)})
    return {
        "model": "victim:single",
        "weights": "w.safetensors",
        "update": "u.safetensors",
        "input_shape": "7",
        "classes": "1",
    }


TRAININGS = {
    (): FedSGD(CrossEntropy()),
    ("--loss", "cross-entropy"): FedSGD(CrossEntropy()),
    ("--loss", "bce"): FedSGD(BinaryCrossEntropy()),
    ("--loss", "mse", "--reduction", "sum"): FedSGD(MeanSquaredError("sum")),
    ("--loss", "torch.nn.functional:mse_loss"): FedSGD(MeanSquaredError()),
    ("--loss", "torch.nn:CrossEntropyLoss"): FedSGD(CrossEntropy()),
    ("--loss", "bce", "--class-weights", "3"): FedSGD(BinaryCrossEntropy(pos_weight=3.0)),
    ("--label-smoothing", "0.1", "--reduction", "sum"): FedSGD(CrossEntropy("sum", 0.1)),
    ("--class-weights", "1,2,1,1,4"): FedSGD(CrossEntropy(weight=(1.0, 2.0, 1.0, 1.0, 4.0))),
    DELTA: FedAvg(lr=0.1),
    (*DELTA, "--momentum", "0.9", "--weight-decay", "1e-4"): FedAvg(optimizer=SGD(0.1, 0.9, 1e-4)),
    (*DELTA, "--optimizer", "adam"): FedAvg(optimizer=Adam(0.1)),
    (*DELTA, "--optimizer", "adam", "--weight-decay", "0.5"): FedAvg(optimizer=Adam(0.1, weight_decay=0.5)),
    # What torch.optim.AdamW does where no weight decay is given.
    (*DELTA, "--optimizer", "adamw"): FedAvg(optimizer=Adam(0.1, weight_decay=0.01, decoupled=True)),
    (*DELTA, "--local-steps", "7", "--local-batch-size", "1"): FedAvg(lr=0.1, steps=7, batch_size=1),
    (*DELTA, "--local-epochs", "2", "--loss", "mse"): FedAvg(lr=0.1, epochs=2, loss=MeanSquaredError()),
}


@pytest.mark.parametrize("options", TRAININGS, ids=" ".join)
def test_the_clients_training(job, options: tuple[str, ...], request) -> None:
    if "weight_delta" in options:
        request.getfixturevalue("delta")  # a gradient would be refused for its sign
    (observation,) = job(*options).observations
    assert observation.training == TRAININGS[options]


def test_adamw_of_torch_has_the_weight_decay_that_is_assumed() -> None:
    assert torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"] == 0.01


def test_defenses_are_told_to_the_attacker_in_order(job) -> None:
    more = ("--defense", "clip:norm=0.5", "--defense", "gaussian_noise:sigma=1e-3")
    (observation,) = job(*more).observations
    clip, noise = gl.defenses.clip(0.5), gl.defenses.gaussian_noise(1e-3)
    assert observation.training.defense == compose(clip, noise)
    assert Knowledge.DEFENSE in observation.knows
    (observation,) = job("--defense", "prune:ratio=0.5,globally=true").observations
    assert observation.training.defense == gl.defenses.prune(0.5, globally=True)


@pytest.mark.parametrize("name", [n for n in gl.defenses.__all__ if n[0].islower() and n != "compose"])
def test_every_defense_has_its_name(job, name: str) -> None:
    options = {"clip": ":norm=1", "prune": ":ratio=0.9", "top_k": ":share=0.1"}
    options |= {"gaussian_noise": ":sigma=0.1", "laplacian_noise": ":scale=0.1", "clamp": ":bound=0.1"}
    options |= {"adaptive_clip": ":norm=1", "exclude_vars": ":pattern=bias", "secure_aggregation": ":clients=1"}
    options |= {"dp_sgd": ":noise_multiplier=1,max_grad_norm=1,batch_size=1"}
    options |= {"local_dp": ":clipping_norm=1,sensitivity=1,epsilon=1,delta=1e-5"}
    (observation,) = job("--defense", name + options.get(name, "")).observations
    assert observation.training.undefended == FedSGD()
    assert observation.training != FedSGD()


def test_defenses_of_any_kind_are_wrapped_in_order(job) -> None:
    more = ("--defense", "dp_sgd:noise_multiplier=1,max_grad_norm=1,batch_size=1", "--defense", "int8")
    (observation,) = job(*more).observations
    assert observation.training.defense == gl.defenses.int8()
    assert observation.training.inner.private.noise_multiplier == 1


def test_three_axes_are_an_image_unless_something_else_is_said(job) -> None:
    assert job().observations[0].space == gl.ImageSpace((1, 8, 8))
    assert job("--input-kind", "image").observations[0].space == gl.ImageSpace((1, 8, 8))
    assert job("--input-kind", "tensor").observations[0].space == gl.TensorSpace((1, 8, 8))


def test_one_output_without_a_stated_loss_has_two_candidates(job, single) -> None:
    made = job(**single)
    assert [o.training for o in made.observations] == [FedSGD(BinaryCrossEntropy()), FedSGD(MeanSquaredError())]
    assert len(job("--loss", "mse", **single).observations) == 1


@pytest.mark.parametrize(("loss", "labels"), [("bce", "1"), ("mse", "-3.5")])
def test_labels_of_one_output_are_targets(job, single, loss: str, labels: str) -> None:
    (observation,) = job("--loss", loss, "--labels", labels, **single).observations
    assert torch.equal(observation.labels, torch.tensor([[float(labels)]], dtype=torch.float64))
    made = job("--loss", loss, "--truth", "t.safetensors", **single)
    assert made.truth.labels.tolist() == [1]


REFUSED = {
    ("--loss", "cross-entropy"): "softmax cross-entropy is constant; give --loss bce or --loss mse",
    ("--label-smoothing", "0.1"): "take a stated loss",
    ("--loss", "bce", "--labels", "2"): "lie in [0, 1]",
    ("--loss", "bce", "--class-weights", "1,2"): "one number",
}


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_softmax_over_one_output_is_never_run(case, single, options: tuple[str, ...]) -> None:
    done = case.attack(*options, **single)
    assert done.code == 2
    assert REFUSED[options] in done.err


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_size_that_is_not_stated_is_named(job, monkeypatch, count: int) -> None:
    from gradleak.attacks.counting import CountedExamples

    monkeypatch.setattr("gradleak.cli.attack.count_examples", lambda *_: CountedExamples(count, "That is why."))
    made = job(batch_size=None)
    assert made.observations[0].batch_size == count
    assert made.batch_size_source == "assumed"
    (note,) = [n for n in made.notes if "batch size" in n]
    assert note.kind is (NoteKind.ASSUMPTION)
    assert note.endswith("That is why.")
    assert job().batch_size_source == "stated"


def test_a_batch_size_that_nothing_tells_is_asked_for(case, monkeypatch) -> None:
    from gradleak.attacks.counting import CountedExamples

    monkeypatch.setattr("gradleak.cli.attack.count_examples", lambda *_: CountedExamples(None, "No head was found."))
    done = case.attack(batch_size=None)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "(No head was found); state the number with --batch-size." in done.err


def test_slips_of_the_capture_are_named(case) -> None:
    done = case.attack(*DELTA)
    assert done.code == 2
    assert "opposite sign" in done.err
    weights, update = case.tensors("weights.safetensors"), case.tensors("update.safetensors")
    case.write("after.safetensors", {k: v - 0.01 * update[k] for k, v in weights.items()})
    done = case.attack(*DELTA, update="after.safetensors")
    assert done.code == 2
    assert "subtract those that were sent out" in done.err


EXAMPLES = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_page_make_jobs(case, job, run, monkeypatch, example: str) -> None:
    words = shlex.split(example.replace("\\\n", " "))
    stated = dict(itertools.pairwise(words))
    shape = tuple(int(v) for v in stated["--input-shape"].split(","))
    outputs = 1 if stated.get("--loss") == "mse" else 5
    inputs = torch.Size(shape).numel()
    (case.folder / "net.py").write_text(
        f"from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear({inputs}, {outputs}))\n"
    )
    generator = torch.Generator().manual_seed(0)
    step = -0.01 if "weight_delta" in words else 0.01
    case.write("W.safetensors", {"1.weight": torch.zeros(outputs, inputs), "1.bias": torch.zeros(outputs)})
    bias = step * torch.tensor([-4.0, 1, 1, 1, 1])[:outputs]
    case.write("U.safetensors", {"1.weight": torch.randn(outputs, inputs, generator=generator), "1.bias": bias})
    made: list[Job] = []
    monkeypatch.setattr("gradleak.cli.attack.run", lambda job, watch: made.append(job) or 0)
    done = run(*words[1:])
    assert done.code == 0, done.err
    assert made[0].observations[0].batch_size == int(stated["--batch-size"])
