from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra 'text' is not installed")

from gradleak.papers.reproduce import reproduce


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_reads_the_pages_sentence(data_dir: Path, tmp_path: Path) -> None:
    done = reproduce("2019_zhu_dlg", only="text", scale="smoke", data=data_dir, out=tmp_path)
    result = done.results["text"]
    rows = {row["name"]: row for row in result["rows"]}
    for kind in ("random weights", "trained"):
        assert rows[f"token accuracy, {kind}, batch 1"]["ours"]["value"] == 1.0
        assert rows[f"sentences read without an error and proved, {kind}, batch 1"]["ours"]["value"] == 1.0
        told = result["texts"][f"The project page's sentence, {kind}, ours, read (proved)"]
        assert told.startswith("registration , volunteer applications , and student travel application open")
        leak = rows[f"share of a sentence's tokens named by the word-embedding gradient, {kind}"]
        assert leak["ours"]["value"] > 0.9
    assert all(math.isfinite(row["ours"]["value"]) for row in rows.values() if isinstance(row["ours"], dict))
    assert "data:image/png;base64," in done.html.read_text()
