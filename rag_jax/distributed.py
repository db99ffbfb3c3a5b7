"""Several processes of one command: where they meet, and who each of them is."""

import argparse

import jax

from rag_jax.errors import InputError

HEARTBEAT_SECONDS = 30  # after so long without a word, a process counts as dead, and the others stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--coordinator, --processes, --process; --distributed auto."""
    group = parser.add_argument_group("several processes (the same command on each)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, the same on all of them")
    group.add_argument("--processes", type=int, metavar="P", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this one is: 0 to P - 1")
    group.add_argument(
        "--distributed", choices=["auto"], help="auto: as JAX finds by itself on TPU pods, Slurm, Open MPI, Kubernetes"
    )


def initialize(args: argparse.Namespace, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes; nothing where no argument asks for it. Call it before anything else touches JAX.

    InputError for arguments that do not go together, and where the others cannot be reached.
    """
    named = {name: getattr(args, name) for name in ("coordinator", "processes", "process")}
    given = {name: value for name, value in named.items() if value is not None}
    if args.distributed and given:
        raise InputError(f"--distributed auto finds out by itself: leave out --{next(iter(given))}")
    if not args.distributed and not given:
        return
    if not args.distributed:
        absent = [name for name in named if name not in given]
        if absent:
            raise InputError(f"--{next(iter(given))} needs --{absent[0]}, too: --coordinator HOST:PORT --processes P "
                             "--process I")  # fmt: skip
        if not 0 <= args.process < args.processes:
            raise InputError(f"--process {args.process} of --processes {args.processes}: a number from 0 to P - 1")
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator {args.coordinator}: HOST:PORT is needed, such as 10.0.0.1:9876")
    try:
        jax.distributed.initialize(
            args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except (RuntimeError, ValueError) as error:
        where = args.coordinator or "--distributed auto"
        raise InputError(f"{where}: the processes did not meet ({error}); start all of them together") from error
