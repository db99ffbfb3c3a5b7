"""`rag-jax bench train`: the training step, of a configuration's stages or of a synthetic load."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

from rag_jax.bench import largest_batch, stages, train
from rag_jax.bench.synthetic_load import LOADS, StepLoad
from rag_jax.cli import load_options
from rag_jax.errors import InputError
from rag_jax.training import config

MAY_BE_0 = ("doc_chunk", "logit_chunk", "groups", "encoder_layers")  # fields of a load


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="configs/NAME.py or configs/NAME.py:ARGUMENT, with its own data")
    parser.add_argument("--stage", action="append", default=[], help="only this stage (may be repeated)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps a stage")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration value")
    fields = ", ".join(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(StepLoad))
    parser.add_argument("--load", choices=tuple(LOADS), help=f"a synthetic load, which {fields} change")
    for field in dataclasses.fields(StepLoad):
        options: dict[str, Any] = {"type": str if get_args(field.type) else field.type, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    parser.add_argument("--mesh", action="append", default=[], metavar="AXIS=N", help="data, fsdp, tensor (load)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of a load (default: 10)")
    parser.add_argument("--alone", action="store_true", help="without transformers, even if torch is there (load)")
    parser.add_argument("--largest", action="store_true", help="instead: the largest batch that fits on the device")
    parser.add_argument("--profile", default="", metavar="DIR", help="write a trace of a few steps (load)")
    parser.epilog = (
        "example: rag-jax bench train --config configs/world.py --stage joint --json\n"
        "         rag-jax bench train --load medium --variant sequence"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if (args.config is None) == (args.load is None):
        raise InputError("give --config, for the stages of a configuration, or --load, for a synthetic load")
    if args.load is None:
        return run_config(args)
    load, shape = load_options.chosen(args, LOADS, MAY_BE_0), mesh_shape(args.mesh)
    if args.largest:
        return largest_batch.report(load, shape, args.alone)
    return train.report(load, shape, args.repeats, args.alone, args.profile)


def run_config(args: argparse.Namespace) -> dict[str, Any]:
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: at least 1")
    cfg = config.load(args.config, args.set)
    if not Path(cfg.corpus).is_dir():
        raise InputError(f"{cfg.corpus}: no such corpus; make it as the docstring of {args.config} says")
    chosen = [stage for stage in cfg.stages if not args.stage or stage.name in args.stage]
    if not chosen:
        raise InputError(f"--stage {args.stage[0]}: {args.config} has {', '.join(stage.name for stage in cfg.stages)}")
    return stages.report(cfg, chosen, args.steps)


def mesh_shape(words: list[str]) -> dict[str, int]:
    """{AXIS: N} from --mesh AXIS=N."""
    shape = {}
    for word in words:
        name, _, size = word.partition("=")
        if not size.removeprefix("-").isdigit():
            raise InputError(f"--mesh {word}: write AXIS=N, such as --mesh data=4")
        shape[name] = int(size)
    return shape
