"""Memory that a process on a CPU keeps from one program to the next, in large pages.

XLA takes the memory of a program at its start and gives it back at its end. glibc then gives it to the kernel, which
clears all of it anew for the next step: 92,000 pages of 4 kB in a step that needs 360 MB, a third of the processor's
time. Only the environment that a process begins with can tell glibc to keep it, so a command begins a second time.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "glibc.malloc.arena_max": "1",  # one heap that can grow; those of threads are too small for XLA's pieces
    "glibc.malloc.mmap_max": "0",
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
