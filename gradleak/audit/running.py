"""An audit from its plan to the evidence: checked whole, tried trial by trial, and written down."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import gradleak
from gradleak.audit.evidence import SCHEMA, bound_rows, leak_rows, remedy_row, utility_rows, verdict
from gradleak.audit.federation import build
from gradleak.audit.plan import Case, Fault, Plan, read_plan
from gradleak.audit.store import Measured, hardware, read_case, write_case
from gradleak.audit.trials import Result, Trial, attempt, choose_attack
from gradleak.audit.workers import spread
from gradleak.errors import GradleakError, InvalidFile, InvalidInput
from gradleak.files import check_writable, sweep, write_bytes

__all__ = ["EVIDENCE", "Audit", "Told", "exit_code", "run", "versions", "worst_first", "write_evidence"]

EVIDENCE, TRIALS = "evidence.json", "trials"
_PACKAGES = ("torch", "numpy", "scipy", "opacus", "ray", "transformers")

Told = Callable[[int, int, str], None]
"""Receives how many trials are done, of how many, and what is being done."""


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    Attributes:
        evidence: what ``evidence.json`` holds.
        measured: every trial with what it found, in the order of the plan; arrays included.
    """

    evidence: dict[str, Any]
    measured: tuple[tuple[Trial, Mapping[str, Any]], ...]


def run(
    plan: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    fail_above: float | None = None,
    executor: str = "here",
    jobs: int = 2,
    address: str | None = None,
    retry_failed: bool = False,
    command: str = "",
    told: Told | None = None,
) -> Audit:
    """Try what a plan says, and write ``evidence.json``; trials that were measured before are not measured again.

    Args:
        plan: a TOML file; ``docs/audit.md`` says what it holds.
        out: folder of the evidence, and of the trials beside it.
        data: folder of named sets, in place of the plan's own.
        fail_above: the target, in place of the plan's own.
        executor: "here", "processes" or "ray"; see :func:`gradleak.audit.workers.spread`.
        jobs: number of processes.
        address: of a Ray cluster.
        retry_failed: measure trials again that failed.
        command: repeats the audit from a shell.
        told: is told about the progress.

    Raises:
        InvalidInput: the plan cannot run; says why, and in which line. Nothing was tried.
        InvalidFile: something cannot be read or written.
    """
    out = Path(out).absolute()
    check_writable(out)
    asked = read_plan(plan, data=data)
    target = asked.fail_above if fail_above is None else fail_above
    if target is not None and not 0 <= target < 1:
        raise InvalidInput(f"A target is a share in [0, 1), not {target}; give 0.05 for 5 %.")
    check_plan(asked)
    lab = _Lab(out / TRIALS, executor, jobs, address, retry_failed, told)
    measured = lab.measure(_trials(asked))
    rows = leak_rows(measured)
    upper = bound_rows(asked, asked.cases)
    plain = {c.name: replace(c, filters=()) for c in asked.cases}
    remedies, more = _remedies(lab, asked, target, rows, plain)
    measured += more
    own = [(t, v) for t, v in measured if t.case in (*asked.cases, *plain.values())]
    evidence = {
        "schema": SCHEMA,
        "verdict": verdict(asked, target, rows, upper, remedies, datetime.now(UTC).isoformat(timespec="seconds")),
        "lower_bound": rows,
        "upper_bound": upper,
        "utility": utility_rows(own, plain),
        "trials": [_plain(t, v, lab) for t, v in worst_first(measured)],
        "plan": _described(asked, command),
        "versions": versions(),
    }
    write_evidence(out, evidence)
    return Audit(evidence, tuple(worst_first(measured)))


def write_evidence(out: Path, evidence: Mapping[str, Any]) -> None:
    """Write ``evidence.json``.

    Raises:
        InvalidFile: it cannot be written there.
    """
    write_bytes(out / EVIDENCE, (json.dumps(evidence, indent=1, ensure_ascii=False) + "\n").encode())


def exit_code(evidence: Mapping[str, Any]) -> int:
    """Return 1 where a target is missed, contradicted, or was not measured in full; else 0."""
    found = evidence["verdict"]
    if found["target"] is None:
        return int(found["grade"] == "contradiction")
    missed = found["grade"] in ("above", "contradiction", "nothing_measured")
    return int(missed or found["failed_trials"] > 0)


def check_plan(plan: Plan) -> None:
    """Check that everything of the plan can run, before the first trial.

    Raises:
        InvalidInput: with the line of what cannot.
    """
    for spec in plan.attacks:
        try:
            choose_attack(spec, plan.budget)
        except GradleakError as error:
            raise plan.refused(Fault(str(error), "attacks", spec)) from error
    for number, case in enumerate(plan.cases):
        try:
            build(case)
        except Fault as fault:
            raise plan.refused(fault, number) from fault
    for number, remedy in enumerate(plan.remedies):
        for case in plan.cases:
            try:
                build(_remedied(case, remedy.filters, remedy.batch_size))
            except Fault as fault:
                key = "batch_size" if fault.key == "batch_sizes" else fault.key
                line = 1 if plan.places is None else plan.places.line("remedy", number + 1, key, fault.value)
                raise InvalidInput(f"Line {line} of {plan.path.name!r}: {fault}") from fault


def _remedied(case: Case, filters: tuple[str, ...] | None, batch_size: int | None) -> Case:
    case = case if filters is None else replace(case, filters=filters)
    return case if batch_size is None else replace(case, batch_sizes=(batch_size,))


def _trials(plan: Plan) -> list[Trial]:
    trials = [
        _trial(plan, case, stage, size, attack, seed)
        for case in plan.cases
        for stage in case.stages
        for size in case.batch_sizes
        for attack in plan.attacks
        for seed in range(plan.seeds)
    ]
    for case in plan.cases:
        trials += _trainings(case)
        trials += _trainings(replace(case, filters=())) if case.filters else []
    return trials


def _trial(plan: Plan, case: Case, stage: int, size: int, attack: str, seed: int) -> Trial:
    return Trial("attack", case, stage, size, seed, attack, plan.knows, plan.budget, plan.tolerance)


def _trainings(case: Case) -> list[Trial]:
    return [] if case.utility is None else [Trial("utility", case, seed=seed) for seed in range(case.utility.seeds)]


def _remedies(
    lab: _Lab, plan: Plan, target: float | None, rows: Sequence[Mapping[str, Any]], plain: Mapping[str, Case]
) -> tuple[list[dict[str, Any]], list[tuple[Trial, Mapping[str, Any]]]]:
    """Measure what would bring a case below the target: every remedy of the plan, where its worst row was."""
    found, all_measured = [], []
    for case in plan.cases if target is not None else ():
        worst = next((r for r in rows if r["case"] == case.name and r["batches"]), None)
        if worst is None or target is None or worst["recovered"]["share"] <= target:
            continue
        for remedy in plan.remedies:
            changed = _remedied(case, remedy.filters, remedy.batch_size)
            size = remedy.batch_size or worst["batch_size"]
            trials = [
                _trial(plan, changed, worst["stage"], size, a, s) for a in plan.attacks for s in range(plan.seeds)
            ]
            measured = lab.measure(trials + _trainings(changed))
            leak = leak_rows(measured)
            cost = utility_rows(measured, plain)
            found.append(remedy_row(remedy, changed, leak, cost, target))
            all_measured += measured
    return found, all_measured


@dataclass(frozen=True, eq=False)
class _Lab:
    """Measures trials and remembers them."""

    folder: Path
    executor: str
    jobs: int
    address: str | None
    retry_failed: bool
    told: Told | None

    def measure(self, trials: Sequence[Trial]) -> list[tuple[Trial, Mapping[str, Any]]]:
        """Return every trial with what it found, measuring only what is not stored yet."""
        sweep(self.folder)
        paths = {trial: trial.path(self.folder) for trial in trials}
        found = {trial: self._stored(path, trial) for trial, path in paths.items()}
        waiting = [t for t, kept in found.items() if kept is None or (self.retry_failed and "error" in kept.values)]

        def keep(done: int, trial: Trial, result: Result) -> None:
            write_case(paths[trial], trial.kind, trial.content(), result.values, result.seconds)
            self._tell(done, len(waiting), f"{trial.case.name}: {trial.kind}, seed {trial.seed}")

        self._tell(0, len(waiting), f"{len(trials) - len(waiting)} of {len(trials)} trials are measured already")
        spread(self.executor, attempt, waiting, keep, jobs=self.jobs, address=self.address)
        found |= {trial: self._stored(paths[trial], trial) for trial in waiting}
        return [(trial, self._present(found[trial], paths[trial])) for trial in trials]

    def _stored(self, path: Path, trial: Trial) -> Measured | None:
        return read_case(path, trial.content())

    def _present(self, found: Measured | None, path: Path) -> Mapping[str, Any]:
        if found is None:
            raise InvalidFile(f"{str(path)!r} was damaged as soon as it was written; check the disk and run again.")
        return {**found.values, "seconds": found.seconds, "date": found.date, "hardware": found.hardware}

    def _tell(self, done: int, total: int, what: str) -> None:
        if self.told is not None:
            self.told(done, total, what)


def worst_first(
    measured: Iterable[tuple[Trial, Mapping[str, Any]]],
) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Return trials by the share that came back, then proofs, then the least error."""

    def rank(pair: tuple[Trial, Mapping[str, Any]]) -> tuple[float, ...]:
        examples = pair[1].get("examples", ())
        errors = [e["error"] for e in examples if e["error"] is not None]
        proved = any(e["proved"] for e in examples)
        return (
            -sum(bool(e["recovered"]) for e in examples) / max(len(examples), 1),
            -proved,
            min(errors, default=np.inf),
        )

    return sorted(measured, key=rank)


def _plain(trial: Trial, values: Mapping[str, Any], lab: _Lab) -> dict[str, Any]:
    content = {k: v for k, v in trial.content().items() if k not in ("knows", "budget", "tolerance", "space")}
    kept = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
    return {"id": trial.path(lab.folder).stem, "kind": trial.kind, "case": trial.case.name, **content, **kept}


def _described(plan: Plan, command: str) -> dict[str, Any]:
    cases = []
    for case in plan.cases:
        federation = build(case)
        cases.append(
            {
                "name": case.name,
                "model": case.model,
                "model_sha256": federation.model_hash,
                "parameters": sum(p.numel() for p in federation.model.parameters() if p.requires_grad),
                "data": case.data,
                "data_sha256": federation.pool.sha256,
                "inputs": f"{federation.pool.space.nouns} of shape {tuple(federation.pool.space.shape)}",
                "filters": list(case.filters),
                "batch_sizes": list(case.batch_sizes),
                "stages": list(case.stages),
            }
        )
    return {
        "title": plan.title,
        "file": plan.path.name,
        "sha256": hashlib.sha256(plan.text.encode()).hexdigest(),
        "text": plan.text,
        "command": command,
        "attacks": list(plan.attacks),
        "seeds": plan.seeds,
        "budget": plan.budget,
        "cases": cases,
    }


def versions() -> dict[str, str]:
    """Return the versions of what computes, and the machine."""
    found = {"gradleak": gradleak.__version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"machine": hardware(), "system": platform.platform(terse=True)}
