"""What one experiment of a reproduced paper is made of: a laboratory that remembers, estimates, rows, figures.

An experiment is a Python file with ``NAME``, ``SMOKE``, ``DEFAULT``, ``FULL`` and ``run(config, lab) -> Result``
(``experiments/README.md`` shows one). Its work is split into cases; the laboratory stores every measured case under
a hash of its content, so that a killed run resumes where it was and nothing is measured twice.
"""

from __future__ import annotations

import ast
import concurrent.futures
import hashlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors_torch
from torch import Tensor

from gradleak.data import public
from gradleak.errors import InvalidInput

__all__ = [
    "Estimate",
    "Figure",
    "Lab",
    "Measured",
    "Result",
    "Row",
    "bootstrap",
    "count_measured",
    "hardware",
    "mean",
    "median",
    "share",
    "write_atomically",
]


# --------------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval.

    Attributes:
        value: the estimate itself.
        low: lower end of the 95 % interval.
        high: upper end.
        n: number of independent examples behind it.

    """

    value: float
    low: float
    high: float
    n: int


def share(successes: Sequence[bool]) -> Estimate:
    """Return the share of true values with Wilson's 95 % interval (Wilson 1927).

    Raises:
        InvalidInput: there are no values.

    """
    n, z = _count(successes), 1.959963984540054
    p = sum(map(bool, successes)) / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, max(0.0, center - half) if p > 0 else 0.0, min(1.0, center + half) if p < 1 else 1.0, n)


def median(values: Sequence[float]) -> Estimate:
    """Return the median with the distribution-free 95 % interval of order statistics.

    Values that are not a number count as infinite: a diverged run is the worst run, not a missing one. Below six
    values no order statistics reach 95 %, and the interval is the whole range.

    Raises:
        InvalidInput: there are no values.

    """
    n = _count(values)
    ordered = sorted(math.inf if math.isnan(v) else float(v) for v in values)
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    tail, k = 0.0, 0
    while k < n // 2 and (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    low = max(k - 1, 0)
    return Estimate(middle, ordered[low], ordered[n - 1 - low], n)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean with a percentile bootstrap 95 % interval (2,000 resamples, fixed seed)."""
    return bootstrap(values, lambda sample: float(sample.mean()))


def bootstrap(values: Sequence[float] | np.ndarray, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """Return ``statistic`` of ``values`` (first axis: examples) with a percentile bootstrap 95 % interval.

    Raises:
        InvalidInput: there are no values.

    """
    n = _count(values)
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    draws = [statistic(array[rng.integers(0, n, n)]) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(statistic(array)), float(low), float(high), n)


def _count(values: Sequence[Any] | np.ndarray) -> int:
    if len(values) == 0:
        raise InvalidInput("An estimate needs at least one measured value; run at least one case.")
    return len(values)


# ------------------------------------------------------------------------------------------------ what comes out


@dataclass(frozen=True)
class Row:
    """One line of the paper's table.

    Attributes:
        name: stable key; the table of the same name in ``expected.toml`` holds the paper's value and the target.
        ours: our attacker's number, or words, or None where it does not apply.
        published: the published algorithm's number in our re-run, likewise.
        unit: of both numbers.
        cost: what one example costs our attacker, in words ("12 s, 310 evaluations").
        note: what a reader must know, among it why ours differs from the paper.

    """

    name: str
    ours: Estimate | str | None
    published: Estimate | str | None = None
    unit: str = ""
    cost: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture: ``draw`` receives an empty ``matplotlib.figure.Figure`` and fills it."""

    name: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (8.0, 4.0)


@dataclass(frozen=True, eq=False)
class Result:
    """What an experiment found.

    Attributes:
        rows: the lines of its table.
        figures: its pictures.
        texts: title → text to print as it is (traces of reconstructed sentences).
        scaled: one sentence that names the difference to the full scale, "" where there is none.

    """

    rows: Sequence[Row]
    figures: Sequence[Figure] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    scaled: str = ""


@dataclass(frozen=True, eq=False)
class Measured:
    """One stored case: what was asked, what came out, and where and when.

    Attributes:
        case: the arguments of the measuring function.
        values: what it returned; arrays come back as ``numpy.ndarray``.
        seconds: its wall-clock time.
        hardware: the machine it ran on.
        date: when, as YYYY-MM-DD.
        source: fingerprint of the experiment's code at that time.

    """

    case: Mapping[str, Any]
    values: Mapping[str, Any]
    seconds: float
    hardware: str
    date: str
    source: str

    def __getitem__(self, name: str) -> Any:
        """Return one value by name."""
        return self.values[name]


# ------------------------------------------------------------------------------------------------ the laboratory

Measure = Callable[..., Mapping[str, Any]]
Build = Callable[..., tuple[Mapping[str, Tensor], Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class Lab:
    """Where an experiment finds its data, measures its cases, and remembers both.

    Attributes:
        name: the experiment, which names the folder of its records.
        out: folder of all records.
        data: folder of data sets, laid out as ``docs/data.md`` says; None to use public loaders.
        jobs: processes that measure cases side by side (one torch thread each if more than one).
        callback: receives a phrase now and then.

    """

    name: str
    out: Path
    data: Path | None = None
    jobs: int = 1
    callback: Callable[[str], None] | None = None

    def measure(self, function: Measure, cases: Sequence[Mapping[str, Any]]) -> list[Measured]:
        """Return ``function(lab, **case)`` for every case, in order, measuring only what is not stored yet.

        Args:
            function: a module-level function of the experiment; returns JSON values, tensors or arrays by name.
            cases: its keyword arguments, JSON values only; they, the experiment's ``VERSION`` and the function's
                name make the hash under which the record is stored.

        """
        paths = [self._path(self.name, function, case, ".json") for case in cases]
        waiting = {path: case for path, case in zip(paths, cases, strict=True) if not path.exists()}
        self._say(f"{self.name}: {function.__name__}, {len(waiting)} of {len(cases)} cases to measure")
        if self.jobs > 1 and len(waiting) > 1:
            self._measure_side_by_side(function, waiting)
        else:
            for done, (path, case) in enumerate(waiting.items(), 1):
                self._measure_one(function, case, path)
                self._say(f"{self.name}: {function.__name__} {done}/{len(waiting)} {_short(case)}")
        return [_read(path) for path in paths]

    def tensors(self, function: Build, **case: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what ``function(lab, **case)`` built, a trained model say, building it only once per ``out``.

        Args:
            function: a module-level function returning (tensors by name, JSON notes such as the accuracy reached).
            case: its arguments, JSON values only.

        """
        path = self._path("artefacts", function, case, ".safetensors")
        if not path.exists():
            self._say(f"{self.name}: building {function.__name__} {_short(case)}")
            start = time.perf_counter()
            tensors, notes = function(self, **case)
            notes = {**notes, "seconds": time.perf_counter() - start, "hardware": hardware(), "date": _today()}
            plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            write_atomically(path, safetensors_torch.save(plain, {"notes": json.dumps(notes)}))
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return safetensors_torch.load(raw), json.loads(header["__metadata__"]["notes"])

    def file(self, name: str) -> Path:
        """Return the path of the data file ``name`` of ``docs/data.md``.

        Raises:
            InvalidInput: it is neither in ``data`` nor to be had from a public loader; says what to do.

        """
        return public.file(name, self.data, self.out / "downloads")

    def images(self, name: str, split: str = "test") -> tuple[Tensor, Tensor]:
        """Return images (N, C, H, W) in [0, 1], float64, and labels (N,) of ``name`` ("cifar100", "mnist", …).

        Raises:
            InvalidInput: the data set is neither in ``data`` nor to be had from a public loader; says what to do.

        """
        return public.images(name, split, self.data, self.out / "downloads")

    @staticmethod
    def sample(total: int, n: int, seed: int = 0) -> list[int]:
        """Return ``n`` distinct random numbers below ``total``, by seed: nothing is looked at and none rejected.

        Raises:
            InvalidInput: there are fewer than ``n``.

        """
        if n > total:
            raise InvalidInput(f"There are only {total} examples, not {n}; choose a smaller n.")
        return [int(i) for i in np.random.default_rng(seed).permutation(total)[:n]]

    def _say(self, phrase: str) -> None:
        if self.callback is not None:
            self.callback(phrase)

    def _path(self, folder: str, function: Callable[..., Any], case: Mapping[str, Any], suffix: str) -> Path:
        module = sys.modules[function.__module__]
        content = {
            "module": function.__module__.rpartition(".")[2],
            "function": function.__name__,
            "version": getattr(module, "VERSION", 1),
            "case": dict(case),
        }
        try:
            text = json.dumps(content, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                f"The case {_short(case)} of {function.__name__} is not plain JSON ({error}); use numbers, text, lists."
            ) from error
        return self.out / folder / (hashlib.sha256(text.encode()).hexdigest()[:24] + suffix)

    def _measure_one(self, function: Measure, case: Mapping[str, Any], path: Path) -> None:
        start = time.perf_counter()
        values = function(self, **case)
        record = {
            "case": dict(case),
            "function": function.__name__,
            "seconds": time.perf_counter() - start,
            "hardware": hardware(),
            "date": _today(),
            "source": _fingerprint(sys.modules[function.__module__]),
        }
        arrays = {
            k: np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for k, v in values.items() if _is_array(v)
        }
        if arrays:
            stream = io.BytesIO()
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
            write_atomically(path.with_suffix(".npz"), stream.getvalue())
        record["values"] = {k: v for k, v in values.items() if k not in arrays}
        record["arrays"] = sorted(arrays)
        write_atomically(path, json.dumps(record, indent=1, default=_plain).encode())

    def _measure_side_by_side(self, function: Measure, waiting: Mapping[Path, Mapping[str, Any]]) -> None:
        module = sys.modules[function.__module__]
        package = sys.modules[module.__name__.rpartition(".")[0]]
        where = (package.__name__, str(next(iter(package.__path__))), module.__name__, function.__name__)
        worker = Lab(self.name, self.out, self.data)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.jobs, mp_context=context) as pool:
            futures = {pool.submit(_work, where, worker, dict(case), path): case for path, case in waiting.items()}
            try:
                for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    future.result()
                    self._say(f"{self.name}: {function.__name__} {done}/{len(waiting)} {_short(futures[future])}")
            except BaseException:
                # Leaving the pool would otherwise wait until every case is measured.
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def count_measured(out: Path) -> int:
    """Return how many measured cases are stored under ``out``."""
    return sum(re.fullmatch("[0-9a-f]{24}", path.stem) is not None for path in out.glob("*/*.json"))


def _work(where: tuple[str, str, str, str], lab: Lab, case: Mapping[str, Any], path: Path) -> None:
    package, folder, module, function = where
    torch.set_num_threads(1)  # noqa: TID251  (this worker process is ours, and its siblings want the other cores)
    load_package(package, Path(folder))
    lab._measure_one(getattr(importlib.import_module(module), function), case, path)


def load_package(name: str, folder: Path) -> None:
    """Make the Python files of ``folder`` importable as submodules of ``name``, whatever the folder is called."""
    for stale in [k for k in sys.modules if k == name or k.startswith(f"{name}.")]:
        del sys.modules[stale]
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _read(path: Path) -> Measured:
    record = json.loads(path.read_text(encoding="utf-8"))
    values = record["values"]
    if record["arrays"]:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            values |= {name: stored[name] for name in record["arrays"]}
    return Measured(record["case"], values, record["seconds"], record["hardware"], record["date"], record["source"])


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain JSON; return numbers, text, lists, tensors or arrays")


def _short(case: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in case.items())[:100]


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _fingerprint(module: types.ModuleType) -> str:
    """Return a hash of the module's code that comments and layout do not change."""
    return hashlib.sha256(ast.dump(ast.parse(inspect.getsource(module))).encode()).hexdigest()[:16]


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` either has all of it or is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def hardware() -> str:
    """Return the machine in words: processor, cores, accelerator, torch."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s.partition(":")[2].strip() for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        processor = names[0] if names else processor
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores{device}, torch {torch.__version__}"
