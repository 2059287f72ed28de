"""Data that an audit may use without asking anybody: named public sets, files, and synthetic data of the same kind."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.audit.plan import Case, Fault
from gradleak.data import load_images, public, read_rows, read_schema
from gradleak.data.archives import read_arrays
from gradleak.errors import GradleakError, InvalidFile
from gradleak.files import read_file
from gradleak.spaces import Category, ImageSpace, InputSpace, Number, TableSpace, TensorSpace
from gradleak.types import Batch

__all__ = ["SYNTHETIC", "Pool", "load_pool"]

SYNTHETIC = "synthetic"
_SEED = 1
"""Of synthetic data, and of which examples of a set without a split are attacked."""
_COARSE = 4
"""Pixels per side of what synthetic images are enlarged from."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples, decoded, in float64: ``train`` is public and trains models, batches of ``test`` are attacked.

    Attributes:
        classes: number of classes of the labels.
        sha256: of all inputs and labels.
    """

    space: InputSpace
    train: Batch
    test: Batch
    classes: int
    sha256: str


@lru_cache(maxsize=4)
def _pool(
    data: str,
    folder: Path,
    shape: tuple[int, ...],
    table: Path | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: int | None,
    examples: int,
) -> Pool:
    if data == SYNTHETIC:
        pool = _synthetic(shape, table, mean, std, classes or 10, examples)
    elif table is not None:
        rows = read_schema(table)
        inputs, labels = read_rows(folder / data, rows)
        if labels is None:
            label = rows.target.name if rows.target else "label"
            raise Fault(f"{data!r} has no labels; add a column {label!r}.", "data")
        pool = _halves(rows, inputs, labels)
    elif data == "adult":
        pool = _adult(public.file("adult.npz", folder, folder), public.file("adult.json", folder, folder))
    else:
        train, test = (Batch(*_images(data, split, folder, shape)) for split in ("train", "test"))
        space = ImageSpace(tuple(train.inputs.shape[1:]), mean, std)
        same = train.inputs.shape == test.inputs.shape and torch.equal(train.inputs, test.inputs)
        pool = _halves(space, train.inputs, train.labels) if same else Pool(space, train, test, 0, "")
    return _whole(pool, examples, classes)


def load_pool(case: Case) -> Pool:
    """Return the data of a case.

    Raises:
        Fault: they are not there, or cannot be used as the case describes them.
    """
    try:
        return _pool(
            case.data, case.folder, case.input_shape, case.table, case.mean, case.std, case.classes, case.examples
        )
    except Fault:
        raise
    except GradleakError as error:
        raise Fault(
            str(error), "table" if case.table is not None and str(case.table) in str(error) else "data"
        ) from None


def _images(data: str, split: str, folder: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    wanted = (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
    where = folder / data
    if ":" not in data and not where.exists():
        inputs, labels = public.images(data, split, folder, folder / "downloads")
        if wanted not in (None, tuple(inputs.shape[1:])):
            raise Fault(
                f"The images of {data!r} have shape {tuple(inputs.shape[1:])}, not {wanted}; correct input_shape or "
                "leave it out.",
                "input_shape",
            )
        return inputs, labels
    has_splits = ":" in data or (where.suffix == ".npz" and f"x_{split}" in _names(where))
    spec = data if ":" in data else where
    found = load_images(spec, split=split if has_splits else None, shape=wanted, dtype=torch.float64)
    if found.labels is None:
        raise Fault(f"{data!r} has no labels; store y beside x, or make each class a folder.", "data")
    return found.inputs, found.labels


def _names(path: Path) -> tuple[str, ...]:
    with np.load(path, allow_pickle=False) as archive:
        return tuple(archive.files)


def _adult(path: Path, told: Path) -> Pool:
    """Return UCI Adult with columns standardized by its training rows."""
    names = ("x_train_num", "x_train_cat", "y_train", "x_test_num", "x_test_cat", "y_test")
    arrays = read_arrays(path, names)
    try:
        words = json.loads(read_file(told))
        numbers = arrays["x_train_num"].astype(np.float64)
        columns: list[Number | Category] = [
            Number(name, "", float(v.min()), float(v.max()), float(v.mean()), float(v.std()), 0)
            for name, v in zip(words["numeric_columns"], numbers.T, strict=True)
        ]
        columns += [Category(n, tuple(words["categories"][n])) for n in words["categorical_columns"]]
        train, test = (
            Batch(
                torch.tensor(np.concatenate([arrays[f"x_{s}_num"].astype(np.float64), arrays[f"x_{s}_cat"]], 1)),
                torch.tensor(arrays[f"y_{s}"].astype(np.int64)),
            )
            for s in ("train", "test")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidFile(
            f"{str(path)!r} is not the Adult set of docs/data.md ({error}); make it as that says."
        ) from error
    return Pool(TableSpace(tuple(columns)), train, test, 0, "")


def _halves(space: InputSpace, inputs: Tensor, labels: Tensor) -> Pool:
    """Return a set without a split in two halves."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(_SEED))
    middle = (len(inputs) + 1) // 2
    one, other = order[:middle], order[middle:]
    return Pool(space, Batch(inputs[one], labels[one]), Batch(inputs[other], labels[other]), 0, "")


def _whole(pool: Pool, examples: int, classes: int | None) -> Pool:
    """Return at most so many examples on either side, drawn by seed, with the number of classes and the hash."""
    sides = []
    for side in (pool.train, pool.test):
        order = torch.randperm(len(side), generator=torch.Generator().manual_seed(_SEED))[:examples]
        sides.append(Batch(side.inputs[order].contiguous(), side.labels[order].long()))
    if len(sides[1]) == 0:
        raise Fault("The data are a single example; give two or more.", "data")
    highest = max(int(side.labels.max()) for side in (pool.train, pool.test)) + 1
    if classes is not None and highest > classes:
        raise Fault(f"The data have a label {highest - 1}, but classes = {classes}; correct classes.", "classes")
    digest = hashlib.sha256()
    for side in sides:
        digest.update(side.inputs.numpy().tobytes())
        digest.update(side.labels.numpy().tobytes())
    return replace(pool, train=sides[0], test=sides[1], classes=classes or highest, sha256=digest.hexdigest())


def _synthetic(
    shape: tuple[int, ...],
    table: Path | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: int,
    examples: int,
) -> Pool:
    """Return data that nobody has: each class has a center, each example lies around one."""
    g = torch.Generator().manual_seed(_SEED)
    count = 2 * examples
    labels = torch.randint(classes, (count,), generator=g)
    space: InputSpace
    if table is not None:
        space = read_schema(table)
        inputs = torch.stack([_column(c, labels, classes, g) for c in space.columns], 1)
    elif len(shape) == 3:
        space = ImageSpace(shape, mean, std)
        around = torch.randn(classes, shape[0], _COARSE, _COARSE, generator=g, dtype=torch.float64)[labels]
        own = torch.randn(count, shape[0], 2 * _COARSE, 2 * _COARSE, generator=g, dtype=torch.float64)
        inputs = (0.5 + 0.25 * _enlarged(around, shape) + 0.1 * _enlarged(own, shape)).clamp(0, 1)
    elif shape:
        space = TensorSpace(shape)
        around = torch.randn(classes, *shape, generator=g, dtype=torch.float64)[labels]
        inputs = around + torch.randn(count, *shape, generator=g, dtype=torch.float64)
    else:
        raise Fault("Synthetic data need a shape; give input_shape such as [3, 32, 32], or table.", "data")
    half = slice(None, examples), slice(examples, None)
    sides = [Batch(inputs[part], labels[part]) for part in half]
    return Pool(space, sides[0], sides[1], classes, "")


def _enlarged(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    return F.interpolate(images, (shape[1], shape[2]), mode="bilinear", align_corners=False)


def _column(column: Number | Category, labels: Tensor, classes: int, g: torch.Generator) -> Tensor:
    if isinstance(column, Category):
        leaning = torch.randn(classes, len(column.values), generator=g, dtype=torch.float64).exp()
        return torch.multinomial(leaning[labels], 1, generator=g)[:, 0].double()
    bounded = math.isfinite(column.high - column.low)
    center, spread = (
        ((column.low + column.high) / 2, (column.high - column.low) / 6) if bounded else (column.mean, column.std)
    )
    around = torch.randn(classes, generator=g, dtype=torch.float64)[labels]
    values = center + spread * (around + torch.randn(len(labels), generator=g, dtype=torch.float64))
    values = values.clamp(column.low, column.high) if bounded else values
    return values if column.decimals is None else (values * 10**column.decimals).round() / 10**column.decimals
