"""Writes the files of `rag-jax evaluate`: predictions.jsonl, report.json, pictures, report.md, report.html."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_jax import metrics
from rag_jax.corpus.directory import Corpus
from rag_jax.data import gold
from rag_jax.errors import InputError
from rag_jax.evaluation.report import evaluation_plots, html, markdown, training_plot
from rag_jax.evaluation.report.evaluation_plots import Picture
from rag_jax.metrics import verdicts
from rag_jax.metrics.figures import unit
from rag_jax.system import files, logs
from rag_jax.system.logs import METRICS_FILE

PREDICTIONS, REPORT = "predictions.jsonl", "report.json"
SHOWN = 3  # examples of right answers, and of wrong ones, in report.md
# Settings of answering that the report mentions only if they differ from these.
DEFAULTS = {
    "num_beams": 1, "mode": "thorough", "closed_book": False, "oracle": False, "retrieval_only": False,
    "prior": "dense", "candidates": 0, "min_length": 0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0, "do_sample": False,
}  # fmt: skip


@dataclass(frozen=True)
class EvaluationResults:
    """The results of an evaluation.

    run: directory of the run, for the training curves.
    corpus: the corpus that was searched.
    rows: rows of predictions.jsonl.
    report: content of report.json.
    setting: how answers were judged.
    command: command line that repeats the evaluation.
    """

    run: Path
    corpus: Corpus
    rows: Sequence[dict[str, Any]]
    report: Mapping[str, Any]
    setting: metrics.Judging
    command: str


def write(out: Path, found: EvaluationResults, limit: int | None = None) -> None:
    """Writes all files, replacing those of an earlier evaluation, which stay if writing fails.

    limit: questions in report.html; None: as many as it has room for.
    """
    before = (markdown.REPORT_FILE, html.REPORT_FILE, markdown.CURVES_FILE, *evaluation_plots.FILES)
    with files.new_files(out, last=REPORT, instead_of=before) as temporary:
        _write_all(temporary, found, limit)


def _write_all(out: Path, found: EvaluationResults, limit: int | None) -> None:
    write_lines(out / PREDICTIONS, found.rows)
    pictures = evaluation_plots.draw(found.report, out) + training(found.run, out)
    title, about = f"Evaluation of {found.run.resolve().name}", facts(found)
    figures = [("Figure", "%", "95% interval"), *markdown.results(found.report)]
    page = html.Page(title, figures, [*about, ("Command", found.command)], pictures)
    html.write(out / html.REPORT_FILE, page, found.rows, found.setting, lambda one: passage(found.corpus, one), limit)
    shown = {name: value for name, value in found.report.items() if name != "seed"}  # only the seed of sampling
    markdown.write(
        out, shown | {"title": title, "about": about, "commands": [found.command]}, examples(found), pictures
    )
    write_json(out / REPORT, found.report)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines, to a temporary name and renamed."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON, to a temporary name and renamed."""
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    # Half a surrogate pair, from an escape in a question file, cannot be encoded: it becomes that escape again.
    files.write_text(path, text, errors="backslashreplace")


def training(run: Path, out: Path) -> list[Picture]:
    """Draws the training curves of a run into `out`; none if it has no log."""
    (out / markdown.CURVES_FILE).unlink(missing_ok=True)
    if not (run / METRICS_FILE).is_file():
        return []
    try:
        training_plot.training_curves(run / METRICS_FILE, out / markdown.CURVES_FILE)
    except InputError as error:
        logs.info(f"no training curves: {error}")
        return []
    return [Picture(markdown.CURVES_FILE, "Training curves", "Stages are shaded")]


def facts(found: EvaluationResults) -> list[tuple[str, str]]:
    """(name, value) of facts about the evaluation, in words."""
    made = found.report
    model = {"sequence": "RAG-Sequence", "token": "RAG-Token"}[made["variant"]]
    questions = f"{made['questions']} ({made['n']:,})" + (f", those with {made['where']}" if made["where"] else "")
    search = ", ".join(f"{made['search'][name]}" for name in ("kind", "dtype") if name in made["search"])
    settings = [f"{name}={made[name]}" for name, usual in DEFAULTS.items() if made[name] != usual]
    facts = [
        ("Run", f"{made['run']} ({model})"),
        ("Questions", questions),
        ("Corpus", f"{made['corpus']} ({found.corpus.n_live:,} passages)"),
        ("Index", f"{made['index']} (step {made['index_step']:,}, search: {search})"),
        ("Answers", f"{made['n_docs'] or 'as many as trained with'} documents read, {made['n_retrieved']} retrieved"),
        ("Settings", ", ".join(settings)),
        ("Retrieval", judged_by(made.get("judged_by", {}))),
        ("Gold ids", gold_ids(made)),
        ("Nothing found", nothing_found(made)),
    ]
    return [(name, value) for name, value in facts if value]


def judged_by(counts: Mapping[str, int]) -> str:
    """How many rankings were judged by document, in words; "" if none was."""
    if not counts.get("document"):
        return ""
    total = sum(counts.values())
    of = "" if counts["document"] == total else f" in {counts['document']:,} of {total:,} questions, else by passage"
    return f"judged by document, each at its first passage found{of}"


def gold_ids(made: Mapping[str, Any]) -> str:
    """A sentence on the gold passages that the corpus lacks; "" if it lacks none."""
    tally = gold.Tally(**made.get("gold_ids", {}))
    words = tally.words(made["corpus"])
    return f"{words}; they count as not found" if words else ""


def nothing_found(made: Mapping[str, Any]) -> str:
    count = made.get("nothing_found", 0)
    return f"for {count:,} of {made['n']:,} questions; the generator read none there" if count else ""


def passage(corpus: Corpus, passage_id: str) -> tuple[str, str] | None:
    """Title and text of a passage, or of a whole document that was cut; None if the corpus has neither."""
    found = [corpus[row] for row in gold.rows_of([passage_id], corpus)[passage_id]]
    return (found[0].title, " ".join(one.text for one in found)) if found else None


def examples(found: EvaluationResults) -> list[dict[str, Any]]:
    """The first right and the first wrong answers; the first of all if none can be judged."""
    written = [row for row in found.rows if row["prediction"] is not None]
    by_verdict: dict[bool | None, list[dict[str, Any]]] = {True: [], False: [], None: []}
    for row in written:
        by_verdict[verdicts.right(row, found.setting)].append(row)
    judged = by_verdict[True][:SHOWN] + by_verdict[False][:SHOWN]
    shown = judged or by_verdict[None][: 2 * SHOWN]
    return [example(found.corpus, row) | {"right": verdicts.right(row, found.setting)} for row in shown]


def example(corpus: Corpus, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the texts of the passages read, in the form of `markdown.write`."""
    passages = []
    for one, prior, posterior in zip(row["read"], row["prior"], row["posterior"], strict=True):
        title, text = passage(corpus, one) or ("", "")
        passages.append({"id": one, "title": title, "text": text, "prior": prior, "posterior": posterior})
    right = [one for one in row["read"] if unit(row, one) in row["gold"]]
    return {**row, "answers": row["answers"] or [row["target"] or ""], "passages": passages, "gold": right}
