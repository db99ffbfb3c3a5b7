"""`rag-jax convert`: converts Hugging Face checkpoints to a run directory."""

import argparse
from pathlib import Path
from typing import Any, get_args

from rag_jax.models.protocols import Pooling
from rag_jax.pretrained.convert import convert
from rag_jax.pretrained.encoder_files import Asked


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a RAG checkpoint: a directory or a hub name")
    parser.add_argument("--question-encoder", metavar="A", help="instead of SOURCE: DPR, BERT, sentence-transformers")
    parser.add_argument("--context-encoder", metavar="B", help="likewise; a BERT given once encodes both")
    parser.add_argument("--generator", metavar="C", help="likewise: BART, mBART, T5, GPT-2, Llama; none: a retriever")
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--variant", choices=("sequence", "token"), help="RAG-Sequence or RAG-Token, as stored if known"
    )
    parser.add_argument("--change-variant", action="store_true", help="take --variant though another one is stored")
    parser.add_argument("--n-docs", type=int, default=0, help="passages read per question (default: as stored, else 5)")
    parser.add_argument(
        "--source-length", type=int, default=0, help="longest generator input (default: as stored, 300)"
    )
    parser.add_argument("--pooling", choices=get_args(Pooling), help="of the encoder's states (default: as stored)")
    parser.add_argument("--question-length", type=int, default=0, help="tokens of a question read (default: as stored)")
    parser.add_argument(
        "--passage-length", type=int, default=0, help="tokens of a passage, for corpora of it (default: as stored)"
    )
    parser.add_argument(
        "--query-prefix", metavar="TEXT", help='before every question, as "query: " (default: as stored)'
    )
    parser.add_argument("--passage-prefix", metavar="TEXT", help="likewise before every passage")
    parser.add_argument(
        "--ignore-setting", action="append", default=[], metavar="KEY", help="leave this key of the files out"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a converted model that is there")
    parser.epilog = (
        "example: rag-jax convert facebook/rag-token-nq --out models/rag-token-nq\n"
        "         rag-jax convert --question-encoder facebook/dpr-question_encoder-single-nq-base \\\n"
        "             --context-encoder facebook/dpr-ctx_encoder-single-nq-base --generator facebook/bart-large "
        "--out models/rag"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    lengths = args.question_length, args.passage_length
    made = convert(
        args.out,
        source=args.source,
        question_encoder=args.question_encoder,
        context_encoder=args.context_encoder,
        generator=args.generator,
        variant=args.variant,
        change_variant=args.change_variant,
        n_docs=args.n_docs,
        source_length=args.source_length,
        asked=Asked(args.pooling or "", *lengths, args.query_prefix, args.passage_prefix),
        ignore=args.ignore_setting,
        overwrite=args.overwrite,
    )
    if args.json:
        return made
    return {"text": everything(made) if args.verbose else text(made)}


def text(made: dict[str, Any]) -> str:
    """The printed summary: the model, settings taken and left out by file, and a hint at the next command."""
    lengths = f"{made['question_length']} and {made['passage_length']} tokens"
    lines = [
        f"{made['out']}: RAG-{made['variant'].capitalize()}, {made['parameters']:,} parameters",
        f"questions and passages of {lengths}; vectors pooled by {made['pooling']}",
    ]
    prefixes = {name: made[name] for name in ("query_prefix", "passage_prefix") if made[name]}
    lines += [f"{name}: {value!r}" for name, value in prefixes.items()]
    lines += [f"no tokenizer for the {role}: put its files beside the weights" for role in made["no_tokenizer_for"]]
    taken: dict[str, int] = {}
    for where in (part.partition(": ")[0] for line in made["settings"].values() for part in line.split("; ")):
        taken[where] = taken.get(where, 0) + 1
    counts = ", ".join(f"{n} of {where}" for where, n in taken.items())
    idle = f"; {len(made['without_effect'])} have no effect here" if made["without_effect"] else ""
    lines.append(f"settings taken: {counts}{idle} (each with --verbose)")
    lines += [f"left out: {where}={value!r}" for where, value in made["ignored_settings"].items()]
    return "\n".join([*lines, f"next: rag-jax index {made['out']} --corpus CORPUS --out INDEX"])


def everything(made: dict[str, Any]) -> str:
    """The counts, then each setting and where it came from."""
    lines = [f"{name}: {value}" for name, value in made.items() if not isinstance(value, dict)]
    lines += [f"{setting} <- {where}" for setting, where in made["settings"].items()]
    idle: dict[str, list[str]] = {}
    for name in made["without_effect"]:
        where, _, key = name.rpartition(": ")
        idle.setdefault(where, []).append(key)
    lines += [f"without effect here: {where}: {', '.join(keys)}" for where, keys in idle.items()]
    return "\n".join(lines + [f"left out: {where}={value!r}" for where, value in made["ignored_settings"].items()])
