"""The documentation: its Python blocks run, what it names exists, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import gradleak as gl
from gradleak.errors import NotApplicable

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
RUN = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{p}.md" for p in ("quickstart", "tables", "text", "threat-models", "defenses", "capture")),
    ROOT / "docs" / "extend.md",
]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


STRICT = ("-W", "error", "-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""Warnings are errors but for what PEFT asks of transformers."""

RUNNER = """
import runpy, shlex, sys
for path in sys.argv[1:]:
    if path.endswith(".py"):
        runpy.run_path(path, run_name="__main__")
        continue
    from gradleak.cli import main
    for line in open(path):
        sys.argv = shlex.split(line)
        try:
            main()
        except SystemExit as end:
            assert not end.code, line
"""
"""One process for all blocks, each in a namespace of its own: importing torch takes longer than most of them."""


def run(files: list[Path], folder: Path, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, *options, "-c", RUNNER, *map(str, files)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def blocks(page: Path, info: str = "python") -> list[str]:
    return [code for head, code in _FENCE.findall(page.read_text(encoding="utf-8")) if head.startswith(info)]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.slow
def test_blocks_run_in_an_empty_folder(tmp_path: Path) -> None:
    files = []
    for page in RUN:
        codes = blocks(page)
        assert codes, f"{page.name} has no Python block"
        for number, code in enumerate(codes):
            files.append(tmp_path / f"{page.stem}_{number}.py")
            files[-1].write_text(code, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    run(files, tmp_path / "empty", *STRICT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "proved"),
    [
        (("docs/quickstart.md", "README.md"), "The update proves that the client trained on this image."),
        (("docs/tables.md",), "The update proves that the client trained on these 2 rows."),
    ],
)
def test_commands_run_in_an_empty_folder(pages: tuple[str, ...], proved: str, tmp_path: Path) -> None:
    text = "\n".join(b for page in pages for b in blocks(ROOT / page, "bash"))
    lines = [" ".join(shlex.split(line, comments=True)) for line in text.replace("\\\n", " ").splitlines()]
    commands = [
        c for c in dict.fromkeys(lines) if c.startswith(("gradleak attack", "gradleak report", "gradleak list"))
    ]
    assert len(commands) >= 2
    capture = tmp_path / "capture.py"
    capture.write_text(next(b for b in blocks(ROOT / pages[0]) if "U.safetensors" in b))
    (tmp_path / "commands").write_text("\n".join(commands).replace("--budget 20s", "--budget 1s"))
    (tmp_path / "empty").mkdir()
    run([capture, tmp_path / "commands"], tmp_path / "empty")
    found = json.loads((tmp_path / "empty" / "leak" / "result.json").read_text(encoding="utf-8"))
    assert found["verdict"]["headline"] == proved
    assert (tmp_path / "empty" / "leak-scored" / "report.html").exists()


@pytest.mark.slow
def test_language_models_are_captured_and_read(tmp_path: Path) -> None:
    """Plain PyTorch, a Trainer with a callback and PEFT, each followed by the command of the page."""
    text = section(ROOT / "docs/capture.md", "Language models")
    files = []
    for number, (head, code) in enumerate(_FENCE.findall(text)):
        files.append(tmp_path / f"{number}{'.py' if head.startswith('python') else ''}")
        files[-1].write_text(code, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    run(files, tmp_path / "empty")
    said = {p.parent.name: p.read_text().splitlines() for p in (tmp_path / "empty").glob("*/sentences.txt")}
    both = ["she had no fever in the morning", "the patient was given the new drug on monday"]
    for folder in ("leak", "leak-trainer"):
        assert sorted(said[folder]) == both
        found = json.loads((tmp_path / "empty" / folder / "result.json").read_text(encoding="utf-8"))
        assert found["verdict"]["grade"] == "proved"
    # An adapter's gradients hold the last word as a label only.
    assert both[1].startswith(said["leak-lora"][0])
    assert len(said["leak-lora"][0].split()) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        # The site is built from docs/ alone.
        assert page.parent == ROOT or file.is_relative_to(ROOT / "docs"), f"{page.name} links out of docs/: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, but there is no such heading"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    lacking = [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in navigation]
    assert not lacking


def section(page: Path, heading: str) -> str:
    return page.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "Attacks"), ("docs/threat-models.md", "What each attack needs")]
)
def test_attack_tables_name_all_attacks(page: str, heading: str) -> None:
    first_cells = [row.split("|")[1] for row in section(ROOT / page, heading).splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) == set(gl.attacks.__all__)


def test_the_table_of_needs_says_that_recursion_solves_batches_too() -> None:
    text = (ROOT / "docs" / "threat-models.md").read_text(encoding="utf-8")
    needs = next(row for row in text.splitlines() if row.startswith("| `recursion` |")).split("|")[2]
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = gl.models.perceptron(image_size=8, seed=0)
    client = gl.Client(model, gl.Batch(images, torch.tensor([3, 14])))
    found = gl.simulate(client, gl.attacks.recursion()).reconstruction
    assert gl.metrics.mse(found.inputs, images).max() < 1e-8
    with pytest.raises(NotApplicable, match="TRAINING"):
        gl.simulate(client, gl.attacks.recursion(), threat=gl.ThreatModel(gl.Knowledge.BATCH_SIZE))
    assert needs.strip() == "`BATCH_SIZE`; `TRAINING` for a batch"


def test_flags_of_knowledge_are_explained() -> None:
    rows = re.findall(
        r"^\| `(\w+)`", section(ROOT / "docs" / "threat-models.md", "What a threat model may grant"), re.M
    )
    assert set(rows) == {flag.name for flag in gl.Knowledge if flag.value}


def test_words_of_certificates_are_explained_once() -> None:
    rows = re.findall(r"^\| `(\w+)`", section(ROOT / "docs" / "threat-models.md", "What a result proves"), re.M)
    assert rows == [verdict.value for verdict in sorted(gl.Verdict, key=lambda v: -v.strength)]


def test_defenses_that_the_readme_names_exist() -> None:
    named = [n for n in re.findall(r"`(\w+)`", section(ROOT / "README.md", "Defenses")) if n.islower()]
    assert set(named) == {n for n in gl.defenses.__all__ if n.islower()}


def test_options_that_the_pages_name_exist() -> None:
    from gradleak.cli import commands

    functions = (
        commands.demo,
        commands.attack,
        commands.audit,
        commands.inspect,
        commands.report,
        commands.list_names,
        commands.reproduce,
    )
    known = {"--help", "--version"} | {
        "--" + name.replace("_", "-") for f in functions for name in inspect.signature(f).parameters
    }
    for name in (
        "README.md",
        "docs/quickstart.md",
        "docs/tables.md",
        "docs/audit.md",
        "docs/command-line.md",
        "docs/capture.md",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
        assert used <= known, f"{name} names {sorted(used - known)}"


def contract_tests() -> types.ModuleType:
    path = ROOT / "tests" / "contracts" / "test_attacks.py"
    spec = importlib.util.spec_from_file_location("contract_tests_of_the_documentation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHOWN = [b for page in ("docs/extend.md", "CONTRIBUTING.md") for b in blocks(ROOT / page, 'python title="attack"')]


@pytest.mark.parametrize(("number", "name"), list(enumerate(("first_layer", "smooth_dlg", "gray_guess"))))
def test_attacks_that_pages_show_keep_the_contract(number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    exec(compile(SHOWN[number], name, "exec"), module.__dict__)
    monkeypatch.setattr(gl.attacks, name, getattr(module, name), raising=False)
    contract = contract_tests()
    checks = [f for n, f in vars(contract).items() if n.startswith("test_") and n != "test_runs_on_cuda"]
    assert len(checks) >= 5
    for check in checks:
        check(name)


def test_the_attack_shown_in_extend_is_short() -> None:
    lines = [line for line in SHOWN[0].splitlines() if line.strip()]
    assert len(lines) <= 20
