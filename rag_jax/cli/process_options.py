"""Options shared by the commands that can run as several processes."""

import argparse

from rag_jax.system.distributed import Processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes, --process and --distributed auto; --verbose is an option of every command."""
    group = parser.add_argument_group("several processes (the same command on each)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, the same on all of them")
    group.add_argument("--processes", type=int, metavar="P", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this one is: 0 to P - 1")
    group.add_argument(
        "--distributed", choices=["auto"], help="auto: as JAX finds by itself on TPU pods, Slurm, Open MPI, Kubernetes"
    )


def from_arguments(args: argparse.Namespace) -> Processes:
    """The settings of `distributed.initialize` that these options give."""
    return Processes(args.coordinator, args.processes, args.process, args.distributed == "auto", args.verbose)
