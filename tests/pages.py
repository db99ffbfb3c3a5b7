"""Rows and passages for the tests of report.html, as a file and in a browser."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from rag_jax.evaluation.report import html
from rag_jax.evaluation.report.html import Page
from rag_jax.metrics import Judging

LONG = "w" * 100_000
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</textarea></script><img src=x onerror='window.hacked = 1'>",
    "<!-- <script> --> </style> {{data}} {{script}}",
    LONG,
    "line\u2028line\u2029paragraph",
    "nul \0 and half a pair \ud800 and \udc00",
    "&lt;b&gt; \" ' ` ${1} \\u003c \\",
    "javascript:window.hacked = 1",
)
SETTING = Judging()


def row(number: int, **values: Any) -> dict[str, Any]:
    usual = {
        "id": f"q{number}", "question": f"Question {number}?", "prediction": "Velor", "score": -0.5,
        "tokens": ["Vel", "or"], "answers": ["Velor"], "target": None, "label": None, "relevance": None,
        "unanswerable": False, "gold": ["p0"],
        "retrieved": ["p0", "p1"], "retrieved_has_answer": [True, False], "read": ["p0", "p1"],
        "prior": [0.75, 0.25], "posterior": [0.125, 0.875], "token_posterior": [[0.9, 0.1], [0.2, 0.8]],
    }  # fmt: skip
    return usual | values


def hostile_rows() -> list[dict[str, Any]]:
    """Rows in which each text of a question in turn is hostile (HTML, scripts, control characters)."""
    return [
        row(i, id=f"{text[:100]} {i}", question=text, prediction=text, answers=[text, "Velor"], tokens=[text[:50], "x"],
            gold=[text[:100]], read=[f"h{i}", "p1"], retrieved=[f"h{i}", "p1"])
        for i, text in enumerate(HOSTILE)
    ]  # fmt: skip


def texts(passage_id: str) -> tuple[str, str] | None:
    if passage_id.startswith("h"):
        text = HOSTILE[int(passage_id[1:])]
        return text, f"{text} Velor {text}"
    return {"p0": ("Velor", "The town of Velor lies by the sea."), "p1": ("", "Nothing of it.")}.get(passage_id)


class Corpus:
    """A corpus of the two passages of `row`."""

    n_live = 2

    def rows(self, names: list[str], missing: int) -> np.ndarray:
        return np.array([{"p0": 0, "p1": 1}.get(name, missing) for name in names])

    def pieces(self, name: str) -> list[int]:
        return []

    def __getitem__(self, row: int) -> SimpleNamespace:
        title, text = texts(f"p{row}") or ("", "")
        return SimpleNamespace(title=title, text=text)


def page(title: str = "Evaluation of a run") -> Page:
    return Page(title, [("Figure", "%"), ("Exact match", "50.0")], [("Run", "runs/a"), ("Command", title)])


def written(out: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    return html.write(
        out / "report.html", options.pop("page", page()), rows, SETTING, options.pop("texts", texts), **options
    )
