"""benchmarks/run.py: what it makes of stored results, and that one failure does not end the run."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "date": "2026-01-01 00:00 UTC",
    "processor": "Some Processor, 2 cores",
    "load": 0.1,
    "threads": 2,
    "gpu": None,
    "torch": "2.13.0",
    "commit": "abc",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_run", ROOT / "benchmarks" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def dlg(images: int = 32, hits: int = 31, median: float = 5e-7, theirs: float = 80.0) -> dict[str, Any]:
    row = {
        "attacker": "gradleak dlg()",
        "images": images,
        "MSE <= 1e-4": hits,
        "median MSE": median,
        "labels right": images,
        "seconds per success": 2.0,
    }
    other = row | {"attacker": "published algorithm", "MSE <= 1e-4": 16, "seconds per success": theirs}
    return {"name": "dlg", "machine": MACHINE, "rows": [row, other]}


def both(fast: int = 62, median: float = 5e-7) -> dict[str, Any]:
    record = dlg(median=median)
    quick = record["rows"][0] | {"attacker": "stopped early", "images": 64, "MSE <= 1e-4": fast, "median MSE": 3e-5}
    return record | {"rows": [quick, *record["rows"]]}


def store(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for record in records:
        (folder / f"{record['name']}.json").write_text(json.dumps(record))
    return folder


def met(bench: types.ModuleType, record: dict[str, Any]) -> list[bool | None]:
    return [line.met for line in bench.lines(record["name"], record)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (dlg(), [True, True, True, True]),
        (dlg(hits=30), [False, True, True, True]),
        (dlg(median=2e-6), [True, False, True, True]),
        (dlg(theirs=49.0), [True, True, True, False]),  # 1/24.5 of the time
        (dlg(theirs=float("inf")), [True, True, True, None]),  # nothing to compare with
        (dlg(images=2, hits=2), [None, None, None, None]),  # too few to decide
        (both(), [True, True, True, True, True]),
        (both(fast=61), [True, True, True, False, True]),
        (both(median=2e-6), [True, False, True, True, True]),
    ],
)
def test_dlg_is_held_against_its_targets(
    bench: types.ModuleType, record: dict[str, Any], expected: list[bool | None]
) -> None:
    assert met(bench, record) == expected


def test_recursion_is_held_against_its_targets(bench: types.ModuleType) -> None:
    row = {"images": 64, "successes": 64, "called exact": 64, "MSE median": 1e-12, "MSE max": 1e-11}
    row["seconds per success"] = 1.0
    double = row | {"successes": 63}
    published = row | {"images": 4, "seconds per success": 120.0}
    assert met(bench, {"name": "recursion", "rows": [row, double, published]}) == [True, True, True, False, True]
    chosen = row | {"certified": 63, "seconds per success": 1.3}
    lines = met(bench, {"name": "recursion", "rows": [row, chosen, double, published]})
    assert lines == [False, True, True, True, True, False, True]


def test_batches_below_the_rank_bound_have_no_target(bench: types.ModuleType) -> None:
    row = {"width": 24, "N": 2, "examples": 10, ">= 30 dB": 9, "95 % interval": "0.6-1.0", "median dB": 40.0}
    row |= {"rank bound": 6144, "unknowns": 6144}
    narrow = row | {"width": 12, ">= 30 dB": 0, "rank bound": 6060}
    lines = bench.lines("batches", {"rows": [row, row | {">= 30 dB": 8}, narrow]})
    assert [line.met for line in lines] == [True, False, None]
    assert "6,060 of 6,144" in lines[2].target


def test_inverting_gradients_is_held_against_the_loop(bench: types.ModuleType) -> None:
    rows = [{"batch": n, "ratio (median of pairs)": r, "ratio range": "0.9-1.1"} for n, r in ((1, 0.99), (8, 1.05))]
    lines = bench.lines("inverting_gradients", {"rows": rows})
    assert [line.met for line in lines] == [True, False]


def test_disaggregation_is_judged_by_its_worst_size(bench: types.ModuleType) -> None:
    row = {"mode": "eval", "classes": 100, "batches": 20, "repeated": 0, "exact wrongly": 0, "repeated within 1e-2": ""}
    row |= {"unique": 100, "verdicts right": 1.0, "seconds median": 0.1, "seconds max": 3.0}
    good, bad = ({"examples": b, "unique within target": s} for b, s in ((16, 1.0), (32, 0.94)))
    rows = [row | {"model": m} | size for m in ("lenet", "resnet18") for size in (good, bad)]
    rows[1]["unique within target"] = 0.96
    rows.append({"model": "lenet", "classes": 10, "bound": "too many"})
    targets = {"within target": {"lenet": 1e-2, "resnet18": 1e-4}, "seconds": {"16": 2, "64": 60}}
    assert met(bench, {"name": "disaggregate", "rows": rows, "targets": targets}) == [True, False, True, False]
    few = [r | {"batches": 4} for r in rows]
    assert set(met(bench, {"name": "disaggregate", "rows": few, "targets": targets})) == {None}


@pytest.mark.parametrize(("trials", "wrong", "expected"), [(5000, 0, True), (4999, 0, None), (20, 1, False)])
def test_one_wrong_proof_fails(bench: types.ModuleType, trials: int, wrong: int, expected: bool | None) -> None:
    record = {"trials": trials, "wrong": wrong, "proofs": 300}
    record |= {"exact_answers_to_clean_updates": 100, "of_these_unproved": 0}
    assert bench.lines("certificate", record)[0].met is expected


@pytest.mark.parametrize(("unproved", "clean", "expected"), [(5, 500, True), (6, 500, False), (0, 100, None)])
def test_exact_answers_are_to_be_proved(
    bench: types.ModuleType, unproved: int, clean: int, expected: bool | None
) -> None:
    record = {"trials": 5000, "wrong": 0, "proofs": 300}
    record |= {"exact_answers_to_clean_updates": clean, "of_these_unproved": unproved}
    assert bench.lines("certificate", record)[1].met is expected


def test_records_may_bring_their_own_summary(bench: types.ModuleType) -> None:
    line = {"what": "speed", "target": "≤ 1 ×", "measured": "0.5 ×", "met": True}
    assert bench.table(bench.lines("new", {"summary": [line]})).endswith("| speed | ≤ 1 × | 0.5 × | yes |")
    assert "results/new.json" in bench.lines("new", {"target": "fast"})[0].measured


def test_disturbed_measurements_say_so(bench: types.ModuleType) -> None:
    quiet = bench.where({"dlg": {"machine": MACHINE}})
    assert quiet.endswith("| `dlg` | 2026-01-01 | Some Processor, 2 cores | 2 | 2.13.0 | abc |")
    assert "disturbed" in bench.where({"dlg": {"machine": MACHINE | {"load": 9.0}}})


RECURSION = [
    {"attacker": "recursion(), float32 update"},
    {"attacker": "auto(), float32 update", "images": 64, "successes": 63, "certified": 62, "goal": 1e-10}
    | {"processor seconds per success": 0.75},
    {"attacker": "published algorithm, float32", "images": 48, "successes": 32, "goal": 1e-4}
    | {"processor seconds per success": 58.8},
]


def test_the_first_page_has_six_plain_rows(bench: types.ModuleType) -> None:
    records = bench.load(bench.RESULTS)
    rows = bench.short(records).splitlines()[2:]
    assert len(rows) == len(bench.HEADLINES) == 6
    assert all(row.count("|") == 3 for row in rows)


def test_rows_of_the_first_page_say_what_was_measured(bench: types.ModuleType) -> None:
    rows = bench.short({"recursion": {"rows": RECURSION}, "dlg": dlg()}).splitlines()[2:]
    assert len(rows) == 1  # the others are not measured
    assert "63 of 64 exact (error ≤ 1e-10), 62 of them proved, 0.75 s each" in rows[0]
    assert "32 of 48 with error ≤ 1e-04, 59 s each" in rows[0]
    assert bench.short({"dlg": dlg()}) == bench.EMPTY


def test_only_the_place_between_the_markers_changes(bench: types.ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    bench.insert(page, "new")
    assert page.read_text() == "before\n<!-- benchmarks -->\nnew\n<!-- /benchmarks -->\nafter\n"
    page.write_text("before\n<!-- benchmarks -->\n")
    with pytest.raises(ValueError, match="no place for the table"):
        bench.insert(page, "new")


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_have_a_place_for_the_table(bench: types.ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(bench.BEGIN) == text.count(bench.END) == 1


def pages(root: Path) -> tuple[Path, Path]:
    (root / "docs").mkdir()
    both = root / "README.md", root / "docs" / "performance.md"
    for page in both:
        page.write_text("<!-- benchmarks -->\n<!-- /benchmarks -->\n")
    return both


def test_the_table_is_rendered_without_running_anything(
    bench: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, performance = pages(tmp_path)
    row = {"images": 64, "successes": 64, "certified": None, "called exact": 64, "MSE median": 0, "MSE max": 0}
    row |= {"attacker": "ours", "goal": 1e-10, "processor seconds per success": 1.0}
    published = row | {"attacker": "published algorithm", "processor seconds per success": 46.0}
    recursion = {"name": "recursion", "rows": [row, row | {"certified": 64}, row, published]}
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", store(tmp_path / "results", dlg(), recursion))
    monkeypatch.setattr(bench, "run", None)
    assert bench.main(["--table-only"]) == 0
    row = "| `dlg()`, one image: MSE ≤ 1e-4 | ≥ 31 of 32 | 31 of 32; published algorithm 16 of 32 | yes |"
    assert all(row in text for text in (performance.read_text(), capsys.readouterr().out))
    assert "`disaggregate()`, C = 100: verdict per example right | ≥ 99 % | not measured" in performance.read_text()
    assert "| ≥ 20 × | not measured: no GPU" in performance.read_text()
    assert row not in readme.read_text()
    assert "46 s each" in readme.read_text()
    assert "not measured" not in readme.read_text()


def test_a_failure_is_reported_and_the_next_one_runs(
    bench: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    readme, performance = pages(tmp_path)
    (tmp_path / "dlg.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "import_time.py").write_text("print('ran')\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", store(tmp_path / "results", dlg()))
    assert bench.main([]) == 1
    assert "ran" in capfd.readouterr().out
    assert "`dlg` failed in the last run (exit code 3" in performance.read_text()
    assert bench.EMPTY in readme.read_text()


def test_quick_runs_leave_results_and_pages_alone(
    bench: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pages(tmp_path)
    before = [page.read_text() for page in both]
    (tmp_path / "dlg.py").write_text(
        "import os, pathlib, sys\n"
        "folder = pathlib.Path(os.environ['GRADLEAK_BENCHMARK_RESULTS'])\n"
        "folder.mkdir(parents=True)\n"
        f"(folder / 'dlg.json').write_text({json.dumps(dlg(images=2, hits=2))!r})\n"
        "assert '--images' in sys.argv\n"
    )
    (tmp_path / "unlisted.py").write_text("raise SystemExit(1)\n")  # no quick size: must not run
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    assert bench.main(["--quick"]) == 0
    assert [page.read_text() for page in both] == before
    assert [p.name for p in (tmp_path / "results").rglob("*.json")] == ["dlg.json"]


def test_every_benchmark_has_a_quick_size(bench: types.ModuleType) -> None:
    assert [n for n in bench.QUICK if not (ROOT / "benchmarks" / f"{n}.py").exists()] == []
