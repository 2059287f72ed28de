"""Reproduce a paper: run its experiments, set the paper's numbers beside ours, write page, pictures and records."""

from __future__ import annotations

import base64
import html
import importlib
import inspect
import io
import json
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gradleak.data import public
from gradleak.errors import GradleakError, InvalidFile, InvalidInput, UnknownName
from gradleak.papers import experiment as lab_module
from gradleak.papers.experiment import Figure, Lab, Result, Row, hardware, write_atomically

__all__ = ["Reproduction", "default_out", "experiments", "papers", "reproduce"]

_SCALES = ("smoke", "default", "full")
_WRITTEN = (
    "ours", "ours_interval", "published", "published_interval", "n", "unit", "cost", "note", "reached", "scale",
    "hardware", "date",
)  # fmt: skip
_HEADER = """# What the paper says and what gradleak measured.
# By hand: paper, source, target (such as "<= 1e-4"), tolerance (absolute) or factor (multiplicative) within which a
# repetition must stay, why (disagreement with the paper, explained: without a measured number, and nothing that
# another run may contradict, since every run prints it). All other keys are written by `gradleak reproduce`; never
# type them in.
"""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """What one call of :func:`reproduce` did.

    Attributes:
        paper: the paper's folder name.
        scale: "smoke", "default" or "full".
        results: experiment → its stored result (rows, texts, figures, hardware, date, seconds).
        failures: experiment → why it has no result.
        drift: sentences about rows that left the tolerance around the recorded value.
        page: the table page (Markdown).
        html: the page with every figure.

    """

    paper: str
    scale: str
    results: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    drift: tuple[str, ...]
    page: Path
    html: Path


@dataclass(frozen=True)
class _Place:
    """Where a paper's experiments are, and whether results may be written beside them."""

    folder: Path
    docs: Path | None
    modules: Mapping[str, Any] = field(default_factory=dict)


def papers(root: Path | None = None) -> tuple[str, ...]:
    """Return the papers that can be reproduced, by folder name."""
    base = _base(root)
    return tuple(sorted(p.name for p in base.iterdir() if (p / "expected.toml").is_file())) if base.is_dir() else ()


def default_out(paper: str) -> Path:
    """Return the folder for what is measured where no other is named."""
    return Path("runs", paper)


def experiments(paper: str, root: Path | None = None) -> tuple[str, ...]:
    """Return the names of the experiments of ``paper``.

    Raises:
        UnknownName: there is no such paper.

    """
    return tuple(_load(paper, root).modules)


def reproduce(
    paper: str,
    *,
    only: str | Sequence[str] | None = None,
    scale: str = "default",
    data: str | Path | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    root: Path | None = None,
    callback: Callable[[str], None] | None = None,
) -> Reproduction:
    """Run the experiments of ``paper`` and write records, results, the table page and one page of figures.

    Everything measured is stored under ``out`` by the hash of its content: a second run measures nothing twice and
    a killed run goes on. From a source tree, results of the scales "default" and "full" also go to
    ``experiments/<paper>/`` (``expected.toml``, ``results/``) and ``docs/papers/<paper>.md``.

    Args:
        paper: folder name, such as "2019_zhu_dlg".
        only: names of experiments; all if None.
        scale: "smoke" (seconds each), "default" or "full".
        data: folder laid out as ``docs/data.md`` says; public loaders if None.
        out: folder for what is measured; ``runs/<paper>`` if None.
        jobs: processes that measure side by side.
        root: another folder of papers than the source tree's ``experiments/`` or the installed package's.
        callback: receives a phrase now and then.

    Raises:
        UnknownName: no such paper, experiment or scale.
        InvalidInput: a data file is missing; names both ways to provide it.

    """
    if scale not in _SCALES:
        raise UnknownName("scale", scale, _SCALES)
    place = _load(paper, root)
    wanted = list(place.modules) if only is None else [only] if isinstance(only, str) else list(only)
    for name in wanted:
        if name not in place.modules:
            raise UnknownName(f"experiment of {paper}", name, place.modules)
    out = default_out(paper) if out is None else Path(out)
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise InvalidInput(f"The data folder {folder} does not exist; pass --data DIR laid out as docs/data.md says.")
    labs = {name: Lab(name, out, folder, jobs, callback) for name in wanted}
    for name in wanted:  # before any work: hours later would be too late
        for file in getattr(place.modules[name], "NEEDS", ()):
            public.require(file, folder, out / "downloads")

    results_folder = out / f"results-{scale}"
    failures: dict[str, str] = {}
    for name in wanted:
        start = time.perf_counter()
        try:
            result = place.modules[name].run(getattr(place.modules[name], scale.upper()), labs[name])
        except GradleakError as error:
            if len(wanted) == 1:
                raise
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        stored = _stored(name, result, scale, time.perf_counter() - start, place.modules[name])
        for figure in result.figures:
            write_atomically(results_folder / name / f"{_slug(figure.name)}.png", _png(figure))
        write_atomically(results_folder / f"{name}.json", _json(stored))

    fresh = {name: _read(results_folder / f"{name}.json") for name in wanted if name not in failures}
    expected = _expected(place.folder)
    drift = tuple(s for name in fresh for s in _drift(name, fresh[name], expected.get(name, {})))
    known = _results(results_folder)
    page = out / f"{paper}-{scale}.md"
    if place.docs is not None and scale != "smoke":
        _publish(place.folder, fresh)
        known_here = _results(place.folder / "results")
        page = place.docs / "papers" / f"{paper}.md"
        write_atomically(page, _markdown(paper, known_here, _expected(place.folder)).encode())
    else:
        write_atomically(page, _markdown(paper, known, expected).encode())
    website = out / f"{paper}-{scale}.html"
    write_atomically(website, _html(paper, known, expected, results_folder).encode())
    return Reproduction(paper, scale, fresh, failures, drift, page, website)


# ------------------------------------------------------------------------------------------------------- loading


def _base(root: Path | None) -> Path:
    if root is not None:
        return root
    package = Path(inspect.getfile(lab_module)).resolve().parents[1]
    source = package.parent / "experiments"
    return source if source.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "_experiments"


def _load(paper: str, root: Path | None) -> _Place:
    known = papers(root)
    if paper not in known:
        raise UnknownName("paper", paper, known)
    folder = _base(root) / paper
    package = "gradleak_experiments_" + re.sub(r"\W", "_", paper)
    lab_module.load_package(package, folder)
    importlib.invalidate_caches()
    modules = {}
    for path in sorted(folder.glob("[!_]*.py")):
        module = importlib.import_module(f"{package}.{path.stem}")
        lacking = [k for k in ("NAME", "run", "SMOKE", "DEFAULT", "FULL") if not hasattr(module, k)]
        if lacking:
            raise InvalidInput(f"{path.name} lacks {', '.join(lacking)}; see experiments/README.md.")
        modules[module.NAME] = module
    ranks = {name: i for i, name in enumerate(_expected(folder))}
    ordered = dict(sorted(modules.items(), key=lambda item: (ranks.get(item[0], len(ranks)), item[0])))
    source = folder.parent.name == "experiments" and (folder.parent.parent / "docs").is_dir()
    return _Place(folder, folder.parent.parent / "docs" if source else None, ordered)


def _expected(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    path = folder / "expected.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InvalidFile(f"{path} is not valid TOML ({error}); correct it.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidFile(f"{path} is not a stored result ({error}); delete it and run again.") from error
    return loaded


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


# ------------------------------------------------------------------------------------------------------- results


def _stored(name: str, result: Result, scale: str, seconds: float, module: Any) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    scaled = result.scaled.rstrip(".") + ("" if gpu or not result.scaled else "; not measured on a GPU")
    return {
        "experiment": name,
        "title": (module.__doc__ or name).strip().splitlines()[0],
        "scale": scale,
        "scaled": scaled,
        "rows": [asdict(row) for row in result.rows],
        "texts": dict(result.texts),
        "figures": [
            {"name": f.name, "caption": f.caption, "file": f"{name}/{_slug(f.name)}.png"} for f in result.figures
        ],
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": seconds,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    figure.draw(canvas)
    stream = io.BytesIO()
    canvas.savefig(stream, format="png")
    return stream.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _reached(row: Mapping[str, Any], target: str) -> bool | None:
    """Return whether ours meets a target such as "<= 1e-4"; None without target or number."""
    match = re.fullmatch(r"\s*(<=|>=)\s*([-+0-9.eE]+)\s*", target)
    if not match or not isinstance(row["ours"], Mapping):
        return None
    value, bound = row["ours"]["value"], float(match[2])
    return bool(value <= bound if match[1] == "<=" else value >= bound)


def _drift(name: str, stored: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for row in stored["rows"]:
        record = expected.get(row["name"], {})
        before = record.get("ours")
        if record.get("scale") != stored["scale"] or not isinstance(before, (int, float)):
            continue
        now = row["ours"]["value"] if isinstance(row["ours"], Mapping) else float("nan")
        within = abs(now - before) <= record.get("tolerance", float("inf"))
        if "factor" in record:
            within = before / record["factor"] <= now <= before * record["factor"]
        if not within:
            yield f"{name}, {row['name']}: measured {now:.3g}, recorded {before:.3g}."


def _publish(folder: Path, fresh: Mapping[str, Mapping[str, Any]]) -> None:
    expected = _expected(folder)
    for name, stored in fresh.items():
        path = folder / "results" / f"{name}.json"
        if stored["scale"] == "default" and path.is_file() and _read(path)["scale"] == "full":
            continue  # the full scale says more
        write_atomically(path, _json(stored))
        table = expected.setdefault(name, {})
        for row in stored["rows"]:
            entry = {k: v for k, v in table.get(row["name"], {}).items() if k not in _WRITTEN}
            table[row["name"]] = entry | _written(row, stored, entry.get("target", ""))
    write_atomically(folder / "expected.toml", (_HEADER + _toml(expected)).encode())


def _written(row: Mapping[str, Any], stored: Mapping[str, Any], target: str) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for key in ("ours", "published"):
        value = row[key]
        if isinstance(value, Mapping):
            entry[key] = _rounded(value["value"])
            entry[f"{key}_interval"] = [_rounded(value["low"]), _rounded(value["high"])]
        elif value is not None:
            entry[key] = value
    n = [row[k]["n"] for k in ("ours", "published") if isinstance(row[k], Mapping)]
    if n:
        entry["n"] = n[0]
    entry |= {k: row[k] for k in ("unit", "cost", "note") if row[k]}
    reached = _reached(row, target)
    if reached is not None:
        entry["reached"] = reached
    return entry | {k: stored[k] for k in ("scale", "hardware", "date")}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _toml(tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = []
    for name, rows in tables.items():
        for row, entry in rows.items():
            lines.append(f"\n[{_key(name)}.{_key(row)}]")
            lines += [f"{_key(k)} = {_value(v)}" for k, v in entry.items()]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --------------------------------------------------------------------------------------------------------- pages

_COLUMNS = (
    "measurement",
    "paper",
    "published algorithm",
    "our attacker",
    "target",
    "n",
    "95 % interval",
    "cost",
    "note",
)


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.3g}"
    return "—" if value is None else str(value)


def _interval(value: Any) -> str:
    return f"[{value['low']:.3g}, {value['high']:.3g}]" if isinstance(value, Mapping) else ""


def _cells(row: Mapping[str, Any], record: Mapping[str, Any], scaled: str) -> tuple[str, ...]:
    target = record.get("target", "")
    reached = {True: f"{target} (reached)", False: f"{target} (missed)", None: target}[_reached(row, target)]
    both = [("ours ", row["ours"]), ("published ", row["published"])]
    present = [(label, v) for label, v in both if isinstance(v, Mapping)]
    intervals = "; ".join((label if len(present) > 1 else "") + _interval(v) for label, v in present)
    paper = record.get("paper", "")
    source = f" ({record['source']})" if record.get("source") else ""
    short = "scaled down" + ("; not measured on a GPU" if "not measured on a GPU" in scaled else "") if scaled else ""
    note = ". ".join(s.rstrip(".") for s in (row["note"], record.get("why", ""), short) if s)
    unit = f", {row['unit']}" if row["unit"] else ""
    n = next((str(v["n"]) for _, v in present), "")
    published, ours = _number(row["published"]), _number(row["ours"])
    said = f"{paper}{source}" if paper != "" else "not given"
    return (row["name"] + unit, said, published, ours, reached, n, intervals, row["cost"], note)


def _tables(
    known: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Iterable[tuple[str, Mapping[str, Any] | None, list[tuple[str, ...]]]]:
    """Yield (experiment, its stored result, its cells), the rows that nobody has measured yet among them."""
    for name in dict.fromkeys([*expected, *known]):
        stored = known.get(name)
        rows = [] if stored is None else stored["rows"]
        table = expected.get(name, {})
        scaled = "" if stored is None else stored["scaled"]
        cells = [_cells(row, table.get(row["name"], {}), scaled) for row in rows]
        for missing in [k for k in table if k not in {row["name"] for row in rows}]:
            empty = asdict(Row(missing, None, note="not measured here"))
            cells.append(_cells(empty, table[missing], ""))
        yield name, stored, cells


def _origin(stored: Mapping[str, Any]) -> str:
    difference = f" Scaled down: {stored['scaled']}." if stored["scaled"] else ""
    return (
        f"Scale: {stored['scale']}. {stored['hardware']}, {stored['date']}, {stored['seconds']:.0f} s in the last run "
        f"(what was stored before is not counted; costs per example are in the table).{difference}"
    )


def _markdown(paper: str, known: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    parts = [
        f"# {paper}: the paper's numbers beside ours\n",
        f"Written by `gradleak reproduce {paper}`; every measured number here was computed from the records of a run. "
        "By hand come what the paper says, the targets, and explanations in the notes, which hold no measured number. "
        "“Published algorithm” is the paper's own attack as it was published, run again by us; “our attacker” is "
        "gradleak's best one. Intervals are 95 % intervals.\n",
    ]
    for name, stored, cells in _tables(known, expected):
        parts.append(f"## {name}\n")
        if stored is not None:
            parts.append(f"{stored['title']}\n\n{_origin(stored)}\n")
        parts += [line(_COLUMNS), line(["---"] * len(_COLUMNS)), *map(line, cells), ""]
        for title, text in (stored or {}).get("texts", {}).items():
            parts.append(f"**{title}**\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;"
    "vertical-align:top}th{background:#f2f2f2}pre{background:#f6f6f6;padding:1em;overflow-x:auto;white-space:pre-wrap}"
    "img{max-width:100%}figcaption{color:#555}"
)


def _html(paper: str, known: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    title = html.escape(f"{paper}: the paper's numbers beside ours")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1>"
    ]
    for name, stored, cells in _tables(known, expected):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if stored is not None:
            parts.append(f"<p>{html.escape(stored['title'])}</p><p>{html.escape(_origin(stored))}</p>")
        parts.append("<table>" + line("th", _COLUMNS) + "".join(line("td", c) for c in cells) + "</table>")
        for heading, text in (stored or {}).get("texts", {}).items():
            parts.append(f"<h3>{html.escape(heading)}</h3><pre>{html.escape(text)}</pre>")
        for figure in (stored or {}).get("figures", []):
            picture = base64.b64encode((folder / figure["file"]).read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(figure["name"])}" src="data:image/png;base64,{picture}">'
                f"<figcaption>{html.escape(figure['caption'])}</figcaption></figure>"
            )
    return "".join(parts) + "</body></html>\n"
