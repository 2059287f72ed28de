"""A record and its pictures become one HTML page."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import jinja2
from markupsafe import Markup

from gradleak.audit.numbers import duration, metric_name, sig
from gradleak.audit.records import REFUSED, Aggregate, Curves, Pictures, Record, Values
from gradleak.report.charts import Series, log_chart
from gradleak.report.pictures import capital

__all__ = ["environment", "render"]

_LAYERS = 8

_TOLD = {
    "LABELS": "the labels of the examples",
    "BATCH_SIZE": "the number of examples",
    "TRAINING": "loss and local training procedure",
    "DEFENSE": "which defense the client applies",
    "BUFFERS": "the client’s running statistics",
    "PUBLIC_DATA": "public examples of the same kind",
    "ORDER": "the order in which the client took its examples",
}
_ACTS = {"MALICIOUS": "send a model of its own making"}

_STATUS = {
    "converged": "ended because the update was matched",
    "budget": "ended because its iterations or time were used up",
    "stalled": "ended because it made no more progress",
    "interrupted": "was interrupted; this is the best it had found by then",
    "exact": "solved the equations directly",
    "not_applicable": "did not run, because its conditions do not hold here",
    "missing_knowledge": "did not run, because it needs to know more",
}
_ALARM, _CAUTION = ("leaked", "proved", "matched", "solved"), ("partly", "close")
_SOURCE = {"assumed": "assumed: nobody stated it"}
_GLUE = "##"
"""What word pieces begin with that continue a word."""


@dataclass(frozen=True)
class _Chart:
    title: str
    text: str
    svg: Markup
    legend: tuple[Series, ...] = ()


def render(record: Record, pictures: Pictures) -> str:
    """Return one self-contained HTML page: it loads nothing, and every string of the record is escaped."""
    template = environment().get_template("report.html")
    outcome = record.outcome
    tried = outcome.told("attempt") if len(outcome.attempts) > 1 else ()  # these stand in a table of their own
    return template.render(
        r=record,
        p=pictures,
        told=[_TOLD[k] for k in record.threat.granted if k in _TOLD],
        acts=[_ACTS[k] for k in record.threat.granted if k in _ACTS],
        untold=[_TOLD[k] for k in record.threat.withheld if k in _TOLD],
        ended=_STATUS.get(outcome.status, outcome.status),
        refused=outcome.status in REFUSED,
        notes=[note for note in outcome.notes if note not in tried],
        mood="alarm"
        if record.verdict.grade in _ALARM
        else "caution"
        if record.verdict.grade in _CAUTION
        else "neutral",
        source=_SOURCE.get(record.subject.batch_size_source, ""),
        marks=_marks(record, len(pictures.titles)),
        charts=_charts(record.curves),
        stops=_stops(record, pictures),
        figures=_figures(record),
        columns=_columns(record),
        differ=any(lacks for values in pictures.values for words in _words(values) for _, lacks in words),
        classes=any(e.label is not None or e.recovered is not None for e in record.examples or ()),
    )


@functools.cache
def environment() -> jinja2.Environment:
    """Return what fills templates: everything is escaped, and what is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradleak.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"sig": sig, "duration": duration, "shape": _shape, "metric": metric_name, "capital": capital}
    environment.filters.update(filters, percent=_percent, words=_words, sentence=_sentence)
    return environment


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if math.isfinite(share) else "–"


def _words(values: Values) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return the words of the private sentence and of the reconstructed one, and whether each lacks its like."""
    guess = _joined(values.guess)
    truth = guess if values.truth is None else _joined(values.truth)
    lone_truth, lone_guess = set(range(len(truth))), set(range(len(guess)))
    for a, b, size in SequenceMatcher(None, truth, guess, autojunk=False).get_matching_blocks():
        lone_truth -= set(range(a, a + size))
        lone_guess -= set(range(b, b + size))
    return [(w, i in lone_truth) for i, w in enumerate(truth)], [(w, i in lone_guess) for i, w in enumerate(guess)]


def _joined(pieces: Sequence[str]) -> list[str]:
    """Return whole words, made of their pieces; an empty piece is none."""
    words: list[str] = []
    for piece in pieces:
        if piece.startswith(_GLUE) and words:
            words[-1] += piece.removeprefix(_GLUE)
        elif piece:
            words.append(piece.removeprefix(_GLUE))
    return words


def _marks(record: Record, count: int) -> list[str]:
    """Return for each shown example what is known of its reconstruction without ground truth."""
    outcome, certificate = record.outcome, record.certificate
    marks = []
    for i in range(count):
        at = record.examples[i].guess if record.examples is not None and i < len(record.examples) else i
        sure = certificate is not None and at is not None and at < len(certificate.examples)
        if sure and certificate is not None and certificate.examples[at or 0] == "proved":
            marks.append("proved")
        else:
            marks.append("solved" if at in outcome.solved else "")
    return marks


def _shape(shape: tuple[int, ...]) -> str:
    return "\u202f×\u202f".join(map(str, shape)) or "one number"


def _columns(record: Record) -> list[tuple[str, str]]:
    """Return the metrics of the table as (name, heading); labels have columns of their own."""
    units = {a.metric: a.unit for a in record.aggregates if a.metric != "label_accuracy"}
    return [(name, metric_name(name) + (f", {unit}" if unit else "")) for name, unit in units.items()]


def _figures(record: Record) -> list[tuple[str, str]]:
    """Return the key figures under the headline: (name, value)."""
    figures: list[tuple[str, str]] = []
    many = record.examples is not None and len(record.examples) > 1
    for aggregate in record.aggregates:
        if aggregate.metric in record.subject.quoted:
            name = capital(metric_name(aggregate.metric)) + (", median" if many else "")
            figures.append((name, _value(aggregate)))
    if record.subject.display == "text" and record.success is not None:
        figures.insert(0, ("Word for word", f"{record.success.successes} of {record.success.n}"))
    known = [e for e in record.examples or () if e.label is not None and e.recovered is not None]
    if known:
        figures.append(("Class recovered", f"{sum(e.label == e.recovered for e in known)} of {len(known)}"))
    if record.examples is None and record.match is not None:
        figures.append(("Residual of the update", sig(record.match.residual)))
        certificate = record.certificate
        measured = certificate is not None and certificate.floor > 0
        floor = certificate.floor if certificate is not None and measured else record.match.floor
        figures.append(("Noise floor", sig(floor)))
    for finding in record.outcome.findings:
        whole = finding.kind == "tokens" and finding.of == record.subject.batch_size
        if whole and record.examples is not None:
            continue  # said as "word for word"
        what = record.subject.nouns if whole else finding.kind.replace("_", " ")
        figures.append((f"{capital(what)} read", f"{finding.count:,} of {finding.of:,}"))
    if record.outcome.status not in REFUSED:
        figures.append(("Time", duration(record.outcome.seconds)))
    return figures


def _value(aggregate: Aggregate) -> str:
    digits = 2 if aggregate.metric in ("mse", "relative_error") else 3
    return sig(aggregate.median, digits) + (f"\u202f{aggregate.unit}" if aggregate.unit else "")


def _charts(curves: Curves | None) -> list[_Chart]:
    if curves is None:
        return []
    names = _chosen(list(curves.layers))
    skipped = f" {len(names)} of {len(curves.layers)} tensors are drawn." if len(names) < len(curves.layers) else ""
    told = [
        (
            "Objective",
            "What the attacker minimizes: the distance between the captured update and that of its candidate.",
            [Series("objective", curves.objectives, "main")],
        ),
        (
            "Error to the private data",
            "Mean squared error over all examples. The attacker cannot see this curve.",
            [Series("MSE", curves.mse, "main")] if curves.mse else [],
        ),
        (
            "Gradient distance by layer",
            "Squared distance per parameter tensor, first layer to last (Zhu et al. 2019, Figure 5)." + skipped,
            layers := _by_layer(names, curves),
        ),
    ]
    charts: list[_Chart] = []
    for title, text, series in told:
        if series and all(len(s.values) == len(curves.iterations) for s in series):
            svg = log_chart(title, "evaluations", curves.iterations, series)
            if svg is not None:
                charts.append(_Chart(title, text, svg, tuple(series) if series is layers else ()))
    return charts


def _chosen(names: list[str]) -> list[str]:
    """Return at most eight names, weights before biases, spread over the depth of the model."""
    if len(names) <= _LAYERS:
        return names
    weights = [n for n in names if n.rsplit(".", 1)[-1] == "weight"] or names
    if len(weights) <= _LAYERS:
        return weights
    return [weights[round(i * (len(weights) - 1) / (_LAYERS - 1))] for i in range(_LAYERS)]


def _by_layer(names: list[str], curves: Curves) -> list[Series]:
    """Return one color per layer from first to last; what is no weight is dashed."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    series = []
    for name in names:
        layer, _, kind = name.rpartition(".")
        hue = round(layers.index(layer) * (_LAYERS - 1) / max(len(layers) - 1, 1))
        series.append(Series(name, curves.layers[name], f"s{hue}" + ("" if kind == "weight" else " dashed")))
    return series


def _stops(record: Record, pictures: Pictures) -> list[dict[str, Any]]:
    """Return the stops of the slider: what the page's script shows at each."""
    if record.curves is None or len(pictures.frames) < 2:
        return []

    def stop(x: int, label: str, objective: float, mse: float | None, images: Sequence[str]) -> dict[str, Any]:
        error = "" if mse is None else sig(mse)
        return {"x": x, "evaluations": label, "objective": sig(objective), "mse": error, "images": list(images)}

    curves, stops = record.curves, []
    for frame, images in zip(pictures.frames, pictures.snapshots, strict=True):
        x, mse = curves.iterations[frame], curves.mse[frame] if curves.mse else None
        stops.append(stop(x, f"{x:,}", curves.objectives[frame], mse, images))
    if stops[-1]["images"] != list(pictures.guess):
        x, mean = stops[-1]["x"], next((a.mean for a in record.aggregates if a.metric == "mse"), None)
        stops.append(stop(x, f"{x:,} (result)", record.outcome.objective, mean, pictures.guess))
    return stops
