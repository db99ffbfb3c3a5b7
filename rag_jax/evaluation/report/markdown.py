"""Writes report.md, one page on a run: what was run, figures, curves, examples of answers, how to repeat it."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_jax.evaluation.report.evaluation_plots import Picture
from rag_jax.metrics import RECALL_KS
from rag_jax.system import files, plain_text
from rag_jax.system.logs import clock

REPORT_FILE = "report.md"
CURVES_FILE = "curves.png"

_SHOWN_PASSAGES = 5
_SHOWN_LETTERS = 300

_RESULTS = (
    ("exact_match_unseen", "Exact match, unseen entities"),
    ("exact_match", "Exact match"),
    ("f1", "F1"),
    ("accuracy", "Label accuracy"),
    ("macro_f1", "Macro-F1 of the labels"),
    ("rouge_l", "ROUGE-L"),
    ("bleu", "BLEU"),
    ("bleu_1", "BLEU-1"),
    ("distinct_1", "Distinct words"),
    ("distinct_2", "Distinct pairs of words"),
    ("no_answer_precision", "Precision of saying there is no answer"),
    ("no_answer_recall", "Recall of saying there is no answer"),
    ("no_answer_f1", "F1 of saying there is no answer"),
    ("squad2_exact_match", "Exact match, no answer included (SQuAD 2)"),
    ("squad2_f1", "F1, no answer included (SQuAD 2)"),
    ("risk_coverage_area", "Area under the risk-coverage curve"),
    *((f"recall_at_{k}", f"Recall@{k} of gold passages") for k in RECALL_KS),
    *((f"answer_recall_at_{k}", f"Answer recall@{k} (a text of the first {k} has the answer)") for k in RECALL_KS),
    ("mrr_at_10", "MRR@10 of gold passages"),
    ("ndcg_at_10", "nDCG@10 of gold passages"),
    ("r_precision", "R-precision of gold passages"),
    ("kilt_r_precision", "R-precision of documents (KILT)"),
    ("kilt_accuracy", "Accuracy where R-precision is 1 (KILT)"),
    ("kilt_exact_match", "Exact match where R-precision is 1 (KILT)"),
    ("kilt_f1", "F1 where R-precision is 1 (KILT)"),
    ("closed_book_exact_match", "Exact match, closed book (no passages)"),
    ("hot_swap_exact_match", "Exact match on changed facts, edited corpus swapped in"),
)  # fmt: skip


def write(
    out: str | Path,
    report: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture] = (),
) -> Path:
    """Writes `report.md` into `out`.

    report: figures by name as in report.json (intervals as NAME_low, NAME_high), n, seconds; and of the run: title,
        about [(name, value)], config (name or mapping), seed, device, commands [str], stages [{"name", "steps",
        "seconds"}]. A key that is absent has no line.
    examples: {"question", "prediction", "answers", "gold": [passage ids], "right": True, False or None,
        "passages": [{"id", "title", "text", "prior", "posterior"}]}.
    pictures: files in `out`.
    """
    out = Path(out)
    sections = [
        [f"# {_inline(report.get('title', f'Report of {out.resolve().name}'))}"],
        _what_was_run(report),
        _results(report),
        _pictures(pictures),
        _examples(examples),
        _commands(report.get("commands", ())),
    ]
    return _written(out / REPORT_FILE, [part for section in sections for part in section])


def write_page(path: Path, title: str, lines: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Writes a page with a title, a list and a table; the first of `rows` is its head."""
    shown = _table([_inline(cell) for cell in rows[0]], rows[1:], "l" + "r" * (len(rows[0]) - 1))
    return _written(path, [f"# {_inline(title)}", "\n".join(f"- {_inline(line)}" for line in lines), shown])


def _written(path: Path, parts: Sequence[str]) -> Path:
    files.write_text(path, "\n\n".join(parts) + "\n", errors="replace")  # for half a surrogate pair
    return path


def results(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, interval) in percent of the figures that the report has, in a fixed order."""
    rows = []
    for key, label in _RESULTS:
        if isinstance(report.get(key), int | float):
            low, high = report.get(f"{key}_low"), report.get(f"{key}_high")
            interval = "" if low is None or high is None else f"{_percent(low)} to {_percent(high)}"
            rows.append((label, _percent(report[key]), interval))
    return rows


def _what_was_run(report: Mapping[str, Any]) -> list[str]:
    config = report.get("config")
    lines = [f"- {_inline(name)}: {_inline(value)}" for name, value in report.get("about", ())]
    if isinstance(config, str):
        lines.append(f"- Configuration: {_code(config)}")
    lines += [
        f"- {label}: {_inline(report[key])}" for key, label in (("seed", "Seed"), ("device", "Device")) if key in report
    ]
    if "seconds" in report:
        lines.append(f"- Time: {clock(report['seconds'])} ({report['seconds']:,.0f} s)")
    parts = ["\n".join(lines)] if lines else []
    if isinstance(config, Mapping):
        shown = json.dumps(config, indent=2, ensure_ascii=False, default=str)
        parts.append(f"<details><summary>Configuration</summary>\n\n{_fenced(shown, 'json')}\n\n</details>")
    stages = report.get("stages")
    if stages:
        rows = [(stage.get("name", ""), _count(stage.get("steps")), _count(stage.get("seconds"))) for stage in stages]
        parts.append(_table(("Stage", "Steps", "Seconds"), rows, "lrr"))
    return ["## What was run", *parts] if parts else []


def _results(report: Mapping[str, Any]) -> list[str]:
    rows = results(report)
    if not rows:
        return []
    if not any(interval for *_, interval in rows):
        table = _table(("Figure", "%"), [row[:2] for row in rows], "lr")
    else:
        table = _table(("Figure", "%", "95% interval (bootstrap)"), rows, "lrr")
    over = [f"Over {_count(report['n'])} questions."] if "n" in report else []
    return ["## Results", *over, table]


def _pictures(pictures: Sequence[Picture]) -> list[str]:
    parts = []
    for picture in pictures:
        title = _inline(picture.title)
        parts += [f"### {title}", f"![{title}]({picture.file})", _inline(picture.about)]
    return ["## Curves", *parts] if parts else []


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = ["## Questions and answers"] if examples else []
    for number, example in enumerate(examples, start=1):
        parts.append(f"### {number}. {_inline(example['question'])}")
        answers = example.get("answers") or ()
        wanted = f" (wanted: {' or '.join(map(_inline, answers))})" if answers else ""
        verdict = {True: ", right", False: ", wrong", None: ""}[example.get("right")]
        parts.append(f"Answer: **{_inline(example['prediction']) or '(nothing)'}**{verdict}{wanted}")
        passages = example.get("passages") or ()
        if passages:
            parts.append(_passages(passages, example.get("gold") or ()))
    return parts


def _passages(passages: Sequence[Mapping[str, Any]], gold: Iterable[str]) -> str:
    gold = frozenset(gold)
    rows = []
    for rank, passage in enumerate(passages[:_SHOWN_PASSAGES], start=1):
        title, text = passage.get("title", ""), _shorten(str(passage.get("text", "")))
        shown = f"**{_inline(title)}** {_inline(text)}" if title else _inline(text)
        mark = f"{rank} (gold)" if passage.get("id") in gold else str(rank)
        rows.append((mark, _share(passage.get("prior")), _share(passage.get("posterior")), shown))
    return _table(("Rank", "Prior", "Posterior", "Passage"), rows, "lrrl", escaped=True)


def _commands(commands: Sequence[str]) -> list[str]:
    return ["## To do it again", _fenced("\n".join(commands), "bash")] if commands else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str, *, escaped: bool = False) -> str:
    rule = ["---:" if side == "r" else "---" for side in align]
    body = rows if escaped else [[_inline(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def _inline(value: Any) -> str:
    """Any value as one line of text, escaped: nothing in it is read as markdown, HTML or the end of a table cell."""
    text = html.escape(plain_text.one_line(str(value)), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~$" else letter for letter in text)


def _code(text: str) -> str:
    return f"<code>{_inline(text)}</code>"


def _fenced(text: str, language: str) -> str:
    text, fence = plain_text.visible(text), "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _shorten(text: str) -> str:
    if len(text) <= _SHOWN_LETTERS:
        return text
    return text[:_SHOWN_LETTERS].rsplit(" ", 1)[0] + " …"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
