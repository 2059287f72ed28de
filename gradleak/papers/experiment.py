"""What an experiment is written with: its laboratory, which remembers, its estimates, rows and figures.

An experiment is a Python file with ``NAME``, ``SMOKE``, ``DEFAULT``, ``FULL`` and ``run(config, lab) -> Result``
(``experiments/README.md`` shows one). Its work is split into cases; the laboratory stores every measured case under
a hash of its content, so that a killed run resumes where it was and nothing is measured twice.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradleak.audit import store
from gradleak.audit.scores import wilson
from gradleak.audit.store import Measured
from gradleak.audit.workers import side_by_side
from gradleak.data import public
from gradleak.data.archives import read_arrays
from gradleak.errors import InvalidFile, InvalidInput
from gradleak.files import read_file, sweep
from gradleak.papers.packages import Address, address, at

__all__ = [
    "Estimate", "Figure", "Lab", "Measured", "Result", "Row", "bootstrap", "mean", "median", "share",
]  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def share(successes: Sequence[bool]) -> Estimate:
    """Return the share of true values with Wilson's 95 % interval.

    Raises:
        InvalidInput: there are no values.
    """
    n, hits = _count(successes), sum(map(bool, successes))
    return Estimate(hits / n, *wilson(hits, n), n)


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


@dataclass(frozen=True)
class Row:
    """One line of the paper's table.

    Attributes:
        name: stable key; the table of the same name in ``expected.toml`` holds the paper's value and the target.
        ours: our attacker's number, or words, or None where it does not apply.
        published: the published algorithm's number in our re-run, likewise.
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
        texts: title → text to print as it is (traces of reconstructed sentences).
        scaled: one sentence that names the difference to the full scale, "" where there is none.
    """

    rows: Sequence[Row]
    figures: Sequence[Figure] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    scaled: str = ""


_NOTES = "notes of what was built"
Measure = Callable[..., Mapping[str, Any]]
Build = Callable[..., tuple[Mapping[str, Tensor], Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class Lab:
    """Where an experiment finds its data, measures its cases, and remembers both.

    Attributes:
        out: folder of all records.
        data: folder of data sets, laid out as ``docs/data.md`` says; None to use public loaders.
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

        Raises:
            InvalidInput: a case is not plain JSON.
            InvalidFile: a record cannot be stored.
        """
        name, folder = function.__name__, self.out / self.name
        sweep(folder)
        paths = [_place(folder, function, case) for case in cases]
        found = {path: store.read_case(path, case) for path, case in zip(paths, cases, strict=True)}
        waiting = [(path, dict(case)) for path, case in zip(paths, cases, strict=True) if found[path] is None]
        waiting = list({path: (path, case) for path, case in waiting}.values())
        damaged = sum(path.exists() for path, _ in waiting)
        again = f" ({damaged} stored ones are damaged)" if damaged else ""
        self._say(f"{self.name}: {name}, {len(waiting)} of {len(cases)} cases to measure{again}")

        def tell(done: int, item: tuple[Path, dict[str, Any]], _: object = None) -> None:
            self._say(f"{self.name}: {name} {done}/{len(waiting)} {store.short(item[1])}")

        if self.jobs > 1 and len(waiting) > 1:
            work = functools.partial(_measure_there, replace(self, jobs=1, callback=None), address(function))
            side_by_side(self.jobs, work, waiting, tell)
        else:
            for done, item in enumerate(waiting, 1):
                _measure(self, function, item)
                tell(done, item)
        found |= {path: store.read_case(path, case) for path, case in waiting}
        return [_present(found[path], path) for path in paths]

    def tensors(self, function: Build, **case: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what ``function(lab, **case)`` built, a trained model say, building it only once per ``out``.

        Args:
            function: a module-level function returning (tensors by name, JSON notes such as the accuracy reached).
            case: its arguments, JSON values only.

        Raises:
            InvalidInput: the case is not plain JSON.
            InvalidFile: what was built cannot be stored.
        """
        name, path = function.__name__, _place(self.out / store.BUILT, function, case)
        found = store.read_case(path, case)
        if found is None or _NOTES not in found.values:
            again = " again, because what was stored is damaged" if path.exists() else ""
            self._say(f"{self.name}: building {name} {store.short(case)}{again}")
            start = time.perf_counter()
            tensors, notes = function(self, **case)
            seconds = time.perf_counter() - start
            store.write_case(path, name, case, {**tensors, _NOTES: {**notes, "seconds": seconds}}, seconds)
            found = store.read_case(path, case)
        values = dict(_present(found, path).values)
        notes = values.pop(_NOTES)
        return {k: torch.from_numpy(v) for k, v in values.items()}, notes

    def arrays(self, name: str, wanted: Collection[str]) -> dict[str, npt.NDArray[Any]]:
        """Return arrays of the data file ``name``, an ``.npz`` file, by name.

        Raises:
            InvalidInput: the file is neither in ``data`` nor to be had from a public loader; says what to do.
            InvalidFile: it is damaged, or lacks one of them.
        """
        path = self.file(name)
        found = read_arrays(path, wanted)
        for key in wanted:
            if key not in found:
                raise InvalidFile(f"{str(path)!r} has no array {key!r}; make the file as docs/data.md says.")
        return found

    def file(self, name: str) -> Path:
        """Return the path of the data file ``name`` of ``docs/data.md``.

        Raises:
            InvalidInput: it is neither in ``data`` nor to be had from a public loader; says what to do.
        """
        return public.file(name, self.data, self.out / "downloads")

    def text(self, name: str) -> str:
        """Return the text of the data file ``name`` as :meth:`file` finds it; InvalidFile if it is no UTF-8."""
        path = self.file(name)
        try:
            return read_file(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidFile(f"{str(path)!r} is damaged ({error}); make the file as docs/data.md says.") from error

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


def _place(folder: Path, function: Callable[..., Any], case: Mapping[str, Any]) -> Path:
    module = sys.modules[function.__module__]
    version = getattr(module, "VERSION", 1)
    return store.place(folder, module.__name__.rpartition(".")[2], function.__name__, case, version=version)


def _measure_there(lab: Lab, where: Address, item: tuple[Path, dict[str, Any]]) -> None:
    _measure(lab, at(where), item)


def _measure(lab: Lab, function: Measure, item: tuple[Path, dict[str, Any]]) -> None:
    path, case = item
    start = time.perf_counter()
    values = function(lab, **case)
    seconds = time.perf_counter() - start
    store.write_case(path, function.__name__, case, values, seconds)


def _present(found: Measured | None, path: Path) -> Measured:
    if found is None:
        raise InvalidFile(f"{str(path)!r} was damaged as soon as it was written; check the disk and run again.")
    return found
