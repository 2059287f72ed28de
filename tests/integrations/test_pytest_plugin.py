"""The pytest plugin: passes and fails with the audit, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["gradleak.integrations.pytest_plugin"]

PLAN = """
[audit]
seeds = 1
budget = 5
attacks = ["linear_inversion"]
[[case]]
model = "perceptron"
model_arg = { width = 16, depth = 1 }
data = "synthetic"
input_shape = [1, 4, 4]
classes = 3
examples = 20
FILTERS
"""


def test_a_leak_fails_and_noise_passes(assert_leakage_below, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("FILTERS", ""))
    with pytest.raises(pytest.fail.Exception, match="Above the target"):
        assert_leakage_below(plan, 0.5)
    plan.write_text(PLAN.replace("FILTERS", 'filters = ["clip:norm=1", "gaussian_noise:sigma=9"]'))
    assert_leakage_below(plan, 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "evidence.html").is_file()
