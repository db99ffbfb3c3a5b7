"""`rag-jax bench decode`: how fast answers are written."""

import argparse
from typing import Any

from rag_jax.bench.decode import LOADS, Variant, report
from rag_jax.cli import load_options


def configure(parser: argparse.ArgumentParser) -> None:
    load_options.add_arguments(parser, LOADS)
    parser.add_argument("--variant", choices=("sequence", "token", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--alone", action="store_true", help="without transformers, even if it is there")
    parser.epilog = "example: rag-jax bench decode --load medium --beams 8 --json"


def run(args: argparse.Namespace) -> dict[str, Any]:
    variants: tuple[Variant, ...] = ("token", "sequence") if args.variant == "both" else (args.variant,)
    return report(load_options.chosen(args, LOADS), variants, args.repeats, args.alone)
