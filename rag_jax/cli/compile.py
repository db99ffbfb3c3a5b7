"""`rag-jax compile`: will a configuration fit on these chips, and how fast can it be? Answered without the chips."""

import argparse
from pathlib import Path
from typing import Any

from rag_jax.aot.compile import CompileOptions, estimate
from rag_jax.training import config


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:ARGUMENT")
    parser.add_argument(
        "--topology", required=True, help="v5e:16x16, v5p:4x4x4, v4, v6e, tpu7x; h100:8, a100:16; cpu:8"
    )
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME",
        help="only this stage, or `search`, or `encode` (may be repeated)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration value")
    corpus = parser.add_argument_group("a corpus that is not there yet")
    corpus.add_argument(
        "--passages", type=int, default=0, metavar="N", help="how many (21015300: the Wikipedia of DPR)"
    )
    corpus.add_argument(
        "--encoder-length", type=int, default=160, metavar="L", help="tokens of a passage (%(default)s)"
    )
    corpus.add_argument("--generator-length", type=int, default=160, metavar="L", help="the same (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="questions of one search (%(default)s)")
    parser.add_argument("--k", type=int, default=20, help="passages it finds for each (%(default)s)")
    parser.add_argument("--hlo", type=Path, metavar="DIR", help="write each compiled program there, as PROGRAM.txt")
    parser.add_argument(
        "--effort", type=float, default=0.0, metavar="-1..1",
        help="of the compiler: -1 compiles some three times as fast, and uses more memory than training will",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, default=0, metavar="N",
        help="compile N layers of each stack and N + 1, and draw the line on to all: minutes where all take hours",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="count from shapes, in seconds")
    parser.add_argument("--needs", type=Path, help=argparse.SUPPRESS)  # in the processes that aot.child_process starts
    parser.epilog = (
        "Needs no accelerator; libtpu (pip install libtpu) compiles for TPUs.\n"
        "example: rag-jax compile --config configs/nq_rag_token.py --topology v5e:16x16 --passages 21015300"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    cfg = config.load(args.config, args.set)
    config.check(cfg)
    wanted = CompileOptions(
        programs=args.stage,
        passages=args.passages,
        encoder_length=args.encoder_length,
        generator_length=args.generator_length,
        batch=args.batch,
        k=args.k,
        text_dir=args.hlo,
        effort=args.effort,
        layers=args.layers,
        count_only=args.no_compile,
        apart=() if args.needs else words(args),
    )
    return estimate(cfg, args.topology, wanted, args.needs)


def words(args: argparse.Namespace) -> list[str]:
    """The command line of a process that compiles one program with the same options."""
    found = ["compile", "--config", args.config, "--topology", args.topology]
    for name in ("passages", "encoder_length", "generator_length", "batch", "k", "effort", "layers"):
        found += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    found += ["--hlo", str(args.hlo)] if args.hlo else []
    return [*found, *(word for value in args.set for word in ("--set", value))]
