"""An index snapshot on disk: embeddings [N, E], bound to a corpus and to the encoder that made them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from rag_jax import files
from rag_jax.errors import InputError

KIND, VERSION = "index", 1
EMBEDDINGS = "embeddings.npy"


@dataclass(frozen=True)
class Manifest:
    """corpus: where the passages are, corpus_hash: what they were; encoder_hash and step: which parameters embedded
    them.
    """

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


def write(
    directory: str | Path, manifest: Manifest, blocks: Iterable[tuple[np.ndarray, np.ndarray]], overwrite: bool = False
) -> Snapshot:
    """Write the blocks (rows [X], embeddings [X, E]) and open the result; it appears whole or not at all.

    InputError for an embedding that is not finite, and for a directory that is there and is no index (or without
    `overwrite`); ValueError where the blocks are not n_passages rows together.
    """
    with files.new_directory(directory, KIND, overwrite) as temporary:
        shape, written = (manifest.n_passages, manifest.width), 0
        array = np.lib.format.open_memmap(temporary / EMBEDDINGS, "w+", np.dtype(manifest.dtype), shape)
        for rows_X, embeddings_XE in blocks:
            if not np.isfinite(embeddings_XE).all():
                bad = int(rows_X[~np.isfinite(embeddings_XE).all(1)][0])
                raise InputError(f"passage row {bad}: its embedding is not finite; the encoder has diverged")
            array[rows_X] = embeddings_XE
            written += len(rows_X)
        if written != manifest.n_passages:
            raise ValueError(f"{written} embeddings were written, the manifest says {manifest.n_passages}")
        array.flush()
        files.write_manifest(temporary, KIND, VERSION, asdict(manifest))
    return open_snapshot(directory)


def open_snapshot(directory: str | Path) -> Snapshot:
    """InputError where the directory is no snapshot, is of another format, or does not match its own manifest."""
    directory = Path(directory)
    found = files.read_manifest(directory, KIND, VERSION)
    manifest = Manifest(**{field.name: found[field.name] for field in fields(Manifest)})
    try:
        embeddings = np.load(directory / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / EMBEDDINGS}: unreadable ({error}); build the index again") from error
    if embeddings.shape != (manifest.n_passages, manifest.width) or str(embeddings.dtype) != manifest.dtype:
        raise InputError(
            f"{directory}: embeddings are {embeddings.shape} {embeddings.dtype}, the manifest says "
            f"{(manifest.n_passages, manifest.width)} {manifest.dtype}; build the index again"
        )
    return Snapshot(directory, manifest, embeddings)


def check(snapshot: Snapshot, corpus_hash: str, encoder_hash: str) -> None:
    """InputError with both hashes where the snapshot is of another corpus or encoder."""
    found = snapshot.manifest
    for have, want, now in (
        (found.corpus_hash, corpus_hash, f"the corpus {found.corpus}, which is now"),
        (found.encoder_hash, encoder_hash, "an encoder other than the run's, which is"),
    ):
        if have != want:
            raise InputError(
                f"{snapshot.directory}: made with {now} {want[:16]} and was {have[:16]}; "
                f"make a new one with: rag-jax index RUN --corpus {found.corpus} --out DIR"
            )
