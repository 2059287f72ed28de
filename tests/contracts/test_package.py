"""What an installed gradleak promises: its version, its types, and an import that costs little."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradleak
import gradleak.report

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def loaded_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def report_modules() -> list[str]:
    package = gradleak.report
    return [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + "."))]


def test_version_is_the_same_everywhere() -> None:
    assert gradleak.__version__ == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation


def test_version_matches_installed_metadata() -> None:
    try:
        installed = importlib.metadata.version("gradleak")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gradleak runs from its folder, without being installed")
    assert installed == gradleak.__version__


def test_type_marker_ships() -> None:
    assert importlib.resources.files("gradleak").joinpath("py.typed").is_file()


def test_importing_gradleak_loads_no_heavy_package() -> None:
    heavy = {
        "transformers",
        "tokenizers",
        "torchvision",
        "datasets",
        "matplotlib",
        "skimage",
        "jinja2",
        "rich",
        "typer",
    }
    assert not loaded_after("import gradleak") & heavy


def test_the_probe_sees_what_is_loaded() -> None:
    assert "jinja2" in loaded_after("import gradleak, jinja2")


@pytest.mark.parametrize("module", report_modules())
def test_report_never_loads_torch(module: str) -> None:
    assert "torch" not in loaded_after(f"import {module}")


def test_every_public_name_resolves() -> None:
    missing = [name for name in gradleak.__all__ if not hasattr(gradleak, name)]
    assert not missing


def test_constraints_pin_every_core_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    wanted = {dependency.partition(">=")[0].lower() for dependency in PROJECT["dependencies"]}
    assert wanted <= pinned
    assert not [line for line in lines if "+" in line.partition("#")[0]], "local version suffixes exclude other wheels"
