"""The page of an audit: every string is escaped, the worst is shown, and everything is there without a script."""

from __future__ import annotations

import re

import numpy as np

from gradleak.report.evidence import render_evidence, specimens

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}"


def values(errors: list[float], *, limit: float = 1e-3) -> dict:
    examples = [
        {"index": i, "recovered": e <= limit, "proved": e < 1e-8, "error": e, "words": ""} for i, e in enumerate(errors)
    ]
    pictures = np.zeros((len(errors), 1, 4, 4), dtype=np.float32)
    return {"examples": examples, "error_name": "MSE", "guess": pictures, "truth": pictures}


def test_the_page_says_the_verdict_first_and_names_what_was_not_tried(evidence) -> None:
    page = render_evidence(evidence())
    assert page.index("Above the target") < page.index("What attackers got") < page.index("What was not tried")
    assert "0" * 64 in page
    assert page.count("<h1>") == 1
    assert 'role="img" aria-label="ward, batch 1, round 2: 33\u202f% came back' in page


def test_every_string_is_escaped(evidence) -> None:
    page = render_evidence(evidence(word=EVIL))
    assert "<img src=x" not in page
    assert len(re.findall(r"<script", page)) == 2


def test_many_trials_are_folded_and_the_rest_is_in_the_data(evidence) -> None:
    page = render_evidence(evidence(3000))
    assert page.count("<tr>") < 100
    assert page.count('"00000000"') == 3001
    assert len(page) < 1_000_000


def test_recovered_examples_are_shown_and_else_the_closest() -> None:
    shown, recovered = specimens([("a", values([0.5, 1e-10])), ("b", values([0.2]))])
    assert recovered
    assert [s.title for s in shown] == ["a"]
    assert "proved" in shown[0].words
    shown, recovered = specimens([("a", values([0.5])), ("b", values([0.2]))])
    assert not recovered
    assert [s.title for s in shown] == ["b", "a"]
    assert specimens([("a", {"refused": "no"})]) == ([], False)


def test_numbers_without_truth_are_not_known(evidence) -> None:
    told = evidence()
    told["lower_bound"][0]["recovered"] = {"count": None, "share": None, "low": 0.0, "high": 1.0}
    assert "not known" in render_evidence(told)
