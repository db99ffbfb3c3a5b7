"""Directories and files that are whole or not there: written under a temporary name, synced, renamed."""

import fcntl
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rag_jax.errors import InputError
from rag_jax.system import block_checksums, disk_errors, logs
from rag_jax.system.paths import real
from rag_jax.system.renaming import renamed, sync

MANIFEST = "manifest.json"
NEWEST = 10**6  # of any kind: a version that is too new is found where the artifact is opened


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
        sync(out.parent)


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
            remove_tree(temporary)
            if not there and not any(out.iterdir()):
                out.rmdir()
            raise
        for name in (last, *instead_of):
            (out / name).unlink(missing_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.rename(out / file.name)
        sync(out)


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
        raise InputError(
            disk_errors.words(error, f"{out}: cannot be made") or f"{out}: cannot be made ({error})"
        ) from error
    lock = _lock(temporary)
    try:
        yield temporary
    except Exception as error:
        if not disk_errors.full(error):
            raise
        raise InputError(disk_errors.words(error, f"{disk_errors.shown(str(out))}: cannot be written")) from error
    finally:
        remove_tree(temporary)
        if lock is not None:
            os.close(lock)


def remove_tree(directory: Path, seconds: float = 5.0) -> None:
    """Removes a directory, as far as that can be done. After a failed write, threads of tensorstore may still make
    files in it, so it is tried again for a while.
    """
    end = time.monotonic() + seconds
    shutil.rmtree(directory, ignore_errors=True)
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.05)
        shutil.rmtree(directory, ignore_errors=True)


def _check_out(out: Path, kind: str, overwrite: bool) -> None:
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise InputError(
            disk_errors.words(error, f"{out}: cannot be read") or f"{out}: cannot be read ({error})"
        ) from error
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
            sync(Path(folder, name))
        sync(Path(folder))


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
            sync(path.parent)
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


def read_json(path: Path, missing: str = "") -> Any:
    """The content of a JSON file; InputError where it is none, or there is no such file.

    missing: what to do about a file that is not there.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file" + (f"; {missing}" if missing else "")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def read_json_object(path: Path, missing: str = "") -> dict[str, Any]:
    """As `read_json`; InputError where the content is not an object, too."""
    found = read_json(path, missing)
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """UTF-8, by rename; errors: what to do with what has no UTF-8."""
    with renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


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
    sync(path.parent)


def read_sealed(path: Path, kind: str, version: int, again: str, oldest: int | None = None) -> dict[str, Any]:
    """What `write_sealed` wrote, without the hash; InputError, ending in the words `again`, for anything else.

    oldest: the first format version that is read, too.
    """
    try:
        content = path.read_bytes()
        fields = json.loads(content) if content else None
    except FileNotFoundError:
        raise InputError(f"{path.parent}: not a finished {kind} (no {path.name}); {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable ({error}); {again}") from error
    if not content:
        raise InputError(f"{path}: the file is empty; {again}")
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise InputError(f"{path}: not the manifest of a {kind}")
    found = fields.get("format_version")
    if not isinstance(found, int) or not (oldest or version) <= found <= version:
        raise InputError(f"{path}: format version {found}, this program reads {version}; {again}")
    if fields.pop("manifest_hash", None) != canonical_sha256(fields):
        raise InputError(f"{path}: altered after it was written; {again}")
    return fields


def kind_of(directory: Path) -> str | None:
    """The kind that the manifest of a directory names, whole or not; None where there is none."""
    try:
        found = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kind = found.get("kind") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None


def write_manifest(
    directory: Path,
    kind: str,
    version: int,
    fields: dict[str, Any],
    known: Mapping[str, block_checksums.Entry] | None = None,
) -> None:
    """Writes manifest.json: kind, format version, `fields`, and size, hash and block sums of every file below
    `directory`.

    known: entries of files that need not be read again.
    """
    known = known or {}
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            files[name] = entry_of(path, known.get(name))
    write_sealed(directory / MANIFEST, kind, version, {**fields, "files": files})


def entry_of(path: Path, known: block_checksums.Entry | None = None) -> block_checksums.Entry:
    """That of a file in a manifest; `known` as it is, if it has block sums; InputError where the file is not its."""
    if known is not None and block_checksums.FIELD in known:
        return known
    found = block_checksums.of_file(path)
    if known is not None and found["sha256"] != known["sha256"]:
        raise InputError(f"{path}: damaged: its content is not what the manifest says; restore it, or build it again")
    return found


def read_manifest(directory: Path, kind: str, version: int, oldest: int | None = None) -> dict[str, Any]:
    """The manifest, after checking kind, version, its own hash and the size of every file. What the files hold is
    verified where it is read, by the block sums in `files`.

    A line says where those are missing, since the artifact is of an older format, from `oldest` on.
    """
    again = f"build the {kind} again"
    if not directory.is_dir():
        raise InputError(f"{directory}: no such {kind} directory")
    manifest = read_sealed(directory / MANIFEST, kind, version, again, oldest)
    for name, expected in entries(directory, manifest, again).items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise InputError(f"{file}: {size} bytes, the manifest says {expected['bytes']}; {again}")
    if manifest["format_version"] < version:
        told_without_sums(directory, kind)
    return manifest


def read_verified(directory: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest, after every byte of every file was verified: for what other libraries read."""
    manifest = read_manifest(directory, kind, version)
    for name, entry in manifest["files"].items():
        block_checksums.whole(directory / name, entry, f"build the {kind} again")
    return manifest


def entries(directory: Path, manifest: Mapping[str, Any], again: str) -> dict[str, block_checksums.Entry]:
    """`files` of a manifest; InputError where they are not what `write_manifest` wrote."""
    found = manifest.get("files")
    if not isinstance(found, dict) or not all(_is_entry(name, entry) for name, entry in found.items()):
        raise InputError(f"{directory / MANIFEST}: does not list files with their sizes and hashes; {again}")
    return found


def _is_entry(name: str, entry: Any) -> bool:
    types = {"bytes": int, "sha256": str}
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in types.items())


SMALL = (".json", ".txt", ".model")  # configuration and tokenizer files
MEND = {
    "corpus": "restore the file, or build the corpus again",
    "run": "restore the file; it was written when the run began",
    "converted model": "convert it again",
    "Hugging Face model": f"export it again; if it was changed on purpose, remove {MANIFEST} beside it or above",
}


def _ours(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, whatever its kind; None where there is none, or one of another program; InputError
    for a damaged one.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not any(mark in content for mark in (b'"manifest_hash"', b'"format_version"')):  # one flip leaves one of them
        return None
    mend = "restore it from a copy; if files beside it were changed on purpose, remove it"
    kind = kind_of(directory)
    if kind is None:
        raise InputError(f"{path}: damaged: not a manifest; {mend}")
    return read_sealed(path, kind, NEWEST, mend, 1)


def check_listed(
    folder: Path,
    names: Collection[str] = (),
    suffixes: Sequence[str] = SMALL,
    below: bool = False,
    kinds: Collection[str] = MEND,
) -> bool:
    """Verifies the files of a folder that a manifest there, or up to two levels above, lists: InputError names a
    damaged or missing one. Whether there is such a manifest.

    names: of the files, by default all with one of the suffixes. below: also in folders within.
    """
    folder = folder.absolute()
    for home in (folder, *list(folder.parents)[:2]):
        manifest = _ours(home)
        if manifest is None or manifest["kind"] not in kinds:
            continue
        mend = MEND[manifest["kind"]]
        for name, entry in entries(home, manifest, mend).items():
            path = home / name
            inside = path.is_relative_to(folder) if below else path.parent == folder
            if inside and (path.name in names if names else path.suffix in suffixes):
                block_checksums.whole(path, entry, mend)
        return True
    return False


@functools.cache  # one line a directory
def told_without_sums(directory: Path, kind: str) -> None:
    """Says that damage in an older artifact is not noticed by itself."""
    logs.info(
        f"{directory}: a {kind} of an older format, without checksums by block: damage is not noticed as it is read; "
        f"rag-jax verify {directory} looks for it"
    )


@contextmanager
def described(path: Path, again: str) -> Iterator[None]:
    """Turns what a sealed file with wrong types or missing fields raises into an InputError with its name."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: does not say what it must ({error!r}); {again}") from error
