"""One self-contained HTML file per reconstruction, rendered from its record alone; torch is never imported."""

from __future__ import annotations

from gradleak.report.pictures import picture
from gradleak.report.render import render

__all__ = ["picture", "render"]
