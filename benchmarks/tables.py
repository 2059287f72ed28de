"""Rows of a table: ``auto()`` on UCI Adult, a perceptron on one-hot groups and a model with entity embeddings.

Random training rows, none rejected, labels unknown, one float32 gradient (FedSGD), a fresh random model per batch: the
perceptron 108-100-100-2, and one of the same layers that looks its eight categories up in embeddings of four numbers. A
row is exact if every cell is: categories the same, numbers as people write them. ``linear_inversion()`` is beside it,
which reads rows that one unit shows alone. The budget is per batch; processor time is that of ``auto()``.

Run: ``python benchmarks/tables.py [--data DIR] [--threads N] [--batches 10] [--budget 30] [--largest 20]``.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import arguments, write_result
from torch import Tensor, nn

import gradleak as gl
from gradleak.errors import NotApplicable
from gradleak.spaces import Category, Number, TableSpace

SIZES = (1, 2, 4, 8, 16, 20)


class Entities(nn.Module):
    """Six numbers beside eight categories, each looked up in an embedding of four numbers."""

    def __init__(self, sizes: list[int], width: int = 100) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 4) for n in sizes)
        layers: list[nn.Module] = [nn.Linear(6 + 4 * len(sizes), width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits (N, 2) of rows (N, 14), codes last."""
        codes = rows[:, 6:].long()
        looked_up = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        logits: Tensor = self.body(torch.cat([rows[:, :6], *looked_up], 1))
        return logits


def adult(folder: Path, *, one_hot: bool) -> tuple[TableSpace, Tensor, Tensor]:
    """Return the table, its training rows (M, 14) decoded, and their labels."""
    arrays = np.load(folder / "adult.npz", allow_pickle=False)
    told = json.loads((folder / "adult.json").read_text(encoding="utf-8"))
    numbers = arrays["x_train_num"].astype(np.float64)
    columns: list[Number | Category] = [
        Number(name, "", float(v.min()), float(v.max()), float(v.mean()), float(v.std()), 0)
        for name, v in zip(told["numeric_columns"], numbers.T, strict=True)
    ]
    columns += [Category(n, tuple(told["categories"][n]), one_hot) for n in told["categorical_columns"]]
    rows = torch.tensor(np.concatenate([numbers, arrays["x_train_cat"]], 1))
    return TableSpace(tuple(columns)), rows, torch.tensor(arrays["y_train"]).long()


def model(space: TableSpace, seed: int) -> nn.Module:
    """Return the model that takes rows of this table."""
    sizes = [len(c.values) for c in space.columns if isinstance(c, Category) and not c.one_hot]
    if not sizes:
        return gl.models.perceptron(width=100, classes=2, in_channels=1, image_size=(1, space.shape[0]), seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Entities(sizes)


def right(space: TableSpace, found: gl.Reconstruction, truth: Tensor) -> int:
    """Return how many private rows were found, every cell of them."""
    guess = found.inputs.double()[space.assign(found.inputs.double(), truth)]
    return int(space.cells(guess, truth).all(1).sum())


def measure(space: TableSpace, rows: Tensor, labels: Tensor, size: int, seed: int, budget: int) -> dict[str, Any]:
    """Return the exact rows of one batch, and what it took."""
    pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 * size + seed))[:size]
    truth = rows[pick]
    client = gl.Client(model(space, seed), gl.Batch(space.encode(truth).float(), labels[pick]))
    coded = isinstance(space.columns[-1], Category) and not space.columns[-1].one_hot
    divided = gl.attacks.entity_embeddings() if coded else gl.attacks.linear_inversion()
    try:
        read = right(space, gl.simulate(client, divided, space=space).reconstruction, truth)
    except NotApplicable:
        read = 0
    began = time.process_time()
    found = gl.simulate(client, gl.attacks.auto(budget=budget), space=space).reconstruction
    seconds = time.process_time() - began
    proof = found.certificate
    proved = 0 if proof is None else sum(v == "proved" for v in proof.examples)
    exact = right(space, found, truth)
    return {"exact": exact, "read": read, "proved": proved, "seconds": seconds, "by": found.attack}


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=10, budget=30, largest=SIZES[-1])
    table, summary = [], []
    for one_hot in (True, False):
        space, rows, labels = adult(options.data, one_hot=one_hot)
        name = "perceptron, one-hot groups" if one_hot else "entity embeddings"
        said, met = [], []
        for size in (s for s in SIZES if s <= options.largest):
            found = [measure(space, rows, labels, size, seed, options.budget) for seed in range(options.batches)]
            count = size * len(found)
            exact, read = (sum(f[k] for f in found) for k in ("exact", "read"))
            table.append(
                {
                    "model": name,
                    "rows a batch": size,
                    "batches": len(found),
                    "rows exact": exact,
                    "of": count,
                    "rows proved": sum(f["proved"] for f in found),
                    "rows by division alone": read,
                    "batches below division": sum(f["exact"] < f["read"] for f in found),
                    "by": ", ".join(sorted({f["by"] for f in found})),
                    "processor s": statistics.median(f["seconds"] for f in found),
                }
            )
            print(table[-1], flush=True)
            said.append(f"{size}: {exact / count:.0%}, {table[-1]['processor s']:.2g} s")
            if size <= 16:
                met.append(exact / count >= (0.95 if size <= 8 else 0.8))
            met.append(table[-1]["batches below division"] == 0)
        summary.append(
            {
                "what": f"rows of Adult, {name}, labels unknown: rows exact, by batch size, median processor time",
                "target": "≥ 95 % up to 8, ≥ 80 % at 16, never fewer than division reads",
                "measured": "; ".join(said),
                "met": all(met) if options.batches >= 5 and options.largest >= 16 else None,
            }
        )
    write_result("tables", table, summary=summary)


if __name__ == "__main__":
    main()
