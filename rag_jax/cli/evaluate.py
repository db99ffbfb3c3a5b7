"""`rag-jax evaluate`: a file of questions, answered and scored; predictions and reports."""

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from rag_jax import metrics
from rag_jax.cli import answer_options, process_options
from rag_jax.data.readers import formats
from rag_jax.evaluation.evaluate import EvaluateOptions, evaluate
from rag_jax.metrics import matching
from rag_jax.system import distributed


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of rag-jax train")
    parser.add_argument(
        "--questions", type=Path, help="question file (default: the dev questions of the configuration)"
    )
    parser.add_argument(
        "--format", choices=formats.FORMATS, default="", help="of the question file (default: as its content tells)"
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="report bad lines instead of stopping")
    parser.add_argument("--out", type=Path, help="directory for predictions.jsonl and the reports (default: RUN)")
    parser.add_argument("--index", type=Path, help="another index, made by rag-jax index: hot swap, no retraining")
    answer_options.add_arguments(parser)
    for name, text in (
        ("--closed-book", "no passages: what the generator knows by itself"),
        ("--oracle", "the right passages are read first: what the generator could do with a perfect retriever"),
        ("--retrieval-only", "recall alone; no answers are written"),
    ):
        parser.add_argument(name, action="store_true", default=None, help=text)  # None: as --decoding says
    parser.add_argument("--n-retrieved", type=int, help="passages retrieved, for recall@k (default: 100)")
    parser.add_argument("--batch", type=int, help="questions answered at once (default: 16)")
    parser.add_argument("--where", default="", metavar="FIELD=VALUE", help="only questions with this, as changed=true")
    parser.add_argument("--limit", type=int, default=0, help="only the first questions of the file")
    parser.add_argument(
        "--metrics",
        type=listed,
        default=(),
        metavar="A,B",
        help=f"of {', '.join(metrics.METRICS)} (default: what fits)",
    )
    parser.add_argument(
        "--labels", type=listed, default=(), metavar="A,B", help="the classes (default: allowed_answers)"
    )
    parser.add_argument(
        "--match",
        choices=tuple(matching.MATCHERS),
        default="",
        help="regex: the answers of the file are patterns; mlqa_zh: MLQA's rules (default: as trained)",
    )
    parser.add_argument(
        "--n-docs-curve", type=numbers, default=(), metavar="A,B",
        help="answer again with so many documents each, as 1,2,5,10,20: figure 3; killed, it goes on",
    )  # fmt: skip
    parser.add_argument(
        "--report-questions", type=int, metavar="N", help="questions in report.html (default: what 18 MB hold)"
    )
    process_options.add_arguments(parser)
    parser.epilog = "example: rag-jax evaluate runs/world --questions data/world/test.jsonl"


def listed(text: str) -> tuple[str, ...]:
    """The comma-separated parts of a text."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    """The comma-separated whole numbers in a text."""
    return tuple(map(int, listed(text)))


FIGURES = 7  # that are printed; report.json has all
AMONG_THE_REST = ("kilt_", "answer_recall_", "recall_at_100")  # of the figures, while there are others
NOT_REPEATED = ("run", "json", "verbose", "coordinator", "processes", "process", "distributed")
USUAL = {"limit": 0}


def command(args: argparse.Namespace) -> str:
    """The command line that repeats this evaluation."""
    words = ["rag-jax", "evaluate", str(args.run)]
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in NOT_REPEATED or value is None or value is False or value in ("", [], (), USUAL.get(name)):
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [word for one in value for word in (option, str(one))]
        else:
            words += [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    with distributed.together(process_options.from_arguments(args)):
        wanted = EvaluateOptions(
            questions=Path(*formats.named([args.questions], args.format)) if args.questions else None,
            skip_bad_lines=args.skip_bad_lines,
            index=args.index,
            where=args.where,
            limit=args.limit,
            configure=partial(answer_options.from_arguments, args),
            search=answer_options.search_from_argument(args.search),
            labels=args.labels,
            match=args.match,
            names=args.metrics,
            docs=args.n_docs_curve,
            shown=args.report_questions,
            command=command(args),
        )
        out = args.out or args.run
        report = evaluate(args.run, out, wanted)
        if not distributed.first():
            return None
        if args.json:
            return report
        curves = ("curves", "risk_coverage")  # they are drawn in the report
        return {"text": text(report, out), **{name: value for name, value in report.items() if name not in curves}}


def text(report: dict[str, Any], out: Path) -> str:
    """The printed summary: questions and setting, the main figures with their intervals, and the report's files."""
    how = "closed book" if report["closed_book"] else f"{report['n_docs']} passages read of {report['n_retrieved']}"
    how = f"the right passages first, {how}" if report["oracle"] else how
    model = "retrieval alone" if report["retrieval_only"] else f"RAG-{report['variant'].capitalize()}"
    lines = [f"{report['n']:,} questions of {report['questions']}: {model}, {how}, {report['seconds']:.0f} s"]
    lines += ["figures, and in brackets their 95% intervals:"]
    figures = [name for name in report if f"{name}_low" in report]
    first = [name for name in figures if not name.startswith(AMONG_THE_REST)][:FIGURES] or figures[:FIGURES]
    width = max(map(len, first), default=0) + 2
    for name in first:
        low, high = report[f"{name}_low"], report[f"{name}_high"]
        lines.append(f"{name:<{width}}{report[name]:.3f}  ({low:.3f} to {high:.3f})")
    rest = len(figures) - len(first)
    more = f"{rest} more figures and all settings: --verbose, or {out / 'report.json'}" if rest else ""
    said = [f"nothing was found for {report['nothing_found']:,} questions"] if report.get("nothing_found") else []
    files = f"see {out / 'report.html'} and {out / 'report.md'}; every answer: {out / 'predictions.jsonl'}"
    return "\n".join([*lines, *said, *([more] if more else []), files])
