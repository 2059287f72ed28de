from __future__ import annotations

import json
import os
import re
import signal
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gradleak.attacks.matching.engine import GradientMatching
from gradleak.audit.records import from_json
from gradleak.cli import attack as cli_attack

FILES = ["reconstruction.safetensors", "report.html", "result.json", "trace.safetensors"]
QUICK = ("--attack-option", "iterations=40")


def record(case, out: str = "out"):
    return from_json((case.folder / out / "result.json").read_text(encoding="utf-8"))


def test_without_ground_truth(case) -> None:
    done = case.attack("--attack-option", "iterations=300")
    assert done.code == 0, done.err
    assert sorted(os.listdir(case.folder / "out")) == FILES
    tensors = load_file(case.folder / "out" / "reconstruction.safetensors")
    assert set(tensors) == {"inputs", "labels"}
    assert tensors["inputs"].shape == (1, 1, 8, 8)
    assert float(tensors["inputs"].min()) >= 0
    assert float(tensors["inputs"].max()) <= 1
    assert tensors["labels"].tolist() == [3]
    assert tensors["labels"].dtype == torch.int64
    found = record(case)
    assert found.examples is None
    assert found.verdict.grade in ("matched", "close")
    assert found.subject.dtype == "float32"
    assert found.attack.options["iterations"] == 300
    assert found.attack.options["solver"] == "lbfgs"
    assert found.command.startswith("gradleak attack --model victim:small")
    assert "LABELS" in found.threat.withheld
    truth = case.tensors("truth.safetensors")["inputs"]
    assert float((tensors["inputs"] - truth).square().mean()) < 1e-4


def test_with_ground_truth(case) -> None:
    done = case.attack("--attack-option", "iterations=300", truth="truth.safetensors")
    assert done.code == 0, done.err
    found = record(case)
    assert found.verdict.headline in done.out
    assert found.examples[0].label == 3
    assert found.examples[0].recovered == 3
    assert found.examples[0].mse < 1e-4
    assert "mse" in done.out
    assert "label_accuracy" in done.out
    assert len(found.curves.mse) == len(found.curves.iterations)
    assert found.curves.iterations[-1] == found.outcome.evaluations > found.outcome.iterations
    assert found.curves.mse[-1] == pytest.approx(found.examples[0].mse, rel=1e-3)


def test_the_truth_changes_no_reconstruction(case) -> None:
    assert case.attack(*QUICK, out="a").code == 0
    assert case.attack(*QUICK, out="b", truth="truth.safetensors").code == 0
    a, b = (load_file(case.folder / out / "reconstruction.safetensors")["inputs"] for out in "ab")
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_equal_seeds_give_equal_results(case) -> None:
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert case.attack(*QUICK, out=out, seed=seed).code == 0
    a, b, c = (load_file(case.folder / out / "reconstruction.safetensors")["inputs"] for out in "abc")
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert not torch.allclose(a, c, atol=1e-3)


def test_a_batch_is_scored_example_by_example(pair) -> None:
    assert pair.attack(*QUICK, batch_size="2", truth="truth.safetensors").code == 0
    found = record(pair)
    assert sorted(e.index for e in found.examples) == [0, 1]
    assert [e.mse for e in found.examples] == sorted((e.mse for e in found.examples), reverse=True)
    assert found.success.n == 2
    assert next(a for a in found.aggregates if a.metric == "mse").sd is not None


def test_labels_are_granted_and_recorded(case) -> None:
    assert case.attack(*QUICK, labels="3").code == 0
    assert "LABELS" in record(case).threat.granted
    assert record(case).outcome.labels == (3,)


def test_weight_delta_of_two_local_steps(delta) -> None:
    done = delta.attack(
        "--attack-option", "iterations=400", kind="weight_delta", lr="0.1", local_epochs="2", truth="truth.safetensors"
    )
    assert done.code == 0, done.err
    found = record(delta)
    assert found.subject.update_kind == "weight_delta"
    assert "2 local steps" in found.subject.training
    assert found.examples[0].mse < 1e-3


def test_other_attacks_and_float64(case) -> None:
    case.write("update.safetensors", {k: v.double() for k, v in case.tensors("update.safetensors").items()})
    case.write("weights.safetensors", {k: v.double() for k, v in case.tensors("weights.safetensors").items()})
    assert case.attack(*QUICK, attack="inverting_gradients").code == 0
    assert record(case).subject.dtype == "float64"
    assert load_file(case.folder / "out" / "reconstruction.safetensors")["inputs"].dtype == torch.float64


def test_own_models_are_sized_from_the_data(case) -> None:
    done = case.attack("--attack-option", "iterations=3", model="lenet", weights=None, update="absent.safetensors")
    assert "absent.safetensors" in done.err
    import gradleak.models
    from gradleak.exchange import Client
    from gradleak.types import Batch

    model = gradleak.models.lenet(classes=5, in_channels=1, image_size=8, seed=0)
    update = Client(model, Batch(torch.rand(1, 1, 8, 8), torch.tensor([2]))).send()
    case.write("lenet.safetensors", dict(model.state_dict()))
    case.write("u.safetensors", dict(update.tensors))
    done = case.attack(
        "--attack-option", "iterations=3", model="lenet", weights="lenet.safetensors", update="u.safetensors"
    )
    assert done.code == 0, done.err


def test_inputs_that_are_no_images(case) -> None:
    from gradleak.exchange import Client
    from gradleak.types import Batch

    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Sigmoid(), torch.nn.Linear(9, 3))
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    batch = Batch(torch.randn(1, 7, generator=generator), torch.tensor([1]))
    case.write("w.safetensors", dict(model.state_dict()))
    case.write("u.safetensors", dict(Client(model, batch).send().tensors))
    case.write("t.safetensors", {"inputs": batch.inputs, "labels": batch.labels})
    done = case.attack(
        *QUICK, model="victim:rows", weights="w.safetensors", update="u.safetensors", input_shape="7", classes="3",
        truth="t.safetensors",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert record(case).subject.input_kind == "tensor"
    assert "Relative error" in record(case).verdict.reason
    assert {"relative_error", "null_guess_ratio"} <= set(record(case).examples[0].values)
    html = (case.folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img" not in html
    assert "Reconstructed" in html


def test_truth_from_npz_and_from_a_picture_without_labels(case) -> None:
    truth = case.tensors("truth.safetensors")["inputs"]
    np.savez(case.folder / "t.npz", inputs=truth.numpy(), labels=np.array([3]))
    assert case.attack(*QUICK, truth="t.npz").code == 0
    assert record(case).examples[0].label == 3
    Image.fromarray((truth[0, 0].numpy() * 255).astype(np.uint8)).save(case.folder / "t.png")
    assert case.attack(*QUICK, truth="t.png").code == 0
    found = record(case)
    assert found.examples[0].label is None
    assert "label_accuracy" not in {a.metric for a in found.aggregates}
    assert found.success.labels is None


def test_update_and_weights_from_npz(case) -> None:
    for name in ("update", "weights"):
        tensors = {k: v.numpy() for k, v in case.tensors(f"{name}.safetensors").items()}
        np.savez(case.folder / f"named_{name}.npz", **tensors)
        arrays = [tensors[k] for k in ("0.weight", "0.bias", "4.weight", "4.bias")]
        np.savez(case.folder / f"{name}.npz", *arrays)
    assert case.attack(*QUICK, out="a").code == 0
    done = case.attack(*QUICK, out="b", update="named_update.npz", weights="named_weights.npz")
    assert done.code == 0, done.err
    done = case.attack(*QUICK, out="c", update="update.npz", weights="weights.npz")
    assert done.code == 0, done.err
    a, b, c = (load_file(case.folder / out / "reconstruction.safetensors")["inputs"] for out in "abc")
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert sum("have no names" in n for n in record(case, "c").outcome.notes) == 2
    np.savez(case.folder / "update.npz", *arrays[:1])
    done = case.attack(*QUICK, update="update.npz")
    assert "1 arrays for 4 trainable parameters" in done.err


def test_public_data_for_the_null_guesses(case) -> None:
    np.savez(case.folder / "p.npz", x=np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8))
    assert case.attack(*QUICK, truth="truth.safetensors", data="p.npz").code == 0
    assert len(record(case).lifts) == 5
    assert "PUBLIC_DATA" in record(case).threat.withheld


def test_normalization_is_undone(case) -> None:
    done = case.attack(*QUICK, mean="0.5", std="0.25")
    assert done.code == 0, done.err
    assert "mean 0.5 and std 0.25" in record(case).subject.normalization


def test_a_time_budget_returns_the_best_so_far(case) -> None:
    done = case.attack("--attack-option", "iterations=1000000", "--attack-option", "tolerance=0", budget="0.5s")
    assert done.code == 0, done.err
    found = record(case)
    assert found.outcome.status in ("budget", "stalled")
    assert found.outcome.status == "stalled" or "time budget" in found.outcome.notes[-1]


def test_auto_is_the_default_and_knows_its_time_budget(case) -> None:
    done = case.attack(attack=None, budget="1m")
    assert done.code == 0, done.err
    found = record(case)
    assert found.attack.name == "auto"
    assert found.attack.options["budget"] == 60


def test_auto_starts_no_phase_after_its_time_budget(case, monkeypatch) -> None:
    from gradleak.attacks.auto import _Case

    def late(self, options, clock) -> None:
        raise AssertionError("the time was over")

    monkeypatch.setattr(_Case, "exactly", lambda self, options, clock: None)
    monkeypatch.setattr(_Case, "polished", late)
    done = case.attack("--attack-option", "iterations=1000000", attack="auto", budget="0.5s")
    assert done.code == 0, done.err
    assert "time budget ended it" in " ".join(record(case).outcome.notes)
    assert record(case).outcome.status == "budget"


def test_report_is_rendered_anew(case) -> None:
    assert case.attack(*QUICK, truth="truth.safetensors").code == 0
    path = case.folder / "out" / "report.html"
    before = path.read_bytes()
    path.unlink()
    done = case.run("report", "out")
    assert done.code == 0, done.err
    assert path.read_bytes() == before
    assert sorted(os.listdir(case.folder / "out")) == FILES


def test_a_second_run_replaces_the_first_and_leaves_other_files(case) -> None:
    assert case.attack(*QUICK, seed="1").code == 0
    (case.folder / "out" / "mine.txt").write_text("keep")
    assert case.attack(*QUICK, seed="2").code == 0
    assert record(case).attack.seed == 2
    assert sorted(os.listdir(case.folder / "out")) == sorted([*FILES, "mine.txt"])


def test_interruption_writes_the_best_so_far_and_says_so(case, monkeypatch) -> None:
    original = GradientMatching._reconstruct

    def interrupted(self, observations, seed, callback):
        def call(step):
            if step.done == 5:
                os.kill(os.getpid(), signal.SIGINT)
            callback(step)

        return original(self, observations, seed, call)

    import gradleak.attacks.matching.engine as engine

    clock = iter(range(10**9))
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(GradientMatching, "_reconstruct", interrupted)
    before = signal.getsignal(signal.SIGINT)
    done = case.attack("--attack-option", "tolerance=0")
    assert done.code == 130
    assert "interrupted" in done.err
    assert record(case).outcome.status == "interrupted"
    assert sorted(os.listdir(case.folder / "out")) == FILES
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interruption_gives_up_and_writes_nothing(case, monkeypatch) -> None:
    def stubborn(self, observations, seed, callback):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second Ctrl-C must have stopped this")

    monkeypatch.setattr(GradientMatching, "_reconstruct", stubborn)
    done = case.attack()
    assert done.code == 130
    assert "nothing was written" in done.err
    assert not (case.folder / "out").exists()


def test_the_result_holds_no_nan_for_json(case) -> None:
    assert case.attack(*QUICK).code == 0
    json.loads(
        (case.folder / "out" / "result.json").read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )


# ------------------------------------------------------------------------------------------------------ failures


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def nan(case):
    update = case.tensors("update.safetensors")
    update["0.weight"][0, 0, 0, 0] = float("nan")
    case.write("update.safetensors", update)


def inf(case):
    update = case.tensors("update.safetensors")
    update["4.bias"][1] = float("inf")
    case.write("update.safetensors", update)


def zero(case):
    case.write("update.safetensors", {k: 0 * v for k, v in case.tensors("update.safetensors").items()})


def missing(case):
    update = case.tensors("update.safetensors")
    del update["4.bias"]
    case.write("update.safetensors", update)


def extra(case):
    case.write("update.safetensors", case.tensors("update.safetensors") | {"head.bias": torch.zeros(3)})


def parallel(case):
    tensors = case.tensors("update.safetensors")
    case.write("update.safetensors", {f"module.{k}": v for k, v in tensors.items()})


def parallel_weights(case):
    tensors = case.tensors("weights.safetensors")
    case.write("weights.safetensors", {f"module.{k}": v for k, v in tensors.items()})


def looked_up(case):
    case.write(
        "update.safetensors",
        {"0.weight": torch.ones(20, 4), "2.weight": torch.ones(5, 12), "2.bias": torch.ones(5)},
    )


def misshapen(case):
    case.write("update.safetensors", case.tensors("update.safetensors") | {"4.bias": torch.zeros(7)})


def integers(case):
    case.write("update.safetensors", case.tensors("update.safetensors") | {"4.bias": torch.zeros(5, dtype=torch.int64)})


def truncated(case):
    path = case.folder / "update.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def empty(case):
    (case.folder / "update.safetensors").write_bytes(b"")


def garbage(case):
    # Not random: one in 128 such files begins as a pickle or a safetensors header does.
    (case.folder / "update.safetensors").write_bytes(bytes(range(1, 256)) * 2)


def huge_header(case):
    (case.folder / "update.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}" * 50)


def pickled(case):
    import pickle

    (case.folder / "update.safetensors").write_bytes(pickle.dumps(Bomb()))


def pickled_by_torch(case):
    torch.save({"0.weight": Bomb()}, case.folder / "update.safetensors")


def pickled_truth(case):
    np.savez(case.folder / "t.npz", inputs=np.array([Bomb()], dtype=object))


def bright(case):
    truth = case.tensors("truth.safetensors")
    case.write("truth.safetensors", truth | {"inputs": truth["inputs"] * 255})


def unnamed(case):
    case.write("truth.safetensors", {"images": torch.zeros(1, 1, 8, 8)})


def other_weights(case):
    case.write("weights.safetensors", {"fc.weight": torch.zeros(2, 2)})


def nan_weights(case):
    case.write("weights.safetensors", case.tensors("weights.safetensors") | {"4.bias": torch.full((5,), torch.nan)})


def blocked(case):
    (case.folder / "out").write_text("a file")


FAILURES = {
    "NaN": (nan, {}, "'0.weight' of the update has NaN"),
    "infinite": (inf, {}, "'4.bias' of the update has NaN or infinite"),
    "all zero": (zero, {}, "zero in every parameter"),
    "missing parameter": (missing, {}, "lacks '4.bias'"),
    "extra parameter": (extra, {}, "has 'head.bias', which the model does not train"),
    "wrapped by a trainer": (parallel, {}, "begin with 'module.' (from DistributedDataParallel)"),
    "weights wrapped by a trainer": (parallel_weights, {}, "begin with 'module.' (from DistributedDataParallel)"),
    "wrong shape": (misshapen, {}, "'4.bias' has shape (5,) in the model but (7,)"),
    "integer update": (integers, {}, "not floats"),
    "truncated": (truncated, {}, "damaged"),
    "empty": (empty, {}, "is empty"),
    "garbage": (garbage, {}, "neither a safetensors, PyTorch nor .npz file"),
    "hostile header": (huge_header, {}, "update.safetensors"),
    "pickle": (pickled, {}, "pickled"),
    "pickle in a torch file": (pickled_by_torch, {}, "pickled"),
    "pickled truth": (pickled_truth, {"truth": "t.npz"}, "cannot be read as .npz"),
    "no update": (None, {"update": "nowhere.safetensors"}, "There is no file 'nowhere.safetensors'"),
    "no weights": (None, {"weights": "nowhere.safetensors"}, "There is no file 'nowhere.safetensors'"),
    "no truth": (None, {"truth": "nowhere.npz"}, "There is no file 'nowhere.npz'"),
    "a folder": (None, {"update": "."}, "is a folder"),
    "unknown attack": (None, {"attack": "dgl"}, "did you mean 'dlg'"),
    "unknown model": (None, {"model": "lenett"}, "did you mean 'lenet'"),
    "unknown module": (None, {"model": "nowhere:small"}, "no module named 'nowhere'"),
    "unknown factory": (None, {"model": "victim:smal"}, "did you mean 'small'"),
    "factory that fails": (None, {"model": "victim:broken"}, "no such checkpoint"),
    "nothing to train": (None, {"model": "victim:frozen"}, "no trainable parameter"),
    "no logits": (
        lambda case: case.write("update.safetensors", {"0.weight": torch.ones(3, 1, 3, 3), "0.bias": torch.ones(3)}),
        {"model": "victim:sequence", "weights": None},
        "where logits",
    ),
    "tokens": (
        looked_up,
        {"model": "victim:tokens", "weights": None, "input_shape": "3"},
        "The model 'victim:tokens' takes tokens, which the command line cannot describe; in Python, gl.attacks.",
    ),
    "attack on tokens": (None, {"attack": "read_sentences", "update": "nowhere"}, "'read_sentences' takes tokens"),
    "unknown attack option": (None, {"attack_option": "restart=2"}, "did you mean 'restarts'"),
    "wrong attack option": (None, {"attack_option": "restarts=many"}, "'restarts' of dlg is int, not 'many'"),
    "impossible attack option": (None, {"attack_option": "restarts=0"}, "restarts=0"),
    "no key=value": (None, {"attack_option": "restarts"}, "not of the form key=value"),
    "unknown solver": (None, {"attack_option": "solver=lbgfs"}, "did you mean 'lbfgs'"),
    "unknown model argument": (None, {"model_arg": "clases=5"}, "did you mean 'classes'"),
    "unknown kind": (None, {"kind": "gradients"}, "did you mean 'gradient'"),
    "unknown device": (None, {"device": "gpu"}, "did you mean 'cpu'"),
    "unknown dtype": (None, {"dtype": "float16"}, "no dtype named 'float16'"),
    "unknown mode": (None, {"mode": "evaluation"}, "no mode named 'evaluation'"),
    "unknown reduction": (None, {"reduction": "avg"}, "'mean' or 'sum'"),
    "smoothing": (None, {"label_smoothing": "1.5"}, "[0, 1)"),
    "no shape": (None, {"input_shape": "one,8,8"}, "not a list of whole numbers"),
    "negative shape": (None, {"input_shape": "1,-8,8"}, "size below 1"),
    "other shape": (None, {"input_shape": "3,8,8"}, "check --input-shape"),
    "other classes": (None, {"classes": "7"}, "The model has 5 classes, not 7"),
    "classes zero": (None, {"classes": "0"}, "Invalid value for '--classes'"),
    "batch size zero": (None, {"batch_size": "0"}, "Invalid value for '--batch-size'"),
    "batch size of the truth": (None, {"batch_size": "2", "truth": "truth.safetensors"}, "has 1 examples"),
    "labels out of range": (None, {"labels": "5"}, "classes run from 0 to 4"),
    "labels not numbers": (None, {"labels": "cat"}, "--labels 'cat'"),
    "too many labels": (None, {"labels": "1,2"}, "names 2 classes for 1 examples"),
    "std zero": (None, {"std": "0"}, "std must be positive"),
    "mean of other channels": (None, {"mean": "0.1,0.2"}, "2 values for 1 channels"),
    "delta without lr": (None, {"kind": "weight_delta"}, "--lr"),
    "lr without delta": (None, {"lr": "0.1"}, "weight_delta"),
    "budget": (None, {"budget": "soon"}, "write for example 90s"),
    "two budgets": (None, {"attack": "auto", "budget": "9s", "attack_option": "budget=9"}, "both limit the time"),
    "image out of range": (bright, {"truth": "truth.safetensors"}, "outside [0, 1]"),
    "truth without inputs": (unnamed, {"truth": "truth.safetensors"}, "no tensor named 'inputs'"),
    "other weights": (other_weights, {}, "lacks '0.weight'"),
    "NaN weights": (nan_weights, {}, "'4.bias' of the weights has NaN"),
    "public data": (None, {"data": "nowhere", "truth": "truth.safetensors"}, "'nowhere'"),
    "dropout": (None, {"model_arg": "p=0.5"}, "--mode eval"),
    "an option that does not exist": (None, {"sed": "1"}, "No such option"),
    "not a number": (None, {"seed": "one"}, "'one'"),
    "out has no name": (None, {"out": ""}, "the name is empty"),
    "out is a file": (blocked, {}, "is not a folder"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_sentence_and_leave_nothing(case, name: str) -> None:
    prepare, changed, says = FAILURES[name]
    if prepare is not None:
        prepare(case)
    before = {p.name: p.stat().st_mtime_ns for p in case.folder.iterdir() if p.name != "__pycache__"}
    done = case.attack(**changed)
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err + done.out
    assert done.err.startswith("gradleak: ")
    assert done.err.count("\n") == 1
    assert done.err.rstrip().endswith((".", "?"))
    after = {p.name: p.stat().st_mtime_ns for p in case.folder.iterdir() if p.name != "__pycache__"}
    assert after == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no folder that refuses root as well")
def test_a_folder_that_cannot_be_written_is_refused_before_the_attack(case, monkeypatch) -> None:
    monkeypatch.setattr(cli_attack, "_attack_with_progress", lambda job: pytest.fail("the attack ran"))
    done = case.attack(out="/proc/x/y")
    assert done.code == 2
    assert "cannot be written" in done.err


def normalized(case):
    """Return the model ``victim:small`` with BatchNorm, and two private examples."""
    import importlib
    import sys

    from gradleak.types import Batch

    sys.path.insert(0, str(case.folder))
    try:
        model = importlib.import_module("victim").small(norm=True)
    finally:
        sys.path.remove(str(case.folder))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    case.write("weights.safetensors", dict(model.state_dict()))
    return model, Batch(torch.rand(2, 1, 8, 8, generator=generator), torch.tensor([1, 4]))


def test_batchnorm_in_training_mode_and_the_remedy_it_names(case) -> None:
    from gradleak.exchange import Client

    model, batch = normalized(case)
    case.write("update.safetensors", dict(Client(model.eval(), batch).send().tensors))
    done = case.attack(*QUICK, model_arg="norm=true", batch_size="2")
    assert done.code == 2
    assert "--mode eval" in done.err
    assert not (case.folder / "out").exists()
    done = case.attack(*QUICK, model_arg="norm=true", mode="eval", batch_size="2")
    assert done.code == 0, done.err


def test_batchnorm_that_was_trained_on_batch_statistics_and_the_remedy_for_it(case) -> None:
    from gradleak.exchange import Client

    model, batch = normalized(case)
    case.write("update.safetensors", dict(Client(model.train(), batch).send().tensors))
    done = case.attack(*QUICK, model_arg="norm=true", batch_size="2")
    assert "--mode batch" in done.err
    plain = ("--attack-option", "iterations=300", "--attack-option", "restarts=2")
    done = case.attack(*plain, model_arg="norm=true", batch_size="2", labels="1,4", mode="batch")
    assert done.code == 0, done.err
    assert record(case).match.residual < 0.05
    options = ("--model-arg", "track=false", "--attack-option", "iterations=300", "--attack-option", "restarts=2")
    done = case.attack(*options, model_arg="norm=true", batch_size="2", labels="1,4")
    assert done.code == 0, done.err
    found = record(case)
    assert found.match.residual < 0.05
    assert any(re.match(r"Left out of the weights: '1\.\w+' and 2 more", n) for n in found.outcome.notes)


def test_buffers_in_the_update_are_left_out_with_a_note(case) -> None:
    model, batch = normalized(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
    optimizer.step()
    case.write("update.safetensors", {k: v - before[k] for k, v in model.state_dict().items()})
    for options in (("norm=true", "--mode", "eval"), ("norm=true", "--model-arg", "track=false")):
        done = case.attack(*QUICK, *options[1:], model_arg=options[0], batch_size="2", kind="weight_delta", lr="0.1")
        assert done.code == 0, done.err
        assert any(re.match(r"Left out of the update: '1\.\w+' and 2 more", n) for n in record(case).outcome.notes)


def test_an_attack_that_fails_leaves_nothing(case, monkeypatch) -> None:
    from gradleak.errors import NotApplicable

    def refuse(*_: object) -> None:
        raise NotApplicable("No linear layer sees the data; choose dlg.")

    monkeypatch.setattr(GradientMatching, "_reconstruct", refuse)
    done = case.attack()
    assert (done.code, done.err) == (2, "gradleak: No linear layer sees the data; choose dlg.\n")
    assert not (case.folder / "out").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_full_or_forbidden_disk(case, monkeypatch, error: OSError) -> None:
    import gradleak.audit.folder as folder

    def refuse(_: int) -> None:
        raise error

    monkeypatch.setattr(folder.os, "fsync", refuse)
    before = sorted(os.listdir(case.folder))
    done = case.attack(*QUICK)
    assert done.code == 2
    assert error.strerror in done.err
    assert "Traceback" not in done.err
    assert [n for n in sorted(os.listdir(case.folder)) if n != "__pycache__"] == [
        n for n in before if n != "__pycache__"
    ]


def test_no_cuda_here(case, monkeypatch) -> None:
    monkeypatch.setattr(cli_attack.torch.cuda, "is_available", lambda: False)
    done = case.attack(device="cuda")
    assert done.code == 2
    assert "--device cpu" in done.err


@pytest.mark.parametrize("damage", ["{", '{"schema": 99}', ""])
def test_report_of_a_damaged_result(case, damage: str) -> None:
    assert case.attack(*QUICK).code == 0
    (case.folder / "out" / "result.json").write_text(damage, encoding="utf-8")
    before = (case.folder / "out" / "report.html").read_bytes()
    done = case.run("report", "out")
    assert done.code == 2
    assert re.match(r"gradleak: .*result\.json", done.err)
    assert (case.folder / "out" / "report.html").read_bytes() == before


def test_report_of_nothing(run) -> None:
    done = run("report", "nowhere")
    assert (done.code, done.out) == (2, "")
    assert "There is no folder" in done.err


def test_results_are_private_only_as_far_as_the_umask_says(case) -> None:
    assert case.attack(*QUICK).code == 0
    assert stat.S_IMODE((case.folder / "out" / "result.json").stat().st_mode) & 0o400


def test_an_attack_of_ones_own(case) -> None:
    (case.folder / "mine.py").write_text(
        "import torch\n"
        "from gradleak.attacks.base import Attack\n"
        "from gradleak.threat import Knowledge\n"
        "from gradleak.types import Reconstruction\n"
        "class Guess(Attack):\n"
        "    requires = Knowledge.BATCH_SIZE\n"
        "    def __init__(self, level): self.level = level\n"
        "    def _reconstruct(self, observations, seed, callback):\n"
        "        shape = observations[0].space.shape\n"
        "        return [Reconstruction(torch.full((o.batch_size, *shape), self.level), None, 1.0, status='stalled')"
        " for o in observations]\n"
        "def guess(*, level: float = 0.5): return Guess(level)\n"
        "def broken(): return 3\n"
    )
    done = case.attack("--attack-option", "level=0.25", attack="mine:guess")
    assert done.code == 0, done.err
    assert record(case).attack.name == "mine:guess"
    assert record(case).attack.options == {"level": 0.25}
    assert "must return an Attack" in case.attack(attack="mine:broken").err
    assert "no factory named" in case.attack(attack="mine:nothing").err
    assert "module:factory" in case.attack(attack="nothing").err


def test_features_are_reported_as_such(case) -> None:
    truth = str(case.folder / "truth.safetensors")
    done = case.attack("--truth", truth, attack="disaggregate")
    assert done.code == 0, done.err
    found = record(case)
    assert found.outcome.shows == "features"
    assert "last layer" in found.verdict.headline
    assert found.examples is None
    assert any("--truth is unused" in note for note in found.outcome.notes)
    assert case.run("report", str(case.folder / "out")).code == 0
