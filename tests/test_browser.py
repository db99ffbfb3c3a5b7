"""report.html in headless Chromium. Skipped where there is no playwright (pip install 'rag-jax[browser]'), or no
Chromium or Chrome on the PATH or named by CHROMIUM.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest

from rag_jax.evaluation.report import html
from rag_jax.metrics import matching

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDTHS = (390, 1400)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium, or CHROMIUM=/path/to/it")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield found
        found.close()


class Opened:
    """A page in the browser, and all errors and warnings that the browser reported."""

    def __init__(self, browser: Any, path: Path, width: int = 1400, scheme: str = "light", at: str = "") -> None:
        self.said: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(5000)
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.goto(f"{path.as_uri()}{at}")

    def _asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.said.append(f"asked the network for {url}")

    def js(self, code: str) -> Any:
        return self.page.evaluate(code)

    def texts(self, selector: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)")

    def check(self) -> None:
        """No errors were reported, no hostile script ran, and nothing is wider than the window."""
        assert self.said == []
        assert self.js("window.hacked") is None
        assert self.js("document.documentElement.scrollWidth <= window.innerWidth")

    def close(self) -> None:
        self.page.close()


# The least contrast of any text with what is behind it (WCAG 2), and where it is.
CONTRAST = """() => {
  const channels = (color) => (color.startsWith("color(") ? color.match(/[\\d.]+/g).map((x) => 255 * x)
    : color.match(/[\\d.]+/g).map(Number));
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const opaque = (color) => color.startsWith("rgb(") || color.startsWith("color(");
  let least = [21, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.disabled || element.closest("script, style, option")) continue;
    let behind = element;
    while (behind && !opaque(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const both = [getComputedStyle(element).color, getComputedStyle(behind || document.body).backgroundColor];
    const [low, high] = both.map((color) => light(channels(color))).sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 120) + both];
  }
  return least;
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_texts_are_harmless(browser, tmp_path, width, scheme):
    rows = pages.hostile_rows()
    opened = Opened(browser, pages.written(tmp_path, rows, page=pages.page(pages.HOSTILE[1])), width, scheme)
    opened.check()
    assert opened.texts("#items a > span[dir]:nth-of-type(2)")[0] == pages.HOSTILE[0]
    for row in rows:
        if opened.texts("#detail h2") == [] or row is not rows[0]:  # a wide window shows the first one by itself
            opened.page.keyboard.press("j")
        opened.check()
        shown = row["question"].replace("\ud800", "\ufffd").replace("\udc00", "\ufffd")
        assert opened.texts("#detail h2") == [html.cut(shown)[0]]
        assert opened.texts(".heat tbody td") == ["0.90", "0.20", "0.10", "0.80"]
    assert opened.texts("script, img, textarea, mark script") == opened.texts(
        "body > script"
    )  # the page built no elements from data
    opened.close()


def test_a_place_in_the_page_can_be_linked_to(browser, tmp_path):
    rows = [pages.row(i, id=f"ä/{i} #?%<b>") for i in range(120)]
    path = pages.written(tmp_path, rows)
    opened = Opened(browser, path)
    opened.page.click("text=Next >> nth=0")
    assert opened.texts("#page") == ["page 2 of 3"]
    opened.page.click("#items li:nth-child(8) a")
    assert opened.texts("#detail h2") == ["Question 57?"]
    again = Opened(browser, path, at=opened.js("location.hash"))
    assert again.texts("#detail h2") == ["Question 57?"]
    broken = Opened(browser, path, at="#%E4%")
    assert broken.texts("#detail h2") == ["Question 0?"]
    for one in (opened, again, broken):
        one.check()
        one.close()


def test_keys(browser, tmp_path):
    opened = Opened(browser, pages.written(tmp_path, [pages.row(i) for i in range(60)]))
    chosen = lambda: opened.texts("#detail h2")[0]  # noqa: E731
    press = opened.page.keyboard.press
    assert chosen() == "Question 0?"
    press("k")
    assert chosen() == "Question 0?"
    for key in ("j", "ArrowRight", "j", "k"):
        press(key)
    assert chosen() == "Question 2?" and opened.texts("#items a[aria-current] span[dir]")[0] == "Question 2?"
    for _ in range(50):
        press("j")
    assert chosen() == "Question 52?" and opened.texts("#page") == ["page 2 of 2"]
    press("/")
    opened.page.keyboard.type("n 3?")
    assert chosen() == "Question 52?"  # a link stays where it is
    assert opened.texts("#items span[dir]:nth-of-type(2)") == ["Question 3?"]
    press("Escape")
    press("j")
    assert chosen() == "Question 3?"
    for _ in range(40):
        press("Tab")
        outline = opened.js(
            "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
        )
        assert outline in (True, "solid")
    opened.check()
    opened.close()


def test_filters_orders_and_search(browser, tmp_path):
    rows = [
        pages.row(0, score=-3.0),
        pages.row(1, score=-1.0, prediction="no"),
        pages.row(2, score=-2.0, gold=["gone"], prediction="Velor Bay"),
        pages.row(3, score=-0.1, answers=[], gold=[], unanswerable=True, prediction="Haifa"),
        pages.row(4, score=-4.0, gold=["gone"]),
    ]
    opened = Opened(browser, pages.written(tmp_path, rows))

    def shown(name: str, value: str) -> list[int]:
        opened.page.select_option(f"#{name}", value)
        found = opened.js("[...document.querySelectorAll('#items a')].map((one) => Number(one.dataset.place))")
        opened.page.select_option(f"#{name}", "all" if name == "filter" else "file")
        return found

    labels = dict(
        zip(
            ("all", "right", "wrong", "misread", "unfound", "unanswerable"), opened.texts("#filter option"), strict=True
        )
    )
    for name, wanted in (
        ("all", [0, 1, 2, 3, 4]),
        ("right", [0, 4]),
        ("wrong", [1, 2, 3]),
        ("misread", [1]),
        ("unfound", [2, 4]),
        ("unanswerable", [3]),
    ):
        assert shown("filter", name) == wanted and labels[name].endswith(f"({len(wanted)})")
    assert shown("order", "sure") == [3, 1, 2, 0, 4] and shown("order", "unsure") == [4, 0, 2, 1, 3]
    assert opened.texts("#order option")[-1] == "Least confident first"  # one has no F1
    opened.page.fill("#query", "hAIFa")
    assert opened.texts("#items a span.said") == ["Haifa"] and opened.texts("#count")[0].startswith("1 of 5")
    opened.page.fill("#query", "nowhere")
    assert opened.texts("#items a") == [] and opened.texts("#detail h2") == []
    opened.check()
    opened.close()


def test_one_thing_at_a_time_on_a_narrow_screen(browser, tmp_path):
    opened = Opened(browser, pages.written(tmp_path, [pages.row(i) for i in range(3)]), 390)
    visible = lambda: [name for name in ("overview", "list", "detail") if opened.page.is_visible(f"#{name}")]  # noqa: E731
    assert visible() == ["overview", "list"]
    opened.page.click("#items li:nth-child(2) a")
    assert visible() == ["detail"] and opened.texts("#detail h2") == ["Question 1?"]
    opened.page.click(".steps button:nth-of-type(2)")
    assert visible() == ["detail"] and opened.texts("#detail h2") == ["Question 2?"]
    opened.page.click("text=All questions")
    assert visible() == ["overview", "list"]
    opened.page.go_back()
    assert visible() == ["detail"]
    opened.check()
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_contrast(browser, tmp_path, scheme, width):
    shares = [[i / 20, 1 - i / 20] for i in range(21)]
    rows = [
        pages.row(0, prediction="sea", answers=["Velor"], tokens=["x"] * 21, token_posterior=shares, gold=["p0", "p1"]),
        pages.row(1),
    ]
    opened = Opened(browser, pages.written(tmp_path, rows), width, scheme, at="" if width > 800 else "#q0")
    least, where = opened.js(CONTRAST)
    assert least >= 4.5, where
    assert opened.texts("article:first-of-type mark:not(.said)") == ["Velor", "Velor"]
    assert opened.texts("mark.said") == ["sea"]
    opened.check()
    opened.close()


@pytest.mark.parametrize("name", ["xquad_ar", "xquad_zh", "xquad_ru", "xquad_en"])
def test_real_text_in_its_direction_with_its_answers_marked(browser, tmp_path, shared_data, name):
    """A passage has a mark exactly where `matching.has_answer` is true."""
    passages = {}
    for line in (shared_data(name) / "passages.jsonl").read_text(encoding="utf-8").splitlines():
        passage = json.loads(line)
        passages[passage["id"]] = (passage["title"], passage["text"])
    rows, ids = [], list(passages)
    for i, line in enumerate((shared_data(name) / "dev.jsonl").read_text(encoding="utf-8").splitlines()[:60]):
        q = json.loads(line)
        read = [q["positive_passage_ids"][0], ids[7 * i % len(ids)]]
        has = [matching.has_answer(" ".join(passages[one]), q["answers"]) for one in read]
        rows.append(
            pages.row(i, question=q["question"], answers=q["answers"], prediction=q["answers"][0], gold=read[:1],
                      retrieved=read, retrieved_has_answer=has, read=read, tokens=list(q["answers"][0][:2].ljust(2)))
        )  # fmt: skip
    assert any(row["retrieved_has_answer"][1] is False for row in rows)
    opened = Opened(browser, pages.written(tmp_path, rows, texts=passages.get), 390, at="#q0")
    direction = "rtl" if name == "xquad_ar" else "ltr"
    for row in rows:
        marked = opened.js("[...document.querySelectorAll('article')].map((one) => one.querySelector('mark') !== null)")
        assert marked == row["retrieved_has_answer"], row["question"]
        for selector in ("#detail h2", "#detail dd.answer", "article p[dir]", "table.heat"):
            style = f"getComputedStyle(document.querySelector({json.dumps(selector)})).direction"
            letters = [letter for letter in opened.texts(selector)[0] if letter.isalpha()]
            if letters and (letters[0].isascii() is (direction == "ltr") or name in ("xquad_zh", "xquad_ru")):
                assert opened.js(style) == direction, (selector, row["question"])
        opened.check()
        opened.page.keyboard.press("j")
    opened.close()


def test_answers_of_several_runs(browser, tmp_path):
    verdicts = [(True, True), (True, False), (False, True), (False, False)]
    rows = [
        pages.row(i, prediction="Velor" if a else "no", runs=[["Velor" if a else "no", a, -0.5], ["", b, None]])
        for i, (a, b) in enumerate(verdicts)
    ]
    page = html.Page("Two", [["", "A", "B"], ["f1", "50.0", "25.0"]], [], runs=["A: runs/a", "B: runs/b"])
    opened = Opened(browser, pages.written(tmp_path, rows, page=page), 390, at="#q1")
    assert opened.texts("#detail dt")[:2] == ["A: runs/a", "B: runs/b"]
    assert opened.texts("#detail dd")[:2] == ["✓ right Velor (log p = -0.50)", "✗ wrong (nothing)"]
    assert "Passages read by A: runs/a" in opened.texts("h3")
    opened.page.goto(opened.page.url.split("#")[0])
    for name, wanted in (("ahead", "1"), ("behind", "2")):
        opened.page.select_option("#filter", name)
        assert opened.js("[...document.querySelectorAll('#items a')].map((one) => one.dataset.place)") == [wanted]
    opened.check()
    opened.close()


def test_a_passage_that_is_gone(browser, tmp_path):
    opened = Opened(browser, pages.written(tmp_path, [pages.row(0, read=["gone", "p1"])]))
    assert (
        opened.texts("article p[dir]")[0] == "(no longer in the corpus)" and opened.texts("table.heat td")[0] == "0.90"
    )
    opened.check()
    opened.close()


def test_a_page_without_questions(browser, tmp_path):
    opened = Opened(browser, pages.written(tmp_path, [pages.row(0)], limit=0))
    assert opened.texts("#items a") == [] and "They are the first 0 of 1" in opened.texts("#count")[0]
    opened.check()
    opened.close()
