"""`rag-jax train`: trains the stages of a configuration one after another, killable at any moment."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from rag_jax.cli import process_options
from rag_jax.errors import InputError
from rag_jax.system import distributed, logs
from rag_jax.training import config
from rag_jax.training.config import TrainConfig
from rag_jax.training.profile import Profile
from rag_jax.training.train import train

SHOWN = 5  # figures of the dev questions that are printed at the end


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:ARGUMENT")
    parser.add_argument("--run", required=True, type=Path, help="run directory; an unfinished run in it is resumed")
    parser.add_argument("--stage", action="append", default=[], help="train only this stage (may be repeated)")
    parser.add_argument(
        "--init", type=Path, help="start from the parameters of this run directory or converted checkpoint"
    )
    parser.add_argument(
        "--refresh", metavar="WHEN", help="in all stages that search: 250, rolling:500, ... (docs/retrieval.md)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the configuration"
    )
    parser.add_argument(
        "--profile",
        metavar="DIR@STEP",
        type=profile_from_argument,
        help="an XLA trace of three steps, from that one on",
    )
    process_options.add_arguments(parser)
    parser.epilog = (
        "example: rag-jax train --config configs/world.py --run runs/world --set stages.joint.steps=400\n"
        "Killed and started again with the same words, it goes on where it was, on as many processes and devices as\n"
        "there are then. At SIGTERM it saves a checkpoint and ends with status 0."
    )


def profile_from_argument(text: str) -> Profile:
    """A Profile from DIR@STEP."""
    directory, at, step = text.rpartition("@")
    if not (at and directory and step.isdigit() and int(step) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not DIR@STEP, as runs/trace@100")
    return Profile(Path(directory), int(step))


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    with distributed.together(process_options.from_arguments(args), args.run / "checkpoints", preemption=True):
        with logs.stamped(jax.process_index(), jax.process_count()):
            found = train(configured(args), args.run, profile=args.profile)
        return {"text": text(found), **found} if distributed.first() else None


def text(result: dict[str, Any]) -> str:
    """The printed summary: progress, the figures of the last log line, and a hint at the next command."""
    run, last = result["run"], result.get("last", {})
    if result.get("preempted"):
        return f"{run}: stopped after step {result['steps']:,} of {result['of']:,}; the same command resumes it"
    lines = [f"{run}: {result['steps']:,} steps in {result['training_seconds']:,.0f} s of training"]
    evaluated = [name for name in last if name.startswith("eval/")][:SHOWN]
    shown = [name for name in ("loss", "step_seconds", "tokens_per_second", *evaluated) if name in last]
    width = max(map(len, shown), default=0) + 2
    lines += [f"{name:<{width}}{format(last[name], ',.0f' if last[name] >= 1000 else '.4g')}" for name in shown]
    return "\n".join([*lines, f"every log line: {run}/metrics.jsonl; next: rag-jax evaluate {run}"])


def configured(args: argparse.Namespace) -> TrainConfig:
    """The configuration file with the changes that the arguments ask for; InputError for an unknown --stage."""
    start = [f"init={json.dumps(str(args.init))}"] if args.init else []
    cfg = config.load(args.config, [*args.set, *start])
    if args.stage:
        known = [stage.name for stage in cfg.stages]
        missing = [name for name in args.stage if name not in known]
        if missing:
            raise InputError(f"--stage {missing[0]}: no such stage; {args.config} has {', '.join(known)}")
        cfg = dataclasses.replace(cfg, stages=tuple(stage for stage in cfg.stages if stage.name in args.stage))
    if args.refresh is not None:
        stages = [dataclasses.replace(s, refresh=args.refresh) if s.objective.searches else s for s in cfg.stages]
        cfg = dataclasses.replace(cfg, stages=tuple(stages))
    return cfg
