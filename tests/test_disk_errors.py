"""Errors of the disk: one line, status 2, and nothing half-written is left."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from rag_jax import __main__ as cli
from rag_jax.errors import InputError
from rag_jax.system import disk_errors, files, program_cache

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "x/0.0" in OCDBT database at local file "/r/.params.building-685de223/arrays/a.'
    'orbax-checkpoint-tmp/ocdbt.process_0/": Failed to write 335244 bytes to file 8: No space left on device '
    "[os_error_code='28']"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/r/x.json"),
            "/r/x.json: No space left on device; make room",
        ),
        (OSError(errno.ENOSPC, "No space left on device", 7), "No space left on device; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/r"), "/r: Read-only file system; make it writable"),
        (PermissionError(errno.EACCES, "Permission denied", "r/x.tmp"), "r/x: Permission denied; change"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"), "f/x: Not a directory; a directory is needed"),
        (FileExistsError(errno.EEXIST, "File exists", "f"), "f: File exists; move"),
        (OSError("1000 requested and 500 written"), "No space left on device"),
        (
            shutil.Error([("a/x", "b/x", "[Errno 28] No space left on device"), ("a/y", "b/y", "...")]),
            "b/y: No space left on device",
        ),
        (ValueError(TENSORSTORE), "/r/params/arrays/a/ocdbt.process_0/: No space left on device; make room"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("INTERNAL: cannot open /x/y: Permission denied"), "Permission denied"),
    ],
)
def test_errors_of_a_disk_are_said_in_words(error: Exception, said: str) -> None:
    found = disk_errors.words(error)
    assert found is not None and found.startswith(said) and found.endswith("give the same command again")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        KeyError("No space left on device"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert disk_errors.words(error) is None


def test_what_was_there_stays_where_new_files_fail(tmp_path: Path) -> None:
    with files.new_files(tmp_path / "out", last="b") as temporary:
        for name in "ab":
            (temporary / name).write_text("old")
    for error, raised in ((OSError(errno.ENOSPC, "full"), InputError), (ValueError("a bug"), ValueError)):
        with (
            pytest.raises(raised, match=r"a bug|b: cannot be written .*make room"),
            files.new_files(tmp_path / "out", last="b", instead_of=["a"]) as temporary,
        ):
            (temporary / "b").write_text("new")
            raise error
        assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a": "old", "b": "old"}
    with pytest.raises(ValueError, match="bug"), files.new_files(tmp_path / "other", last="b"):
        raise ValueError("a bug")
    assert not (tmp_path / "other").exists()


def world(out: Path) -> int:
    return cli.main(["world", "--out", str(out), "--entities", "20", "--workers", "1"])


def test_a_missing_directory_is_crossed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolves `..` like `mkdir -p`, without creating the directory; links are followed before `..`."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path)
    assert world(Path("a/missing/../b")) == 0 and world(Path("link/../c")) == 0
    assert (tmp_path / "a" / "b" / "world.json").exists() and not (tmp_path / "a" / "missing").exists()
    assert (tmp_path / "elsewhere" / "c" / "world.json").exists() and not (tmp_path / "c").exists()
    sizes = ["--train-tokenizer", "--encoder-vocab", "300", "--generator-vocab", "300"]
    assert cli.main(["corpus", "a/b/passages.jsonl", "--out", "a/missing/../corpus", *sizes]) == 0
    assert (tmp_path / "a" / "corpus" / "manifest.json").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "file/below/further"])
def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    (tmp_path / "file").write_text("precious")
    assert world(tmp_path / out) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"rag-jax: {tmp_path / out}: ") and (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_world_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".world.building-01234567").mkdir()
    assert world(tmp_path / "world") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_standard_output_full() -> None:
    script = str(Path(sys.executable).with_name("rag-jax"))
    with open("/dev/full", "w") as stdout:
        done = subprocess.run([script, "--help"], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    cause = "standard output: cannot be written (No space left on device); make room there"
    assert done.returncode == 2 and done.stderr == f"rag-jax: {cause}, and give the same command again\n"


def test_no_place_for_compiled_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rag_jax").write_text("a file")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    program_cache.keep(environment)
    assert list(environment) == ["XDG_CACHE_HOME"]
    assert capsys.readouterr().err.startswith("compiled programs are not kept (")


def test_torn_programs_are_removed(tmp_path: Path) -> None:
    for name, age in (("torn-cache", 99), ("young-cache", 0), ("whole-cache", 99), ("whole-atime", 99)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (os.stat(tmp_path / name).st_mtime - age,) * 2)
    program_cache.remove_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole-atime", "whole-cache", "young-cache"]


def full_disk(out: Path, sizes: int, commands: str) -> str:
    words = [sys.executable, str(ROOT / "scripts" / "full_disk.py"), "--out", str(out), "--sizes", str(sizes)]
    done = subprocess.run([*words, "--commands", commands], capture_output=True, text=True, check=False)
    if "allows no tmpfs" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_world_on_a_full_disk(tmp_path: Path) -> None:
    assert "world" in full_disk(tmp_path / "out", 4, "world")


@pytest.mark.slow
def test_every_command_on_a_full_disk(tmp_path: Path) -> None:
    from scripts.full_disk import COMMANDS

    full_disk(tmp_path / "out", 3, ",".join(COMMANDS))


def test_the_echo_of_a_failed_save_is_silent(tmp_path: Path) -> None:
    """An uncatchable error like those of tensorstore's callbacks is silent; any other one is reported."""
    code = (
        "from rag_jax.system import disk_errors\n"
        "disk_errors.without_echoes()\n"
        "class Late:\n"
        "    def __init__(self, words): self.words = words\n"
        "    def __del__(self): raise RuntimeError(self.words)\n"
        "Late('Event loop is closed')\n"
        "Late('a bug')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Event loop" not in done.stderr and "a bug" in done.stderr


def test_a_directory_that_is_still_written_to_is_removed(tmp_path, monkeypatch):
    """As after a failed array: other threads still write files while the directory is being removed."""
    folder, plain, left = tmp_path / "half", shutil.rmtree, [2]

    def remove(path, ignore_errors=False):
        plain(path, ignore_errors=ignore_errors)
        if left[0]:
            left[0] -= 1
            (path / "late").mkdir(parents=True)

    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", remove)
    files.remove_tree(folder)
    assert not folder.exists() and not left[0]
    left[0] = 10**6
    folder.mkdir()
    files.remove_tree(folder, seconds=0.2)  # it gives up after the time limit
    assert folder.exists()
