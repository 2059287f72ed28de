"""From trials to evidence: what came back with its intervals, what the bounds say, what filters cost, and the verdict.

Everything is plain JSON, in the form that ``docs/audit.md`` describes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gradleak import bounds
from gradleak.audit.federation import build
from gradleak.audit.plan import Case, Plan, Remedy
from gradleak.audit.scores import wilson
from gradleak.audit.trials import Trial, prior

__all__ = ["SCHEMA", "bound_rows", "leak_rows", "utility_rows", "verdict"]

SCHEMA = "gradleak-evidence-1"
"""Name and version of the form of ``evidence.json``."""

Row = dict[str, Any]
Values = Mapping[str, Any]
_CAPS = {
    "batch_size": "the number of examples",
    "training": "loss and local training",
    "defense": "the filters, in order",
    "labels": "the labels",
    "buffers": "running statistics",
    "public_data": "public examples of the same kind",
    "order": "the order of the examples",
}
_LEARNED = 0.05
"""By how much training without filters must better the model for its cost to tell anything."""
_CAUSE = "noise or near duplicates leave that much room, or the tolerance is tighter than the number format allows."


def leak_rows(measured: Iterable[tuple[Trial, Values]]) -> list[Row]:
    """Return one row for each cell of case, filters, stage, batch size and attack: what came back, the worst first."""
    cells: dict[tuple[Any, ...], list[tuple[Trial, Values]]] = {}
    for trial, values in measured:
        if trial.kind == "attack":
            key = (trial.case.name, trial.case.filters, trial.stage, trial.batch_size, trial.attack)
            cells.setdefault(key, []).append((trial, values))
    rows = [_leak_row(found[0][0], [v for _, v in found]) for found in cells.values()]
    return sorted(rows, key=lambda r: (-_share(r["recovered"]), -_share(r["proved"]), -r["recovered"]["high"]))


def _share(counted: Mapping[str, Any]) -> float:
    return -1.0 if counted["share"] is None else float(counted["share"])


def _leak_row(trial: Trial, results: Sequence[Values]) -> Row:
    ran = [v for v in results if "examples" in v]
    refused = [v for v in results if "refused" in v]
    nulls: Counter[str] = Counter()
    findings: dict[str, list[int]] = {}
    for v in ran:
        for null in v["nulls"]:
            nulls[null["guess"]] += null["recovered"]
    for v in (*ran, *refused):
        for f in v["findings"]:
            seen = findings.setdefault(f["kind"], [0, 0])
            seen[0], seen[1] = seen[0] + f["count"], seen[1] + f["of"]
    best = max(nulls.items(), key=lambda pair: pair[1], default=("", 0))
    proofs = [e for v in ran for e in v["examples"] if e["proved"]]
    return {
        "case": trial.case.name,
        "filters": list(trial.case.filters),
        "stage": trial.stage,
        "batch_size": trial.batch_size,
        "attack": trial.attack,
        "nouns": ran[0]["nouns"] if ran else "examples",
        "error": ran[0]["error_name"] if ran else "",
        "batches": len(ran),
        "examples": sum(len(v["examples"]) for v in ran),
        "recovered": _counted(ran, lambda e: e["recovered"]),
        "proved": _counted(ran, lambda e: e["proved"] and e["recovered"] is not False),
        "batches_hit": sum(any(e["recovered"] for e in v["examples"]) for v in ran),
        "proved_but_not_recovered": sum(e["recovered"] is False for e in proofs),
        "null": {"guess": best[0], "recovered": best[1]},
        "findings": {kind: {"count": c, "of": of} for kind, (c, of) in findings.items()},
        "ways": dict(Counter(v["way"] for v in ran)),
        "out_of_time": sum(v["status"] == "budget" for v in ran),
        "refused": len(refused),
        "why_refused": refused[0]["refused"] if refused else "",
        "failed": sum("error" in v for v in results),
    }


def _counted(ran: Sequence[Values], right: Callable[[Values], bool | None]) -> Row:
    """Return a share of examples with Wilson's 95 % interval, for which each batch counts once.

    Examples of one batch share a fate, so that they are fewer independent trials than examples. Where ``right`` is
    None, without the truth, nobody can tell.
    """
    if any(right(e) is None for v in ran for e in v["examples"]):
        return {"count": None, "share": None, "low": 0.0, "high": 1.0}
    shares = [statistics.fmean(bool(right(e)) for e in v["examples"]) for v in ran]
    count = sum(bool(right(e)) for v in ran for e in v["examples"])
    low, high = wilson(sum(shares), len(shares))
    return {"count": count, "share": statistics.fmean(shares) if shares else None, "low": low, "high": high}


def bound_rows(plan: Plan, cases: Iterable[Case]) -> list[Row]:
    """Return what no attacker can beat in each case, or in words why nothing is known."""
    rows = []
    for case in cases:
        federation = build(case)
        if case.prior is None:
            guessed = prior(case, plan.tolerance)
            # Nobody knows the best guess: the upper end of what a guess without the update may reach counts.
            kappa = max(wilson(guessed["hits"], guessed["of"])[1], 1e-6)
            how = (
                f"measured: the best of {guessed['guesses']} public examples and the guesses that say least is within "
                f"the tolerance of {guessed['hits']} of {guessed['of']} held-out ones; upper end of the 95 % interval"
            )
        else:
            kappa, how = case.prior, "stated in the plan"
        found = bounds.upper_bound(
            federation.training,
            examples=max(case.batch_sizes),
            rounds=case.rounds,
            sampling_rate=case.sampling_rate,
            prior=min(kappa, 1 - 1e-9),
            coordinates=sum(p.numel() for p in federation.model.parameters() if p.requires_grad),
        )
        rows.append(
            {
                "case": case.name,
                "filters": list(case.filters),
                "share": found.value,
                "text": found.text,
                "mechanism": found.mechanism,
                "noise_multiplier": found.noise_multiplier,
                "epsilon": found.epsilon,
                "delta": found.delta,
                "rounds": case.rounds,
                "sampling_rate": case.sampling_rate,
                "prior": kappa,
                "prior_source": how,
            }
        )
    return rows


def utility_rows(measured: Iterable[tuple[Trial, Values]], plain: Mapping[str, Case]) -> list[Row]:
    """Return what training reaches with each case's filters and without; ``plain`` are the cases without, by name."""
    values: dict[Case, list[Values]] = {}
    for trial, found in measured:
        if trial.kind == "utility" and "error" not in found:
            values.setdefault(trial.case, []).append(found)
    asked = [case for case in values if case.filters or case not in plain.values()]
    asked += [case for case in values if not case.filters and case.name not in {c.name for c in asked}]
    rows = []
    for case in asked:
        before, own = values[case][0]["before"], plain[case.name]
        without = _spread(values[own]) if own in values else None
        rows.append(
            {
                "case": case.name,
                "filters": list(case.filters),
                "metric": values[case][0]["metric"],
                "before": before,
                "with": _spread(values[case]),
                "without": without,
                # A training that leads nowhere shows no cost, whatever filters do to it.
                "telling": without is not None and without["low"] > before + _LEARNED,
            }
        )
    return rows


def _spread(found: Sequence[Values]) -> Row:
    values = [float(v["value"]) for v in found]
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "trainings": len(values)}


# ------------------------------------------------------------------------------------------------------- in words


def verdict(
    plan: Plan,
    target: float | None,
    rows: Sequence[Row],
    upper: Sequence[Row],
    remedies: Sequence[Row],
    created: str,
) -> Row:
    """Return the answer in plain words: it says what was tried and what came of it, and promises nothing else."""
    ran = [r for r in rows if r["batches"]]
    failed, reason = sum(r["failed"] for r in rows), []
    grade, headline = _grade(target, ran)
    if ran:
        worst = ran[0]
        counted, size, nouns = worst["recovered"], worst["batch_size"], worst["nouns"]
        back = "came back" if counted["count"] is not None else "are proved by the update alone"
        counted = counted if counted["count"] is not None else worst["proved"]
        reason.append(
            f"The worst of {_many(len(rows), 'row')}: case “{worst['case']}”, {_stage(worst['stage'])}, "
            f"batches of {size}, attack {worst['attack']}: {counted['count']} of {worst['examples']} {nouns} "
            f"{back} ({_percent(counted['share'])}; 95 % interval {_percent(counted['low'])} to "
            f"{_percent(counted['high'])})"
            + (f", {worst['proved']['count']} of them proved by the update alone." if back == "came back" else ".")
        )
        if worst["null"]["recovered"]:
            reason.append(
                f"A guess without the update ({worst['null']['guess']}) gets {worst['null']['recovered']} of them."
            )
    above = [b for b in upper for r in ran if r["case"] == b["case"] and b["share"] is not None
             and r["filters"] == b["filters"] and r["recovered"]["low"] > b["share"]]  # fmt: skip
    if above:
        grade = "contradiction"
        headline = "The evidence contradicts itself: more came back than the stated upper bound allows."
        reason.insert(0, f"Case “{above[0]['case']}”: do not rely on this page before that is explained.")
    elif any(b["share"] is not None for b in upper):
        reason += [f"Case “{b['case']}”: {b['text']}" for b in upper if b["share"] is not None]
    else:
        reason.append("No upper bound is known for any case: other attacks may get more than those that were tried.")
    strange = sum(r["proved_but_not_recovered"] for r in rows)
    if strange:
        reason.append(f"{_many(strange, 'reconstruction')} explained the update, yet outside the tolerance: {_CAUSE}")
    if failed:
        reason.append(
            f"{_many(failed, 'trial')} failed and {'counts' if failed == 1 else 'count'} nowhere: see the trials."
        )
    read = {k: f for r in rows for k, f in r["findings"].items() if f["count"]}
    if read:
        reason.append(
            f"Besides whole {ran[0]['nouns'] if ran else 'examples'}, attacks read {', '.join(sorted(read))}."
        )
    refused = sorted(
        {f"{r['attack']} does not apply to case “{r['case']}”" for r in rows if r["refused"] and not r["batches"]}
    )
    reason += [f"{r}." for r in refused]
    return {
        "grade": grade,
        "headline": headline,
        "reason": reason,
        "target": target,
        "tolerance": plan.tolerance,
        "created": created,
        "failed_trials": failed,
        "attacker": {
            "knows": ["the model that was sent out", "the update", *(_CAPS[k] for k in plan.knows)],
            "does_not_know": [words for k, words in _CAPS.items() if k not in plan.knows],
        },
        "not_tried": _not_tried(plan),
        "remedies": list(remedies),
    }


def _grade(target: float | None, ran: Sequence[Row]) -> tuple[str, str]:
    if not ran:
        return (
            "nothing_measured",
            "Nothing was measured: no attack of the plan ran, so this page says nothing about leakage.",
        )
    nouns = ran[0]["nouns"]
    if any(r["recovered"]["share"] is None for r in ran):
        return _grade_without_truth(target, ran)
    share, high = max(_share(r["recovered"]) for r in ran), max(r["recovered"]["high"] for r in ran)
    hits, total = sum(r["recovered"]["count"] for r in ran), sum(r["examples"] for r in ran)
    tried = f"{hits} of {total:,} {nouns} came back" if hits else f"none of {total:,} {nouns} came back"
    if target is None:
        if hits:
            return "leaks", f"It leaks: {_percent(share)} of the {nouns} came back in the worst row of what was tried."
        return "nothing_came_back", f"In what was tried, {tried}; up to {_percent(high)} cannot be excluded."
    said = f"the target is at most {_percent(target)}"
    if share > target:
        return "above", f"Above the target: {_percent(share)} of the {nouns} came back in the worst row; {said}."
    if high <= target:
        return "within", f"Within the target in what was tried: {tried}; {said}."
    return (
        "undecided",
        f"Not decided: {tried}, but with so few batches up to {_percent(high)} cannot be excluded; {said}.",
    )


def _grade_without_truth(target: float | None, ran: Sequence[Row]) -> tuple[str, str]:
    nouns, share = ran[0]["nouns"], max(_share(r["proved"]) for r in ran)
    hits, total = sum(r["proved"]["count"] for r in ran), sum(r["examples"] for r in ran)
    said = "" if target is None else f"; the target is at most {_percent(target)}"
    if not hits:
        return "undecided", (
            f"Not decided: none of {total:,} {nouns} was proved, and without the truth nobody can tell what came back "
            f"unproved{said}."
        )
    if target is not None and share > target:
        return "above", f"Above the target: {_percent(share)} of the {nouns} were proved in the worst row{said}."
    return "leaks", f"It leaks: the updates alone prove {hits} of {total:,} {nouns}{said}."


def _not_tried(plan: Plan) -> list[str]:
    said = [
        "A server that sends a manipulated model, which can get more than one that only looks on.",
        "Combining the updates of several rounds or clients.",
        "Priors learned from public data, such as generative models.",
        "Other models, data, batch sizes and stages of training than those listed, and examples unlike those drawn.",
        "Partial leaks that are no whole example, such as membership or properties, except what is listed as read.",
    ]
    if plan.attacks != ("auto",):
        said.append("Attacks of gradleak other than those named in the plan.")
    if "defense" not in plan.knows:
        said.append("An attacker who knows the filters, which real ones may.")
    if plan.budget is not None:
        said.append(f"More than {plan.budget:g} seconds for each attack.")
    return said


def remedy_row(remedy: Remedy, case: Case, leak: Sequence[Row], cost: Sequence[Row], target: float) -> Row:
    """Return what a remedy reached, in the rows that were measured with it."""
    worst = leak[0]
    return {
        "case": case.name,
        "remedy": remedy.words,
        "filters": list(case.filters),
        "batch_size": worst["batch_size"],
        "batches": worst["batches"],
        "examples": worst["examples"],
        "recovered": worst["recovered"],
        "proved": worst["proved"],
        "reached": worst["batches"] > 0 and _share(worst["recovered"]) <= target,
        "sure": worst["batches"] > 0 and worst["recovered"]["high"] <= target,
        "utility": cost[0]["with"] if cost else None,
    }


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 or 0.9 < share < 1 else f"{100 * share:.0f} %"


def _stage(stage: int) -> str:
    return "before training" if stage == 0 else f"after {_many(stage, 'round')}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
