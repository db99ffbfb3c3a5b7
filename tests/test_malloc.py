"""A command restarts once, with the same arguments, as the same process, and only where that helps."""

import importlib.util
import os
import platform
import subprocess
import sys

import pytest

from rag_jax.system import malloc


@pytest.fixture
def started(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rag_jax", "train", "--run", "a b"])
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    return calls


def test_it_begins_again_with_the_same_words(started):
    malloc.keep({"HOME": "/h", "JAX_PLATFORMS": "cpu"})
    (program, words, environment), *others = started
    assert not others and program == sys.executable
    assert words == [sys.executable, "-m", "rag_jax", "train", "--run", "a b"]
    settings = dict(word.split("=") for word in environment.pop("GLIBC_TUNABLES").split(":"))
    assert settings == malloc.TUNABLES and environment == {"HOME": "/h", "JAX_PLATFORMS": "cpu"}


def test_not_against_the_users_word_and_not_in_vain(started, monkeypatch):
    malloc.keep({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    malloc.keep({})  # on a TPU
    for libc in (("glibc", "2.31"), ("", "")):
        monkeypatch.setattr(platform, "libc_ver", lambda libc=libc: libc)
        malloc.keep({"JAX_PLATFORMS": "cpu"})
    assert started == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_large_pieces_go_back_and_small_ones_stay():
    """MiB resident after freeing: one buffer of 256 MiB, with small ones around it, leaves; 128 of 1 MiB stay."""
    code = """
import numpy as np
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def filled(mib):
    x = np.empty(mib * 2**20, np.uint8)
    x[::4096] = 1
    return x
start, most, kept = resident(), 0, []
for _ in range(5):
    step = filled(256)
    kept.append(filled(4))
    most = max(most, resident() - start)
    del step
print(most, resident() - start)
start, small = resident(), [filled(1) for _ in range(128)]
del small
print(resident() - start)
"""
    settings = ":".join(f"{name}={value}" for name, value in malloc.TUNABLES.items())
    environment = {**os.environ, "GLIBC_TUNABLES": settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    most, left, small = map(float, done.stdout.split())
    assert 256 <= most < 300 and left < 40
    assert small > 100


def test_one_process_with_its_output_and_exit_status():
    """The first start and the second print the same process id, and the exit status is that of the second."""
    code = (
        "import os; from rag_jax.system import malloc; malloc.helps = lambda environment: True\n"
        "print(os.getpid(), 'GLIBC_TUNABLES' in os.environ, flush=True); malloc.keep(os.environ); os._exit(3)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    first, second = (line.split() for line in done.stdout.splitlines())
    assert done.returncode == 3 and first == [second[0], "False"] and second[1] == "True"
