"""`rag-jax bench search`: exact search by types of the index, beside other libraries."""

import argparse
from typing import Any

from rag_jax.bench.search import DTYPES, RIVALS, SearchLoad, report


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passages", type=int, default=SearchLoad.passages, help=f"(default: {SearchLoad.passages:,})")
    parser.add_argument("--width", type=int, default=SearchLoad.width, help=f"(default: {SearchLoad.width})")
    parser.add_argument(
        "--batch", type=int, default=SearchLoad.batch, help=f"queries at a time (default: {SearchLoad.batch})"
    )
    parser.add_argument("--seed", type=int, default=SearchLoad.seed)
    parser.add_argument("--k", type=int, nargs="+", default=[5, 100], help="passages to find (default: 5 100)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the index; float32 is always measured"
    )
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, help="(default: those installed)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    parser.epilog = "example: rag-jax bench search --passages 1000000 --k 5 100 --rivals faiss --json"


def run(args: argparse.Namespace) -> dict[str, Any]:
    load = SearchLoad(args.passages, args.width, args.batch, args.seed)
    return report(load, args.k, args.dtype, args.rivals, args.repeats)
