"""The command begins again with large pages once, with the same words, and not where they are not to be had."""

import os
import subprocess
import sys

import pytest

from rag_jax import large_pages


@pytest.fixture
def started(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rag_jax", "train", "--run", "a b"])
    monkeypatch.setattr(large_pages, "offered", lambda: True)
    return calls


@pytest.mark.parametrize(
    "given, then",
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"),
    ],
)
def test_it_begins_again_with_the_same_words(started, given, then):
    large_pages.ask({"HOME": "/h", **given})
    words = [sys.executable, "-m", "rag_jax", "train", "--run", "a b"]
    assert started == [(sys.executable, words, {"HOME": "/h", "GLIBC_TUNABLES": then})]
    large_pages.ask(started[0][2])
    assert len(started) == 1


def test_not_against_the_users_word_and_not_in_vain(started, monkeypatch):
    large_pages.ask({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    monkeypatch.setattr(large_pages, "offered", lambda: False)
    large_pages.ask({})
    assert started == []


def test_one_process_with_its_output_and_exit_status():
    """In a process: what it says first as itself, and again after it began once more, under the same number."""
    code = (
        "import os; from pathlib import Path; from rag_jax import large_pages; large_pages.offered = lambda: True\n"
        "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), flush=True); large_pages.ask(os.environ); os._exit(3)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    first, second = (line.split() for line in done.stdout.splitlines())
    assert done.returncode == 3 and first[0] == second[0]
    assert (first[1], second[1]) == ("None", "glibc.malloc.hugetlb=1")
