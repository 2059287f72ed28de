"""An audit of what was captured: every update is attacked, and the evidence says what the updates prove."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gradleak import bounds
from gradleak.attacks.base import nothing_found
from gradleak.attacks.certifying import better
from gradleak.audit.evidence import SCHEMA, leak_rows, verdict
from gradleak.audit.factories import build_attack
from gradleak.audit.federation import tensors_hash
from gradleak.audit.plan import Case, Plan
from gradleak.audit.running import Audit, Told, versions, worst_first, write_evidence
from gradleak.audit.store import place, read_case, write_case
from gradleak.audit.trials import Result, Trial, findings, kept, scored, unscored
from gradleak.audit.workers import spread
from gradleak.auditing import write_page
from gradleak.capture import MANIFEST, Entry, read_capture
from gradleak.cli.attack import prepare
from gradleak.cli.captures import completed
from gradleak.cli.running import Job
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import MissingKnowledge, NotApplicable
from gradleak.files import check_writable, sweep
from gradleak.types import Reconstruction, Shows

__all__ = ["audit_capture"]

VERSION = 1
_BUDGET = 60.0
"""Seconds of one attack."""
_PRIOR = 0.01
"""Success without the update that the upper bound assumes: a capture holds no data to measure it with."""
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Item:
    """One update, by the capture's folder and its own."""

    folder: Path
    entry: Entry

    def content(self) -> dict[str, Any]:
        """Return what the result depends on: the hash of every file that the manifest names."""
        manifest = (self.entry.folder / MANIFEST).read_bytes()
        named = (
            self.entry.manifest.weights,
            self.entry.manifest.update,
            self.entry.manifest.table,
            self.entry.manifest.truth,
        )
        files = [hashlib.sha256(self.entry.path(name).read_bytes()).hexdigest() for name in named if name]
        return {"manifest": hashlib.sha256(manifest).hexdigest(), "files": files, "budget": _BUDGET, "attack": "auto"}

    def job(self) -> Job:
        """Return the attack on it, ready to run, as ``gradleak attack`` makes it ready."""
        from gradleak.cli.commands import command_of  # Not at the top: that module imports this one's caller.

        words = [str(self.folder), "--out", "unused"]
        manifest = self.entry.manifest
        words += [] if manifest.round is None else ["--round", str(manifest.round)]
        words += [] if manifest.client is None else ["--client", manifest.client]
        with command_of("attack").make_context("attack", words) as context:
            asked = completed({**context.params, "context": context})
            return prepare({**asked, "command": "", "budget": None})


def audit_capture(
    folder: Path,
    out: Path,
    *,
    fail_above: float | None,
    executor: str,
    jobs: int,
    address: str | None,
    retry_failed: bool,
    command: str,
    told: Told,
) -> Audit:
    """Attack every update of a capture and write the evidence; see :func:`gradleak.run_audit`.

    Raises:
        InvalidInput: the capture cannot be read, or an update of it cannot be attacked at all; nothing was tried.
    """
    check_writable(out)
    items = [_Item(folder.absolute(), entry) for entry in read_capture(folder).entries]
    ready = [item.job() for item in items]
    trials = [_trial(item, job) for item, job in zip(items, ready, strict=True)]
    paths = [place(out / "trials", "audit", "capture", item.content(), version=VERSION) for item in items]
    sweep(out / "trials")
    stored = [read_case(path, item.content()) for path, item in zip(paths, items, strict=True)]
    waiting = [i for i, s in zip(items, stored, strict=True) if s is None or (retry_failed and "error" in s.values)]
    at = {item.entry.folder: path for item, path in zip(items, paths, strict=True)}

    def keep(done: int, item: _Item, result: Result) -> None:
        write_case(at[item.entry.folder], "capture", item.content(), result.values, result.seconds)
        told(done, len(waiting), item.entry.name)

    spread(executor, _measure, waiting, keep, jobs=jobs, address=address)
    found = [(t, read_case(p, i.content())) for t, p, i in zip(trials, paths, items, strict=True)]
    measured = worst_first([(t, {**r.values, "seconds": r.seconds, "date": r.date}) for t, r in found if r is not None])
    evidence = _evidence(folder, measured, ready, items, fail_above, command)
    audit = Audit(evidence, tuple(measured))
    write_evidence(out, evidence)
    write_page(audit, out)
    return audit


def _trial(item: _Item, job: Job) -> Trial:
    manifest, seen = item.entry.manifest, job.observations[0]
    case = Case(item.entry.name, job.model, "captured", filters=manifest.defense)
    return Trial("attack", case, manifest.round or 0, seen.batch_size or 1, 0, "auto")


def _measure(item: _Item) -> Result:
    return kept(functools.partial(_attacked, item))


def _attacked(item: _Item) -> Mapping[str, Any]:
    job, best, seen, refusal = item.job(), None, None, None
    attack = build_attack("auto", {}, _BUDGET).attack
    for observation in job.observations:
        deadline = Deadline(_BUDGET / len(job.observations))
        try:
            found = attack.reconstruct(observation, seed=0, deadline=deadline)
        except TimeSpent:
            found = nothing_found(observation)
        except (NotApplicable, MissingKnowledge) as error:
            refusal = error
            continue
        if best is None or _better(found, best):
            best, seen = found, observation
    if best is None or seen is None:
        assert refusal is not None
        return {"refused": str(refusal), "findings": findings(refusal.findings)}
    if job.truth is not None and best.shows is Shows.INPUTS:
        return scored(seen.space, best, job.truth, job.public, _TOLERANCE)
    return unscored(seen.space, best)


def _better(found: Reconstruction, best: Reconstruction) -> bool:
    assert found.certificate is not None
    return better(found.certificate, best.certificate)


def _evidence(
    folder: Path,
    measured: Sequence[tuple[Trial, Mapping[str, Any]]],
    jobs: Sequence[Job],
    items: Sequence[_Item],
    target: float | None,
    command: str,
) -> dict[str, Any]:
    text = json.dumps([i.content() for i in items], indent=1)
    plan = Plan(folder, text, (), seeds=1, budget=_BUDGET, fail_above=target, tolerance=_TOLERANCE)
    rows, upper = leak_rows(measured), [_bound(i, j) for i, j in zip(items, jobs, strict=True)]
    told = verdict(plan, target, rows, upper, (), datetime.now(UTC).isoformat(timespec="seconds"))
    told["not_tried"] = [*told["not_tried"], "Other rounds and clients than those captured."]
    told["reason"] += sorted(
        {str(n) for item in items for n in item.entry.notes} | {str(n) for j in jobs for n in j.warnings}
    )
    trials = [
        {
            "id": f"{number:08d}",
            "kind": "attack",
            "case": t.case.name,
            "filters": list(t.case.filters),
            "stage": t.stage,
            "batch_size": t.batch_size,
            "seed": t.seed,
            "attack": t.attack,
            **{k: v for k, v in values.items() if k not in ("guess", "truth")},
        }
        for number, (t, values) in enumerate(measured)
    ]
    cases = [
        {
            "name": i.entry.name,
            "model": j.model,
            "model_sha256": tensors_hash(j.observations[0].model),
            "parameters": sum(p.numel() for p in j.observations[0].params.values()),
            "data": "captured",
            "data_sha256": "",
            "inputs": f"{j.observations[0].space.nouns} of shape {tuple(j.observations[0].space.shape)}",
            "filters": list(i.entry.manifest.defense),
        }
        for i, j in zip(items, jobs, strict=True)
    ]
    described = {
        "title": "",
        "file": folder.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "text": text,
        "command": command,
        "attacks": ["auto"],
        "seeds": 1,
        "budget": _BUDGET,
        "cases": cases,
    }
    return {
        "schema": SCHEMA,
        "verdict": told,
        "lower_bound": rows,
        "upper_bound": upper,
        "utility": [],
        "trials": trials,
        "plan": described,
        "versions": versions(),
    }


def _bound(item: _Item, job: Job) -> dict[str, Any]:
    seen = job.observations[0]
    assert seen.training is not None  # granted to every attack on a capture
    count = sum(p.numel() for p in seen.params.values())
    found = bounds.upper_bound(seen.training, examples=seen.batch_size or 1, prior=_PRIOR, coordinates=count)
    unknown = item.entry.manifest.unknown_filters
    text = (
        "No bound is stated, because the update passed filters that gradleak does not know." if unknown else found.text
    )
    return {
        "case": item.entry.name,
        "filters": list(item.entry.manifest.defense),
        "share": None if unknown else found.value,
        "text": text,
        "mechanism": found.mechanism,
        "noise_multiplier": found.noise_multiplier,
        "epsilon": found.epsilon,
        "delta": found.delta,
        "rounds": 1,
        "sampling_rate": 1.0,
        "prior": _PRIOR,
        "prior_source": "assumed, because a capture holds no data to measure it with",
    }
