"""`rag-jax bench`: a table of benchmarks, each a module with `configure(parser)` and `run(args)`."""

import argparse
from typing import Any

import jax

from rag_jax.cli import bench_decode, bench_encode, bench_search, bench_train, output_options

BENCHES = {
    "train": (
        bench_train,
        "the training step: of a configuration's stages, or of a load beside transformers",
    ),
    "decode": (bench_decode, "writing answers, beside transformers and beside the limit"),
    "search": (bench_search, "exact search by types of the index, beside faiss, NumPy and ScaNN"),
    "encode": (bench_encode, "embedding passages, beside transformers and beside the limit"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (module, text) in BENCHES.items():
        kind = kinds.add_parser(name, help=text, description=text)
        output_options.add_arguments(kind, default=argparse.SUPPRESS)
        module.configure(kind)
    parser.epilog = "example: rag-jax bench decode --load medium"


def run(args: argparse.Namespace) -> dict[str, Any]:
    jax.config.update("jax_enable_compilation_cache", False)  # or compile times would be those of reading the cache
    module, _ = BENCHES[args.what]
    return module.run(args)
