"""Directories and files that are whole or not there: written under a temporary name, synced, renamed."""

import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rag_jax import disk
from rag_jax.errors import InputError

MANIFEST = "manifest.json"


@contextmanager
def new_directory(out: str | Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `out` to fill; renamed to `out` if the block ends well, else removed.

    What a killed run left beside `out` is removed first. A finished `out` is refused unless `overwrite`, and even then
    anything but an artifact of this `kind` (see `write_manifest`). Two runs at once for the same `out`: the second is
    refused (the first holds a lock that the kernel gives back when it dies).
    """
    out = real(out)
    _check_out(out, kind, overwrite)
    with _temporary(out) as temporary:
        yield temporary
        sync_tree(temporary)
        if out.exists() and any(out.iterdir()):
            _check_out(out, kind, overwrite)
            old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
        _sync(out.parent)


@contextmanager
def new_files(out: Path, last: str, instead_of: Iterable[str] = ()) -> Iterator[Path]:
    """Yields a temporary directory to fill with files, which go into the directory `out` if the block ends well.

    There they replace those of the same name, and those named by `instead_of` are removed before; `last` comes last, so
    that where it is, all are. If the block fails, `out` is as it was.
    """
    there = out.exists()
    with _temporary(out / last) as temporary:
        try:
            yield temporary
            sync_tree(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if not there and not any(out.iterdir()):
                out.rmdir()
            raise
        for name in (last, *instead_of):
            (out / name).unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.rename(out / file.name)
        _sync(out)


def real(path: str | Path) -> Path:
    """The absolute path, links in the middle followed; `missing/..` counts as if `missing` were there (mkdir -p)."""
    path = Path(path)
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def crosses_missing(path: Path) -> bool:
    """Whether `..` stands behind a directory that is not there, so that the system would not find what is meant."""
    parts = path.parts
    return any(part == ".." and not Path(*parts[:i]).exists() for i, part in enumerate(parts) if i)


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out`, locked, which is gone at the end unless it was renamed; InputError where there
    is no room for it, or it cannot be made. What a killed process left is removed first.
    """
    temporary = out.with_name(f".{out.name}.building-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        temporary.mkdir()
    except OSError as error:
        raise InputError(disk.words(error, f"{out}: cannot be made") or f"{out}: cannot be made ({error})") from error
    lock = _lock(temporary)
    try:
        yield temporary
    except Exception as error:
        if not disk.full(error):
            raise
        raise InputError(disk.words(error, f"{disk.shown(str(out))}: cannot be written")) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _check_out(out: Path, kind: str, overwrite: bool) -> None:
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise InputError(disk.words(error, f"{out}: cannot be read") or f"{out}: cannot be read ({error})") from error
    try:
        ours = json.loads((out / MANIFEST).read_bytes()).get("kind") == kind
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise InputError(f"{out}: exists and is not {'an' if kind[0] in 'aeiou' else 'a'} {kind}; choose another --out")
    if not overwrite:
        raise InputError(f"{out}: a finished {kind} is already there; pass --overwrite or choose another --out")


def _remove_stale(out: Path) -> None:
    for mark in ("building", "old"):
        for stale in out.parent.glob(f".{glob.escape(out.name)}.{mark}-*"):
            lock = _lock(stale)
            if lock is None:
                raise InputError(f"{out}: another process is building it now; wait for it or choose another --out")
            shutil.rmtree(stale)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def check_writable(directory: Path) -> None:
    """Raises now what writing into the directory would raise after hours of work; leaves nothing there."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    trial = directory / f".writable-{secrets.token_hex(4)}"
    trial.mkdir()
    trial.rmdir()
    with suppress(OSError):  # another process uses it by now
        for one in missing:
            one.rmdir()


def sync_tree(directory: Path) -> None:
    """Everything below, and the directory itself, is on disk when this returns."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO | None]:
    """Yields an unbuffered file to fill, which becomes `path` if the block ends well and is removed if it does not.

    None where `path` is there, or another process is making it: it holds a lock, which the kernel gives back when it
    dies. What it left half written is written anew. So processes share a list of files to make without a word.
    """
    temporary = path.with_name(f".{path.name}.building")
    with temporary.open("ab", buffering=0) as stream:
        if not _claim(stream, temporary, path):
            yield None
            return
        stream.truncate(0)
        try:
            yield stream
            os.fsync(stream.fileno())
            temporary.rename(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _claim(stream: BinaryIO, temporary: Path, path: Path) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        ours = os.path.samestat(os.fstat(stream.fileno()), temporary.stat())
    except FileNotFoundError:
        ours = False
    if ours and path.exists():
        temporary.unlink()
    return ours and not path.exists()  # not ours: between opening and locking it was finished and renamed


def write_all(stream: BinaryIO, parts: Iterable[Any]) -> None:
    """Writes byte strings or arrays to an unbuffered file, which may take less than is offered."""
    for part in parts:
        left = memoryview(part).cast("B")
        while left:
            left = left[stream.write(left) :]


def link(source: Path, target: Path) -> None:
    """`target` shares the bytes of `source` where the file system can, else it is a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """UTF-8, by rename; errors: what to do with what has no UTF-8."""
    with renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` if the block ends well and is removed if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_sealed(path: Path, kind: str, version: int, fields: Mapping[str, Any]) -> None:
    """A JSON file with kind, format version, `fields` and a hash over all of it; there whole or not at all."""
    sealed = {"kind": kind, "format_version": version, **fields}
    sealed["manifest_hash"] = canonical_sha256(sealed)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb", buffering=0) as stream:
            write_all(stream, [(json.dumps(sealed, indent=1, ensure_ascii=False) + "\n").encode()])
            os.fsync(stream.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def read_sealed(path: Path, kind: str, version: int, again: str) -> dict[str, Any]:
    """What `write_sealed` wrote, without the hash; InputError, ending in the words `again`, for anything else."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: not a finished {kind} (no {path.name}); {again}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error}); {again}") from error
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise InputError(f"{path}: not the manifest of a {kind}")
    if fields.get("format_version") != version:
        found = fields.get("format_version")
        raise InputError(f"{path}: format version {found}, this program reads {version}; {again}")
    if fields.pop("manifest_hash", None) != canonical_sha256(fields):
        raise InputError(f"{path}: altered after it was written; {again}")
    return fields


def write_manifest(
    directory: Path, kind: str, version: int, fields: dict[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Writes manifest.json: kind, format version, `fields`, and size and hash of every file below `directory`.

    known: hashes of files that need not be read again.
    """
    known = known or {}
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
    write_sealed(directory / MANIFEST, kind, version, {**fields, "files": files})


def read_manifest(directory: Path, kind: str, version: int, verify: bool = False) -> dict[str, Any]:
    """The manifest, after checking kind, version, its own hash and the size (with `verify` the hash) of every file."""
    again = f"build the {kind} again"
    if not directory.is_dir():
        raise InputError(f"{directory}: no such {kind} directory")
    manifest = read_sealed(directory / MANIFEST, kind, version, again)
    for name, expected in manifest["files"].items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise InputError(f"{file}: {size} bytes, the manifest says {expected['bytes']}; {again}")
        if verify and file_sha256(file) != expected["sha256"]:
            raise InputError(f"{file}: its content is not what the manifest says; {again}")
    return manifest
