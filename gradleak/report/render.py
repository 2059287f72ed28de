"""A record and its pictures become one HTML page."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from gradleak.audit.numbers import duration, sig
from gradleak.audit.records import Aggregate, Curves, Pictures, Record
from gradleak.report.charts import Series, log_chart

__all__ = ["render"]

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

_HEADLINE = ("mse", "psnr", "ssim")
_HEADLINE_VALUES = ("relative_error",)

_STATUS = {
    "converged": "ended because the update was matched",
    "budget": "ended because its iterations or time were used up",
    "stalled": "ended because it made no more progress",
    "interrupted": "was interrupted; this is the best it had found by then",
    "exact": "solved the equations directly",
}


@dataclass(frozen=True)
class _Chart:
    title: str
    text: str
    svg: Markup
    legend: tuple[Series, ...] = ()


def render(record: Record, pictures: Pictures) -> str:
    """Return one self-contained HTML page: it loads nothing, and every string of the record is escaped."""
    template = _environment().get_template("report.html")
    return template.render(
        r=record,
        p=pictures,
        told=[_TOLD[k] for k in record.threat.granted if k in _TOLD],
        acts=[_ACTS[k] for k in record.threat.granted if k in _ACTS],
        untold=[_TOLD[k] for k in record.threat.withheld if k in _TOLD],
        ended=_STATUS.get(record.outcome.status, record.outcome.status),
        charts=_charts(record.curves),
        stops=_stops(record, pictures),
        figures=_figures(record),
        noun=_noun(record),
        columns=_columns(record),
        relative=_relative(record),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradleak.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(sig=sig, duration=duration, shape=_shape, metric=_metric)
    return environment


def _shape(shape: tuple[int, ...]) -> str:
    return "\u202f×\u202f".join(map(str, shape)) or "one number"


def _noun(record: Record) -> str:
    return "image" if record.subject.input_kind == "image" else "example"


def _relative(record: Record) -> bool:
    """Return whether the examples are values of their own units; earlier versions scored those by their MSE as well."""
    return record.subject.input_kind != "image" and any("relative_error" in e.values for e in record.examples or ())


def _columns(record: Record) -> list[tuple[str, str]]:
    """Return the metrics of the table as (name, heading); labels have columns of their own."""
    units = {a.metric: a.unit for a in record.aggregates if a.metric != "label_accuracy"}
    return [(name, _metric(name) + (f", {unit}" if unit else "")) for name, unit in units.items()]


def _metric(name: str) -> str:
    return name.upper() if len(name) <= 4 else name.replace("_", " ")


def _figures(record: Record) -> list[tuple[str, str]]:
    """Return the key figures under the headline: (name, value)."""
    figures: list[tuple[str, str]] = []
    many = record.examples is not None and len(record.examples) > 1
    for aggregate in record.aggregates:
        if aggregate.metric in (_HEADLINE_VALUES if _relative(record) else _HEADLINE):
            name = _metric(aggregate.metric)
            name = name[:1].upper() + name[1:] + (", median" if many else "")
            figures.append((name, _value(aggregate)))
    known = [e for e in record.examples or () if e.label is not None and e.recovered is not None]
    if known:
        figures.append(("Class recovered", f"{sum(e.label == e.recovered for e in known)} of {len(known)}"))
    if record.examples is None and record.match is not None:
        figures.append(("Residual of the update", sig(record.match.residual)))
        certificate = record.certificate
        measured = certificate is not None and certificate.floor > 0
        floor = certificate.floor if certificate is not None and measured else record.match.floor
        figures.append(("Noise floor of its format", sig(floor)))
    figures.append(("Time", duration(record.outcome.seconds)))
    return figures


def _value(aggregate: Aggregate) -> str:
    digits = 2 if aggregate.metric in ("mse", "relative_error") else 3
    return sig(aggregate.median, digits) + (f"\u202f{aggregate.unit}" if aggregate.unit else "")


def _charts(curves: Curves | None) -> list[_Chart]:
    if curves is None:
        return []
    xs = curves.iterations
    charts: list[_Chart] = []

    def add(title: str, text: str, series: list[Series], legend: bool = False) -> None:
        if series and all(len(s.values) == len(xs) for s in series):
            svg = log_chart(title, "evaluations", xs, series)
            if svg is not None:
                charts.append(_Chart(title, text, svg, tuple(series) if legend else ()))

    add(
        "Objective",
        "What the attacker minimizes: the distance between the captured update and that of its candidate.",
        [Series("objective", curves.objectives, "main")],
    )
    if curves.mse:
        add(
            "Error to the private data",
            "Mean squared error over all examples. The attacker cannot see this curve.",
            [Series("MSE", curves.mse, "main")],
        )
    names = _chosen(list(curves.layers))
    skipped = f" {len(names)} of {len(curves.layers)} tensors are drawn." if len(names) < len(curves.layers) else ""
    add(
        "Gradient distance by layer",
        "Squared distance per parameter tensor, first layer to last (Zhu et al. 2019, Figure 5)." + skipped,
        _by_layer(names, curves),
        legend=True,
    )
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
    stops: list[dict[str, Any]] = []
    for frame, images in zip(pictures.frames, pictures.snapshots, strict=True):
        stops.append(
            {
                "x": record.curves.iterations[frame],
                "evaluations": f"{record.curves.iterations[frame]:,}",
                "objective": sig(record.curves.objectives[frame]),
                "mse": sig(record.curves.mse[frame]) if record.curves.mse else "",
                "images": list(images),
            }
        )
    if stops[-1]["images"] != list(pictures.guess):
        last = stops[-1]
        mean = next((a.mean for a in record.aggregates if a.metric == "mse"), None)
        stops.append(
            {
                "x": last["x"],
                "evaluations": f"{last['x']:,} (result)",
                "objective": sig(record.outcome.objective),
                "mse": "" if mean is None else sig(mean),
                "images": list(pictures.guess),
            }
        )
    return stops
