"""The command line: exit statuses, which text goes to which stream, and help for every command."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_jax import __main__ as cli
from rag_jax import __version__
from rag_jax.errors import InputError
from rag_jax.system import program_cache

SCRIPT = str(Path(sys.executable).with_name("rag-jax"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """`command(run)` adds the command `fake`, with one option --n."""

    def add(run: Callable[[argparse.Namespace], dict]) -> None:
        module = types.ModuleType("fake_command")
        module.configure = lambda parser: parser.add_argument("--n", type=int, default=3)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "a fake"))

    return add


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_has_an_example(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert cli.COMMANDS[name][1] in out and "--json" in out and "--verbose" in out
    assert f"rag-jax {name} " in out[out.index("--json") :], "the epilog shows an example"
    assert callable(importlib.import_module(cli.COMMANDS[name][0]).run)


@pytest.mark.parametrize("words", [["train"], ["--json", "train"], ["train", "--json", "--verbose"]])
def test_options_of_output_stand_before_and_after_a_benchmark(words: list[str]) -> None:
    _, args = cli.parse("bench", words)
    assert (args.json, args.verbose) == ("--json" in words, "--verbose" in words)


@pytest.mark.parametrize("start", [[SCRIPT], [sys.executable, "-m", "rag_jax"]])
def test_both_ways_to_start(start: list[str]) -> None:
    version = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"rag-jax {__version__}\n" and version.stderr == ""
    alone = subprocess.run(start, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in alone.stdout for name in cli.COMMANDS)
    unknown = subprocess.run([*start, "trian"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and unknown.stdout == ""
    assert "'trian'" in unknown.stderr and ", ".join(cli.COMMANDS) in unknown.stderr


def test_result_as_lines_text_or_json(command: Callable, capsys: pytest.CaptureFixture) -> None:
    def run(args: argparse.Namespace) -> dict:
        print("on the way")
        return {"n": args.n, "loss": float("nan"), "rows": [1.5, float("inf")]}

    command(run)
    assert cli.main(["fake", "--n", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "n: 5\nloss: nan\nrows: [1.5, inf]\n" and captured.err == "on the way\n"
    assert cli.main(["fake", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 3, "loss": None, "rows": [1.5, None]}
    command(lambda args: {"text": "Anna Aska", "score": 1})
    assert cli.main(["fake"]) == 0
    assert capsys.readouterr().out == "Anna Aska\n"
    assert cli.main(["fake", "--verbose"]) == 0
    assert capsys.readouterr().out == "Anna Aska\nscore: 1\n"
    assert cli.main(["fake", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"score": 1}


def test_bad_input_is_2_without_a_traceback(command: Callable, capsys: pytest.CaptureFixture) -> None:
    def run(args: argparse.Namespace) -> dict:
        raise InputError("dev.jsonl:3: no field 'id'; add it")

    command(run)
    assert cli.main(["fake"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "rag-jax: dev.jsonl:3: no field 'id'; add it\n"


def test_bad_usage_is_2(command: Callable, capsys: pytest.CaptureFixture) -> None:
    command(lambda args: {})
    for argv in (["fake", "--n", "many"], ["fake", "--m"], ["fake", "extra"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
        assert "usage: rag-jax fake" in capsys.readouterr().err


def test_an_error_of_ours_is_not_hidden(command: Callable) -> None:
    def run(args: argparse.Namespace) -> dict:
        raise ValueError("a bug")

    command(run)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["fake"])


def test_interrupted_is_130(command: Callable, capsys: pytest.CaptureFixture) -> None:
    def run(args: argparse.Namespace) -> dict:
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "rag-jax: interrupted\n"


def test_reader_gone_is_141_and_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run([SCRIPT], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141 and done.stderr == ""


def test_programs_are_kept_in_the_users_cache() -> None:
    given = {"XDG_CACHE_HOME": "/somewhere"}
    program_cache.keep(given)
    assert given["JAX_COMPILATION_CACHE_DIR"].startswith("/somewhere/rag_jax/xla-")
    assert int(given["JAX_COMPILATION_CACHE_MAX_SIZE"]) > 2**20
    own = {"JAX_COMPILATION_CACHE_DIR": "/mine"}
    program_cache.keep(own)
    assert own["JAX_COMPILATION_CACHE_DIR"] == "/mine"


def test_kept_programs_are_found_again(tmp_path: Path) -> None:
    code = (
        "import jax\n"
        "f = jax.jit(lambda x: sum(x**i for i in range(1, 9)) @ x); f(jax.numpy.ones((9, 9))).block_until_ready()"
    )
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    program_cache.keep(environment)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    files = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        files.append(sorted(path.name for path in tmp_path.rglob("jit_*-cache")))
    assert files[0] and files[0] == files[1]
