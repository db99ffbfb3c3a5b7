"""`rag-jax encode`: a corpus embedded with a run's context encoder."""

import argparse
from pathlib import Path
from typing import Any

from rag_jax.cli import process_options
from rag_jax.errors import InputError
from rag_jax.index import encode, encode_job, shards
from rag_jax.inference.encode_corpus import encode_corpus
from rag_jax.system import distributed


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of rag-jax train")
    parser.add_argument("--corpus", type=Path, required=True, help="corpus tokenised as the run's corpus was")
    parser.add_argument("--out", type=Path, required=True, help="directory of the job: a new one, or one to resume")
    parser.add_argument(
        "--shard-rows", type=int, default=encode_job.SHARD_ROWS, metavar="N", help="passages a file (%(default)s)"
    )
    parser.add_argument("--dtype", choices=list(shards.DTYPES), default="float32", help="as stored (%(default)s)")
    parser.add_argument(
        "--batch", type=int, default=encode.BATCH, help="passages embedded at once, over all devices (%(default)s)"
    )
    process_options.add_arguments(parser)
    parser.epilog = (
        "Killed or stopped, the same command goes on; several processes share one --out.\n"
        "example: rag-jax encode runs/wiki --corpus corpora/wiki --out runs/wiki/embeddings --dtype int8\n"
        "         rag-jax index runs/wiki/embeddings --out indexes/wiki"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("shard_rows", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    distributed.initialize(process_options.from_arguments(args))
    return encode_corpus(args.run, args.corpus, args.out, args.dtype, args.shard_rows, args.batch)
