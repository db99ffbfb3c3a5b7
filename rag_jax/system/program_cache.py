"""Compiled programs kept on disk, so that the same command starts at once the next time."""

import contextlib
import hashlib
import os
import platform
import sys
import time
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import TextIO

VERBS = {  # JAX warns so for every program
    "Error writing persistent compilation cache entry": "kept",
    "Error reading persistent compilation cache entry": "read",
}
TORN_SECONDS = 60.0  # younger ones may be in the middle of being written


def keep(environment: MutableMapping[str, str]) -> None:
    """Tells JAX to keep programs in rag_jax/xla-NAME of the user's cache directory.

    NAME is for this kind of processor: a program for another one could crash. JAX's own variables come first;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Where nothing can be written, nothing is kept, and a line says so.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = Path(home, "rag_jax", f"xla-{processor()}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError(f"{directory} cannot be written to")
            if "JAX_COMPILATION_CACHE_MAX_SIZE" not in environment:
                remove_torn(directory)
        except OSError as error:
            print(f"compiled programs are not kept ({error}); XDG_CACHE_HOME names another directory", file=sys.stderr)
            return
        environment["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
    warnings.showwarning = _once


def processor() -> str:
    """A short name of this kind of processor."""
    try:
        with open("/proc/cpuinfo") as file:
            words = "".join(sorted({line for line in file if line.startswith(("model name", "flags"))}))
    except OSError:
        words = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {words}".encode()).hexdigest()[:12]


def remove_torn(directory: Path) -> None:
    """Removes programs that a full disk or a kill left half written: JAX would fail to read them for ever after.

    Where its cache has a largest size, it writes the time of last use, in a file of its own, after the program.
    """
    names = {path.name for path in directory.iterdir()}
    for name in names:
        if name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in names:
            with contextlib.suppress(FileNotFoundError):  # another process evicts it
                if time.time() - (directory / name).stat().st_mtime > TORN_SECONDS:
                    (directory / name).unlink()


_shown = warnings.showwarning
_told: set[str] = set()  # like stderr itself, one for the whole process


def _once(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """One line for all programs that cannot be kept or read, in place of two for each."""
    start = next((start for start in VERBS if str(message).startswith(start)), None)
    if start is None:
        _shown(message, category, filename, lineno, file, line)
    elif start not in _told:
        _told.add(start)
        print(f"compiled programs are not {VERBS[start]} ({str(message).rpartition(': ')[2]})", file=sys.stderr)
