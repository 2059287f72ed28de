"""What every benchmark shares: data, machine, versions, and one JSON file per table under results/."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradleak as gl
from gradleak.data import load_images

HERE = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("GRADLEAK_BENCHMARK_RESULTS", HERE / "results"))


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """Parse --data, --threads and one integer option per default."""
    parser = argparse.ArgumentParser(description=description)
    default = os.environ.get("GRADLEAK_DATA", str(HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="folder of the real-data samples")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def cifar100(folder: Path) -> tuple[Tensor, Tensor]:
    """Return all CIFAR-100 test images, float64 in [0, 1], and labels, in random order of a fixed seed."""
    found = load_images(str(folder / "cifar100.npz"), split="test", dtype=torch.float64)
    assert found.labels is not None
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(found.inputs)))
    return found.inputs[order], found.labels[order]


def victim(
    images: Tensor, labels: Tensor, *, width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[gl.Client, gl.Observation]:
    """Return a client with the paper's LeNet and what an honest-but-curious server sees of its gradient."""
    model = gl.models.lenet(width=width, seed=seed).to(dtype)
    return observe(gl.Client(model, gl.Batch(images.to(dtype), labels)))


def observe(client: gl.Client) -> tuple[gl.Client, gl.Observation]:
    """Return the client and what the default threat model shows."""
    space = gl.ImageSpace(tuple(client.batch.inputs.shape[1:]))
    seen = gl.ThreatModel().observe(
        client.model, client.send(), space=space, training=client.training, batch_size=len(client.batch)
    )
    return client, seen


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that were measured."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{name}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradleak": gl.__version__,
        "commit": commit,
    }


def write_result(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print the rows as a table and store them with machine, versions and date in results/NAME.json."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [columns, *[[_show(row.get(c, "")) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"name": name, "machine": machine(), **more, "rows": [dict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def _show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
