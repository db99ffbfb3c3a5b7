"""Writes report.html, one file without network or framework in which to browse the questions of an evaluation.

The page is templates/report.html with style, script and data inserted. The data come from corpora and models, so they
are untrusted: they are JSON in a script element that is not run, without characters that could end it; the script
inserts them as text only; and the page's content security policy admits only this style and this script, by hashes.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rag_jax.evaluation.report.evaluation_plots import Picture
from rag_jax.metrics import Judging, verdicts
from rag_jax.metrics.figures import depth, golds, ranked, unit
from rag_jax.system import files, plain_text

REPORT_FILE = "report.html"
BUDGET = 18_000_000  # bytes of questions and passages, unless more questions are asked for
LETTERS = 4000  # characters shown of a text; the page says how many are left out
GOLDS = 20  # gold answers shown of a question
UNREAD = 3  # gold passages shown that were not read

_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")

Texts = Callable[[str], tuple[str, str] | None]  # id of a passage -> its title and text; None where it is not there


@dataclass(frozen=True)
class Page:
    """The part of a page above the questions.

    figures: rows of a table, the first one its head.
    about: (name, value) of facts about the evaluation.
    runs: names of the runs that are compared; each row of predictions then has "runs", [answer, right, log p] of each.
    """

    title: str
    figures: Sequence[Sequence[str]]
    about: Sequence[tuple[str, str]]
    pictures: Sequence[Picture] = ()
    runs: Sequence[str] = ()


@dataclass
class _Passages:
    """Numbers the passages of a page, each of which it contains once; `new` are those not yet written."""

    texts: Texts
    number: dict[str, int] = field(default_factory=dict)
    new: list[list[Any]] = field(default_factory=list)

    def of(self, passage_id: str) -> int | None:
        """The number of a passage in the page; None if it is not in the corpus."""
        if passage_id not in self.number:
            found = self.texts(passage_id)
            if found is None:
                return None
            text, left = cut(found[1])
            self.new.append([passage_id, cut(found[0])[0], text, left])
            self.number[passage_id] = len(self.number)
        return self.number[passage_id]


def write(
    path: Path, page: Page, rows: Sequence[Mapping[str, Any]], setting: Judging, texts: Texts, limit: int | None = None
) -> Path:
    """Writes a page to a temporary name and renames it.

    rows: rows of predictions.jsonl.
    limit: the page shows the first so many; None: as many as BUDGET has room for.
    The pictures must be files beside it.
    """
    questions, passages = chosen(rows if limit is None else rows[:limit], setting, texts, limit is None)
    shown = "" if len(questions) == len(rows) else (
        f"They are the first {len(questions):,} of {len(rows):,}; the figures are over all of them, and so is "
        "predictions.jsonl (--report-questions N puts more here)."
    )  # fmt: skip
    head = {
        "title": page.title,
        "figures": page.figures,
        "about": page.about,
        "plots": [{"title": p.title, "about": p.about, "src": data_uri(path.with_name(p.file))} for p in page.pictures],
        "runs": page.runs,
        "shown": shown,
    }
    data = f'{safe_json(head)[:-1]},"passages":[{",".join(passages)}],"questions":[{",".join(questions)}]}}'
    files.write_text(path, filled(page.title, data))
    return path


def chosen(
    rows: Iterable[Mapping[str, Any]], setting: Judging, texts: Texts, budgeted: bool
) -> tuple[list[str], list[str]]:
    """JSON of each question, and of the passages that they name by number. budgeted: stop before BUDGET is exceeded."""
    store, size = _Passages(texts), 0
    questions: list[str] = []
    passages: list[str] = []
    for row in rows:
        made = safe_json(question(row, setting, store))
        new = [safe_json(passage) for passage in store.new]
        store.new.clear()
        size += sum(len(part.encode()) for part in (made, *new))
        if budgeted and size > BUDGET and questions:
            break
        questions.append(made)
        passages += new
    return questions, passages


def question(row: Mapping[str, Any], setting: Judging, passages: _Passages) -> dict[str, Any]:
    """The data of one question that the page shows."""
    gold, wanted = set(row["gold"]), golds(row, setting)
    has = dict(zip(row["retrieved"], row["retrieved_has_answer"], strict=True)) if wanted else {}
    read = [
        [passages.of(one), round(prior, 4), round(posterior, 4), unit(row, one) in gold, has.get(one)]
        for one, prior, posterior in zip(row["read"], row["prior"], row["posterior"], strict=True)
    ]
    known = {unit(row, one) for one in row["read"]}
    unread = [passages.of(one) for one in row["gold"] if one not in known][:UNREAD]
    f1, score = verdicts.f1(row, setting), row["score"]
    by_token = row["token_posterior"]
    return {
        "id": row["id"],
        "question": cut(row["question"])[0],
        "prediction": row["prediction"] if row["prediction"] is None else cut(row["prediction"])[0],
        "answers": [cut(answer)[0] for answer in row["answers"][:GOLDS]],
        "target": None if row["target"] in row["answers"] or row["target"] is None else cut(row["target"])[0],
        "right": verdicts.right(row, setting),
        "f1": None if f1 is None else round(f1, 4),
        "score": round(score, 4) if math.isfinite(score) else None,
        "unanswerable": bool(row["unanswerable"]),
        "golden": len(gold) if depth(row) else 0,  # nothing is found where nothing was looked for
        "rank": next((rank for rank, one in enumerate(ranked(row), start=1) if one in gold), 0),
        "found": len(ranked(row)),
        "read": read,
        "unread": [number for number in unread if number is not None],
        "tokens": row["tokens"] if by_token else [],
        "runs": row.get("runs", []),
        "heat": by_token and [[round(share, 3) for share in shares] for shares in by_token],
    }


def cut(text: str) -> tuple[str, int]:
    """(the beginning of a text without control characters, the number of characters left out)."""
    text = plain_text.visible(text)
    return (text[:LETTERS] + " …", len(text) - LETTERS) if len(text) > LETTERS else (text, 0)


def safe_json(value: Any) -> str:
    """JSON for a script element: without `<`, so that nothing ends the element; half a surrogate pair is U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]) if found[0] < chr(0xD800) else 0xFFFD:04x}", text)


def data_uri(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def filled(title: str, data: str) -> str:
    """The page with these data."""
    templates = resources.files("rag_jax.evaluation.report") / "templates"
    style, script = ((templates / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    shown = html.escape(title.encode("utf-8", "replace").decode())
    parts = {"policy": policy, "title": shown, "style": style, "script": script, "data": data}
    template = (templates / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
