"""Options shared by the commands that answer questions."""

import argparse
import dataclasses
import json

import ml_collections

from rag_jax.errors import InputError
from rag_jax.inference.config import AnswerConfig
from rag_jax.retrieval.config import SearchConfig, check_search_config
from rag_jax.system import configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of answering: --decoding, --search, --n-docs, --num-beams, --mode, --set."""
    parser.add_argument("--decoding", default="", metavar="FILE[:NAME]", help="as configs/decoding.py:paper_sequence")
    parser.add_argument(
        "--search", metavar="KIND|JSON", help="exact, scann, bm25, hybrid (default: as trained), or all of SearchConfig"
    )
    parser.add_argument("--n-docs", type=int, help="passages read per question (default: as trained)")
    parser.add_argument("--num-beams", type=int, help="1: greedy (the default)")
    parser.add_argument("--mode", choices=("thorough", "fast"), help="decoding of RAG-Sequence (default: thorough)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any field of rag_jax.inference.config.AnswerConfig",
    )


def search_from_argument(text: str | None) -> SearchConfig | None:
    """The SearchConfig of --search, which is a kind or the keys of SearchConfig as JSON; None where it is not given."""
    if not text:
        return None
    try:
        values = json.loads(text) if text.startswith("{") else {"kind": text}
    except ValueError as error:
        raise InputError(f"--search {text}: not JSON ({error})") from error
    search = configuration.build(SearchConfig, values, "--search")
    check_search_config(search)
    return search


def from_arguments(args: argparse.Namespace, base: AnswerConfig) -> AnswerConfig:
    """`base`, updated by --decoding, then by the other options given, then by --set."""
    values = configuration.plain(base) | (configuration.evaluated(args.decoding) if args.decoding else {})
    names = {field.name for field in dataclasses.fields(AnswerConfig)}
    values |= {name: value for name, value in vars(args).items() if name in names and value is not None}
    changes = ml_collections.ConfigDict()
    configuration.override(changes, args.set)
    return configuration.build(AnswerConfig, values | configuration.plain(changes), "decoding")
