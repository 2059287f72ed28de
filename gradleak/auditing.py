"""Audits as people call them: the plan is tried, and evidence and its page are written."""

from __future__ import annotations

from pathlib import Path

from gradleak.audit.running import Audit, Told, run
from gradleak.files import write_bytes
from gradleak.report.evidence import render_evidence, specimens

__all__ = ["PAGE", "run_audit", "write_page"]

PAGE = "evidence.html"


def run_audit(
    plan: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    fail_above: float | None = None,
    executor: str = "here",
    jobs: int = 2,
    address: str | None = None,
    retry_failed: bool = False,
    command: str = "",
    told: Told | None = None,
) -> Audit:
    """Try what a plan says, and write ``evidence.json`` and ``evidence.html`` into ``out``.

    Arguments and errors are those of :func:`gradleak.audit.running.run`.
    """
    audit = run(
        plan,
        out,
        data=data,
        fail_above=fail_above,
        executor=executor,
        jobs=jobs,
        address=address,
        retry_failed=retry_failed,
        command=command,
        told=told,
    )
    write_page(audit, Path(out))
    return audit


def write_page(audit: Audit, out: Path) -> None:
    """Write the page of an audit.

    Raises:
        InvalidFile: it cannot be written there.
    """
    shown, recovered = specimens(
        (f"{t.case.name}, batch of {t.batch_size}, seed {t.seed}", v) for t, v in audit.measured if t.kind == "attack"
    )
    page = render_evidence(audit.evidence, shown, recovered=recovered)
    write_bytes(out / PAGE, page.encode("utf-8", errors="replace"))
