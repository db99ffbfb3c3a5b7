"""`rag-jax evaluate`: a file of questions, answered and scored; predictions and reports."""

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from rag_jax import metrics
from rag_jax.cli import answer_options, process_options
from rag_jax.data.readers import formats
from rag_jax.evaluation.evaluate import Wanted, evaluate
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


NOT_REPEATED = ("run", "json", "coordinator", "processes", "process", "distributed")
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
        wanted = Wanted(
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
        return report if args.json else {"text": text(report, out)}


def text(report: dict[str, Any], out: Path) -> str:
    """The printed result: all of report.json but the curves, and the files in which to see them."""
    shown = {name: value for name, value in report.items() if name not in ("curves", "risk_coverage")}
    lines = [f"{name}: {value}" for name, value in shown.items()]
    return "\n".join([*lines, f"see {out / 'report.html'}, {out / 'report.md'} and {out / 'predictions.jsonl'}"])
