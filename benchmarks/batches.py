"""Batches on the paper's LeNet, labels unknown, default dlg() options: per example, order free.

Target: at widths 24 (N = 2, 4) and 32 (N = 8) at least 90 % of examples reach PSNR 30 dB. The paper's width 12 is
measured beside its rank bound: where the bound is below the number of unknowns, no attacker without a prior is exact.
"""

from __future__ import annotations

import time

from _common import arguments, cifar100, spread, victim, write_result

import gradleak as gl
from gradleak.analytic.ranks import rank_bound
from gradleak.audit.scores import wilson
from gradleak.metrics import assign, psnr
from gradleak.training import parameters

CASES = ((24, 2), (24, 4), (32, 8), (12, 1), (12, 2), (12, 4), (12, 8))


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=3, iterations=0)
    images, labels = cifar100(options.data)
    attack = gl.attacks.dlg(trace=False, **({"iterations": options.iterations} if options.iterations else {}))
    rows = []
    for width, n in CASES:
        values: list[float] = []
        right, evaluations, began = 0, [], time.perf_counter()
        for batch in range(options.batches):
            chosen = slice(batch * n, (batch + 1) * n)
            client, seen = victim(images[chosen], labels[chosen], width=width, seed=batch)
            found = attack.reconstruct(seen)
            order = assign(found.inputs, images[chosen])
            values += psnr(found.inputs[order], images[chosen]).tolist()
            assert found.labels is not None
            right += int((found.labels[order] == labels[chosen]).sum())
            evaluations.append(found.evaluations)
        bound = rank_bound(client.model, parameters(client.model), (3, 32, 32), n)
        hits = sum(v >= 30 for v in values)
        low, high = wilson(hits, len(values))
        rows.append(
            {
                "width": width,
                "N": n,
                "examples": len(values),
                ">= 30 dB": hits,
                "95 % interval": f"{low:.2f}-{high:.2f}",
                "worst dB": min(values),
                "median dB": spread(values)["median"],
                "labels right": right,
                "evaluations": spread(evaluations)["median"],
                "s per batch": (time.perf_counter() - began) / options.batches,
                "unknowns": bound.unknowns,
                "rank bound": bound.rank,
            }
        )
    write_result("batches", rows, target=">= 90 % of examples at 30 dB for (24, 2), (24, 4), (32, 8)")


if __name__ == "__main__":
    main()
