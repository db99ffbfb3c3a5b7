"""An index snapshot on disk: embeddings [N, E] and a manifest that binds them to a corpus and to the encoder that
made them.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rag_jax.errors import InputError

FORMAT_VERSION = 1
EMBEDDINGS = "embeddings.npy"


@dataclass(frozen=True)
class Manifest:
    """corpus: where the passages are, corpus_hash: what they were; encoder_hash and step: which parameters embedded
    them.
    """

    format_version: int
    corpus: str
    corpus_hash: str
    encoder_hash: str
    step: int
    n_passages: int
    width: int
    dtype: str


@dataclass(frozen=True)
class Snapshot:
    """An opened snapshot; the embeddings are memory-mapped."""

    directory: Path
    manifest: Manifest
    embeddings_NE: np.ndarray


class Writer:
    """Embeddings row block by row block into a temporary directory, renamed to `directory` by `finish`."""

    def __init__(self, directory: Path, manifest: Manifest, overwrite: bool = False) -> None:
        self.directory, self.manifest, self.overwrite = directory.absolute(), manifest, overwrite
        if self.directory.exists() and not overwrite:
            raise InputError(f"{directory}: exists already; name another directory, or give --overwrite")
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.parent.glob(f".{self.directory.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        self.temporary = self.directory.with_name(f".{self.directory.name}.tmp-{os.getpid()}")
        self.temporary.mkdir()
        shape = (manifest.n_passages, manifest.width)
        self.array = np.lib.format.open_memmap(self.temporary / EMBEDDINGS, "w+", np.dtype(manifest.dtype), shape)

    def write(self, start: int, rows_XE: np.ndarray) -> None:
        if not np.isfinite(rows_XE).all():
            bad = start + int(np.flatnonzero(~np.isfinite(rows_XE).all(1))[0])
            raise InputError(
                f"the embedding of passage row {bad} is not finite; the encoder has diverged, use an earlier checkpoint"
            )
        self.array[start : start + len(rows_XE)] = rows_XE

    def finish(self) -> Snapshot:
        self.array.flush()
        (self.temporary / "manifest.json").write_text(json.dumps(asdict(self.manifest), indent=2) + "\n")
        old = self.directory.with_name(f".{self.directory.name}.old-{os.getpid()}")
        if self.directory.exists():
            self.directory.rename(old)
        self.temporary.rename(self.directory)
        shutil.rmtree(old, ignore_errors=True)
        return open_snapshot(self.directory)


def open_snapshot(directory: str | Path) -> Snapshot:
    """InputError where the directory is no snapshot, is of another format, or does not match its own manifest."""
    directory = Path(directory)
    try:
        manifest = Manifest(**json.loads((directory / "manifest.json").read_text()))
        embeddings = np.load(directory / EMBEDDINGS, mmap_mode="r")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{directory}: not a readable index ({error}); make one with rag-jax index") from error
    if manifest.format_version != FORMAT_VERSION:
        raise InputError(
            f"{directory}: index format {manifest.format_version}, this version reads {FORMAT_VERSION}; "
            "rebuild it with rag-jax index"
        )
    if embeddings.shape != (manifest.n_passages, manifest.width) or str(embeddings.dtype) != manifest.dtype:
        raise InputError(
            f"{directory}: embeddings are {embeddings.shape} {embeddings.dtype}, the manifest says "
            f"{(manifest.n_passages, manifest.width)} {manifest.dtype}; rebuild it with rag-jax index"
        )
    return Snapshot(directory, manifest, embeddings)


def check(snapshot: Snapshot, corpus_hash: str, encoder_hash: str) -> None:
    """InputError with both hashes where the snapshot is of another corpus or encoder."""
    found = snapshot.manifest
    for what, have, want in (
        ("corpus", found.corpus_hash, corpus_hash),
        ("encoder", found.encoder_hash, encoder_hash),
    ):
        if have != want:
            raise InputError(
                f"{snapshot.directory}: made with {what} {have[:16]}, but this run's {what} is {want[:16]}; "
                "make a new one with: rag-jax index RUN --corpus CORPUS --out DIR"
            )
