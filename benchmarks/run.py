"""Run all benchmarks one after another, and set their figures beside the targets: ``make bench``.

Every script runs in a process of its own and writes results/NAME.json; one that fails is reported, and the next one
runs. The table is printed and written between the ``<!-- benchmarks -->`` markers of docs/performance.md; five rows in
plain words, :data:`HEADLINES`, go to README.md. ``--table-only`` runs nothing and renders what results/ holds.
``--quick`` runs small sizes into results/quick/, which show that the scripts work and say nothing about targets; it
leaves the pages alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
EMPTY = "*No figures yet: this section is filled from the scripts in `benchmarks/`.*"

QUICK: dict[str, tuple[str, ...]] = {
    "dlg": ("--images", "2", "--default", "0", "--published", "0", "--polished", "2"),
    "restarts": ("--repeats", "1", "--evaluations", "5"),
    "batches": ("--batches", "1", "--iterations", "50"),
    "batches_features": ("--batches", "1", "--iterations", "50"),
    "inverting_gradients": ("--pairs", "1", "--steps", "1"),
    "recursion": ("--images", "2", "--auto", "1", "--published", "0", "--double", "1"),
    "disaggregate": ("--batches", "1", "--large", "0"),
    "pooling": ("--images", "1", "--batches", "1", "--tutorial", "1", "--part", "7"),
    "recursion_batches": ("--batches", "1", "--largest", "8", "--lenets", "1"),
    "spear": ("--batches", "1", "--largest", "4", "--beyond", "0"),
    "resnet_batches": ("--size", "4", "--batches", "1", "--steps", "4"),
    "tables": ("--batches", "1", "--largest", "2"),
    "vit": ("--images", "1", "--large", "1", "--remains", "0"),
    "certificate": ("--trials", "20"),
    "fedavg_memory": ("--steps", "4"),
    "cost": ("--repeats", "1", "--largest", "16"),
    "import_time": ("--rounds", "1"),
    "threads": ("--rounds", "1", "--evaluations", "20"),
    "adapters": ("--rounds", "1"),
    "inspection": ("--batches", "1", "--seconds", "5"),
    "hostile": ("--broken", "5", "--results", "20", "--kills", "3", "--commands", "0"),
    "gpu": ("--images", "2", "--published", "1"),
}
"""What makes benchmarks small; scripts that are not listed have no quick size."""

EXPECTED: dict[str, tuple[tuple[str, str], ...]] = {
    "recursion": (
        ("`auto()`, one image, float32 update: MSE ≤ 1e-10 and certified", "64 of 64"),
        ("`recursion()`, one image, float64 update: MSE ≤ 1e-16", "64 of 64"),
        ("`auto()`, one image, float32 update: time per success", "≤ 1/40 of the published algorithm"),
    ),
    "pooling": (("`recursion()`, CNNs with max-pooling, one image: MSE ≤ 1e-8 and proved", "≥ 18 of 20"),),
    "dlg": (
        ("`dlg()`, one image: MSE ≤ 1e-4", "≥ 31 of 32"),
        ("`dlg()`, one image, stopped at MSE 1e-4: time per success", "≤ 1/25 of the published algorithm"),
    ),
    "batches": (("`dlg()`, batches on wide LeNets: examples ≥ 30 dB", "≥ 90 %"),),
    "batches_features": (
        ("`feature_matching()`, LeNet width 24 N = 4, 32 N = 8, 64 N = 8, 16: examples ≥ 40 dB", "≥ 95 %"),
    ),
    "restarts": (("32 restarts together against 32 in a loop, LeNet", "≤ 0.12 × compiled, ≤ 0.3 × eager"),),
    "disaggregate": (
        ("`disaggregate()`, C = 100, B = 1 to 32, unique classes: error of the features", "≤ 1e-4 in ≥ 95 %"),
        ("`disaggregate()`, C = 100: verdict per example right", "≥ 99 %"),
        ("`disaggregate()`, C = 100: time", "B = 16 ≤ 2 s, B = 64 ≤ 60 s"),
    ),
    "spear": (
        (
            "`spear()`, ReLU perceptron of width 200 and six layers, N = 1, 2, 4, 8, 12, 16, 20: batches exact",
            "≥ 95 % each",
        ),
    ),
    "resnet_batches": (
        ("ResNet-18, N = 4, 8, 16, cosine + TV, with and without features, and polished", "PSNR at equal time"),
    ),
    "inverting_gradients": (("`inverting_gradients()`, ResNet-18: one iteration against a minimal loop", "≤ 1.0 ×"),),
    "breaching": (("`inverting_gradients()`, ResNet-18: one iteration against `breaching` 0.1.2", "≤ 0.85 ×"),),
    "tables": (("rows of Adult, perceptron and entity embeddings: rows exact", "≥ 95 % up to 8, ≥ 80 % at 16"),),
    "backbones": (("`prior_matching()`, modern backbones", "≥ best of `breaching` 0.1.2 at equal time, > gray"),),
    "vit": (("`auto()`, one image, vision transformers, dropout on: ≥ 90 dB and proved, time", "all, ≤ 2 s"),),
    "certificate": (("certificates: wrong proofs in 5,000 random trials", "0"),),
    "fedavg_memory": (
        ("`FedAvg(checkpoint=True)`, 20 local steps: peak memory", "≤ 4 × one step"),
        ("`FedAvg(checkpoint=True)`, 20 local steps: time", "≤ 3 × storing every step"),
    ),
    "cost": (("cost against N = 1 to 32, image side 32, 64, 128, width 12 to 96", "curves, limit named"),),
    "import_time": (
        ("`import gradleak` against `import torch`", "≤ 1.1 ×"),
        ("`gradleak --help`", "≤ 0.5 s"),
    ),
    "threads": (("search with the threads that the commands choose, one core busy, against one thread", "≤ 1.5 ×"),),
    "adapters": (("adapters that observe, one local epoch of three networks: processor time", "≤ 2 % of a round"),),
    "inspection": (("`gl.inspect()` predicts what `auto()` then does, models × batches × steps × filters", "≥ 95 %"),),
    "hostile": (("broken files, results and bombs, kills and signals: not as promised", "0"),),
    "gpu": (("`dlg()` on a GPU against the published algorithm on the same GPU", "≥ 20 ×"),),
}
"""Every target by the benchmark that measures it, in the order of the table; shown where there is no record."""

REASONS = {"gpu": "no GPU on the machine of these results"}
"""Why a target may have no measurement although there is a script."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One target beside its measurement.

    Attributes:
        what: what was measured.
        target: as text.
        measured: as text.
        met: None where the measurement decides nothing (too few runs, no target).

    """

    what: str
    target: str
    measured: str
    met: bool | None


def scripts() -> list[str]:
    """Return the names of all benchmarks, known ones first."""
    found = {p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_")} - {Path(__file__).stem}
    return [n for n in EXPECTED if n in found] + sorted(found - set(EXPECTED))


def run(names: Sequence[str], *, quick: bool, results: Path) -> dict[str, str]:
    """Run benchmarks one after another and return what went wrong by name."""
    failed: dict[str, str] = {}
    environment = {**os.environ, "GRADLEAK_BENCHMARK_RESULTS": str(results)}
    for name in names:
        if quick and name not in QUICK:
            print(f"== {name}: no quick size, left out", flush=True)
            continue
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, str(HERE / f"{name}.py"), *(QUICK[name] if quick else ())]
        code = subprocess.run(command, env=environment, check=False).returncode
        minutes = (time.perf_counter() - began) / 60
        if code:
            failed[name] = f"exit code {code} after {minutes:.1f} minutes"
        print(f"== {name}: {failed.get(name, f'{minutes:.1f} minutes')}", flush=True)
    return failed


def load(results: Path) -> dict[str, Record]:
    """Return the stored records by name, in the order of the benchmarks."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("*.json"))}
    return {n: found[n] for n in [*EXPECTED, *(n for n in found if n not in EXPECTED)] if n in found}


def lines(name: str, record: Record) -> list[Line]:
    """Return a record's lines: its own summary, else what the reader of its name makes of it, else a pointer."""
    if "summary" in record:
        return [Line(s["what"], s["target"], s["measured"], s["met"]) for s in record["summary"]]
    if name in READERS:
        return READERS[name](record)
    return [Line(name, str(record.get("target", "–")), f"see `benchmarks/results/{name}.json`", None)]


def _dlg(record: Record) -> list[Line]:
    others = [r for r in record["rows"] if r["attacker"].startswith("published")]
    polished = [r for r in record["rows"] if r["attacker"].startswith("polished")]
    mine = [r for r in record["rows"] if r not in others and r not in polished]
    ours, fast = mine[-1], mine[0]  # the default, and the one that stops at the goal; one row may be both
    count, hits = ours["images"], ours["MSE <= 1e-4"]
    enough = count >= 32
    beside = "".join(f"; published algorithm {o['MSE <= 1e-4']} of {o['images']}" for o in others)
    what = "`dlg()`, one image"
    early = f"{what}, stopped at MSE 1e-4"
    found = [
        Line(f"{what}: MSE ≤ 1e-4", "≥ 31 of 32", f"{hits} of {count}{beside}", _if(enough, 32 * hits >= 31 * count)),
        Line(f"{what}: median MSE", "≤ 1e-6", f"{ours['median MSE']:.1e}", _if(enough, ours["median MSE"] <= 1e-6))
        if "stopped" not in ours["attacker"]
        else Line(f"{what}: median MSE", "≤ 1e-6", "not measured", None),
        Line(
            f"{what}: labels",
            "all",
            f"{ours['labels right']} of {count}",
            _if(enough, ours["labels right"] == count),
        ),
    ]
    if fast is not ours:
        total, good = fast["images"], fast["MSE <= 1e-4"]
        met = _if(total >= 64, 64 * good >= 62 * total)
        found.append(Line(f"{early}: MSE ≤ 1e-4", "≥ 62 of 64", f"{good} of {total}", met))
    if others:
        found.append(_speed(f"{early}: time per success", fast, others[0], 25, enough))
    for row in polished:
        error, ratio, count = row["median MSE"], row["time against stopped"], row["images"]
        measured = f"{error:.1e}, {ratio:.2f} × ({count} images, worst {row['worst MSE']:.0e})"
        met = _if(count >= 32, error <= 1e-12 and ratio <= 1.5)
        label = f"{what}, float64 update, polished: median MSE, time against the unpolished"
        found.append(Line(label, "≤ 1e-12 in ≤ 1.5 ×", measured, met))
    return found


def _recursion(record: Record) -> list[Line]:
    chosen = [row for row in record["rows"] if row.get("certified") is not None]
    single, double, *others = (row for row in record["rows"] if row not in chosen)
    found = []
    for row in chosen:
        count, hits, sure = row["images"], row["successes"], row["certified"]
        measured = f"{hits} of {count} and {sure} certified, median {row['MSE median']:.0e}, worst {row['MSE max']:.0e}"
        what = "`auto()`, one image, float32 update"
        met = _if(count >= 64, hits == sure == count)
        found.append(Line(f"{what}: MSE ≤ 1e-10 and certified", "64 of 64", measured, met))
        if others:
            found.append(_speed(f"{what}: time per success", row, others[0], 40, count >= 64))
    for row, limit, kind in ((single, 1e-10, "float32"), (double, 1e-16, "float64")):
        count, hits, enough = row["images"], row["successes"], row["images"] >= 64
        what = f"`recursion()`, one image, {kind} update"
        measured = f"{hits} of {count}, median {row['MSE median']:.0e}, worst {row['MSE max']:.0e}"
        found += [
            Line(f"{what}: MSE ≤ {limit:.0e}", "64 of 64", measured, _if(enough, hits == count)),
            Line(f"{what}: called exact", "all", f"{row['called exact']} of {count}", row["called exact"] == count),
        ]
        if others and row is single:
            found.append(_speed(f"{what}: time per success", single, others[0], 40, enough))
    return found


def _speed(what: str, ours: Record, published: Record, factor: int, enough: bool) -> Line:
    # Processor time where it was taken: other work on the machine does not stretch it.
    key = "processor seconds per success"
    key = key if key in ours and key in published else "seconds per success"
    mine, theirs = ours[key], published[key]
    target = f"≤ 1/{factor} of the published algorithm"
    if not math.isfinite(mine):
        return Line(what, target, "no success", _if(enough, False))
    if not math.isfinite(theirs):
        return Line(what, target, f"{mine:.2g} s; no success of the published in {published['images']}", None)
    ratio = theirs / mine
    return Line(what, target, f"1/{ratio:.0f} ({mine:.2g} s against {theirs:.3g} s)", _if(enough, ratio >= factor))


def _batches(record: Record) -> list[Line]:
    found = []
    for row in record["rows"]:
        width, size, count, hits = row["width"], row["N"], row["examples"], row[">= 30 dB"]
        wanted = (width, size) in ((24, 2), (24, 4), (32, 8))
        bound = f"{row['rank bound']:,} of {row['unknowns']:,}"
        exact = row["rank bound"] >= row["unknowns"]
        target = "≥ 90 %" if wanted else "possible" if exact else f"not exact: rank at most {bound}"
        measured = f"{hits} of {count} ({row['95 % interval']}), median {row['median dB']:.0f} dB"
        found.append(
            Line(
                f"`dlg()`, LeNet of width {width}, N = {size}: examples ≥ 30 dB",
                target,
                measured,
                _if(wanted, hits >= 0.9 * count),
            )
        )
    return found


def _inverting_gradients(record: Record) -> list[Line]:
    what = "`inverting_gradients()`, ResNet-18, N = {}: one iteration against a minimal loop"
    found = []
    for row in record["rows"]:
        ratio = row["ratio (median of pairs)"]
        measured = f"{ratio:.2f} × ({row['ratio range']})"
        found.append(Line(what.format(row["batch"]), "≤ 1.0 ×", measured, ratio <= 1.0))
    return found


def _disaggregate(record: Record) -> list[Line]:
    found = []
    rows = [r for r in record["rows"] if "bound" not in r]
    hundred = [r for r in rows if r["classes"] == 100]
    for model, limit in record["targets"]["within target"].items():
        chosen = [r for r in hundred if r["model"] == model and (r["examples"] <= 32 or model == "lenet")]
        if not chosen:
            continue
        shares = [(r["unique within target"], r) for r in chosen if r["unique"]]
        pooled = sum(s * r["unique"] for s, r in shares) / sum(r["unique"] for _, r in shares)
        low, row = min(shares, key=lambda pair: pair[0])
        sizes = f"B = {min(r['examples'] for r in chosen)} to {max(r['examples'] for r in chosen)}"
        what = f"`disaggregate()`, {model}, C = 100, {sizes}: unique classes with error ≤ {limit:.0e}"
        measured = f"{_percent(pooled)}, lowest {_percent(low)} at B = {row['examples']} ({row['mode']} mode)"
        found.append(Line(what, "≥ 95 %", measured, _if(_batches_done(chosen), low >= 0.95)))
    total = sum(r["unique"] + r["repeated"] for r in hundred)
    if total:
        right = sum(r["verdicts right"] * (r["unique"] + r["repeated"]) for r in hundred) / total
        wrong = sum(r["exact wrongly"] for r in hundred)
        measured = f"{_percent(right)} of {total:,}; {wrong} called exact wrongly"
        found.append(
            Line(
                "`disaggregate()`, C = 100: verdict per example right",
                "≥ 99 %",
                measured,
                _if(_batches_done(hundred), right >= 0.99),
            )
        )
    for size, limit in record["targets"]["seconds"].items():
        chosen = [r for r in hundred if r["examples"] == int(size)]
        if chosen:
            # One thread's processor time says what other work on the machine cannot disturb.
            alone = record.get("machine", {}).get("threads") == 1 and all("cpu seconds max" in r for r in chosen)
            clock, unit = ("cpu seconds", "processor s, one thread") if alone else ("seconds", "s")
            slowest = max(r[f"{clock} max"] for r in chosen)
            median = max(r[f"{clock} median"] for r in chosen)
            measured = f"slowest {slowest:.2g} {unit} (highest median {median:.2g})"
            found.append(
                Line(
                    f"`disaggregate()`, C = 100: time at B = {size}",
                    f"≤ {limit} s",
                    measured,
                    _if(_batches_done(chosen), slowest <= limit),
                )
            )
    for classes in sorted({r["classes"] for r in rows} - {100}):
        for model in dict.fromkeys(r["model"] for r in rows):
            chosen = [r for r in rows if r["classes"] == classes and r["model"] == model]
            parts = [
                f"B = {r['examples']}: unique {_percent(r['unique within target'])}, "
                f"repeated {_percent(r['repeated within 1e-2'])}"
                for r in chosen
            ]
            if parts:
                found.append(Line(f"`disaggregate()`, {model}, C = {classes}", "reported", "; ".join(parts), None))
    return found


def _batches_done(rows: Iterable[Record]) -> bool:
    return all(r["batches"] >= 20 for r in rows)


def _certificate(record: Record) -> list[Line]:
    trials, wrong = record["trials"], record["wrong"]
    clean, unproved = record["exact_answers_to_clean_updates"], record["of_these_unproved"]
    return [
        Line(
            "certificates: wrong proofs in 5,000 random trials",
            "0",
            f"{wrong} in {trials:,} ({record['proofs']:,} proofs)",
            False if wrong else _if(trials >= 5000, True),
        ),
        Line(
            "certificates: exact answers to clean updates called unproved",
            "≤ 1 %",
            f"{unproved} of {clean:,}",
            _if(clean >= 400, unproved <= 0.01 * clean),
        ),
    ]


READERS: dict[str, Callable[[Record], list[Line]]] = {
    "dlg": _dlg,
    "batches": _batches,
    "inverting_gradients": _inverting_gradients,
    "recursion": _recursion,
    "disaggregate": _disaggregate,
    "certificate": _certificate,
}


def _if(condition: bool, value: bool) -> bool | None:
    return bool(value) if condition else None


def _percent(share: float | str) -> str:
    return f"{100 * share:.1f} %" if isinstance(share, float | int) else "–"


def table(items: Iterable[Line]) -> str:
    """Return lines as a Markdown table."""
    words = {True: "yes", False: "**no**", None: "–"}
    rows = [f"| {i.what} | {i.target} | {i.measured} | {words[i.met]} |" for i in items]
    return "\n".join(["| what | target | measured | met |", "| --- | --- | --- | --- |", *rows])


def where(records: Mapping[str, Record]) -> str:
    """Return on what each record was measured, as a Markdown table, with a warning where other work disturbed it."""
    rows = ["| benchmark | date | machine | threads | torch | commit |", "| --- | --- | --- | --- | --- | --- |"]
    for name, record in records.items():
        m = record.get("machine", {})
        load, count = m.get("load"), _cores(m.get("processor", ""))
        disturbed = load is not None and count and load > 1.5 * count
        warning = f"; **load {load:.0f}: other work disturbed the times**" if disturbed else ""
        cells = (
            f"`{name}`",
            str(m.get("date", "–")).split(" ")[0],
            (m.get("gpu") or m.get("processor", "unknown")) + warning,
            m.get("threads", "–"),
            m.get("torch", "–"),
            m.get("commit") or "–",
        )
        rows.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(rows)


def _cores(processor: str) -> int | None:
    words = processor.removesuffix(" cores").rsplit(" ", 1)[-1]
    return int(words) if words.isdigit() else None


def whole(records: Mapping[str, Record], failed: Mapping[str, str], names: Sequence[str]) -> str:
    """Return the table of everything, with what is missing and where it was measured."""
    found: list[Line] = []
    for name in dict.fromkeys([*EXPECTED, *names, *records]):
        if name in records:
            found += lines(name, records[name])
            continue
        reason = REASONS.get(name, "" if name in names else "no script measures it yet")
        measured = f"not measured: {reason}" if reason else "not measured"
        expected = EXPECTED.get(name, ((f"`benchmarks/{name}.py`", "–"),))
        found += [Line(what, target, measured, None) for what, target in expected]
    parts = [table(found), "Measured on:", where(records)]
    parts += [f"`{n}` failed in the last run ({why}); figures of it are older." for n, why in failed.items()]
    return "\n\n".join(parts)


def _one_image(record: Record) -> str:
    ours = next(r for r in record["rows"] if r.get("certified") is not None)
    published = next(r for r in record["rows"] if r["attacker"].startswith("published"))
    key = "processor seconds per success"
    return (
        f"{ours['successes']} of {ours['images']} exact (error ≤ {ours['goal']:.0e}), {ours['certified']} of them "
        f"proved, {ours[key]:.2g} s each. The published search: {published['successes']} of {published['images']} with "
        f"error ≤ {published['goal']:.0e}, {published[key]:.2g} s each"
    )


def _solved_batch(record: Record) -> str:
    wanted = ("perceptron", "relu", 8)
    row = next(r for r in record["rows"] if (r["model"], r["activation"], r["examples"]) == wanted)
    seconds, error = row["processor s"], row["worst MSE"]
    return f"{row['solved']} of {row['batches']} batches exact (error ≤ {error:.0e}), {seconds:.2g} s each"


def _transformer(record: Record) -> str:
    row = next(r for r in record["rows"] if r["model"].startswith("ViT-Base/16") and r["model"].endswith("0.1"))
    hits, sure = row[">= 90 dB"], row["proved"]
    return f"{hits} of {row['images']} at 90 dB or more, {sure} of them proved, {row['processor s']:.2g} s each"


def _deep(record: Record) -> str:
    row = next(r for r in record["rows"] if (r["N"], r["features"], r["steps"]) == (4, "none", 500))
    count, minutes = row["N"] * row["batches"], row["processor s"] / 60
    return f"blurred; {row['examples >= 20 dB']} of {count} pictures at 20 dB or more, {minutes:.0f} minutes a batch"


def _sentences(record: Record) -> str:
    rows = [r for r in record["rows"] if r["part"] == 2 and r["sentences"] == 8]
    whole = sum(r["exact"] == "8 of 8" for r in rows)
    proved = sum(r["proved"] == 8 for r in rows)
    slowest = max(r["seconds"] for r in rows)
    return f"{whole} of {len(rows)} batches word for word, {proved} of them proved, {slowest:.0f} s each at most"


def _wrong_proofs(record: Record) -> str:
    return f"{record['wrong']} in {record['trials']:,} random trials made to provoke one ({record['proofs']:,} proofs)"


HEADLINES: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("recursion", "one 32 × 32 picture in one gradient, the network of the 2019 paper", _one_image),
    ("vit", "one 224 × 224 photograph in one gradient of ViT-Base/16, dropout on", _transformer),
    ("recursion_batches", "8 pictures in one gradient, two-layer ReLU perceptron, solved", _solved_batch),
    ("resnet_batches", "4 pictures in one gradient, ResNet-18, searched", _deep),
    ("text", "8 sentences in one gradient of a language model of GPT-2's shape, random weights", _sentences),
    ("certificate", "results called proved that were wrong", _wrong_proofs),
)
"""The rows of the first page: benchmark, what was tried in plain words, and what came out."""


def short(records: Mapping[str, Record]) -> str:
    """Return the table of the first page."""
    rows = []
    for name, what, tell in HEADLINES:
        with suppress(KeyError, StopIteration):  # not measured, or not at that size
            rows.append(f"| {what} | {tell(records[name])} |")
    if not rows:
        return EMPTY
    return "\n".join(["| what was tried | what came back |", "| --- | --- |", *rows])


def insert(page: Path, body: str) -> None:
    """Replace what stands between the markers of a page.

    Raises:
        ValueError: the page does not have both markers, in this order.

    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the table; put {BEGIN} and {END} into it.")
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; return 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these benchmarks (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, into results/quick/; pages stay as they are")
    parser.add_argument("--table-only", action="store_true", help="run nothing, render what results/ holds")
    options = parser.parse_args(arguments)
    known = scripts()
    if unknown := [n for n in options.names if n not in known]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    results = RESULTS / "quick" if options.quick else RESULTS
    failed = {} if options.table_only else run(options.names or known, quick=options.quick, results=results)
    records = load(results)
    body = whole(records, failed, known)
    print(body)
    if not options.quick:
        insert(ROOT / "docs" / "performance.md", body)
        insert(ROOT / "README.md", short(records))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
