"""`rag-jax compare`: evaluations of the same questions side by side."""

import argparse
from pathlib import Path
from typing import Any

from rag_jax import metrics
from rag_jax.evaluation.compare import compare, table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directories that rag-jax evaluate wrote into"
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help=f"of {', '.join(metrics.METRICS)} (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.md, and compare.html to browse")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.epilog = "example: rag-jax compare runs/frozen runs/learned --metric exact_match --metric recall"


def run(args: argparse.Namespace) -> dict[str, Any]:
    result = compare(args.runs, args.metric, args.seed, args.out)
    return {"text": table(result), **result}
