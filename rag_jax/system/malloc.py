"""Memory of a process on a CPU, in large pages, of which it keeps the small pieces from one program to the next.

XLA takes the memory of a program at its start and gives it back at its end. glibc then gives it to the kernel, which
clears all of it again for the next step: in pages of 4 kB 92,000 of a step that needs 360 MB, a third of the
processor's time; in pages of 2 MB 180. Only the environment that a process begins with can tell glibc which pages to
ask for and what to keep, so a command begins a second time.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "glibc.malloc.arena_max": "1",  # one heap that can grow; those of threads are too small for XLA's pieces
    # Pieces of 32 MiB and more, the most that glibc takes here, come from the kernel and go back to it: the buffer of a
    # step is one of them. In a heap that keeps everything, smaller pieces settle in its gap and the next buffer comes
    # behind it, so that a large step stays resident several times.
    "glibc.malloc.mmap_threshold": str(2**25),
    "glibc.malloc.trim_threshold": str(2**60),
    "glibc.malloc.hugetlb": "1",
}
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")


def helps(environment: Mapping[str, str]) -> bool:
    """Whether programs run on the CPU, and glibc knows these settings."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    return environment.get("JAX_PLATFORMS") == "cpu" or not any(importlib.util.find_spec(name) for name in PLUGINS)


def keep(environment: Mapping[str, str]) -> None:
    """Begins this process again, as the same process, where that helps and GLIBC_TUNABLES is not set; else returns.

    What the user says there stays: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns all of it off.
    """
    if VARIABLE not in environment and helps(environment):
        settings = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, VARIABLE: settings})
