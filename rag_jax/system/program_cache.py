"""Cache of compiled programs on disk, so that the same command starts without compiling the next time."""

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

VERBS = {  # how JAX's warnings begin, one for every program -> what our line says instead
    "Error writing persistent compilation cache entry": "kept",
    "Error reading persistent compilation cache entry": "read",
}
TORN_SECONDS = 60.0  # a younger file may still be being written


def keep(environment: MutableMapping[str, str]) -> None:
    """Sets JAX's environment variables to cache programs in rag_jax/xla-NAME of the user's cache directory.

    NAME stands for this kind of processor, since a program for another one could crash. Variables that the user has set
    are kept; JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. If the directory cannot be written to, a line on
    stderr says so and nothing is cached.
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
    """A hash of 12 digits that names this kind of processor: its model and instruction sets."""
    try:
        with open("/proc/cpuinfo") as file:
            words = "".join(sorted({line for line in file if line.startswith(("model name", "flags"))}))
    except OSError:
        words = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {words}".encode()).hexdigest()[:12]


def remove_torn(directory: Path) -> None:
    """Removes programs that a full disk or a kill left half written, which JAX would fail to read every time.

    A cache with a largest size writes each program's time of last use to a second file (`-atime`) after the program,
    so a program without one is incomplete.
    """
    names = {path.name for path in directory.iterdir()}
    for name in names:
        if name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in names:
            with contextlib.suppress(FileNotFoundError):  # another process has evicted it
                if time.time() - (directory / name).stat().st_mtime > TORN_SECONDS:
                    (directory / name).unlink()


_shown = warnings.showwarning
_told: set[str] = set()  # global, like stderr itself


def _once(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """Prints one line for all programs that cannot be kept or read, in place of two warnings for each."""
    start = next((start for start in VERBS if str(message).startswith(start)), None)
    if start is None:
        _shown(message, category, filename, lineno, file, line)
    elif start not in _told:
        _told.add(start)
        print(f"compiled programs are not {VERBS[start]} ({str(message).rpartition(': ')[2]})", file=sys.stderr)
