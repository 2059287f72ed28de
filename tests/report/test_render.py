from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradleak import metrics
from gradleak.audit.numbers import duration, power, sig
from gradleak.audit.records import (
    Aggregate,
    AttemptRecord,
    CertificateRecord,
    Curves,
    Example,
    FindingRecord,
    Lift,
    Match,
    Outcome,
    Pictures,
    Shown,
    Success,
    from_json,
    to_json,
)
from gradleak.audit.verdict import judge_refusal
from gradleak.report import picture, render
from gradleak.report.charts import Series, log_chart
from gradleak.report.pictures import encode_png

VOID = {"meta", "link", "img", "br", "input", "line", "path"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(params=["one", "five", "blind", "blind batch"])
def shown(request, case):
    return case({"one": 1, "five": 5, "blind": 1, "blind batch": 3}[request.param], truth="blind" not in request.param)


def test_the_page_is_well_formed_and_loads_nothing(shown) -> None:
    html = render(shown.record, shown.pictures)
    page = Page(html)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "data:,")), (tag, name, value)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org)|fetch\(|XMLHttp|<iframe|<object", html)


def test_verdict_comes_first(shown) -> None:
    html = render(shown.record, shown.pictures)
    page = Page(html)
    headings = [t for t, _ in page.tags if t in ("h1", "h2", "h3")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert page.words.index(shown.record.verdict.reason.split(".")[0][:20]) < page.words.index("What came back")


def test_everything_a_reader_needs_is_there(case) -> None:
    good = case(3)
    words = Page(render(good.record, good.pictures)).words
    for needed in (
        "lenet",
        "90,812 parameters",
        "Was told",
        "the number of examples",
        "Was not told",
        "the labels of the examples",
        "solver=lbfgs",
        "Worst example",
        "Against guesses that never saw the update",
        "Gradient distance by layer",
        "The dummy label was optimized together with the image.",
        "What would stop it",
        "What this report cannot say",
        "gradleak attack --model lenet",
        "torch 2.13.0",
        "contains private data",
    ):
        assert needed in words, needed


def test_without_truth_no_score_is_shown(case) -> None:
    blind = case(1, truth=False)
    html = render(blind.record, blind.pictures)
    words = Page(html).words
    assert "Private image" not in words
    assert "PSNR" not in words
    assert "Residual of the update" in words
    assert "Error to the private data" not in words


def test_the_worst_example_is_first(case) -> None:
    good = case(5)
    rows = re.findall(r'<tr><th scope="row">(\d+)</th><td>', render(good.record, good.pictures))
    assert rows[:5] == [str(e.index + 1) for e in good.record.examples]
    errors = [e.values["mse"] for e in good.record.examples]
    assert errors == sorted(errors, reverse=True)


def test_hostile_strings_stay_text(hostile) -> None:
    html = render(hostile.record, hostile.pictures)
    page = Page(html)
    assert len(re.findall(r"<script", html)) == 2
    assert not [a for t, a in page.tags if t == "img" and not (a.get("src") or "").startswith("data:image/png")]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "<script>alert(1)</script>" in page.words
    assert "{{7*7}}" in page.words


def test_slider_stops_carry_what_they_show(case) -> None:
    good = case(2)
    html = render(good.record, good.pictures)
    stops = json.loads(re.search(r'id="stops">(.*?)</script>', html, re.S)[1])
    assert [s["x"] for s in stops][: len(good.pictures.frames)] == [
        good.record.curves.iterations[k] for k in good.pictures.frames
    ]
    assert stops[-1]["images"] == list(good.pictures.guess)
    assert stops[-1]["evaluations"] == f"{good.record.curves.iterations[-1]:,}"
    assert "<dt>Evaluations</dt>" in html  # what the curves count; a step with a line search takes several
    assert "Recorded iteration" not in html
    assert not re.search(r"\d iteration|iteration \d", html.split('id="stops"')[0].split("<h3>The attacker")[0])
    assert all(len(s["images"]) == 2 and s["objective"] and s["mse"] for s in stops)


def test_a_closed_form_has_no_slider_and_no_curves(case) -> None:
    good = case(1)
    record = replace(good.record, curves=None)
    html = render(record, picture(record, good.inputs, good.truth, None))
    assert 'type="range"' not in html
    assert "How the attack went" not in html
    Page(html)


def test_values_that_are_no_images_become_a_table(case) -> None:
    good = case(1)
    subject = replace(good.record.subject, input_kind="tensor", input_shape=(30,), display="numbers")
    record = replace(good.record, subject=subject)
    inputs, truth = np.linspace(0, 1, 30)[None], np.linspace(0, 1, 30)[None] + 0.001
    pictures = picture(record, inputs, truth, None)
    assert len(pictures.values[0].names) == 24
    html = render(record, pictures)
    assert "<img" not in html
    assert "first 24 of 30 values" in Page(html).words
    Page(render(replace(record, examples=None), picture(replace(record, examples=None), inputs)))


def test_values_are_headed_by_their_relative_error(case) -> None:
    good = case(2)
    subject = replace(
        good.record.subject,
        input_kind="tensor",
        input_shape=(4,),
        noun="example",
        nouns="examples",
        display="numbers",
        quoted=("relative_error",),
    )
    values = {"mse": 62.0, "null_guess_ratio": 7e-4, "relative_error": 6e-4}
    record = replace(
        good.record,
        subject=subject,
        examples=tuple(Example(i, i, None, None, values) for i in range(2)),
        aggregates=tuple(Aggregate(k, "", 2, v, 0.0, v, v, v, getattr(metrics, k).meaning) for k, v in values.items()),
        success=replace(good.record.success, error="squared relative error"),
        lifts=(),
        curves=None,
    )
    inputs = np.ones((2, 4))
    html = render(record, picture(record, inputs, inputs))
    words = Page(html).words
    figures = re.search(r'<dl class="figures">(.*?)</dl>', html, re.S)[1]
    assert "Relative error, median" in figures
    assert "MSE" not in figures
    assert "1 of 2 examples count as recovered: squared relative error at most 0.0010" in words
    assert "each divided by the size" in words
    assert "pixel" not in words


SUBJECT = {"input_kind": "tokens", "noun": "sentence", "nouns": "sentences", "display": "text", "quoted": ()}


def sentences(record, truth: bool):
    shown = Shown((), (("play", "##ing", "chess", "well"),), (("play", "##ing", "go", "well"),) if truth else None)
    examples = (Example(0, 0, None, None, {}),) if truth else None
    subject = replace(record.subject, batch_size=1, **SUBJECT)
    return replace(record, subject=subject, shown=shown, examples=examples, curves=None)


@pytest.mark.parametrize("truth", [True, False])
def test_sentences_stand_side_by_side(case, truth: bool) -> None:
    record = sentences(case(1, truth=truth).record, truth)
    ids = np.array([[1, 2, 3, 4]])
    html = render(record, picture(record, ids, ids if truth else None))
    words = Page(html).words
    assert "playing chess well" in words.replace("  ", " ")
    assert ("playing go well" in words) is truth
    assert re.findall(r"<mark>(.*?)</mark>", html) == (["chess"] if truth else [])
    assert "<img" not in html
    assert ("Sentence 1" in words) is truth


def test_words_are_compared_in_their_order(case) -> None:
    record = sentences(case(1).record, True)
    shown = Shown((), (("we", "play", "##ed", "chess", "", ""),), (("we", "all", "play", "##s", "chess", ""),))
    ids = np.zeros((1, 6))
    html = render(replace(record, shown=shown), picture(replace(record, shown=shown), ids, ids))
    assert re.findall(r"<mark>(.*?)</mark>", html) == ["played"]
    assert re.findall(r'<mark class="missed">(.*?)</mark>', html) == ["all", "plays"]
    nothing = replace(shown, guess=(("", "", "", "", "", ""),))
    html = render(replace(record, shown=nothing), picture(replace(record, shown=nothing), ids, ids))
    assert "nothing was read" in html


def test_a_row_of_named_texts_is_a_table(case) -> None:
    record = sentences(case(1).record, True)
    record = replace(record, shown=Shown(("age", "job"), (("39", "clerk"),), (("39", "nurse"),)))
    html = render(record, picture(record, np.zeros((1, 2)), np.zeros((1, 2))))
    assert '<tr><th scope="row">job</th><td>nurse</td><td>clerk</td></tr>' in html


class TestWithoutAScore:
    def blind(self, case, **changes):
        record = case(1, truth=False).record
        return replace(record, **changes)

    def test_findings_and_who_won(self, case) -> None:
        finding = FindingRecord("labels", "The classes of 58 of 64 images were read.", False, 58, 64)
        outcome = replace(case(1, truth=False).record.outcome, findings=(finding,), attack="labels")
        attempts = (
            AttemptRecord("recursion", False, None, "A layer is too narrow."),
            AttemptRecord("dlg", True, "unproved", ""),
        )
        notes, kinds = ("recursion: not taken. A layer is too narrow.", "Mind the range."), ("attempt", "range")
        outcome = replace(outcome, attempts=attempts, notes=notes, note_kinds=kinds)
        words = Page(render(self.blind(case, outcome=outcome), case(1, truth=False).pictures)).words
        assert "Mind the range." in words
        assert "not taken" not in words  # The table of what was tried says it already.
        assert "Labels read 58 of 64" in words
        assert "The classes of 58 of 64 images were read. This is an estimate." in words
        assert "What was tried" in words
        assert "recursion does not apply A layer is too narrow." in words
        assert "the result is that of labels" in words

    @pytest.mark.parametrize("status", ["not_applicable", "missing_knowledge"])
    def test_a_refusal_is_said_in_words(self, case, status: str) -> None:
        outcome = Outcome(status, float("nan"), 0, 0, 0.0)
        record = self.blind(
            case, outcome=outcome, verdict=judge_refusal(outcome, "Two outputs."), match=None, curves=None
        )
        html = render(record, picture(record, np.empty((0, 3, 4, 4), np.float32)))
        words = Page(html).words
        assert "No image was reconstructed: the attack did not run." in words
        assert "Two outputs." in words
        assert "What would stop it" not in words
        assert "nan" not in words
        assert "contains private data" not in words

    def test_what_is_proved_is_marked(self, case) -> None:
        blind = case(4, truth=False)
        certificate = CertificateRecord("unproved", 0.1, 1e-7, examples=("proved", "unproved", "unproved", "unproved"))
        record = replace(blind.record, certificate=certificate, outcome=replace(blind.record.outcome, solved=(2,)))
        captions = re.findall(r"<figcaption><b>(.*?)</figcaption>", render(record, blind.pictures))
        assert [c.rsplit(" · ", 1)[-1] for c in captions] == [
            "proved", "recovered class 11", "solved", "recovered class 13"
        ]  # fmt: skip

    def test_where_the_batch_size_comes_from(self, case) -> None:
        blind = case(1, truth=False)
        record = replace(blind.record, subject=replace(blind.record.subject, batch_size_source="assumed"))
        assert "1 image (assumed: nobody stated it)" in Page(render(record, blind.pictures)).words


@pytest.mark.parametrize("value", [1e308, 5e-324, -1e308, float("nan"), float("inf"), 0.0])
def test_damaged_numbers_never_crash_a_page(case, value: float) -> None:
    good = case(2)
    r, k = good.record, len(good.record.curves.iterations)
    values = dict.fromkeys(("mse", "psnr", "ssim"), value)
    record = replace(
        r,
        outcome=replace(r.outcome, objective=value, seconds=value),
        match=Match(value, value),
        certificate=CertificateRecord("matched", value, value, 1, 2, (), "", value, value),
        examples=tuple(replace(e, values=values) for e in r.examples),
        aggregates=tuple(Aggregate(a.metric, a.unit, 2, *[value] * 5) for a in r.aggregates),
        success=Success(value, 1, 2, value, value, value),
        lifts=(Lift("gray", value, value),),
        curves=Curves(
            r.curves.iterations, (value,) * k, {"fc.weight": (1.0, *[value] * (k - 1))}, (value, *[1.0] * (k - 1))
        ),
    )
    record = from_json(to_json(record))
    inputs = np.full_like(good.inputs, value)
    Page(render(record, picture(record, inputs, good.truth, good.snapshots)))
    table = replace(record, subject=replace(record.subject, display="numbers"))
    Page(render(table, picture(table, inputs, good.truth)))


@pytest.mark.parametrize("shape", [(1, 3, 0, 0), (1, 0, 4, 4), (1, 0), (1,)])
def test_empty_examples_never_crash_a_page(case, shape) -> None:
    record = replace(case(1, truth=False).record, curves=None)
    Page(render(record, picture(record, np.zeros(shape))))


@pytest.mark.parametrize("iterations", [(-5, 3), (3, 1), (0, 2**62), (5, 0, 9)])
def test_curves_that_run_nowhere_are_not_drawn(case, iterations) -> None:
    good = case(1)
    n = len(iterations)
    record = replace(good.record, curves=Curves(iterations, (1.0,) * n, {"a": (0.5,) * n}, ()))
    Page(render(record, picture(record, good.inputs, good.truth)))


def test_rendering_survives_the_round_trip_through_json(case) -> None:
    good = case(2)
    assert render(from_json(to_json(good.record)), good.pictures) == render(good.record, good.pictures)


def test_many_examples_are_cut_and_counted(case) -> None:
    good = case(20, frames=3, side=8)
    assert len(good.pictures.guess) == 16
    assert good.pictures.omitted == 4
    assert "4 more images are not shown" in Page(render(good.record, good.pictures)).words


def test_large_traces_are_thinned_with_both_ends_kept(case) -> None:
    good = case(4, frames=200, side=64)
    assert len(good.pictures.frames) <= 80
    assert good.pictures.frames[0] == 0
    assert good.pictures.frames[-1] == 199
    assert len(render(good.record, good.pictures)) < 10_000_000


def test_an_example_without_reconstruction_is_gray(case) -> None:
    good = case(2)
    examples = (replace(good.record.examples[0], guess=None), good.record.examples[1])
    pictures = picture(replace(good.record, examples=examples), good.inputs, good.truth, good.snapshots)
    assert decode(pictures.guess[0]).std() == 0


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_exact(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7))
    decoded = decode(encode_png(pixels / 255))
    assert np.array_equal(decoded if channels == 3 else decoded[..., None], pixels.transpose(1, 2, 0))


def test_png_of_other_channels_and_of_broken_values() -> None:
    assert decode(encode_png(np.zeros((4, 3, 2)))).shape == (3, 8)
    broken = np.array([[[np.nan, np.inf, -np.inf, 2.0, -1.0]]])
    assert decode(encode_png(broken)).tolist() == [[0, 255, 0, 255, 0]]


def test_no_pictures_at_all_still_render(case) -> None:
    Page(render(case(1).record, Pictures()))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.0, "1.0"),
        (0.001, "0.0010"),
        (1234.5, "1234"),
        (3.1e-7, "3.1\u202f×\u202f10⁻⁷"),
        (9.99e-8, "1.0\u202f×\u202f10⁻⁷"),
        (-0.5, "−0.50"),
        (2e5, "2.0\u202f×\u202f10⁵"),
        (float("inf"), "∞"),
        (float("nan"), "not a number"),
        (5e-324, "4.9\u202f×\u202f10⁻³²⁴"),
    ],
)
def test_numbers(value, text: str) -> None:
    assert sig(value) == text


def test_small_words() -> None:
    assert power(0) == "1"
    assert power(-12) == "10⁻¹²"
    assert [duration(s) for s in (0.25, 30, 600, 7200)] == ["0.25\u202fs", "30\u202fs", "10\u202fmin", "2.0\u202fh"]


def points(svg: str) -> list[tuple[float, float]]:
    path = re.search(r' d="([^"]*)"', svg)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_chart_is_logarithmic() -> None:
    svg = str(log_chart("Objective", "evaluations", [0, 1, 2], [Series("o", (1.0, 1e-3, 1e-6))]))
    (_, a), (_, b), (_, c) = points(svg)
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert "10⁻⁶" in svg
    assert 'role="img"' in svg
    assert "from 1.0 at 0 evaluations to 1.0" in svg


def test_chart_leaves_gaps_where_there_is_no_logarithm() -> None:
    values = (1.0, 0.0, float("nan"), -1.0, float("inf"), 0.1)
    svg = str(log_chart("O", "evaluations", range(6), [Series("o", values)]))
    assert len(points(svg)) == 2
    assert re.search(r' d="([^"]*)"', svg)[1].count("M") == 2


@pytest.mark.parametrize(
    ("xs", "values"), [([0], (1.0,)), ([0, 0], (1.0, 1.0)), ([0, 1], (0.0, float("nan"))), ([], ())]
)
def test_nothing_to_draw_is_no_chart(xs, values) -> None:
    assert log_chart("O", "evaluations", xs, [Series("o", values)]) is None


def test_constant_and_enormous_ranges_have_ticks() -> None:
    for values in ((0.5, 0.5), (1e-300, 1e300), (0.011, 0.012)):
        svg = str(log_chart("O", "evaluations", [0, 1], [Series("o", values)]))
        ys = [float(y) for y in re.findall(r'class="tick" x="50" y="([\d.]+)"', svg)]
        assert 2 <= len(ys) <= 9
        assert all(0 <= y <= 268 for _, y in points(svg))


def test_report_needs_no_torch(case, tmp_path) -> None:
    good = case(1)
    (tmp_path / "result.json").write_text(to_json(good.record), encoding="utf-8")
    code = (
        "import sys, pathlib; from gradleak.audit.records import Pictures, from_json; "
        "from gradleak.report import render; "
        "html = render(from_json(pathlib.Path(sys.argv[1]).read_text(encoding='utf-8')), Pictures()); "
        "assert '<html' in html; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "result.json")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
