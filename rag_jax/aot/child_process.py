"""Compiling one program in a process of its own: where libtpu crashes, the others are still compiled and reported."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from rag_jax.aot.memory import ProgramNeeds
from rag_jax.errors import InputError

# libtpu 0.0.42 and 0.0.42.1 overflow their stack on bfloat16 training steps of more than one question a chip
GOOD_LIBTPU = "0.0.43.2"


def no_core_dump() -> None:
    """For this process: libtpu would write gigabytes when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def needs(command: Sequence[str], name: str, count: Callable[[], ProgramNeeds]) -> ProgramNeeds:
    """Needs of a program as another process finds them; where that crashed those of `count`, with the reason as `said`.

    command: the arguments of `rag-jax` that compile programs; `--stage NAME` and `--needs FILE` are added to them.
    count: returns the needs from shapes alone, in some ten seconds.
    InputError where the other process refuses its input; RuntimeError, with its last lines, where it fails otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="rag-jax-compile-") as scratch:
        out, log = Path(scratch) / "needs.json", Path(scratch) / "stderr"
        words = [sys.executable, "-m", "rag_jax", *command, "--stage", name, "--needs", str(out)]
        with log.open("wb") as stream:
            done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=stream, check=False)
        if done.returncode == 0:
            return ProgramNeeds.from_dict(json.loads(out.read_text()))
        lines = log.read_text(errors="replace").splitlines()
    if done.returncode == 2 and lines:
        raise InputError(lines[-1].removeprefix("rag-jax: "))
    if done.returncode < 0:
        return dataclasses.replace(count(), said=crash(-done.returncode, name), crashed=True)
    raise RuntimeError("\n".join([f"{name}: compiling failed", *lines[-20:]]))


def crash(number: int, name: str) -> str:
    """A line about a compiler that ended by this signal: which one, and what to try."""
    version = metadata.version("libtpu")
    known = signal.strsignal(number) or f"signal {number}"
    said = f"THE COMPILER CRASHED on {name} ({known}, libtpu {version}); "
    if tuple(map(int, version.split(".")[:3])) < (0, 0, 43):
        return said + f"libtpu {GOOD_LIBTPU} compiles it: pip install libtpu=={GOOD_LIBTPU}"
    return said + "try another libtpu, fewer questions a chip, or remat='none'; what is above was counted from shapes"
