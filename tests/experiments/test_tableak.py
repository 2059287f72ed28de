"""TabLeak's experiment: its smoke version runs and fills its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradleak.papers.reproduce import reproduce


@pytest.mark.slow
@pytest.mark.data
def test_smoke(data_dir: Path, tmp_path: Path) -> None:
    done = reproduce("2023_vero_tableak", scale="smoke", data=data_dir, out=tmp_path)
    rows = {row["name"]: row for row in done.results["training"]["rows"]}
    assert len(rows) == 8
    for number in (1, 5, 10, 15):
        assert 0 < rows[f"cells right, epoch {number}"]["ours"]["value"] <= 1
        assert 0 <= rows[f"rows exact, epoch {number}"]["ours"]["value"] <= 1
