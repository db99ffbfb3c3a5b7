"""`rag-jax world`: the built-in fictional world, as files of passages and questions."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from rag_jax.data.synthetic.world import write


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `rag-jax world`."""
    parser.add_argument("--out", required=True, type=Path, help="directory to write; must not exist or be empty")
    parser.add_argument("--entities", type=int, default=2000, help="entities, one passage each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world (default: %(default)s)")
    parser.add_argument("--edit", action="store_true", help="the same world with half of its facts changed")
    parser.add_argument(
        "--relations", type=int, default=0, help="kinds of fact a kind of entity, 6 or more (default: all)"
    )
    parser.add_argument(
        "--wordings", type=int, default=0, help="wordings of each statement and question (default: all)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.epilog = "example: rag-jax world --out world --entities 2000 --seed 0"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the world, and returns its manifest with passages per second."""
    start = time.perf_counter()
    manifest = write(
        args.out, args.entities, args.seed, args.edit, args.workers, relations=args.relations, wordings=args.wordings
    )
    made = ", ".join(f"{n:,} {name}" for name, n in manifest["counts"].items())
    return {
        "text": f"{args.out}: {made}\nnext: rag-jax corpus {args.out}/passages.jsonl --out CORPUS --train-tokenizer",
        "out": str(args.out),
        **manifest,
        "passages_per_second": round(args.entities / (time.perf_counter() - start)),
    }
