from __future__ import annotations

import json
import os
import re
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gradleak.audit.records import from_json
from gradleak.models import vision_transformer

FILES = ["reconstruction.safetensors", "report.html", "result.json", "trace.safetensors"]
QUICK = ("--attack-option", "iterations=40")


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
    found = case.record()
    assert found.examples is None
    assert found.verdict.grade == "proved"
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
    found = case.record()
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
    found = pair.record()
    assert sorted(e.index for e in found.examples) == [0, 1]
    assert [e.mse for e in found.examples] == sorted((e.mse for e in found.examples), reverse=True)
    assert found.success.n == 2
    assert next(a for a in found.aggregates if a.metric == "mse").sd is not None


def test_labels_are_granted_and_recorded(case) -> None:
    assert case.attack(*QUICK, labels="3").code == 0
    assert "LABELS" in case.record().threat.granted
    assert case.record().outcome.labels == (3,)


def test_weight_delta_of_two_local_steps(delta) -> None:
    done = delta.attack(
        "--attack-option", "iterations=400", kind="weight_delta", lr="0.1", local_epochs="2", truth="truth.safetensors"
    )
    assert done.code == 0, done.err
    found = delta.record()
    assert found.subject.update_kind == "weight_delta"
    assert "2 local steps" in found.subject.training
    assert found.examples[0].mse < 1e-3


def test_other_attacks_and_float64(case) -> None:
    case.write("update.safetensors", {k: v.double() for k, v in case.tensors("update.safetensors").items()})
    case.write("weights.safetensors", {k: v.double() for k, v in case.tensors("weights.safetensors").items()})
    assert case.attack(*QUICK, attack="inverting_gradients").code == 0
    assert case.record().subject.dtype == "float64"
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
    assert case.record().subject.input_kind == "tensor"
    assert "Relative error" in case.record().verdict.reason
    assert {"relative_error", "null_guess_ratio"} <= set(case.record().examples[0].values)
    html = (case.folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img" not in html
    assert "Reconstructed" in html


def test_truth_from_npz_and_from_a_picture_without_labels(case) -> None:
    truth = case.tensors("truth.safetensors")["inputs"]
    np.savez(case.folder / "t.npz", inputs=truth.numpy(), labels=np.array([3]))
    assert case.attack(*QUICK, truth="t.npz").code == 0
    assert case.record().examples[0].label == 3
    Image.fromarray((truth[0, 0].numpy() * 255).astype(np.uint8)).save(case.folder / "t.png")
    assert case.attack(*QUICK, truth="t.png").code == 0
    found = case.record()
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
    assert sum("have no names" in n for n in case.record("c").outcome.notes) == 2
    np.savez(case.folder / "update.npz", *arrays[:1])
    done = case.attack(*QUICK, update="update.npz")
    assert "1 arrays for 4 trainable parameters" in done.err


def test_public_data_for_the_null_guesses(case) -> None:
    np.savez(case.folder / "p.npz", x=np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8))
    assert case.attack(*QUICK, truth="truth.safetensors", data="p.npz").code == 0
    assert len(case.record().lifts) == 5
    assert "PUBLIC_DATA" in case.record().threat.withheld


def test_normalization_is_undone(case) -> None:
    done = case.attack(*QUICK, mean="0.5", std="0.25")
    assert done.code == 0, done.err
    assert "mean 0.5 and std 0.25" in case.record().subject.normalization


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
    assert case.record().attack.seed == 2
    assert sorted(os.listdir(case.folder / "out")) == sorted([*FILES, "mine.txt"])


def test_the_result_holds_no_nan_for_json(case) -> None:
    assert case.attack(*QUICK).code == 0
    json.loads(
        (case.folder / "out" / "result.json").read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )


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


@pytest.mark.slow
def test_batchnorm_that_was_trained_on_batch_statistics_and_the_remedy_for_it(case) -> None:
    from gradleak.exchange import Client

    model, batch = normalized(case)
    case.write("update.safetensors", dict(Client(model.train(), batch).send().tensors))
    done = case.attack(*QUICK, model_arg="norm=true", batch_size="2")
    assert "--mode batch" in done.err
    plain = ("--attack-option", "iterations=150", "--attack-option", "restarts=2")
    done = case.attack(*plain, model_arg="norm=true", batch_size="2", labels="1,4", mode="batch")
    assert done.code == 0, done.err
    assert case.record().match.residual < 0.05
    options = ("--model-arg", "track=false", "--attack-option", "iterations=150", "--attack-option", "restarts=2")
    done = case.attack(*options, model_arg="norm=true", batch_size="2", labels="1,4")
    assert done.code == 0, done.err
    found = case.record()
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
        assert any(re.match(r"Left out of the update: '1\.\w+' and 2 more", n) for n in case.record().outcome.notes)


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
    assert case.record().attack.name == "mine:guess"
    assert case.record().attack.options == {"level": 0.25}
    assert "must return an Attack" in case.attack(attack="mine:broken").err
    assert "no factory named" in case.attack(attack="mine:nothing").err
    assert "module:factory" in case.attack(attack="qqqq").err


def test_features_are_reported_as_such(case) -> None:
    truth = str(case.folder / "truth.safetensors")
    done = case.attack("--truth", truth, attack="disaggregate")
    assert done.code == 0, done.err
    found = case.record()
    assert found.outcome.shows == "features"
    assert "last layer" in found.verdict.headline
    assert found.examples is None
    assert any("--truth is unused" in note for note in found.outcome.notes)
    assert case.run("report", str(case.folder / "out")).code == 0


def test_a_vision_transformer_with_dropout_on(run, tmp_path) -> None:
    options = {"patch": 4, "width": 48, "depth": 1, "dropout": 0.1}
    model = vision_transformer(**options, classes=10, image_size=16, seed=0).train()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.nn.functional.cross_entropy(model(image), torch.tensor([3])).backward()
    save_file(model.state_dict(), tmp_path / "W.safetensors")
    save_file({k: p.grad for k, p in model.named_parameters()}, tmp_path / "U.safetensors")
    given = ["--model", "vision_transformer", "--mode", "train", "--input-shape", "3,16,16", "--classes", "10"]
    given += [s for k, v in options.items() for s in ("--model-arg", f"{k}={v}")]
    given += ["--weights", "W.safetensors", "--update", "U.safetensors"]
    for size, out in ((("--batch-size", "1"), "stated"), ((), "assumed")):
        done = run("attack", *given, *size, "--out", out)
        assert done.code == 0, done.err
        found = from_json((tmp_path / out / "result.json").read_text(encoding="utf-8"))
        assert (found.verdict.grade, found.outcome.attack) == ("proved", "patch_embedding")
        inputs = load_file(tmp_path / out / "reconstruction.safetensors")["inputs"]
        assert float((inputs - image).square().mean()) <= 1e-9
    done = run("attack", *given, "--batch-size", "2", "--out", "two")
    assert done.code == 2
    assert "active dropout" in done.err
