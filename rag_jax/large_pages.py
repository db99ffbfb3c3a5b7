"""Memory in pages of 2 MB instead of 4 kB, where programs run on a CPU.

XLA takes the memory of a program at its start and gives it back at its end, so in every step the kernel clears all of
it anew, a page at a time: 92,000 of 4 kB in a step that needs 360 MB, which is a third of the processor's time. glibc
asks for large pages only where its environment says so when a process begins, so the command begins a second time.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def offered() -> bool:
    """Whether this machine gives large pages to those who ask, and only to them."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    return ENABLED.exists() and "[madvise]" in ENABLED.read_text()


def ask(environment: Mapping[str, str]) -> None:
    """Begins this process again, as the same process, with large pages; returns where it has them or cannot have them.

    A value of the user's stays: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns it off.
    """
    given = environment.get(VARIABLE, "")
    if SETTING not in given and offered():
        changed = {**environment, VARIABLE: ":".join(filter(None, (given, f"{SETTING}=1")))}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], changed)
