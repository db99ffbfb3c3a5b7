"""Settings of glibc's malloc for programs on a CPU: large pages, and small pieces kept from one step to the next.

XLA allocates the memory of a program when it starts and frees it when it ends. glibc then returns it to the kernel,
which has to clear all of it again for the next step. A step of 360 MB takes 92,000 pages of 4 kB, and clearing them a
third of the processor's time; in pages of 2 MB it takes 180. glibc reads these settings only from the environment that
a process starts with, so a command replaces itself by a second start of the same process.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "glibc.malloc.arena_max": "1",  # one heap that can grow; the heaps of threads are too small for XLA's buffers
    # Buffers of 32 MiB and more (the largest threshold that glibc accepts) are mapped from the kernel and returned to
    # it, and the buffer of a step is one of them. In a heap that keeps everything, smaller pieces would fill the gap
    # that it leaves and the next one be placed behind them, so that a large step would stay resident several times.
    "glibc.malloc.mmap_threshold": str(2**25),
    "glibc.malloc.trim_threshold": str(2**60),
    "glibc.malloc.hugetlb": "1",
}
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")


def helps(environment: Mapping[str, str]) -> bool:
    """Whether programs run on the CPU and glibc (2.35 or newer) knows these settings."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    return environment.get("JAX_PLATFORMS") == "cpu" or not any(importlib.util.find_spec(name) for name in PLUGINS)


def keep(environment: Mapping[str, str]) -> None:
    """Restarts this command in the same process (exec) with these settings, if they help; else returns.

    It does nothing where the user has set GLIBC_TUNABLES: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns all of it off.
    """
    if VARIABLE not in environment and helps(environment):
        settings = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, VARIABLE: settings})
