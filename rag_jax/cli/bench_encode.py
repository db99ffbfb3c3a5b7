"""`rag-jax bench encode`: how fast passages are embedded."""

import argparse
from pathlib import Path
from typing import Any

from rag_jax.bench.encode import LOADS, report
from rag_jax.cli import load_options


def configure(parser: argparse.ArgumentParser) -> None:
    load_options.add_arguments(parser, LOADS)
    parser.add_argument("--corpus", type=Path, help="its first passages instead of random ones")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--alone", action="store_true", help="without transformers, even if torch is there")
    parser.epilog = "example: rag-jax bench encode --load minilm --corpus data/corpus --json"


def run(args: argparse.Namespace) -> dict[str, Any]:
    return report(load_options.chosen(args, LOADS), args.corpus, args.repeats, args.alone)
