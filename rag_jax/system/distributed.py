"""Several processes of one command: how they connect, agree on values, and end when one of them is lost."""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rag_jax.errors import InputError
from rag_jax.system import disk_errors, logs, plain_text

HEARTBEAT_SECONDS = 30  # a process that is silent for so long counts as dead, and the others stop
# How long process 0 waits before it ends after an error: its end makes JAX abort the others, which meanwhile find the
# error in a collective themselves and can report it.
GRACE_SECONDS = 3.0
# what errors say when another process has gone
LOST = ("gloo", "connection", "unavailable", "deadline", "heartbeat", "coordination", "barrier", "nccl", "timed out")


@dataclass(frozen=True)
class Processes:
    """How the processes of one command find each other; by default there is only one.

    coordinator: HOST:PORT where process 0 listens.
    count: the number of processes.
    number: the number of this process, from 0.
    automatic: JAX finds out all three by itself, on TPU pods, Slurm, Open MPI and Kubernetes.
    verbose: all processes print their lines, not process 0 alone.
    """

    coordinator: str | None = None
    count: int | None = None
    number: int | None = None
    automatic: bool = False
    verbose: bool = False


def initialize(processes: Processes, heartbeat_seconds: int = HEARTBEAT_SECONDS, preemption: bool = False) -> None:
    """Connects to the other processes, if there are any; must be called before anything else touches JAX.

    heartbeat_seconds: a process that is silent for so long counts as dead.
    preemption: SIGTERM does not end the process; `multihost_utils.reached_preemption_sync_point` reports it.
    InputError for settings that do not fit together, and where the others cannot be reached.
    """
    coordinator, count, number = processes.coordinator, processes.count, processes.number
    named = {"coordinator": coordinator, "processes": count, "process": number}
    given = [name for name, value in named.items() if value is not None]
    if processes.automatic and given:
        raise InputError(f"--distributed auto finds out by itself: leave out --{given[0]}")
    if not processes.automatic and not given:
        return
    if not processes.automatic:
        if coordinator is None or count is None or number is None:
            absent = [name for name in named if name not in given]
            raise InputError(
                f"--{given[0]} needs --{absent[0]}, too: --coordinator HOST:PORT --processes P --process I"
            )
        if not 0 <= number < count:
            raise InputError(f"--process {number} of --processes {count}: a number from 0 to P - 1")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator {coordinator}: HOST:PORT is needed, such as 10.0.0.1:9876")
    jax.config.update("jax_enable_preemption_service", preemption)
    try:
        jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=heartbeat_seconds)
    except (RuntimeError, ValueError) as error:
        where = coordinator or "--distributed auto"
        raise InputError(f"{where}: the processes did not meet ({error}); start all of them together") from error


def first() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(value: Any) -> Any:
    """The value of process 0, in all processes; it must be JSON."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if first() else b""
    # broadcasts need the same shape in all processes, so the length goes first
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b" ")[:size], np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


def everywhere(true: bool) -> bool:
    """Whether the argument is true in all processes."""
    return true if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(true)).all())


@contextlib.contextmanager
def together(processes: Processes, checkpoints: Path | None = None, preemption: bool = False) -> Iterator[None]:
    """Context manager: connects the processes, and ends this one at once, saying why, if the block fails.

    That holds for several processes; in a single one the error passes through. Only process 0 shows progress, unless
    `verbose`; with several, each line begins with the time and the process.
    checkpoints: the directory from which the command will resume, for the message.
    preemption: see `initialize`.
    """
    initialize(processes, preemption=preemption)
    several = jax.process_count() > 1
    if not first() and not processes.verbose:
        logs.silence()
    try:
        stamp = logs.stamped(jax.process_index(), jax.process_count()) if several else contextlib.nullcontext()
        with _standard_output_apart(), _last_words(checkpoints), stamp:
            yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        # a normal exit would wait for the others in JAX's shutdown barrier, while they may wait for this process
        leave(error, checkpoints)


AGAIN = "another process died, or the network failed, or this one was killed: start all again with the same command"
SPEAKER = """trap '' TERM INT
read word && exit
step=$([ -n "$2" ] && ls "$2" 2>/dev/null | grep -Ex '[0-9]+' | sort -n | tail -n 1)
echo "$1${2:+; training goes on from step ${step:-0}}" >&2"""


@contextlib.contextmanager
def _last_words(checkpoints: Path | None) -> Iterator[None]:
    """Context manager: prints a message if this process is killed inside, as JAX does when another process is lost.

    A shell does it: it reads a line from a pipe to this process, and prints when the pipe closes without one.
    """
    if jax.process_count() == 1:
        yield
        return
    said, where = f"rag-jax: process {jax.process_index()} has ended: {AGAIN}", str(checkpoints or "")
    with subprocess.Popen(["sh", "-c", SPEAKER, "sh", said, where], stdin=subprocess.PIPE) as speaker:
        try:
            yield
        finally:
            speaker.communicate(b"well\n")


@contextlib.contextmanager
def _standard_output_apart() -> Iterator[None]:
    """Context manager: redirects standard output to standard error, since Gloo reports its connections there."""
    if jax.process_count() == 1:
        yield
        return
    kept = os.dup(1)  # descriptors, not sys.stdout: the C++ library does not know Python's streams
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def leave(error: BaseException, checkpoints: Path | None = None) -> None:
    """Prints what happened and ends this process without any clean-up.

    Status 2 for an InputError or an error of the disk, 130 when interrupted, 1 for the rest.
    """
    said, status = plain_text.one_line(str(error)), 1
    if isinstance(error, InputError):
        status = 2
    elif found := disk_errors.words(error):
        said, status = found, 2
    elif isinstance(error, KeyboardInterrupt):
        said, status = "interrupted", 130
    elif any(word in said.lower() for word in LOST):
        steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()] if checkpoints else []
        goes_on = f"; training goes on from step {max(steps, default=0)}" if checkpoints else ""
        said = f"{AGAIN}{goes_on} ({said[:300]})"
    else:
        traceback.print_exception(error)
    print(f"rag-jax: process {jax.process_index()}: {said}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    if first():
        time.sleep(GRACE_SECONDS)
    os._exit(status)
