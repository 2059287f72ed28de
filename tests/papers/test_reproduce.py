from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradleak.errors import InvalidFile, InvalidInput, NotApplicable, UnknownName
from gradleak.papers.reproduce import experiments, papers, reproduce

TOY = '''"""A toy."""
from dataclasses import dataclass
from pathlib import Path
import torch
from gradleak.papers.experiment import Figure, Result, Row, median, share
from . import _shared

NAME = "toy"

@dataclass(frozen=True)
class Config:
    n: int

SMOKE, DEFAULT, FULL = Config(2), Config(4), Config(8)

def one(lab, *, number, crash_at=-1):
    with open(lab.out / "calls.txt", "a") as f:
        f.write(f"{number}\\n")
    if (lab.out / "crash").exists() and number == 2:
        raise KeyboardInterrupt
    weights, notes = lab.tensors(_shared.train, seed=3)
    image = torch.full((2, 3), float(number))
    return {"square": number**2 + float(weights["w"].sum()), "image": image, "nan": float("nan")}

def run(config, lab):
    records = lab.measure(one, [{"number": i} for i in range(config.n)])
    assert records[1]["image"].shape == (2, 3)
    return Result(
        rows=[
            Row("median square", median([r["square"] for r in records]), share([True]), unit="px", cost="1 s"),
            Row("words | <b>", "fails", None),
        ],
        figures=[Figure("A line", "of <squares>", lambda f: f.subplots().plot([r["square"] for r in records]))],
        texts={"trace": "a & b"},
        scaled=f"{config.n} of 8",
    )
'''
SHARED = """
import torch

def train(lab, *, seed):
    with open(lab.out / "trained.txt", "a") as f:
        f.write("x")
    w = torch.zeros(2)
    return {"w": w, "tied": w}, {"accuracy": 0.5}
"""
EXPECTED = """
[toy."median square"]
paper = 3.0
source = "Table 1"
target = "<= 100"
factor = 1.5
[toy."not measured"]
paper = "x"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments" / "1999_toy"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "out").mkdir()
    (folder / "toy.py").write_text(TOY)
    (folder / "_shared.py").write_text(SHARED)
    (folder / "expected.toml").write_text(EXPECTED)
    return folder.parent


def calls(out: Path) -> list[str]:
    return (out / "calls.txt").read_text().split()


def test_runs_publishes_and_measures_nothing_twice(root: Path) -> None:
    out = root.parent / "out"
    done = reproduce("1999_toy", out=out, root=root)
    assert calls(out) == ["0", "1", "2", "3"]
    assert (out / "trained.txt").read_text() == "x"
    again = reproduce("1999_toy", out=out, root=root)
    assert calls(out) == ["0", "1", "2", "3"]
    assert done.results["toy"]["rows"] == again.results["toy"]["rows"]
    assert not again.drift

    table = tomllib.loads((root / "1999_toy" / "expected.toml").read_text())["toy"]
    entry = table["median square"]
    assert entry["ours"] == pytest.approx(2.5)
    assert entry["ours_interval"] == [0.0, 9.0]
    assert (entry["n"], entry["paper"], entry["target"], entry["reached"]) == (4, 3.0, "<= 100", True)
    assert entry["scale"] == "default"
    assert entry["hardware"]
    assert table["words | <b>"]["ours"] == "fails"

    page = done.page.read_text()
    assert done.page == root.parent / "docs" / "papers" / "1999_toy.md"
    assert "| median square, px | 3.0 (Table 1) | 1 | 2.5 | <= 100 (reached) | 4 |" in page
    assert "not measured here" in page
    assert "typed in" not in page  # what the paper says is
    assert "every measured number here was computed from the records of a run" in page
    assert "words \\| <b>" in page
    if not torch.cuda.is_available():
        assert "4 of 8; not measured on a GPU" in page

    website = done.html.read_text()
    assert "words | &lt;b&gt;" in website
    assert "of &lt;squares&gt;" in website
    assert 'src="data:image/png;base64,' in website
    assert "http" not in website.replace("http-equiv", "")


def test_smoke_publishes_nothing(root: Path) -> None:
    done = reproduce("1999_toy", out=root.parent / "out", root=root, scale="smoke")
    assert done.page.parent == root.parent / "out"
    assert (root / "1999_toy" / "expected.toml").read_text() == EXPECTED
    assert not (root.parent / "docs" / "papers").exists()


def test_default_does_not_overwrite_full(root: Path) -> None:
    out = root.parent / "out"
    reproduce("1999_toy", out=out, root=root, scale="full")
    reproduce("1999_toy", out=out, root=root, scale="default")
    assert json.loads((root / "1999_toy" / "results" / "toy.json").read_text())["scale"] == "full"


def test_a_killed_run_resumes(root: Path) -> None:
    out = root.parent / "out"
    (out / "crash").touch()
    with pytest.raises(KeyboardInterrupt):
        reproduce("1999_toy", out=out, root=root)
    (out / "crash").unlink()
    reproduce("1999_toy", out=out, root=root)
    assert calls(out) == ["0", "1", "2", "2", "3"]
    assert not list(out.rglob("*.partial"))


def test_version_measures_anew_and_drift_is_reported(root: Path) -> None:
    out = root.parent / "out"
    reproduce("1999_toy", out=out, root=root)
    path = root / "1999_toy" / "toy.py"
    path.write_text(TOY.replace('NAME = "toy"', 'NAME = "toy"\nVERSION = 2').replace("number**2", "number**4"))
    done = reproduce("1999_toy", out=out, root=root)
    assert len(calls(out)) == 8
    assert done.drift == ("toy, median square: measured 8.5, recorded 2.5.",)


@pytest.mark.slow
def test_side_by_side_equals_one_after_another(root: Path) -> None:
    one = reproduce("1999_toy", out=root.parent / "out", root=root)
    (root.parent / "out2").mkdir()
    two = reproduce("1999_toy", out=root.parent / "out2", root=root, jobs=2)
    assert one.results["toy"]["rows"] == two.results["toy"]["rows"]
    assert sorted(calls(root.parent / "out2")) == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_what_was_to_be_measured_side_by_side(root: Path) -> None:
    path = root / "1999_toy" / "toy.py"
    path.write_text(TOY.replace("Config(4)", "Config(60)"))
    out = root.parent / "out"
    (out / "crash").touch()
    with pytest.raises(KeyboardInterrupt):
        reproduce("1999_toy", out=out, root=root, jobs=2)
    assert len(calls(out)) < 60


def test_missing_data_names_both_ways_before_any_work(root: Path) -> None:
    path = root / "1999_toy" / "toy.py"
    path.write_text(TOY.replace('NAME = "toy"', 'NAME = "toy"\nNEEDS = ("lfw.npz",)'))
    with pytest.raises(InvalidInput, match=r"'lfw.npz' is not in .*--data DIR .* docs/data.md .* or "):
        reproduce("1999_toy", out=root.parent / "out", root=root, data=root)
    assert not (root.parent / "out" / "calls.txt").exists()
    with pytest.raises(InvalidInput, match="does not exist"):
        reproduce("1999_toy", out=root.parent / "out", root=root, data=root / "absent")


def test_one_failing_experiment_does_not_stop_the_others(root: Path) -> None:
    bad = TOY.replace('NAME = "toy"', 'NAME = "bad"').replace(
        "    records = lab.measure",
        '    from gradleak.errors import NotApplicable\n    raise NotApplicable("no")\n    records = lab.measure',
    )
    (root / "1999_toy" / "bad.py").write_text(bad)
    done = reproduce("1999_toy", out=root.parent / "out", root=root)
    assert set(done.results) == {"toy"}
    assert done.failures == {"bad": "NotApplicable: no"}
    with pytest.raises(NotApplicable):
        reproduce("1999_toy", only="bad", out=root.parent / "out", root=root)


NEEDY = '''"""Needs a package."""
import package_of_the_text_extra
NAME, SMOKE, DEFAULT, FULL = "needy", 1, 1, 1
def run(config, lab): ...
'''


def test_an_absent_package_is_one_sentence_and_the_other_experiments_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradleak.papers import reproduce as module

    monkeypatch.setitem(module._EXTRAS, "package_of_the_text_extra", "text")
    said = (
        "The experiment 'needy' needs the package 'package_of_the_text_extra', which is not installed; "
        "install it with pip install 'gradleak[text]'."
    )
    (root / "1999_toy" / "needy.py").write_text(NEEDY)
    done = reproduce("1999_toy", out=root.parent / "out", root=root, scale="smoke")
    assert set(done.results) == {"toy"}
    assert done.failures == {"needy": said}
    with pytest.raises(InvalidInput) as caught:
        reproduce("1999_toy", only="needy", out=root.parent / "out", root=root)
    assert str(caught.value) == said
    late = NEEDY.replace("import package_of_the_text_extra\n", "").replace(
        ": ...", ": import package_of_the_text_extra"
    )
    (root / "1999_toy" / "needy.py").write_text(late)
    assert reproduce("1999_toy", out=root.parent / "out", root=root, scale="smoke").failures == {
        "needy": f"InvalidInput: {said}"
    }


def test_the_paper_without_the_extra_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [k for k in sys.modules if k.partition(".")[0] in ("transformers", "tokenizers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for name in [k for k in sys.modules if k.startswith("gradleak.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    assert "text" in experiments("2019_zhu_dlg")
    with pytest.raises(
        InvalidInput, match=r"^The experiment 'text' needs the package 'transformers'.*gradleak\[text\]"
    ):
        reproduce("2019_zhu_dlg", only="text", scale="smoke", out=tmp_path)
    lacking = module_place("2019_zhu_dlg").lacking
    assert set(lacking) == {"text"}


def module_place(paper: str) -> Any:
    from gradleak.papers import reproduce as module

    return module._load(paper, None)


def test_a_place_that_cannot_be_written_is_noticed_before_any_work(root: Path) -> None:
    (root.parent / "file").write_text("")
    for bad in (root.parent / "file", Path("/proc/gradleak")):
        with pytest.raises(InvalidInput, match="name another one with --out"):
            reproduce("1999_toy", out=bad, root=root)
    assert not (root.parent / "out" / "trained.txt").exists()


def test_damaged_results_of_other_experiments_are_left_out_and_named(root: Path) -> None:
    out, told = root.parent / "out", []
    reproduce("1999_toy", out=out, root=root, scale="smoke")
    stored = json.loads((out / "results-smoke" / "toy.json").read_text())
    broken = {
        "a": "{", "b": "[]", "c": json.dumps(stored | {"rows": [{}]}), "d": "[" * 100_000,
        "e": json.dumps(stored | {"texts": {"a": 3}}), "f": json.dumps(stored | {"figures": [3]}),
        "g": json.dumps(stored | {"rows": [stored["rows"][0] | {"ours": {"value": "x"}}]}), "h": "",
    }  # fmt: skip
    for name, content in broken.items():
        (out / "results-smoke" / f"{name}.json").write_text(content)
    done = reproduce("1999_toy", out=out, root=root, scale="smoke", callback=told.append)
    assert "## toy" in done.page.read_text()
    assert len([s for s in told if s.startswith("Left out of the page")]) == len(broken)


def test_a_missing_picture_does_not_cost_the_page(root: Path) -> None:
    out = root.parent / "out"
    reproduce("1999_toy", out=out, root=root)
    done = reproduce("1999_toy", out=out, root=root)
    again = module_html(root, out)
    assert again == done.html.read_text()
    next((out / "results-default" / "toy").glob("*.png")).unlink()
    assert "A line: this picture is missing; run the experiment again." in module_html(root, out)


def module_html(root: Path, out: Path) -> str:
    from gradleak.papers import reproduce as module
    from gradleak.papers.expected import read_expected
    from gradleak.papers.page import to_html

    known = module._results(out / "results-default", None)
    return to_html("1999_toy", known, read_expected(root / "1999_toy"), out / "results-default")


@pytest.mark.parametrize(
    "text",
    ["[", "a = 3", "[a]\nb = 3", "[a.b]\ntarget = 3", '[a.b]\nfactor = "x"', "[a.b]\ntolerance = true", "\udcff",
     "a = " + "[" * 50_000, "a = " + "9" * 5000],
)  # fmt: skip
def test_expected_figures_that_cannot_be_read(root: Path, text: str) -> None:
    (root / "1999_toy" / "expected.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidFile, match=r"expected\.toml .*; correct it\.$"):
        experiments("1999_toy", root)


def test_names(root: Path) -> None:
    assert papers(root) == ("1999_toy",)
    assert experiments("1999_toy", root) == ("toy",)
    with pytest.raises(UnknownName, match="1999_toy"):
        reproduce("1999_tyo", root=root)
    with pytest.raises(UnknownName, match="toy"):
        reproduce("1999_toy", only="tyo", root=root)
    with pytest.raises(UnknownName, match="smoke"):
        reproduce("1999_toy", scale="smoky", root=root)
    (root / "1999_toy" / "expected.toml").write_text("[")
    with pytest.raises(InvalidFile, match="TOML"):
        experiments("1999_toy", root)
    assert "2019_zhu_dlg" in papers()


def test_stored_arrays_come_back(root: Path) -> None:
    out = root.parent / "out"
    reproduce("1999_toy", out=out, root=root)
    archives = sorted((out / "toy").glob("*.npz"))
    assert len(archives) == 4
    sums = []
    for path in archives:
        with np.load(path, allow_pickle=False) as stored:
            sums.append(float(stored["image"].sum()))
    assert sorted(sums) == [0.0, 6.0, 12.0, 18.0]
