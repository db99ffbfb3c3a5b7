"""report.html as a file: the content of its data, which can be nothing but data."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pages
import pytest

from rag_jax.evaluation.report import html
from rag_jax.evaluation.report.evaluation_plots import Picture
from rag_jax.metrics import Judging


class Elements(HTMLParser):
    """The elements of a page as a browser parses them, with the raw text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.raw: dict[str, str] = {}
        self._in = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id") or tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in:
            self.raw[self._in] = self.raw.get(self._in, "") + data


def parsed(path: Path) -> Elements:
    elements = Elements()
    elements.feed(path.read_text(encoding="utf-8"))
    return elements


def data(path: Path) -> dict:
    return json.loads(parsed(path).raw["data"])


def test_the_page_holds_what_the_rows_say(tmp_path):
    rows = [
        pages.row(0),
        pages.row(1, prediction="x", gold=["p9", "p1"], retrieved=["p0", "p1"], read=["p0"], prior=[1.0],
                  posterior=[1.0], token_posterior=None),
        pages.row(2, answers=[], gold=[], unanswerable=True, prediction=""),
        pages.row(3, prediction=None, token_posterior=None, gold=["none"]),
        pages.row(4, answers=[], target="a long text", prediction="a text", score=-math.inf),
        pages.row(5, retrieved=[], retrieved_has_answer=[], read=[], prior=[], posterior=[], token_posterior=None),
    ]  # fmt: skip
    found = data(pages.written(tmp_path, rows))
    assert found["title"] == "Evaluation of a run" and found["shown"] == ""
    assert found["figures"] == [["Figure", "%"], ["Exact match", "50.0"]]
    assert [p[0] for p in found["passages"]] == ["p0", "p1"]  # once each
    assert found["passages"][0] == ["p0", "Velor", "The town of Velor lies by the sea.", 0]
    q = found["questions"]
    assert [one["right"] for one in q] == [True, False, True, None, None, True]
    assert [one["rank"] for one in q] == [1, 2, 0, 0, 1, 0]
    assert [one["golden"] for one in q] == [1, 2, 0, 1, 1, 0]  # closed book looks for none
    assert q[0]["read"] == [[0, 0.75, 0.125, True, True], [1, 0.25, 0.875, False, False]]
    assert q[0]["tokens"] == ["Vel", "or"] and q[0]["heat"] == [[0.9, 0.1], [0.2, 0.8]]
    assert q[1]["heat"] is None and q[1]["unread"] == [1] and q[1]["f1"] == 0  # p9 is not in the corpus
    assert q[2]["read"][0][4] is None  # no answer to have
    assert q[3]["prediction"] is None and q[3]["f1"] is None
    assert q[4]["target"] == "a long text" and q[4]["score"] is None and q[4]["f1"] == pytest.approx(2 / 3, abs=1e-4)


def test_nothing_in_the_data_is_markup(tmp_path):
    ordinary = parsed(pages.written(tmp_path, [pages.row(0)]))
    path = pages.written(tmp_path, pages.hostile_rows(), page=pages.page("</title><script>window.hacked = 1</script>"))
    hostile = parsed(path)
    assert hostile.tags == ordinary.tags
    body = path.read_bytes()
    assert b"\0" not in body and "\u2028" not in body.decode("utf-8")  # it is UTF-8: no half pair
    inside = hostile.raw["data"]
    assert not set("<>&\u2028\u2029") & set(inside)
    found = json.loads(inside)
    assert found["questions"][0]["question"] == pages.HOSTILE[0]
    assert found["questions"][5]["question"] == "nul  and half a pair \ufffd and \ufffd"
    assert (
        found["questions"][3]["question"].startswith("w" * 4000 + " …")
        and len(found["questions"][3]["question"]) < 4010
    )
    assert found["passages"][-1][0]
    left = {passage[0]: passage[3] for passage in found["passages"]}
    assert left["h3"] == 2 * len(pages.LONG) + len(" Velor ") - html.LETTERS


def test_the_policy_lets_our_script_and_style_run_and_nothing_else(tmp_path):
    elements = parsed(pages.written(tmp_path, [pages.row(0)]))
    policy = next(a["content"] for tag, a in elements.attributes if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(elements.raw[name].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert not any(attribute.startswith("on") for _, a in elements.attributes for attribute in a)
    assert "innerHTML" not in elements.raw["script"] and "http" not in elements.raw["script"]
    assert not any(a.get("src") or a.get("href", "").startswith("http") for _, a in elements.attributes)


def test_pictures_are_in_the_file(tmp_path):
    (tmp_path / "recall.png").write_bytes(b"\x89PNG picture")
    page = html.Page("t", [], [], [Picture("recall.png", "Recall", "what it is")])
    (plot,) = data(pages.written(tmp_path, [pages.row(0)], page=page))["plots"]
    assert plot["title"] == "Recall" and plot["about"] == "what it is"
    assert base64.b64decode(plot["src"].removeprefix("data:image/png;base64,")) == b"\x89PNG picture"


def test_as_many_questions_as_asked_for_or_as_there_is_room_for(tmp_path, monkeypatch):
    rows = [pages.row(i, read=[f"x{i}", "p1"]) for i in range(40)]
    texts = lambda one: (one, "t" * 1000)  # noqa: E731
    few = data(pages.written(tmp_path, rows, texts=texts, limit=7))
    assert len(few["questions"]) == 7 and "the first 7 of 40" in few["shown"]
    assert {passage[0] for passage in few["passages"]} == {"p0", "p1", *(f"x{i}" for i in range(7))}
    monkeypatch.setattr(html, "BUDGET", 30_000)
    path = pages.written(tmp_path, rows, texts=texts)
    some = data(path)
    assert 10 < len(some["questions"]) < 30 and f"the first {len(some['questions'])} of 40" in some["shown"]
    numbers = [one[0] for q in some["questions"] for one in q["read"]]
    assert max(numbers) == len(some["passages"]) - 1
    assert len(data(pages.written(tmp_path, rows, texts=texts, limit=40))["questions"]) == 40  # asked for: all
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_regular_expressions_are_judged_as_such(tmp_path):
    rows = [pages.row(0, answers=["Ve.*r"]), pages.row(1, answers=["x+"])]
    path = html.write(tmp_path / "report.html", pages.page(), rows, Judging(match="regex"), pages.texts)
    assert [(q["right"], q["f1"]) for q in data(path)["questions"]] == [(True, None), (False, None)]


def test_no_placeholder_is_left(tmp_path):
    text = pages.written(tmp_path, pages.hostile_rows()).read_text(encoding="utf-8")
    assert re.findall(r"\{\{(\w+)\}\}", text) == ["data", "script"] * (text.count("{{data}}"))
    assert text.count("{{data}}") >= 1  # the hostile text contains it, and is not substituted
