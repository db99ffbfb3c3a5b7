"""Passages, titles, ids and answers cannot steer a terminal."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax import __main__ as cli
from rag_jax.cli import ask
from rag_jax.evaluation.report import html, markdown
from rag_jax.inference.pipeline import Answer, ReadPassage
from rag_jax.system import logs
from rag_jax.system.plain_text import one_line, visible

BAD = "\x1b[2J\x1b]0;owned\x07\x1b]52;c;ZXZpbA==\x1b\\\x9b31m\x1bc\x08\x7f\u202egnol\u202c\u2066x\u2069\x00"


JOINED = "می\u200cخواهم \u200fעברית \U0001f468\u200d\U0001f469"  # joiners and marks that belong to the text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x9b1;2Hx", "x"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c\x9d0;t\x9cd", "abcd"),
        ("\x1bPq#0;1\x1b\\sixel", "sixel"),
        ("\x1b]0;never ended\nnext line", "0;never ended\nnext line"),
        ("\x1bc\x1b(B\x1b#8end\x1b", "end"),
        ("a\r\nb\rc\x85d\u2028e", "a\nb\nc\nd\ne"),
        ("a\tb\nc", "a\tb\nc"),
        ("bell\x07 back\x08 del\x7f nul\x00", "bell back del nul"),
        ("user\u202enimda\u202c \u2067x\u2069", "usernimda x"),
        (
            "می\u200cخواهم \u200fעברית \U0001f468\u200d\U0001f469",
            "می\u200cخواهم \u200fעברית \U0001f468\u200d\U0001f469",
        ),
        ("half \ud83d", "half \ufffd"),
        (BAD, "gnolx"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown and visible(shown) == shown
    assert one_line(text) == " ".join(shown.split())


CONTROLS = "\x1b\x9b\x9d\x07\x9c\\[]0;m\n\r\x00\u202e\u2066ab\ud83d"


@settings(max_examples=200)
@given(st.text(st.one_of(st.characters(), st.sampled_from(CONTROLS))))
def test_nothing_that_steers_is_left(text: str) -> None:
    shown = visible(text)
    kinds = {unicodedata.category(char) for char in shown if char not in "\n\t"}
    assert not kinds & {"Cc", "Cs"} and not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert visible(shown) == shown and shown.encode().decode() == shown
    assert "\n" not in one_line(text)


def safe(text: str) -> bool:
    return "\x1b" not in text and "\u202e" not in text and "\x9b" not in text and "\x07" not in text


def test_what_ask_shows() -> None:
    passage = ReadPassage(f"p{BAD}\n[q]", f"T{BAD}\n0.99  0.99  Fake", f"text{BAD}\nmore", 0.5, 0.5)
    found = Answer(f"Oslo{BAD}\nquestion  fake", -1.0, (passage,), ("p",), (f"t{BAD}",), ((1.0,),))
    shown = ask.render(f"Q{BAD}", found)
    assert safe(shown) and "Oslo" in shown and "text" in shown
    assert len(shown.splitlines()) == 9  # no line more than of a question without line ends


def test_output_errors_and_lines_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.render({"text": f"a{BAD}\nb"}, as_json=False) == "agnolx\nb"
    assert cli.render({"x": f"a{BAD}"}, as_json=False) == "x: agnolx"
    assert safe(cli.render({"x": BAD}, as_json=True)) and "\\u001b[2J" in cli.render({"x": BAD}, as_json=True)
    cli.say(f"f.jsonl:3: id {BAD}\nrag-jax: all is well")
    logs.info(f"skipped {BAD}")
    said = capsys.readouterr().err
    assert safe(said) and len(said.splitlines()) == 2


def test_reports(tmp_path: Path) -> None:
    passage = {"id": "p", "title": f"T{BAD}", "text": f"x{BAD}", "prior": 0.5, "posterior": 0.5}
    example = {"question": f"Q{BAD}", "prediction": f"A{BAD}", "answers": [BAD], "passages": [passage]}
    page = markdown.write(tmp_path, {"title": BAD, "commands": [f"rag-jax {BAD}"]}, [example]).read_text(
        encoding="utf-8"
    )
    assert safe(page) and "Tgnolx" in page
    assert html.cut(f"a{BAD}") == ("agnolx", 0)
