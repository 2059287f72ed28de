from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch

from gradleak.attacks.matching.engine import GradientMatching

QUICK = ("--attack-option", "iterations=40")


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


def inner(case):
    update = case.tensors("update.safetensors")
    case.write("update.safetensors", {f"inner.{k}": v for k, v in update.items()})


def strange(how: str) -> dict[str, str | None]:
    return {"model": "victim:strange", "weights": None, "model_arg": f"how={how}"}


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
    "pickled truth": (pickled_truth, {"truth": "t.npz"}, "pickled Python objects"),
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
    "attack on tokens": (
        None,
        {"attack": "read_sentences", "update": "nowhere"},
        "is for language models",
    ),
    "unknown attack option": (None, {"attack_option": "restart=2"}, "did you mean 'restarts'"),
    "wrong attack option": (None, {"attack_option": "restarts=many"}, "'restarts' of dlg is int, not 'many'"),
    "impossible attack option": (None, {"attack_option": "restarts=0"}, "restarts=0"),
    "no key=value": (None, {"attack_option": "restarts"}, "not of the form key=value"),
    "unknown solver": (None, {"attack_option": "solver=lbgfs"}, "did you mean 'lbfgs'"),
    "unknown model argument": (None, {"model_arg": "clases=5"}, "did you mean 'classes'"),
    "unknown kind": (None, {"kind": "gradients"}, "did you mean 'gradient'"),
    "unknown device": (None, {"device": "gpu"}, "did you mean 'cpu'"),
    "unknown dtype": (None, {"dtype": "float16"}, "no such value named 'float16'"),
    "unknown mode": (None, {"mode": "evaluation"}, "named 'evaluation'"),
    "unknown reduction": (None, {"reduction": "avg"}, "choose one of mean, sum"),
    "smoothing": (None, {"label_smoothing": "1.5"}, "[0, 1)"),
    "no shape": (None, {"input_shape": "one,8,8"}, "not a list of whole numbers"),
    "negative shape": (None, {"input_shape": "1,-8,8"}, "size below 1"),
    "other shape": (None, {"input_shape": "3,8,8"}, "check --input-shape"),
    "other classes": (None, {"classes": "7"}, "The model has 5 classes, not 7"),
    "classes zero": (None, {"classes": "0"}, "Invalid value for '--classes'"),
    "batch size zero": (None, {"batch_size": "0"}, "Invalid value for '--batch-size'"),
    "batch size of the truth": (None, {"batch_size": "2", "truth": "truth.safetensors"}, "has 1 examples"),
    "batch size not whole": (None, {"batch_size": "1.5"}, "'1.5'"),
    "batch size huge": (None, {"batch_size": "100000000000"}, "--batch-size"),
    "labels out of range": (None, {"labels": "5"}, "classes run from 0 to 4"),
    "labels not numbers": (None, {"labels": "cat"}, "'--labels': 'cat' is not a list"),
    "labels between classes": (None, {"labels": "1.5"}, "names class 1.5"),
    "too many labels": (None, {"labels": "1,2"}, "names 2 labels for 1 examples"),
    "std zero": (None, {"std": "0"}, "std must be positive"),
    "mean of other channels": (None, {"mean": "0.1,0.2"}, "2 values for 1 channels"),
    "delta without lr": (None, {"kind": "weight_delta"}, "--lr"),
    "lr without delta": (None, {"lr": "0.1"}, "weight_delta"),
    "budget": (None, {"budget": "soon"}, "write for example 90s"),
    "endless budget": (None, {"budget": "1e308"}, "is not a time"),
    "two budgets": (None, {"attack": "auto", "budget": "9s", "attack_option": "budget=9"}, "both limit the time"),
    "image out of range": (bright, {"truth": "truth.safetensors"}, "outside [0, 1]"),
    "truth without inputs": (unnamed, {"truth": "truth.safetensors"}, "no tensor named 'inputs'"),
    "other weights": (other_weights, {}, "lacks '0.weight'"),
    "NaN weights": (nan_weights, {}, "'4.bias' of the weights has NaN"),
    "public data": (None, {"data": "nowhere", "truth": "truth.safetensors"}, "'nowhere'"),
    "dropout": (None, {"model_arg": "p=0.5"}, "--mode eval"),
    "functional dropout": (
        inner,
        strange("dropout"),
        "F.dropout",
    ),
    "a forward pass that ends the program": (
        inner,
        strange("quits"),
        "does not take 1 inputs",
    ),
    "a forward pass through NumPy": (
        inner,
        strange("numpy"),
        "differentiable operations",
    ),
    "no memory": (
        inner,
        strange("memory"),
        "does not fit in memory",
    ),
    "a factory that ends the program": (None, {"model": "victim:quits"}, "SystemExit"),
    "NaN in the factory's own weights": (None, {"model": "victim:damaged", "weights": None}, "has NaN or infinite"),
    "unknown loss": (None, {"loss": "mae"}, "did you mean 'mse'"),
    "a loss that fails": (None, {"loss": "victim:wrong"}, "(not this one)"),
    "a loss that is none": (None, {"loss": "victim:MODULE"}, "no factory named"),
    "smoothing of another loss": (None, {"loss": "mse", "label_smoothing": "0.1"}, "belongs to --loss cross-entropy"),
    "weights of another number of classes": (None, {"class_weights": "1,2"}, "has 2 values, but the model has 5"),
    "no weight": (None, {"class_weights": "1,1,1,1,0"}, "weights are above 0"),
    "unknown defense": (None, {"defense": "clipping:norm=1"}, "did you mean 'clip'"),
    "unknown option of a defense": (None, {"defense": "clip:size=1"}, "option of clip named 'size'"),
    "defense without its option": (None, {"defense": "clip"}, "needs a value of 'norm'"),
    "infinite defense": (None, {"defense": "clip:norm=inf"}, "cannot be inf"),
    "unknown optimizer": (None, {"kind": "weight_delta", "lr": "0.1", "optimizer": "adagrad"}, "did you mean 'adam"),
    "momentum of adam": (
        None,
        {"kind": "weight_delta", "lr": "0.1", "optimizer": "adam", "momentum": "0.9"},
        "belongs to --optimizer sgd",
    ),
    "epochs and steps": (
        None,
        {"kind": "weight_delta", "lr": "0.1", "local_epochs": "2", "local_steps": "3"},
        "give one of them",
    ),
    "endless training": (
        None,
        {"kind": "weight_delta", "lr": "0.1", "local_epochs": "1000000000"},
        "1,000,000,000 local steps cannot be simulated",
    ),
    "infinite lr": (None, {"kind": "weight_delta", "lr": "inf"}, "'inf' is not a number above 0"),
    "negative decay": (None, {"kind": "weight_delta", "lr": "0.1", "weight_decay": "-1"}, "weight_decay=-1"),
    "NaN mean": (None, {"mean": "nan"}, "'nan' is not a list of finite numbers"),
    "infinite labels": (None, {"labels": "inf"}, "not a list of finite numbers"),
    "huge seed": (None, {"seed": str(2**64)}, "'--seed'"),
    "a class for an attack": (None, {"attack": "torch:Tensor"}, "does not say what it takes"),
    "a module for an attack": (None, {"attack": "os:path"}, "is a module"),
    "negative iterations": (None, {"attack": "inverting_gradients", "attack_option": "iterations=-1"}, "cannot be -1"),
    "huge iterations": (None, {"attack_option": f"iterations={10**30}"}, "too large"),
    "NaN tolerance": (None, {"attack_option": "tolerance=nan"}, "cannot be nan"),
    "huge shape": (None, {"input_shape": "100000,100000,100000"}, "has more than"),
    "huge batch": (None, {"batch_size": "9999999"}, "more than 100,000,000 unknowns"),
    "an image of two axes": (None, {"input_shape": "8,8", "input_kind": "image"}, "three sizes"),
    "a name that is no UTF-8": (None, {"update": "\udcff\x1b[31m"}, "'\\udcff\\x1b[31m'"),
    "a very long name": (None, {"model": "a" * 10**5}, "…"),
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
    monkeypatch.setattr("gradleak.cli.attack.run", lambda *_: pytest.fail("the attack ran"))
    done = case.attack(out="/proc/x/y")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_a_model_of_tokens_is_refused_and_its_ids_are_named(case) -> None:
    looked_up(case)
    done = case.attack(model="victim:tokens", weights=None, input_shape="3", attack=None)
    assert done.code == 3
    assert case.record().outcome.status == "not_applicable"
    assert "TokenSpace" in case.record().verdict.reason


def test_an_attack_that_does_not_apply_is_a_recorded_result(case, monkeypatch) -> None:
    from gradleak.errors import NotApplicable

    def refuse(*_: object) -> None:
        raise NotApplicable("No linear layer sees the data; choose dlg.")

    monkeypatch.setattr(GradientMatching, "_reconstruct", refuse)
    done = case.attack()
    assert done.code == 3
    assert case.record().outcome.status == "not_applicable"
    assert "No linear layer sees the data; choose dlg." in case.record().verdict.reason
    assert "No linear layer sees the data" in done.out
    assert case.run("report", "out").code == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_full_or_forbidden_disk(case, monkeypatch, error: OSError) -> None:
    def refuse(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", refuse)
    before = sorted(os.listdir(case.folder))
    done = case.attack(*QUICK)
    assert done.code == 2
    assert error.strerror in done.err
    assert "Traceback" not in done.err
    assert [n for n in sorted(os.listdir(case.folder)) if n != "__pycache__"] == [
        n for n in before if n != "__pycache__"
    ]


def test_no_cuda_here(case, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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


def test_what_a_terminal_cannot_show_does_not_cost_the_result(case, monkeypatch) -> None:
    import io
    import sys

    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    done = case.attack(*QUICK, out="o\udcffut")
    sys.stdout.flush()
    assert done.code == 0, done.err
    text = shown.getvalue().decode("ascii")
    assert "\\udcffut/report.html" in text
    assert "?" in text


@pytest.mark.slow
def test_a_closed_pipe_has_its_own_exit_code(tmp_path) -> None:
    import subprocess
    import sys

    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; sys.argv = ['gradleak', 'list']; from gradleak.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
