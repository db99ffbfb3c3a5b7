"""`rag-jax evaluate`: answer a file of questions; score the answers and the retrieval; write predictions.jsonl and
report.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rag_jax import answer, config, distributed, logs, metrics
from rag_jax import run as runs
from rag_jax.answer import Answer, AnswerConfig, Pipeline
from rag_jax.config import SearchConfig
from rag_jax.data import formats
from rag_jax.data.formats import Question
from rag_jax.errors import InputError


def prediction_rows(
    questions: Sequence[Question], answers: Sequence[Answer], corpus: Any, retrieval_only: bool = False
) -> list[dict[str, Any]]:
    """One row a question: what predictions.jsonl holds and metrics.summarize reads."""
    rows = []
    for question, found in zip(questions, answers, strict=True):
        golds = list(question.answers) or ([question.target] if question.target else [])
        texts = [corpus[corpus.row(passage)] for passage in found.retrieved]
        rows.append(
            {
                "id": question.id,
                "question": question.question,
                "prediction": None if retrieval_only else found.text,
                "answers": golds,
                "score": found.score,
                "gold": list(question.right_passage_ids),
                "retrieved": list(found.retrieved),
                "prior": [passage.prior for passage in found.passages],
                "posterior": [passage.posterior for passage in found.passages],
                "retrieved_has_answer": [metrics.has_answer(f"{p.title} {p.text}", golds) for p in texts],
            }
        )
    return rows


def predict(
    loaded: runs.Loaded, params: Any, index: Any, questions: Sequence[Question], cfg: AnswerConfig, program: Any = None
) -> list[dict[str, Any]]:
    """Prediction rows of the questions."""
    texts = [question.question for question in questions]
    answers = answer.answer_questions(loaded, params, index, texts, cfg, program)
    return prediction_rows(questions, answers, loaded.corpus, cfg.retrieval_only)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, by rename."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.rename(path)


def select(questions: Sequence[Question], where: str, limit: int) -> list[Question]:
    """The first `limit` questions (0: all) whose field equals the value in `where`, such as changed=true."""
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


def evaluate(
    directory: Path,
    questions: Path | None,
    out: Path,
    index: Path | None = None,
    where: str = "",
    limit: int = 0,
    configure: Callable[[AnswerConfig], AnswerConfig] = lambda cfg: cfg,
    search: SearchConfig | None = None,
) -> dict[str, Any]:
    """Score a run on a question file (its own dev questions by default) and write the two files into `out`.

    configure: what to change of how the run answers by default. search: as of Pipeline.from_run. With several
    processes all answer together, and the first one writes.
    """
    begun = time.perf_counter()
    pipeline = Pipeline.from_run(directory, index, search)
    if questions is None and not pipeline.config.dev:
        raise InputError(f"{directory}: a converted model names no questions; pass --questions FILE")
    file = questions or Path(pipeline.config.dev)
    asked = select(formats.read_questions(file), where, limit)
    cfg = configure(pipeline.answer_config())
    answers = pipeline.answer([q.question for q in asked], cfg)
    rows = prediction_rows(asked, answers, pipeline.loaded.corpus, cfg.retrieval_only)
    manifest = pipeline.snapshot.manifest
    report = {
        **metrics.summarize(rows),
        "run": str(directory),
        "questions": str(file),
        "where": where,
        "corpus": manifest.corpus,
        "index": str(pipeline.snapshot.directory),
        "index_hash": pipeline.snapshot.hash,
        "index_step": manifest.step,
        "encoder_hash": manifest.encoder_hash,
        "search": pipeline.search_manifest(),
        "corpus_hash": manifest.corpus_hash,
        "variant": pipeline.loaded.rag.variant,
        **config.plain(cfg),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if distributed.first():
        out.mkdir(parents=True, exist_ok=True)
        write_lines(out / "predictions.jsonl", rows)
        temporary = out / "report.json.tmp"
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        temporary.rename(out / "report.json")
    distributed.barrier("report written")
    return report


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of rag-jax train")
    parser.add_argument(
        "--questions", type=Path, help="question file (default: the dev questions of the configuration)"
    )
    parser.add_argument("--out", type=Path, help="directory for predictions.jsonl and report.json (default: RUN)")
    parser.add_argument("--index", type=Path, help="another index, made by rag-jax index: hot swap, no retraining")
    answer.add_arguments(parser)
    for name, text in (
        ("--closed-book", "no passages: what the generator knows by itself"),
        ("--retrieval-only", "recall alone; no answers are written"),
    ):
        parser.add_argument(name, action="store_true", default=None, help=text)  # None: as --decoding says
    parser.add_argument("--n-retrieved", type=int, help="passages retrieved, for recall@k (default: 100)")
    parser.add_argument("--batch", type=int, help="questions answered at once (default: 16)")
    parser.add_argument("--where", default="", metavar="FIELD=VALUE", help="only questions with this, as changed=true")
    parser.add_argument("--limit", type=int, default=0, help="only the first questions of the file")
    distributed.add_arguments(parser)
    parser.epilog = "example: rag-jax evaluate runs/world --questions data/world/test.jsonl"


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    configured = partial(answer.from_arguments, args)
    with distributed.together(args):
        if not distributed.first():
            logs.silence()
        search = answer.search_from_argument(args.search)
        out = args.out or args.run
        report = evaluate(args.run, args.questions, out, args.index, args.where, args.limit, configured, search)
        return report if distributed.first() else None
