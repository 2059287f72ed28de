"""Curves as inline SVG: logarithmic axes, labelled ticks, no dependency and no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from gradleak.audit.numbers import power, sig

__all__ = ["Series", "log_chart"]

_W, _H = 440, 268
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44
_POINTS = 500
_ENDS = 1e-301, 1e301


@dataclass(frozen=True)
class Series:
    """One curve: a name, its values, and the style class that colors it."""

    name: str
    values: tuple[float, ...]
    style: str = "s0"


def log_chart(label: str, x_label: str, xs: Sequence[float], series: Sequence[Series]) -> Markup | None:
    """Return an SVG of ``series`` over ``xs``, or None where nothing can be drawn.

    The value axis is logarithmic; the other one is log(1 + x), which shows 0, where it goes beyond a hundred. Values
    that are zero, negative, not finite or at the ends of float64 leave a gap. The marker line that follows the slider
    is moved by the page's script from the ``data-`` attributes.
    """
    positive = [v for s in series for v in s.values if _drawn(v)]
    if len(xs) < 2 or xs[0] < 0 or xs[-1] <= xs[0] or min(xs) < xs[0] or not positive:
        return None
    ticks, low, high = _log_ticks(min(positive), max(positive))
    x0, x1, y0, y1 = _LEFT, _W - _RIGHT, _H - _BOTTOM, _TOP

    logarithmic = xs[-1] > 100
    along = math.log1p if logarithmic else float
    left, right = along(xs[0]), along(xs[-1])

    def px(x: float) -> float:
        return x0 + (along(x) - left) / (right - left) * (x1 - x0)

    def py(y: float) -> float:
        return y0 + (math.log10(y) - low) / (high - low) * (y1 - y0)

    summary = escape(_summary(label, x_label, xs, series))
    parts = [
        f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{summary}" '
        f'data-min="{xs[0]}" data-max="{xs[-1]}" data-left="{x0}" data-right="{x1}" data-log="{int(logarithmic)}">'
    ]
    for value, text in ticks:
        y = py(value)
        parts.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x in _decades(xs[0], xs[-1]) if logarithmic else _linear_ticks(xs[0], xs[-1]):
        parts.append(f'<line class="axis" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{y0}" y2="{y0 + 4}"/>')
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{y0 + 18}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<line class="axis" x1="{x0}" x2="{x1}" y1="{y0}" y2="{y0}"/>')
    parts.append(f'<line class="marker" x1="{x1}" x2="{x1}" y1="{y0}" y2="{y1}"/>')
    for s in series:
        path = _path([(px(x), py(v) if _drawn(v) else None) for x, v in zip(xs, s.values, strict=True)])
        parts.append(f'<path class="line {escape(s.style)}" d="{path}"><title>{escape(s.name)}</title></path>')
    parts.append(
        f'<text class="axis-label" x="{(x0 + x1) / 2}" y="{_H - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return Markup("".join(parts) + "</svg>")


def _drawn(value: float) -> bool:
    return _ENDS[0] < value < _ENDS[1]


def _summary(label: str, x_label: str, xs: Sequence[float], series: Sequence[Series]) -> str:
    if len(series) != 1:
        return f"{label}: {len(series)} curves from {xs[0]:,.0f} to {xs[-1]:,.0f} {x_label}"
    first, last = series[0].values[0], series[0].values[-1]
    return f"{label}: from {sig(first)} at {xs[0]:,.0f} {x_label} to {sig(last)} at {xs[-1]:,.0f}"


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    step = max(1, math.ceil(len(points) / _POINTS))
    kept = [p for i, p in enumerate(points) if i % step == 0 or i == len(points) - 1]
    out, pen = [], "M"
    for x, y in kept:
        if y is None:
            pen = "M"
            continue
        out.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(out)


def _log_ticks(smallest: float, largest: float) -> tuple[list[tuple[float, str]], float, float]:
    """Return (value, text) ticks and the axis limits in decades."""
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    if high - low <= 1:
        low, high = min(low, high - 1), max(high, low + 1)
        values = [(m * 10.0**low, f"{m * 10.0**low:g}" if low >= -3 else f"{m}·{power(low)}") for m in (1, 2, 5)]
        return [*values, (10.0**high, f"{10.0**high:g}" if high >= -3 else power(high))], low, high
    step = max(1, math.ceil((high - low) / 6))
    # Whole steps, so that both ends of the axis carry a label.
    low = math.floor(low / step) * step
    high = math.ceil(high / step) * step
    return [(10.0**e, power(e)) for e in range(low, high + 1, step)], low, high


def _decades(low: float, high: float) -> list[float]:
    decades = [0.0, *(10.0**k for k in range(math.ceil(math.log10(high)) + 1))]
    return [x for x in decades if low <= x <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = max(1.0, next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw))
    step = math.ceil(step)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]
