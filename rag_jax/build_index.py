"""`rag-jax index`: an index directory, from an encode job or from a run and a corpus in one go."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_jax import encode_corpus
from rag_jax.errors import InputError
from rag_jax.retrieval import encode_job, index
from rag_jax.retrieval.corpus import Corpus


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="RUN|JOB", help="run directory (needs --corpus), or a finished rag-jax encode job"
    )
    parser.add_argument(
        "--corpus", type=Path, help="corpus tokenised as the run's corpus was (of a job: if it was moved)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the index directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    parser.epilog = (
        "examples:\n"
        "  rag-jax index runs/world --corpus data/edited-corpus --out data/edited-index\n"
        "  rag-jax index runs/wiki/embeddings --out indexes/wiki      (after rag-jax encode; the files are shared)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if encode_job.is_job(args.source):
        snapshot = from_job(args.source, args.corpus, args.out, args.overwrite)
    elif args.corpus is None:
        raise InputError(f"{args.source}: with a run, --corpus says what to embed; it is no encode job")
    else:
        snapshot = from_run(args.source, args.corpus, args.out, args.overwrite)
    return {"index": str(args.out), **asdict(snapshot.manifest), "hash": snapshot.hash}


def from_job(job_dir: Path, corpus_dir: Path | None, out: Path, overwrite: bool = False) -> index.Snapshot:
    """The snapshot of a finished job."""
    return index.from_job(job_dir, Corpus.open(corpus_dir or encode_job.read_job(job_dir).corpus), out, overwrite)


def from_run(run_dir: Path, corpus_dir: Path, out: Path, overwrite: bool = False) -> index.Snapshot:
    """Embeds a corpus into a snapshot in one go."""
    corpus = Corpus.open(corpus_dir)
    encoder = encode_corpus.read_encoder(run_dir, corpus)
    blocks = encode_job.blocks(encoder.rows(corpus), range(len(corpus)))
    return index.write(out, encoder.manifest(corpus), blocks, overwrite)
