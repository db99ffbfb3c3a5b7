"""Compiling one program in a process of its own: where libtpu crashes, the others are still compiled and reported."""

import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rag_jax.aot.memory import ProgramNeeds
from rag_jax.errors import InputError

# libtpu 0.0.42 and 0.0.42.1 overflow their stack on bfloat16 training steps of more than one question a chip
GOOD_LIBTPU = "0.0.43.2"


def no_core_dump() -> None:
    """For this process: libtpu would write gigabytes when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def needs(command: Sequence[str], counted: ProgramNeeds) -> ProgramNeeds:
    """Needs of a program as another process finds them, or `counted`, with the reason as `said`, where that crashed.

    command: the arguments of `rag-jax` that compile this one program; `--needs FILE` is added to them.
    InputError where the other process refuses its input; RuntimeError, with its last lines, where it fails otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="rag-jax-compile-") as scratch:
        out, log = Path(scratch) / "needs.json", Path(scratch) / "stderr"
        words = [sys.executable, "-m", "rag_jax", *command, "--needs", str(out)]
        with log.open("wb") as stream:
            done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=stream, check=False)
        if done.returncode == 0:
            return ProgramNeeds.from_dict(json.loads(out.read_text()))
        lines = log.read_text(errors="replace").splitlines()
    if done.returncode == 2 and lines:
        raise InputError(lines[-1].removeprefix("rag-jax: "))
    if done.returncode < 0:
        counted.said, counted.crashed = crash(-done.returncode, counted.name), True
        return counted
    raise RuntimeError("\n".join([f"{counted.name}: compiling failed", *lines[-20:]]))


def crash(number: int, name: str) -> str:
    """What to say of a compiler that ended by a signal, and what to try."""
    version = metadata.version("libtpu")
    known = signal.strsignal(number) or f"signal {number}"
    said = f"THE COMPILER CRASHED on {name} ({known}, libtpu {version}); "
    if tuple(map(int, version.split(".")[:3])) < (0, 0, 43):
        return said + f"libtpu {GOOD_LIBTPU} compiles it: pip install libtpu=={GOOD_LIBTPU}"
    return said + "try another libtpu, fewer questions a chip, or remat='none'; what is above was counted from shapes"
