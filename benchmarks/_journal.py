"""Rows kept as they come, so that a long benchmark that is stopped goes on where it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from _common import RESULTS


class Journal:
    """Measured rows by key in results/NAME.partial.jsonl, which is removed once the table is written."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.partial.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.rows = {entry["key"]: entry["row"] for entry in map(json.loads, text.splitlines())}
        self.used: set[str] = set()

    def row(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a key, measured now unless it has been before."""
        self.used.add(key)
        if key not in self.rows:
            self.rows[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": self.rows[key]}) + "\n")
            print(key, self.rows[key], file=sys.stderr, flush=True)
        return dict(self.rows[key])

    def finish(self) -> None:
        """Forget the rows once the table holds them; rows that a smaller run did not ask for stay."""
        if self.used == set(self.rows):
            self.path.unlink(missing_ok=True)
