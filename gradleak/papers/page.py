"""The pages of a reproduced paper: one table in Markdown, and every figure in one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradleak.errors import InvalidFile
from gradleak.files import read_file
from gradleak.papers.expected import reached
from gradleak.papers.experiment import Row

__all__ = ["to_html", "to_markdown"]

_COLUMNS = (
    "measurement", "paper", "published algorithm", "our attacker", "target", "n", "95 % interval", "cost", "note",
)  # fmt: skip


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.3g}"
    return "—" if value is None else str(value)


def _interval(value: Any) -> str:
    return f"[{value['low']:.3g}, {value['high']:.3g}]" if isinstance(value, Mapping) else ""


def _cells(row: Mapping[str, Any], record: Mapping[str, Any], scale: str) -> tuple[str, ...]:
    target = record.get("target", "")
    met = {True: f"{target} (reached)", False: f"{target} (missed)", None: target}[reached(row, target)]
    both = [("ours ", row["ours"]), ("published ", row["published"])]
    present = [(label, v) for label, v in both if isinstance(v, Mapping)]
    intervals = "; ".join((label if len(present) > 1 else "") + _interval(v) for label, v in present)
    paper = record.get("paper", "")
    source = f" ({record['source']})" if record.get("source") else ""
    note = ". ".join(s.rstrip(".") for s in (row["note"], record.get("why", ""), scale) if s)
    unit = f", {row['unit']}" if row["unit"] else ""
    n = next((str(v["n"]) for _, v in present), "")
    published, ours = _number(row["published"]), _number(row["ours"])
    said = f"{paper}{source}" if paper != "" else "not given"
    return (row["name"] + unit, said, published, ours, met, n, intervals, row["cost"], note)


def _tables(
    known: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Iterable[tuple[str, Mapping[str, Any] | None, list[tuple[str, ...]]]]:
    """Yield (experiment, its stored result, its cells), the rows that nobody has measured yet among them."""
    for name in dict.fromkeys([*expected, *known]):
        stored = known.get(name)
        rows = [] if stored is None else stored["rows"]
        table = expected.get(name, {})
        scale = "" if stored is None or not stored["scaled"] else _scaled(stored, "scaled down")
        cells = [_cells(row, table.get(row["name"], {}), scale) for row in rows]
        for missing in [k for k in table if k not in {row["name"] for row in rows}]:
            empty = asdict(Row(missing, None, note="not measured here"))
            cells.append(_cells(empty, table[missing], ""))
        yield name, stored, cells


def _scaled(stored: Mapping[str, Any], how: str) -> str:
    return how if stored["gpu"] else f"{how}; not measured on a GPU"


def _origin(stored: Mapping[str, Any]) -> str:
    difference = f" Scaled down: {_scaled(stored, stored['scaled'])}." if stored["scaled"] else ""
    return (
        f"Scale: {stored['scale']}. {stored['hardware']}, {stored['date']}, {stored['seconds']:.0f} s in the last run "
        f"(what was stored before is not counted; costs per example are in the table).{difference}"
    )


def to_markdown(paper: str, known: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the table page: the stored results ``known`` beside what is ``expected``, both by experiment."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    parts = [
        f"# {paper}: the paper's numbers beside ours\n",
        f"Written by `gradleak reproduce {paper}`; every measured number here was computed from the records of a run. "
        "By hand come what the paper says, the targets, and explanations in the notes, which hold no measured number. "
        "“Published algorithm” is the paper's own attack as it was published, run again by us; “our attacker” is "
        "gradleak's best one. Intervals are 95 % intervals.\n",
    ]
    for name, stored, cells in _tables(known, expected):
        parts.append(f"## {name}\n")
        if stored is not None:
            parts.append(f"{stored['title']}\n\n{_origin(stored)}\n")
        parts += [line(_COLUMNS), line(["---"] * len(_COLUMNS)), *map(line, cells), ""]
        for title, text in (stored or {}).get("texts", {}).items():
            parts.append(f"**{title}**\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;"
    "vertical-align:top}th{background:#f2f2f2}pre{background:#f6f6f6;padding:1em;overflow-x:auto;white-space:pre-wrap}"
    "img{max-width:100%}figcaption{color:#555}"
)


def to_html(paper: str, known: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> str:
    """Return the page with the figures, whose pictures are in ``folder``; it loads nothing."""

    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    title = html.escape(f"{paper}: the paper's numbers beside ours")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1>"
    ]
    for name, stored, cells in _tables(known, expected):
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if stored is not None:
            parts.append(f"<p>{html.escape(stored['title'])}</p><p>{html.escape(_origin(stored))}</p>")
        parts.append("<table>" + line("th", _COLUMNS) + "".join(line("td", c) for c in cells) + "</table>")
        for heading, text in (stored or {}).get("texts", {}).items():
            parts.append(f"<h3>{html.escape(heading)}</h3><pre>{html.escape(text)}</pre>")
        for figure in (stored or {}).get("figures", []):
            parts.append(
                f"<figure>{_picture(folder / figure['file'], figure['name'])}"
                f"<figcaption>{html.escape(figure['caption'])}</figcaption></figure>"
            )
    return "".join(parts) + "</body></html>\n"


def _picture(path: Path, name: str) -> str:
    try:
        picture = base64.b64encode(read_file(path)).decode()
    except InvalidFile:
        return f"<p>{html.escape(name)}: this picture is missing; run the experiment again.</p>"
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{picture}">'
