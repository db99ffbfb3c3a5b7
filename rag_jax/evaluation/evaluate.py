"""Answers a file of questions, scores answers and retrieval, and writes predictions and reports."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax import metrics
from rag_jax.corpus.directory import Corpus
from rag_jax.data import gold, tasks
from rag_jax.data.readers import formats
from rag_jax.data.readers.formats import Question
from rag_jax.errors import InputError
from rag_jax.evaluation import docs_curve, predictions
from rag_jax.evaluation.report import write_report
from rag_jax.inference import pipeline as pipelines
from rag_jax.inference.pipeline import AnswerConfig, Pipeline
from rag_jax.metrics import abstention
from rag_jax.metrics.calibration import calibration
from rag_jax.metrics.curves import recall_curves
from rag_jax.retrieval.config import SearchConfig
from rag_jax.runs.index_location import IndexLocation
from rag_jax.system import configuration, distributed, files, logs


def predict(
    location: IndexLocation,
    params: Any,
    index: Any,
    questions: Sequence[Question],
    cfg: AnswerConfig,
    program: Any = None,
    match: str = "string",
) -> list[dict[str, Any]]:
    """Answers questions with these parameters and this index, and returns their prediction rows.

    program: the compiled answer program, if there is one. match: as in metrics.Judging.
    """
    texts = [question.question for question in questions]
    loaded = location.loaded
    gold_NG = pipelines.right_rows(questions, loaded.corpus) if cfg.oracle else None
    answers = pipelines.answer_questions(location, params, index, texts, cfg, program, gold_NG)
    depth = pipelines.depth(loaded, cfg)
    return predictions.rows(questions, answers, loaded.corpus, depth, cfg.retrieval_only, match)


def select(questions: Sequence[Question], where: str, limit: int) -> list[Question]:
    """The first `limit` questions (0: all) with the extra field and value of `where`, such as changed=true; "": any."""
    if limit < 0:
        raise InputError(f"--limit {limit} must be at least 0 (all)")
    chosen = list(questions)
    if where:
        name, separator, value = where.partition("=")
        if not separator:
            raise InputError(f"--where {where}: expected FIELD=VALUE, such as changed=true")
        chosen = [q for q in chosen if json.dumps(q.extra.get(name)) == value or q.extra.get(name) == value]
        if not chosen:
            raise InputError(f"--where {where}: no question has this; write values as in the file (true, 3, text)")
    return chosen[:limit] if limit else chosen


@dataclass(frozen=True)
class EvaluateOptions:
    """Settings of an evaluation.

    questions: question file; None: the dev questions of the run.
    skip_bad_lines: report unreadable records and go on.
    index: index directory; None: that of the run.
    where, limit: see `select`.
    configure: changes the run's own settings of answering.
    search: as in Pipeline.from_run; None: that of the run.
    labels: possible labels (metrics.Judging); (): the allowed answers.
    match: rule of comparing answers (metrics.Judging); "": that of the run's task.
    names: metrics, keys of metrics.METRICS; (): those that fit the data.
    docs: numbers of documents for the curve of `docs_curve`.
    shown: questions in report.html; None: as many as it has room for.
    command: command line that repeats this evaluation, for the report.
    """

    questions: Path | None = None
    skip_bad_lines: bool = False
    index: Path | None = None
    where: str = ""
    limit: int = 0
    configure: Callable[[AnswerConfig], AnswerConfig] = lambda cfg: cfg
    search: SearchConfig | None = None
    labels: Sequence[str] = ()
    match: str = ""
    names: Sequence[str] = ()
    docs: Sequence[int] = ()
    shown: int | None = None
    command: str = ""


def evaluate(directory: Path, out: Path, wanted: EvaluateOptions) -> dict[str, Any]:
    """Evaluates a run on a question file, writes predictions and reports (`write_report`) into `out`, and returns the
    content of report.json.

    With several processes all answer together, and the first one writes.
    """
    begun = time.perf_counter()
    metrics.check_names(wanted.names)
    if wanted.shown is not None and wanted.shown < 0:
        raise InputError(f"--report-questions {wanted.shown} must be at least 0")
    if distributed.first():
        files.check_writable(out)
    pipeline = Pipeline.from_run(directory, wanted.index, wanted.search)
    if wanted.questions is None and not pipeline.config.dev:
        raise InputError(f"{directory}: a converted model names no questions; pass --questions FILE")
    file = wanted.questions or Path(pipeline.config.dev)
    corpus, task = pipeline.loaded.corpus, pipeline.config.task
    found = formats.read_questions(file, skip_bad_lines=wanted.skip_bad_lines)
    asked = tasks.posed(select(found, wanted.where, wanted.limit), task, corpus)
    cfg = wanted.configure(pipeline.answer_config())
    setting = metrics.Judging(tuple(wanted.labels) or cfg.allowed_answers, wanted.match or task.match)
    docs_curve.check(pipeline, cfg, wanted.docs)
    tally = gold_ids(asked, corpus, file, cfg, wanted.names)
    gold_NG = right_passages(asked, corpus, file) if cfg.oracle else None
    answers = pipeline.answer([q.question for q in asked], predictions.deeper(cfg, asked, corpus), gold_NG)
    depth = pipelines.depth(pipeline.loaded, cfg)
    rows = predictions.rows(asked, answers, corpus, depth, cfg.retrieval_only, setting.match)
    figures = scored(rows, setting, wanted.names)
    curves: dict[str, Any] = {"recall": recall_curves(rows, setting), "calibration": calibration(rows, setting)}
    if wanted.docs:
        curves["n_docs"] = docs_curve.curve(pipeline, cfg, wanted.docs, rows, setting, out)
    report = {
        **figures,
        **dataclasses.asdict(setting),
        **what(pipeline),
        "questions": str(file),
        "where": wanted.where,
        **configuration.plain(cfg),
        **({} if gold_NG is None else {"without_gold": int((gold_NG < 0).all(1).sum())}),
        **({"gold_ids": dataclasses.asdict(tally)} if tally.named else {}),
        **how_judged(rows),
        "task": configuration.plain(task),
        "curves": curves,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if distributed.first():
        made = write_report.EvaluationResults(directory, pipeline.loaded.corpus, rows, report, setting, wanted.command)
        write_report.write(out, made, wanted.shown)
    distributed.barrier("report written")
    return report


def gold_ids(
    asked: Sequence[Question], corpus: Corpus, file: Path, cfg: AnswerConfig, names: Sequence[str] = ()
) -> gold.Tally:
    """Counts the gold ids of the questions, and warns of those that the corpus lacks.

    names: the metrics that were asked for; (): the default ones.
    InputError where the corpus lacks most, and they are needed for a metric or for an oracle.
    """
    if cfg.closed_book:
        return gold.Tally()
    needed = cfg.oracle or not names or bool(set(names) & set(metrics.OF_GOLD))
    mend = (
        "name the index of its corpus with --index, correct positive_passage_ids, or ask for other figures alone "
        "(--metrics exact_match,f1)"
    )
    found = gold.tally(asked, corpus)
    found.settle(file, corpus.directory, "they count as not found", mend, refuse=needed)
    return found


def right_passages(asked: Sequence[Question], corpus: Corpus, file: Path) -> np.ndarray:
    """Rows of the right passages for an oracle (`pipelines.right_rows`); InputError if no question has one.

    Training on gold documents refuses the same.
    """
    gold_NG = pipelines.right_rows(asked, corpus)
    if (gold_NG < 0).all():
        raise InputError(f"{file}: no question names a right passage that the corpus has, which --oracle reads")
    return gold_NG


def how_judged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts for report.json: questions judged by passage and by document, and those for which no passage was found."""
    levels = Counter(row["level"] for row in rows if row["level"] and row["depth"])
    nothing = sum(not row["retrieved"] for row in rows if row["depth"])
    if nothing:
        logs.info(f"nothing was found for {nothing:,} of {len(rows):,} questions: none of them reads a passage")
    return {**({"judged_by": dict(levels)} if levels else {}), **({"nothing_found": nothing} if nothing else {})}


def what(pipeline: Pipeline) -> dict[str, Any]:
    """Names and hashes of run, corpus, index and search, for report.json."""
    manifest = pipeline.snapshot.manifest
    return {
        "run": str(pipeline.directory),
        "corpus": manifest.corpus,
        "index": str(pipeline.snapshot.directory),
        "index_hash": pipeline.snapshot.hash,
        "index_step": manifest.step,
        "encoder_hash": manifest.encoder_hash,
        "search": pipeline.search_manifest(),
        "corpus_hash": manifest.corpus_hash,
        "variant": pipeline.loaded.rag.variant,
    }


def scored(rows: Sequence[dict[str, Any]], setting: metrics.Judging, names: Sequence[str] = ()) -> dict[str, Any]:
    """The figures with intervals, and the risk-coverage curve if its area is among them; logs what is left out."""
    found: dict[str, Any] = metrics.summarize(rows, setting, names, intervals=True)
    for reason in metrics.missing(rows, setting, names, found):
        logs.info(reason)
    if "risk_coverage_area" in found:
        found["risk_coverage"] = abstention.risk_coverage(rows, setting)
    return found
