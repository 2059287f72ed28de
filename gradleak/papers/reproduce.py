"""Reproduce a paper: run its experiments, set the paper's numbers beside ours, write page, pictures and records."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gradleak.audit.store import hardware, today
from gradleak.data import public
from gradleak.errors import GradleakError, InvalidFile, InvalidInput, UnknownName
from gradleak.files import check_writable, read_file, write_bytes
from gradleak.papers.expected import drift, enter, read_expected, to_toml
from gradleak.papers.experiment import Figure, Lab, Result
from gradleak.papers.packages import load_package
from gradleak.papers.page import to_html, to_markdown

__all__ = ["Reproduction", "default_out", "experiments", "papers", "reproduce"]

_SCALES = ("smoke", "default", "full")
_EXTRAS = {"tokenizers": "text", "transformers": "text", "timm": "vision", "torchvision": "vision", "opacus": "dp"}
"""Package → the extra of gradleak that brings it."""


@dataclass(frozen=True, eq=False)
class Reproduction:
    """What one call of :func:`reproduce` did.

    Attributes:
        results: experiment → its stored result (rows, texts, figures, hardware, date, seconds).
        drift: sentences about rows that left the tolerance around the recorded value.
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
    """Where a paper's experiments are, and whether results may be written beside them.

    Attributes:
        docs: folder of the pages in a source tree, else None.
        lacking: experiment → sentence about the package that it needs and that is not installed.
    """

    folder: Path
    docs: Path | None
    modules: Mapping[str, Any] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All experiments, in the order of the paper."""
        ranks = {name: i for i, name in enumerate(read_expected(self.folder))}
        return tuple(sorted([*self.modules, *self.lacking], key=lambda name: (ranks.get(name, len(ranks)), name)))


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
        InvalidFile: its ``expected.toml`` is damaged.
    """
    return _load(paper, root).names


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

    Everything measured is stored under ``out`` (``runs/<paper>`` if None) by the hash of its content: a second run
    measures nothing twice and a killed run goes on. From a source tree that can be written, results of the scales
    "default" and "full" also go to ``experiments/<paper>/`` (``expected.toml``, ``results/``) and
    ``docs/papers/<paper>.md``.

    ``only`` names experiments, all if None; ``scale`` is "smoke" (seconds each), "default" or "full"; ``data`` is laid
    out as ``docs/data.md`` says, and public loaders serve if it is None; ``root`` is another folder of papers than the
    source tree's ``experiments/`` or the installed package's; ``callback`` receives a phrase now and then.

    Returns:
        What was done; of several experiments, those that could not be measured are its ``failures``.

    Raises:
        UnknownName: no such paper, experiment or scale.
        InvalidInput: a data file is missing (names both ways to provide it), ``out`` cannot be written, or the only
            experiment asked for needs a package that is not installed.
        GradleakError: whatever the only experiment asked for raises.
    """
    if scale not in _SCALES:
        raise UnknownName("scale", scale, _SCALES)
    place = _load(paper, root)
    names = place.names
    wanted = list(names) if only is None else [only] if isinstance(only, str) else list(only)
    for name in wanted:
        if name not in names:
            raise UnknownName(f"experiment of {paper}", name, names)
    failures = {name: place.lacking[name] for name in wanted if name in place.lacking}
    if len(failures) == len(wanted):
        raise InvalidInput(next(iter(failures.values())))
    out = default_out(paper) if out is None else Path(out)
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise InvalidInput(f"The data folder {folder} does not exist; pass --data DIR laid out as docs/data.md says.")
    # All of this before any work: hours later would be too late.
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    runnable = [name for name in wanted if name not in failures]
    for name in runnable:
        for file in getattr(place.modules[name], "NEEDS", ()):
            public.require(file, folder, out / "downloads")

    results_folder = out / f"results-{scale}"
    fresh: dict[str, dict[str, Any]] = {}
    for name in runnable:
        try:
            fresh[name] = _run(name, place.modules[name], Lab(name, out, folder, jobs, callback), scale, results_folder)
        except GradleakError as error:
            if len(wanted) == 1:
                raise
            failures[name] = f"{type(error).__name__}: {error}"

    expected = read_expected(place.folder)
    left = tuple(s for name in fresh for s in drift(name, fresh[name], expected.get(name, {})))
    known = _results(results_folder, callback)
    page = out / f"{paper}-{scale}.md"
    if place.docs is not None and scale != "smoke":
        _publish(place.folder, fresh)
        page = place.docs / "papers" / f"{paper}.md"
        shown = _results(place.folder / "results", callback)
        _write(page, to_markdown(paper, shown, read_expected(place.folder)).encode())
    else:
        _write(page, to_markdown(paper, known, expected).encode())
    website = out / f"{paper}-{scale}.html"
    _write(website, to_html(paper, known, expected, results_folder).encode())
    return Reproduction(paper, scale, fresh, failures, left, page, website)


def _run(name: str, module: Any, lab: Lab, scale: str, folder: Path) -> dict[str, Any]:
    """Return the result of one experiment as it is stored in ``folder``."""
    start = time.perf_counter()
    try:
        result = module.run(getattr(module, scale.upper()), lab)
    except ImportError as error:
        raise InvalidInput(_lacking(name, error)) from error
    content = _json(_stored(name, result, scale, time.perf_counter() - start, module))
    for figure in result.figures:
        _write(folder / name / f"{_slug(figure.name)}.png", _png(figure))
    _write(folder / f"{name}.json", content)
    stored: dict[str, Any] = json.loads(content)
    return stored


def _base(root: Path | None) -> Path:
    if root is not None:
        return root
    package = Path(inspect.getfile(Lab)).resolve().parents[1]
    source = package.parent / "experiments"
    return source if source.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "_experiments"


def _load(paper: str, root: Path | None) -> _Place:
    known = papers(root)
    if paper not in known:
        raise UnknownName("paper", paper, known)
    folder = _base(root) / paper
    package = "gradleak_experiments_" + re.sub(r"\W", "_", paper)
    load_package(package, folder)
    importlib.invalidate_caches()
    modules, lacking = {}, {}
    for path in sorted(folder.glob("[!_]*.py")):
        try:
            module = importlib.import_module(f"{package}.{path.stem}")
        except ImportError as error:
            lacking[path.stem] = _lacking(path.stem, error)
            continue
        absent = [k for k in ("NAME", "run", "SMOKE", "DEFAULT", "FULL") if not hasattr(module, k)]
        if absent:
            raise InvalidInput(f"{path} lacks {', '.join(absent)}; see experiments/README.md.")
        modules[module.NAME] = module
    source = folder.parent.name == "experiments" and (folder.parent.parent / "docs").is_dir()
    docs = folder.parent.parent / "docs" if source else None
    return _Place(folder, docs if docs is not None and _writable(folder, docs) else None, modules, lacking)


def _lacking(name: str, error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in _EXTRAS:
        remedy = f"install it with pip install 'gradleak[{_EXTRAS[package]}]'"
    else:
        remedy = "install what it imports"
    needs = f"the package {package!r}, which is not installed" if package else f"what cannot be imported ({error})"
    return f"The experiment {name!r} needs {needs}; {remedy}."


def _writable(*folders: Path) -> bool:
    try:
        for folder in folders:
            check_writable(folder)
    except InvalidInput:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return a stored result.

    Raises:
        InvalidFile: it is damaged.
    """
    try:
        stored: dict[str, Any] = json.loads(read_file(path).decode("utf-8"))
        # Whole is what both pages can show.
        (to_markdown("", {"": stored}, {}) + to_html("", {"": stored}, {}, path.parent)).encode()
    except InvalidFile:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InvalidFile(f"{path} is not a stored result; run its experiment again.") from error
    return stored


def _results(folder: Path, callback: Callable[[str], None] | None) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = _read(path)
        except InvalidFile as error:
            if callback is not None:
                callback(f"Left out of the page: {error}")
    return found


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def _stored(name: str, result: Result, scale: str, seconds: float, module: Any) -> dict[str, Any]:
    return {
        "experiment": name,
        "title": (module.__doc__ or name).strip().splitlines()[0],
        "scale": scale,
        "scaled": result.scaled.rstrip("."),
        "gpu": torch.cuda.is_available(),
        "rows": [asdict(row) for row in result.rows],
        "texts": dict(result.texts),
        "figures": [
            {"name": f.name, "caption": f.caption, "file": f"{name}/{_slug(f.name)}.png"} for f in result.figures
        ],
        "hardware": hardware(),
        "date": today(),
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


def _publish(folder: Path, fresh: Mapping[str, Mapping[str, Any]]) -> None:
    expected, known = read_expected(folder), _results(folder / "results", None)
    for name, stored in fresh.items():
        path = folder / "results" / f"{name}.json"
        if stored["scale"] == "default" and known.get(name, {}).get("scale") == "full":
            continue  # the full scale says more
        _write(path, _json(stored))
        enter(expected, name, stored)
    _write(folder / "expected.toml", to_toml(expected).encode())
