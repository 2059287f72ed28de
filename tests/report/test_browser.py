"""The report in a real browser: the slider works, nothing overflows, nothing is requested."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from gradleak.audit.records import AttemptRecord, Shown
from gradleak.audit.verdict import judge_refusal
from gradleak.report import picture, render
from gradleak.report.evidence import render_evidence

BROWSER = os.environ.get("GRADLEAK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine"),
    pytest.mark.xdist_group("browser"),  # one worker, and so one start
]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

OVERFLOWING = """() => {
  const wide = [];
  for (const e of document.querySelectorAll('body *')) {
    const box = e.getBoundingClientRect();
    const clipped = e.closest('.visually-hidden');
    if (!clipped && box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5)) {
      wide.push(e.tagName + '.' + e.getAttribute('class') + ' ' + box.left + '–' + box.right);
    }
  }
  return wide;
}"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page at a width; afterwards it must have been silent and self-contained."""
    contexts, complaints, requests = [], [], []

    def opened(html: str, width: int, *, dark: bool = False):
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [
        (tmp_path / "report.html").as_uri() for _ in contexts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize(("n", "truth"), [(1, True), (5, True), (1, False), (4, False)])
def test_nothing_overflows(show, case, width: int, n: int, truth: bool) -> None:
    good = case(n, truth=truth)
    page = show(render(good.record, good.pictures), width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", ["sentences", "rows", "refusal"])
def test_what_is_no_picture_does_not_overflow_either(show, case, kind: str, width: int) -> None:
    record = case(1).record
    subject = replace(record.subject, display="numbers" if kind == "rows" else "text", noun="sentence")
    record = replace(record, subject=subject, curves=None)
    inputs = np.linspace(-1e6, 1e6, 8)[None]
    if kind == "sentences":
        words = (*["un", "##believ", "##ably"] * 20, "x" * 300)
        record = replace(record, shown=Shown((), (words,), (words[1:] + words[:1],)))
    if kind == "refusal":
        attempts = tuple(AttemptRecord(f"attack_{i}", False, None, "It does not apply. " * 9) for i in range(3))
        outcome = replace(record.outcome, status="not_applicable", attempts=attempts)
        record = replace(record, outcome=outcome, examples=None, verdict=judge_refusal(outcome, "No. " * 40))
    page = show(render(record, picture(record, inputs, inputs)), width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    outside = "e => !e.closest('.scroll') || e.classList.contains('scroll')"
    assert page.evaluate(OVERFLOWING.replace("const clipped =", f"const clipped = !({outside})(e) ||")) == []


def test_hostile_strings_neither_run_nor_overflow(show, hostile) -> None:
    page = show(render(hostile.record, hostile.pictures), 400)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    assert page.locator("script").count() == 2


def test_the_slider_changes_picture_figures_and_marker(show, case) -> None:
    good = case(2)
    page = show(render(good.record, good.pictures), 1280)
    slider = page.locator("#slider")

    def state() -> tuple[object, ...]:
        return (
            page.locator("img[data-guess='0']").get_attribute("src"),
            page.locator("img[data-guess='1']").get_attribute("src"),
            page.locator("#at-evaluations").inner_text(),
            page.locator("#at-objective").inner_text(),
            page.locator("#at-mse").inner_text(),
            page.locator(".marker").first.get_attribute("x1"),
            slider.get_attribute("aria-valuetext"),
        )

    last = state()
    assert last[0] == good.pictures.guess[0]
    slider.focus()
    page.keyboard.press("Home")
    first = state()
    assert first[0] == good.pictures.snapshots[0][0]
    assert first[2] == "0"
    assert all(a != b for a, b in zip(first, last, strict=True))
    page.keyboard.press("ArrowRight")
    assert state()[0] == good.pictures.snapshots[1][0]
    page.keyboard.press("End")
    assert state() == last
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert state()[0] not in (first[0], last[0])


@pytest.mark.slow
def test_play_runs_to_the_end_and_pauses(show, case) -> None:
    good = case(1, frames=6)
    page = show(render(good.record, good.pictures), 1280)
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    page.locator("#play").click()
    assert page.locator("#play").get_attribute("aria-label") == "Pause"
    page.locator("#play[aria-label^='Play']").wait_for()
    assert page.locator("#slider").input_value() == page.locator("#slider").get_attribute("max")
    assert page.locator("img[data-guess]").get_attribute("src") == good.pictures.guess[0]


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(show, case, dark: bool) -> None:
    good = case(2)
    page = show(render(good.record, good.pictures), 1280, dark=dark)
    ratios = page.evaluate(
        """() => {
          const light = (c) => {
            const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
              .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return ['h1', '.reason', '.figures dt', '.aside', 'figcaption', 'td', '.soft', 'footer', '.masthead']
            .map((s) => {
              const ink = light(getComputedStyle(document.querySelector(s)).color);
              return [s, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)];
            });
        }"""
    )
    assert [pair for pair in ratios if pair[1] < 4.5] == []


def test_print_hides_the_player_and_keeps_the_pictures(show, case) -> None:
    good = case(1)
    page = show(render(good.record, good.pictures), 1280)
    assert page.locator(".player").is_visible()
    page.emulate_media(media="print")
    assert not page.locator(".player").is_visible()
    assert page.locator("img[data-guess]").is_visible()


@pytest.mark.parametrize("width", [1280, 400])
def test_evidence_fits_and_pages_through_thousands_of_trials(show, evidence, width: int) -> None:
    page = show(render_evidence(evidence(3000, word="a ward with a long name " * 4)), width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.locator("#all summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#body tr").count() == 50
    page.locator("#next-button").press("Enter")
    assert page.locator("#where").inner_text() == "51 – 100 of 3001"
    page.locator("#back-button").press("Enter")
    assert page.locator("#back-button").is_disabled()
