"""`rag-jax index`: embed a corpus with a run's context encoder, into an index directory."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_jax import run as runs
from rag_jax import sharding
from rag_jax.retrieval.corpus import Corpus


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of rag-jax train")
    parser.add_argument(
        "--corpus", type=Path, required=True, help="corpus directory, tokenised as the run's corpus was"
    )
    parser.add_argument("--out", type=Path, required=True, help="the index directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    parser.epilog = "example: rag-jax index runs/world --corpus data/edited-corpus --out data/edited-index"


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = runs.read_config(args.run)
    corpus = Corpus.open(args.corpus)
    runs.check_tokenizers(args.run, corpus)
    loaded = runs.load(config.model, corpus, sharding.make_mesh(config.mesh or None))
    params = runs.read_params(args.run, loaded.rag, loaded.mesh)
    step = sum(stage.steps for stage in config.stages)
    snapshot = runs.write_index(loaded, params, step, args.out, args.overwrite)
    return {"index": str(args.out), **asdict(snapshot.manifest)}
