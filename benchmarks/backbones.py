"""Modern backbones at equal processor time: ours beside three presets of breaching 0.1.2, gray and the public mean.

Victims are the networks of ``_backbones.py`` with CIFAR-10 test images (random, of a fixed seed; none is rejected or
tuned on), at initialization or after a short training on the CIFAR-10 training sample, in evaluation mode or in
training mode (the batch's own statistics). Every attacker first has its cost measured, in processor seconds of one
thread, and then gets as many steps as fit into ``--seconds``: each goes through its whole schedule. breaching is told
the labels; ours recovers them. Gray is 0.5 everywhere, the public mean is that of the training images, pixel by pixel.

breaching runs in an environment of its own, as in ``breaching.py``, whose bends apply; its options are as it ships but
for the number of steps. PSNR and SSIM are means over the examples, taken after the best assignment for batches.

Run: ``python benchmarks/backbones.py [--seconds 30] [--images 3] [--rows all] [--python PATH] [--cache FOLDER]``. A run
that is stopped goes on where it was. Target: ours at least the best of breaching's in every row, and above gray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

PRESETS = ("invertinggradients", "modern", "seethroughgradients")
WHO = ("ours", *PRESETS, "gray", "public mean")
ROWS = [
    (name, mode, state, n)
    for n in (1, 8)
    for state in ("initial", "trained")
    for mode in ("eval", "train")
    for name in ("resnet20", "resnet18", "densenet", "mobilenet", "convnext")
    if not (name == "convnext" and mode == "train")  # It has no BatchNorm: both modes are the same.
]
PROBE = 6
"""Steps by which an attacker's cost is measured."""


def _cost(run: Any) -> float:
    """Return the processor seconds of one step; what two lengths have in common is left out."""
    took = []
    for length in (1, 1, 1 + PROBE):  # The first warms up.
        begun = time.process_time()
        run(length)
        took.append(time.process_time() - begun)
    return max((took[2] - took[1]) / PROBE, took[2] / (4 * PROBE))


def worker() -> None:
    """Serve lines {"victim", "preset", "seconds", "out"} with breaching's reconstruction (in its environment)."""
    here = Path(__file__).resolve().parent
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != here]  # breaching.py here has the package's name.
    import torch
    from torch import library

    torch.set_num_threads(1)
    operators = library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import breaching

    sys.path += [str(here.parent), str(here)]
    from _backbones import network

    class Metadata:
        shape, modality = (3, 32, 32), "vision"

    out, sys.stdout = sys.stdout, sys.stderr  # breaching prints.
    print(json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seen = torch.load(asked["victim"], weights_only=True)
        model = network(seen["name"], 0)
        model.load_state_dict(seen["state"])
        model.train(seen["mode"] == "train")
        loss, n = torch.nn.CrossEntropyLoss(), len(seen["labels"])
        buffers = None if seen["mode"] == "train" else list(model.buffers())
        payload = {"parameters": [p.detach() for p in model.parameters()], "buffers": buffers, "metadata": Metadata()}
        shared = {
            "gradients": seen["gradient"],
            "buffers": None,
            "metadata": {"num_data_points": n, "labels": seen["labels"], "local_hyperparams": None},
        }

        def run(length: int, asked: Any = asked, payload: Any = payload, shared: Any = shared, model: Any = model,
                loss: Any = loss) -> Any:  # fmt: skip
            torch.manual_seed(asked["seed"])
            settings = breaching.get_attack_config(asked["preset"], overrides=[f"optim.max_iterations={length}"])
            attack = breaching.attacks.prepare_attack(model, loss, settings)
            with contextlib.redirect_stdout(sys.stderr):
                return attack.reconstruct([dict(payload)], [dict(shared, metadata=dict(shared["metadata"]))], {})[0]

        try:
            steps = max(1, int(asked["seconds"] / _cost(run)))
            begun = time.process_time()
            found = run(steps)["data"].detach()
            answer = {"steps": steps, "seconds": time.process_time() - begun}
            torch.save(found, asked["out"])
        except Exception as error:  # noqa: BLE001 - what the peer raises is part of the result
            answer = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"}
        print(json.dumps(answer), file=out, flush=True)


class Peer:
    """breaching in a process of its own."""

    def __init__(self, python: Path) -> None:
        self.process = subprocess.Popen(
            [str(python), __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("breaching did not run in its environment; its error stands above.")
        return dict(json.loads(line))

    def ask(self, **question: Any) -> dict[str, Any]:
        """Return what one attack of breaching answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()


def trained(name: str, cache: Path, data: Path) -> dict[str, Any]:
    """Return the weights of a network after three epochs on the CIFAR-10 training sample, kept in ``cache``."""
    import torch
    from _backbones import network

    from gradleak.data import load_images

    path = cache / f"backbone.{name}.pt"
    if not path.exists():
        sample = load_images(str(data / "cifar10.npz"), split="train", dtype=torch.float32)
        assert sample.labels is not None
        model, generator = network(name, 1).train(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            for rows in torch.randperm(len(sample.inputs), generator=generator).split(50):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(sample.inputs[rows]), sample.labels[rows])
                loss.backward()
                optimizer.step()
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return dict(torch.load(path, weights_only=True))


def victim(row: tuple[str, str, str, int], number: int, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Return a client, what the server sees of its update, and its weights."""
    import torch
    from _backbones import network
    from _common import observe

    import gradleak as gl
    from gradleak.data import load_images
    from gradleak.training import batch_statistics

    name, mode, state, n = row
    images = load_images(str(options.data / "cifar10.npz"), split="test", dtype=torch.float32)
    assert images.labels is not None
    order = torch.randperm(len(images.inputs), generator=torch.Generator().manual_seed(0))
    chosen = order[number * n : (number + 1) * n]
    model = network(name, 1000 + number)
    if state == "trained":
        model.load_state_dict(trained(name, options.cache, options.data))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model = batch_statistics(model) if mode == "train" else model.eval()
    return *observe(gl.Client(model, gl.Batch(images.inputs[chosen], images.labels[chosen]))), weights


def attack(who: str, row: tuple[str, str, str, int], number: int, peer: Any, options: argparse.Namespace) -> Any:
    """Attack one batch in one way; return PSNR, SSIM, steps and seconds, or why it failed."""
    import torch

    import gradleak as gl
    from gradleak.data import load_images
    from gradleak.metrics import assign, psnr, ssim

    client, seen, weights = victim(row, number, options)
    truth, labels = client.batch.inputs, client.batch.labels

    def ours(length: int) -> Any:
        return gl.attacks.prior_matching(iterations=length, trace=False).reconstruct(seen, seed=number).inputs

    answer: dict[str, Any] = {}
    if who == "gray":
        found = torch.full_like(truth, 0.5)
    elif who == "public mean":
        public = load_images(str(options.data / "cifar10.npz"), split="train", dtype=torch.float32).inputs.mean(0)
        found = public.expand_as(truth).contiguous()
    elif who == "ours":
        steps = max(1, int(options.seconds / _cost(ours)))
        begun = time.process_time()
        found = ours(steps)
        answer = {"steps": steps, "seconds": time.process_time() - begun}
    else:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder) / "victim.pt", Path(folder) / "out.pt"
            gradient = [seen.update.tensors[k].clone() for k, _ in client.model.named_parameters()]
            kept = {"name": row[0], "mode": row[1], "state": weights, "labels": labels, "gradient": gradient}
            torch.save(kept, path)
            asked = {"victim": str(path), "out": str(out), "preset": who, "seconds": options.seconds, "seed": number}
            answer = peer().ask(**asked)
            if "failed" in answer:
                return answer
            found = torch.load(out, weights_only=True)
    shown = found.detach().float().clamp(0, 1)
    shown = shown[assign(shown, truth)]
    return {**answer, "dB": float(psnr(shown, truth).mean()), "SSIM": float(ssim(shown, truth).mean())}


def table(row: tuple[str, str, str, int], found: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return one line of the table."""

    def mean(who: str, what: str) -> float | None:
        values = [f[who][what] for f in found if what in f[who]]
        return sum(values) / len(values) if len(values) == len(found) else None

    name, mode, state, n = row
    whole: dict[str, Any] = {"model": name, "mode": mode, "state": state, "N": n, "batches": len(found)}
    whole["processor s"] = seconds
    for who in WHO:
        whole[f"{who} dB"], whole[f"{who} SSIM"] = mean(who, "dB"), mean(who, "SSIM")
        whole[f"{who} each"] = [round(f[who]["dB"], 1) for f in found if "dB" in f[who]]
    return whole


def stored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the last table that this run did not measure."""
    from _common import RESULTS

    path, keys = RESULTS / "backbones.json", ("model", "mode", "state", "N")
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [b for b in before if not any(all(b[k] == r[k] for k in keys) for r in rows)]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per row of the table; a row below gray or the public mean says so."""
    lines = []
    for row in rows:
        theirs = {p: row[f"{p} dB"] for p in PRESETS if row[f"{p} dB"] is not None}
        best = max(theirs.values(), default=float("-inf"))
        floor = max(row["gray dB"], row["public mean dB"])
        parts = [f"ours {row['ours dB']:.1f} dB, SSIM {row['ours SSIM']:.2f}"]
        parts += [
            f"`{p}` fails" if p not in theirs else f"`{p}` {theirs[p]:.1f}, {row[f'{p} SSIM']:.2f}" for p in PRESETS
        ]
        parts.append(f"gray {row['gray dB']:.1f}, public mean {row['public mean dB']:.1f}")
        if row["ours dB"] < floor:
            parts.append("**below a guess without the update**")
        mode = "either mode" if row["model"] == "convnext" else f"{row['mode']} mode"
        count = f"{row['batches']} × {row['processor s']:.0f} s"
        lines.append(
            {
                "what": f"{row['model']}, {mode}, {row['state']}, N = {row['N']} ({count} each)",
                "target": "≥ best of `breaching` 0.1.2 at equal time, > gray",
                "measured": "; ".join(parts),
                "met": False if row["ours dB"] < max(best, floor) else True if row["batches"] >= 10 else None,
            }
        )
    return lines


def main() -> None:
    """Measure all rows and store the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="processor seconds of each attack")
    parser.add_argument("--images", type=int, default=3, help="batches a row")
    parser.add_argument("--rows", default="all", help="comma-separated model.mode.state.N, or all")
    parser.add_argument("--python", type=Path, help="Python of an environment with breaching (made if none)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "gradleak-backbones")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    import breaching as setup  # The script beside this one.
    import torch
    from _common import write_result
    from _journal import Journal

    torch.set_num_threads(1)
    asked = None if options.rows == "all" else options.rows.split(",")
    with tempfile.TemporaryDirectory() as folder:
        journal, rows = Journal("backbones"), []
        peer = cache(lambda: Peer(options.python or setup.environment(Path(folder) / "breaching")))
        versions = journal.row("versions", lambda: peer().versions)
        for row in ROWS:
            if asked is not None and ".".join(map(str, row)) not in asked:
                continue
            name = ".".join(map(str, row))
            found = [
                {
                    who: journal.row(
                        f"{name}, batch {number}, {who}, {options.seconds:.0f} s",
                        lambda who=who, row=row, number=number: attack(who, row, number, peer, options),
                    )
                    for who in WHO
                }
                for number in range(options.images)
            ]
            rows.append(table(row, found, options.seconds))
        rows = [*stored(rows), *rows]
        write_result("backbones", rows, breaching={"version": "0.1.2", **versions}, summary=summary(rows))
        journal.finish()


if __name__ == "__main__":
    main()
