"""Atomic writing of directories and files (temporary name, fsync, rename), and the manifests that describe them."""

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
NEWEST = 10**6  # accepts every format version here: one that is too new is refused where the artifact is opened


@contextmanager
def new_directory(out: str | Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `out` to fill, renamed to `out` if the block succeeds and removed if it fails.

    kind: of the artifact, see `write_manifest`.
    overwrite: replace a finished artifact of this kind; InputError without it, and for anything else that is there.
    What a killed process left beside `out` is removed first. InputError if another process is building `out` now; that
    one holds a lock, which the kernel releases when it dies.
    """
    out = real(out)
    _check_out(out, kind, overwrite)
    with _temporary(out) as temporary:
        yield temporary
        sync_tree(temporary)
        if out.exists() and any(out.iterdir()):
            _check_out(out, kind, overwrite)  # again: another process may have written there in the meantime
            old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
        sync(out.parent)


@contextmanager
def new_files(out: Path, last: str, instead_of: Iterable[str] = ()) -> Iterator[Path]:
    """Yields a temporary directory to fill with files, which are moved into the directory `out` if the block succeeds.

    last: the file that is moved last, and removed first if it is there, so that where it is, all are.
    instead_of: files of `out` that are removed before.
    Files of the same name are replaced. If the block fails, `out` is unchanged.
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
    """Yields a locked hidden directory beside `out`, which is removed at the end unless it has been renamed.

    What a killed process left is removed first. InputError where it cannot be made, and where the disk is full.
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
    """Removes a directory, trying again for some seconds; what cannot be removed stays, without an error.

    After a failed write, threads of tensorstore may still be creating files in it.
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
    """Raises the error that writing into the directory would raise, before hours of work; leaves nothing there."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    trial = directory / f".writable-{secrets.token_hex(4)}"
    trial.mkdir()
    trial.rmdir()
    with suppress(OSError):  # another process uses it by now
        for one in missing:
            one.rmdir()


def sync_tree(directory: Path) -> None:
    """Waits until everything below the directory, and the directory itself, is on disk (fsync)."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """Hex digest of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO | None]:
    """Yields an unbuffered file to fill, renamed to `path` if the block succeeds and removed if it fails.

    Yields None if `path` exists or another process is writing it: that one holds a lock, which the kernel releases when
    it dies, and a half-written file is then rewritten by the next. So processes can divide a list of files among
    themselves without communicating.
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
    """Writes byte strings or arrays whole to an unbuffered file, whose `write` may accept only a part of them."""
    for part in parts:
        left = memoryview(part).cast("B")
        while left:
            left = left[stream.write(left) :]


def link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy where the file system has no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_json(path: Path, missing: str = "") -> Any:
    """The content of a JSON file; InputError if it is absent or not JSON.

    missing: advice for the message when the file is absent.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file" + (f"; {missing}" if missing else "")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def read_json_object(path: Path, missing: str = "") -> dict[str, Any]:
    """The content of a JSON file that holds an object; InputError if it is absent, not JSON, or no object.

    missing: advice for the message when the file is absent.
    """
    found = read_json(path, missing)
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8 by rename; errors: as in `str.encode`, for characters that have no UTF-8."""
    with renamed(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_sealed(path: Path, kind: str, version: int, fields: Mapping[str, Any]) -> None:
    """Writes a JSON file with kind, format version, `fields` and a hash over all of these, by rename."""
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
    """The content of a file by `write_sealed`, without the hash; InputError if it is absent, damaged or another kind.

    version: the newest format version that is accepted.
    again: advice that ends the message of the error.
    oldest: the oldest format version that is accepted; None means `version`.
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
    """The kind in the manifest of a directory, whether or not its hash is right; None where there is none."""
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
    """Writes manifest.json: kind, format version, `fields`, and an entry (size, hash, block sums) for every file below.

    known: entries, by name, of files that need not be read again.
    """
    known = known or {}
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            files[name] = entry_of(path, known.get(name))
    write_sealed(directory / MANIFEST, kind, version, {**fields, "files": files})


def entry_of(path: Path, known: block_checksums.Entry | None = None) -> block_checksums.Entry:
    """The manifest entry of a file.

    known: an entry to use as it is if it has block sums; else InputError where its sha256 is not that of the file.
    """
    if known is not None and block_checksums.FIELD in known:
        return known
    found = block_checksums.of_file(path)
    if known is not None and found["sha256"] != known["sha256"]:
        raise InputError(f"{path}: damaged: its content is not what the manifest says; restore it, or build it again")
    return found


def read_manifest(directory: Path, kind: str, version: int, oldest: int | None = None) -> dict[str, Any]:
    """The manifest of a directory, after checks of kind, version, its own hash and the size of every file.

    The content of a file is verified when it is read, by the block sums in `files`.
    oldest: the oldest format version that is accepted; for one before `version`, a line says that it has no block sums.
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
    """The manifest, after every byte of every file was verified: for files that other libraries will read."""
    manifest = read_manifest(directory, kind, version)
    for name, entry in manifest["files"].items():
        block_checksums.whole(directory / name, entry, f"build the {kind} again")
    return manifest


def entries(directory: Path, manifest: Mapping[str, Any], again: str) -> dict[str, block_checksums.Entry]:
    """The entries of the files of a manifest by name; InputError where they do not look like `write_manifest`'s."""
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
    """The manifest of a directory, of any kind; None where there is none, or that of another program.

    InputError for a damaged one.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except OSError:
        return None
    # either mark is enough: a flipped byte can damage only one of them
    if not any(mark in content for mark in (b'"manifest_hash"', b'"format_version"')):
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
    """Verifies the files of a folder that a manifest lists, there or up to two levels above; False if there is none.

    names: names of the files to verify; by default all with one of the suffixes.
    below: verify files in folders below, too.
    kinds: manifests of other kinds are passed over.
    InputError for a damaged or missing file.
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
    """Prints that damage in an artifact of an older format is not noticed when it is read."""
    logs.info(
        f"{directory}: a {kind} of an older format, without checksums by block: damage is not noticed as it is read; "
        f"rag-jax verify {directory} looks for it"
    )


@contextmanager
def described(path: Path, again: str) -> Iterator[None]:
    """Context manager: turns errors from wrong types or missing fields of a sealed file into an InputError.

    path: the file, for the message. again: advice that ends the message.
    """
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: does not say what it must ({error!r}); {again}") from error
