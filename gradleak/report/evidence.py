"""Evidence of an audit becomes one HTML page that somebody signs or rejects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from gradleak.report.pictures import encode_png
from gradleak.report.render import environment

__all__ = ["Specimen", "render_evidence", "specimens"]

_SPECIMENS = 12
"""Examples that are shown, the worst first."""
_PER_TRIAL = 2
_ROWS = 14
"""Rows of the picture, the worst first."""
_LISTED = 30
"""Rows of a table that are shown at once; the rest is folded."""
_MOODS = {
    "above": "alarm",
    "leaks": "alarm",
    "contradiction": "alarm",
    "undecided": "caution",
    "nothing_measured": "caution",
}
_W, _LEFT, _MIDDLE, _RIGHT, _STEP, _TOP = 780, 200, 560, 750, 30, 62
"""Widths and places of the picture, in its units: names, shares, usefulness."""


@dataclass(frozen=True)
class Specimen:
    """One example as a person sees it: two pictures, or texts under names."""

    title: str
    words: str
    truth: str = ""
    guess: str = ""
    rows: tuple[tuple[str, str, str], ...] = ()


def specimens(trials: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[list[Specimen], bool]:
    """Return the recovered examples of the worst ``trials`` (title, what was found), and whether there were any.

    Where nothing came back, the closest reconstructions are shown.
    """
    found: list[Specimen] = []
    closest = []
    for title, values in trials:
        examples = sorted(values.get("examples", ()), key=lambda e: (not e["proved"], e["error"] is None, e["error"]))
        back = [e for e in examples if e["recovered"]]
        for example in back[:_PER_TRIAL] if len(found) < _SPECIMENS else ():
            found.append(_specimen(title, values, example))
        if not back and examples and examples[0]["error"] is not None:
            closest.append((examples[0]["error"], title, values, examples[0]))
        if len(found) >= _SPECIMENS:
            break
    if found:
        return found[:_SPECIMENS], True
    return [_specimen(*rest) for _, *rest in sorted(closest, key=lambda c: c[0])[: _SPECIMENS // 3]], False


def _specimen(title: str, values: Mapping[str, Any], example: Mapping[str, Any]) -> Specimen:
    at, proof = example["index"], ", proved by the update alone" if example["proved"] else ""
    words = f"{values['error_name']} {example['error']:.2g}{proof}." if example["error"] is not None else ""
    if "guess" in values:
        return Specimen(title, words, encode_png(values["truth"][at]), encode_png(values["guess"][at]))
    if "guess_text" not in values:
        return Specimen(title, words)
    truth, guess = values["truth_text"][at], values["guess_text"][at]
    names = values["names"] or [""] * len(truth)
    return Specimen(title, words, rows=tuple(zip(names, truth, guess, strict=False)))


def render_evidence(evidence: Mapping[str, Any], shown: Sequence[Specimen] = (), *, recovered: bool = True) -> str:
    """Return one self-contained HTML page: it loads nothing, and every string of the evidence is escaped.

    ``shown`` are examples that came back, or, if not ``recovered``, the closest ones.
    """
    trials = [t for t in evidence["trials"] if t["kind"] != "utility"]
    rows = [_trial(t) for t in trials]
    # In a script element only the end tag would be read; < is written so that none can appear.
    data = Markup(json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c").replace("&", "\\u0026"))
    return (
        environment()
        .get_template("evidence.html")
        .render(
            e=evidence,
            v=evidence["verdict"],
            mood=_MOODS.get(evidence["verdict"]["grade"], "neutral"),
            figures=_figures(evidence),
            chart=_chart(evidence),
            shown=shown,
            recovered=recovered,
            listed=_LISTED,
            trials=rows,
            data=data,
            failed=[t for t in evidence["trials"] if "error" in t],
            share=share,
            seconds=sum(t["seconds"] for t in evidence["trials"]),
        )
    )


def share(value: float | None) -> str:
    """Return a share as people write it: 4.2 %, 37 %."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}\u202f%" if 0 < value < 0.1 or 0.9 < value < 1 else f"{100 * value:.0f}\u202f%"


def _trial(t: Mapping[str, Any]) -> list[str]:
    """Return the cells of one trial in the table of all."""
    examples = t.get("examples", ())
    what = "failed" if "error" in t else "does not apply" if "refused" in t else t["status"]
    errors = [e["error"] for e in examples if e["error"] is not None]
    return [
        t["case"],
        ", ".join(t["filters"]) or "none",
        *(str(t[k]) for k in ("stage", "batch_size", "seed", "attack")),
        _came_back(examples),
        str(sum(e["proved"] for e in examples)) if examples else "–",
        f"{min(errors):.2g}" if errors else "–",
        what,
        f"{t['seconds']:.1f}",
        t["id"][:8],
    ]


def _came_back(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return "–"
    if any(e["recovered"] is None for e in examples):
        return "not known"
    return f"{sum(e['recovered'] for e in examples)} of {len(examples)}"


def _figures(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [r for r in evidence["lower_bound"] if r["batches"]]
    figures = []
    if rows:
        worst = rows[0]
        for name in ("recovered", "proved"):
            got = worst[name]
            told = share(got["share"]) if got["share"] is not None else "not known"
            figures.append((f"Worst share {name}", f"{told} ({share(got['low'])} – {share(got['high'])})"))
    bounds = [b["share"] for b in evidence["upper_bound"]]
    figures.append(("Upper bound", "none for a case" if None in bounds or not bounds else share(max(bounds))))
    costs = [u["without"]["mean"] - u["with"]["mean"] for u in evidence["utility"] if u["telling"] and u["filters"]]
    told = f"{100 * max(costs):.1f} points" if costs and max(costs) > 0 else "none seen" if costs else "not measured"
    figures.append(("Largest cost of filters", told))
    measured = [t for t in evidence["trials"] if t["kind"] != "utility"]
    figures.append(("Attacks tried", f"{len(measured):,}"))
    return figures


def _chart(evidence: Mapping[str, Any]) -> Markup:
    """Return lower bound, upper bound and cost as one picture, a line for each of the worst rows."""
    rows = [r for r in evidence["lower_bound"] if r["batches"]][:_ROWS]
    bounds = {(b["case"], tuple(b["filters"])): b["share"] for b in evidence["upper_bound"]}
    useful = {(u["case"], tuple(u["filters"])): u for u in evidence["utility"]}
    target, height = evidence["verdict"]["target"], _TOP + _STEP * len(rows) + 40
    if not rows:
        return Markup("")
    bottom = height - 34

    def at(value: float, right: int = _MIDDLE - 50, left: int = _LEFT) -> float:
        return left + min(max(value, 0.0), 1.0) * (right - left)

    said, parts = [], []
    panels = ((_LEFT, _MIDDLE - 50, "share that came back"), (_MIDDLE, _RIGHT, "accuracy with and without filters"))
    for left, right, name in panels if any(u["with"]["mean"] >= 0 for u in useful.values()) else panels[:1]:
        for tick in (0.0, 0.5, 1.0):
            x = at(tick, right, left)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 16}" y2="{bottom}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{100 * tick:.0f} %</text>'
            )
        parts.append(f'<text x="{(left + right) / 2:.1f}" y="16" text-anchor="middle">{name}</text>')
    if target is not None:
        x = at(target)
        parts.append(f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 16}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x + 4:.1f}" y="{_TOP - 22}">target {share(target)}</text>')
    for number, r in enumerate(rows):
        y, got, key = _TOP + _STEP * number + 8, r["recovered"], (r["case"], tuple(r["filters"]))
        got = got if got["share"] is not None else r["proved"]
        name = f"{r['case']}, batch {r['batch_size']}" + (f", round {r['stage']}" if r["stage"] else "")
        short = name if len(name) <= 30 else f"{name[:28]}…"
        parts.append(f'<text class="name" x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(short)}</text>')
        parts.append(f'<line class="interval" x1="{at(got["low"]):.1f}" x2="{at(got["high"]):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="measured" cx="{at(got["share"]):.1f}" cy="{y}" r="5"/>')
        if r["proved"]["share"]:
            parts.append(f'<circle class="proved" cx="{at(r["proved"]["share"]):.1f}" cy="{y}" r="2.2"/>')
        upper = bounds.get(key)
        if upper is not None:
            x = at(upper)
            parts.append(f'<path class="bound" d="M{x - 6:.1f} {y - 8}H{x:.1f}V{y + 8}H{x - 6:.1f}"/>')
        sentence = f"{name}: {share(got['share'])} came back, interval {share(got['low'])} to {share(got['high'])}"
        sentence += ", no upper bound" if upper is None else f", upper bound {share(upper)}"
        if (u := useful.get(key)) is not None and u["with"]["mean"] >= 0:
            ends = [at(u[k]["mean"], _RIGHT, _MIDDLE) for k in ("with", "without") if u[k] is not None]
            parts.append(f'<line class="cost" x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{y}" y2="{y}"/>')
            if len(ends) == 2:
                parts.append(f'<circle class="without" cx="{ends[1]:.1f}" cy="{y}" r="5"/>')
            parts.append(f'<circle class="with" cx="{ends[0]:.1f}" cy="{y}" r="5"/>')
            sentence += f", accuracy {share(u['with']['mean'])}"
            sentence += "" if u["without"] is None else f" instead of {share(u['without']['mean'])}"
        said.append(sentence)
    label = escape(". ".join(said) + ".")
    head = f'<svg class="chart evidence" viewBox="0 0 {_W} {height}" role="img" aria-label="{label}">'
    return Markup(head + "".join(parts) + "</svg>")
