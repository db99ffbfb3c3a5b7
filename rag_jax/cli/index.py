"""`rag-jax index`: an index directory, from an encode job, from a run and a corpus in one go, or from an older index
of which the corpus is an update.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_jax.errors import InputError
from rag_jax.index import encode_job, shards
from rag_jax.inference import build_index


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="RUN|JOB",
        help="run directory (needs --corpus), or a finished rag-jax encode job",
    )
    parser.add_argument(
        "--corpus", type=Path, help="corpus tokenised as the run's corpus was (of a job: if it was moved)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the index directory to make")
    parser.add_argument("--dtype", choices=list(shards.DTYPES), help="as stored, of a run (default float32)")
    parser.add_argument("--update", type=Path, metavar="INDEX", help="embed only the rows that this one does not have")
    parser.add_argument("--run", type=Path, metavar="RUN", help="with --update: the run that INDEX was made with")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    parser.epilog = (
        "examples:\n"
        "  rag-jax index runs/world --corpus data/edited-corpus --out data/edited-index\n"
        "  rag-jax index runs/wiki/embeddings --out indexes/wiki      (after rag-jax encode; the files are shared)\n"
        "  rag-jax index --update indexes/wiki --run runs/wiki --corpus corpora/monday --out indexes/monday"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.dtype and (args.update is not None or (args.source and encode_job.is_job(args.source))):
        raise InputError("--dtype is that of the job or of the older index; it is chosen when a run embeds")
    if args.update is not None:
        run_dir = args.run or args.source
        if run_dir is None or args.corpus is None or (args.run and args.source):
            raise InputError("--update INDEX needs --run RUN and --corpus CORPUS, and nothing beside them")
        snapshot = build_index.from_snapshot(args.update, run_dir, args.corpus, args.out, args.overwrite)
    elif args.source is None or args.run is not None:
        raise InputError("name a RUN, with --corpus, or a JOB; --run goes with --update")
    elif encode_job.is_job(args.source):
        snapshot = build_index.from_job(args.source, args.corpus, args.out, args.overwrite)
    elif args.corpus is None:
        raise InputError(f"{args.source}: with a run, --corpus says what to embed; it is no encode job")
    else:
        snapshot = build_index.from_run(args.source, args.corpus, args.out, args.overwrite, args.dtype or "float32")
    m = snapshot.manifest
    said = f"{args.out}: {m.n_passages:,} passages as {m.width} numbers of {m.dtype}, by the encoder of step {m.step:,}"
    hint = f"next: rag-jax ask QUESTION --run RUN --index {args.out}, or rag-jax evaluate RUN --index {args.out}"
    return {"text": f"{said}\n{hint}", "index": str(args.out), **asdict(m), "hash": snapshot.hash}
