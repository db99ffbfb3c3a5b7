"""`rag-jax export`: writes the model of a run as a directory that transformers loads."""

import argparse
from pathlib import Path
from typing import Any

from rag_jax.pretrained import as_run, load
from rag_jax.pretrained.export import save_pretrained
from rag_jax.pretrained.parts import SIDES
from rag_jax.runs import directory as runs


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of rag-jax train, or of rag-jax convert")
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--part", choices=SIDES, help="this part alone, for its own class in transformers")
    parser.add_argument(
        "--context-encoder-inside", action="store_true", help="in the RAG checkpoint, not in a folder of its own"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file of weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported model that is there")
    parser.epilog = "example: rag-jax export models/rag-token-nq --out models/rag-token-nq-hf"


def run(args: argparse.Namespace) -> dict[str, Any]:
    rag, params = load.open_pretrained(args.run)
    folder = args.run / "tokenizers"
    save_pretrained(
        args.out,
        rag,
        params,
        part=args.part,
        tokenizers_from=folder if folder.is_dir() else None,
        original=as_run.provenance(args.run),
        context_inside=args.context_encoder_inside,
        shard_bytes=int(args.shard_gb * 1e9),
        overwrite=args.overwrite,
        answering=runs.read_config(args.run).answering,
    )
    return {"out": str(args.out), "variant": rag.variant, "part": args.part or "all"}
