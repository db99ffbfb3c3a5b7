"""`rag-jax verify`: what is damaged in a corpus, index, encode job, run, converted model or export."""

import argparse
from pathlib import Path
from typing import Any

from rag_jax.runs.verify_artifacts import verify


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="corpus, index, encode job, run, model or export")
    parser.epilog = "Exit status 2 where anything is damaged.\nexample: rag-jax verify runs/world"


def run(args: argparse.Namespace) -> dict[str, Any]:
    found = verify(args.path)
    damaged = found["damaged"]
    said = f"{args.path}: {found['kind']}, {found['bytes']:,} bytes: "
    said += f"{len(damaged)} damaged" if damaged else "whole"
    if args.json:
        return found | {"exit_status": 2 if damaged else 0}
    return {"text": "\n".join([*damaged, said]), "exit_status": 2 if damaged else 0}
