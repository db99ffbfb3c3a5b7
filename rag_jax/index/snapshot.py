"""An index snapshot on disk: embeddings [N, E] in shard files, bound to a corpus and to the encoder that made them.

A snapshot never changes. One made from an encode job or an older snapshot shares their files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.stacked_arrays import ArrayFile, Scaled, Stacked, stack
from rag_jax.errors import InputError
from rag_jax.index import encode_job, shards
from rag_jax.index.shards import Identity, Shard
from rag_jax.system import files
from rag_jax.system.block_checksums import Entry

KIND, VERSION, OLDEST = "index", 3, 2  # version 2 has no checksums by block


@dataclass(frozen=True)
class Manifest:
    """Description of a snapshot.

    corpus: path of the corpus; corpus_hash: its content.
    encoder_hash, step: the parameters that embedded it, and the updates they were trained for.
    tokenizer_hash: the encoder's tokenizer.
    width: E; dtype: of the stored embeddings.
    form: see `RagConfig.passage_form`, "" in snapshots made before there was one.
    """

    corpus: str
    corpus_hash: str
    encoder_hash: str
    tokenizer_hash: str
    step: int
    n_passages: int
    width: int
    dtype: str
    form: str = ""

    @classmethod
    def of(
        cls, corpus: Corpus, encoder_hash: str, step: int, width: int, dtype: str = "float32", form: str = ""
    ) -> Self:
        """The manifest of a snapshot of all passages of a corpus."""
        return cls(
            corpus=str(corpus.directory.resolve()),
            corpus_hash=corpus.hash,
            encoder_hash=encoder_hash,
            tokenizer_hash=corpus.encoder_tokenizer.hash,
            step=step,
            n_passages=len(corpus),
            width=width,
            dtype=dtype,
            form=form,
        )


@dataclass(frozen=True)
class Snapshot:
    """An opened snapshot, whose embeddings are read only where they are indexed.

    embeddings_NE: array-like (see `stacked_arrays.StoredRows`), in the stored type, but float32 where int8 is stored.
    rows_NE, scale_N: as stored; embeddings = rows * scale for int8, scale_N is None for other types.
    """

    directory: Path
    manifest: Manifest
    hash: str
    shards: tuple[Shard, ...]
    embeddings_NE: Any
    rows_NE: Any
    scale_N: Any


def write(
    directory: str | Path,
    manifest: Manifest,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    overwrite: bool = False,
    shared: Sequence[tuple[Shard, Entry]] = (),
) -> Snapshot:
    """Writes a snapshot, which appears whole or not at all, and opens it.

    blocks: (rows [X], embeddings [X, E]), each written as one file; rows ascend without gaps, from the end of `shared`.
    overwrite: replace an index that is there.
    shared: existing shards with the first rows, and their entries in a manifest; their files are linked or copied.

    InputError for an embedding that is not finite, and for a directory that is there and is no index (or without
    `overwrite`); ValueError where shared and blocks together are not n_passages rows.
    """
    m = manifest
    with files.new_directory(directory, KIND, overwrite) as temporary:
        identities = [shard.identity for shard, _ in shared]
        for shard, _ in shared:
            files.link(shard.path, temporary / shard.path.name)
        written = identities[-1].last if identities else 0
        for rows_X, embeddings_XE in blocks:
            last = written + len(rows_X)
            if not np.array_equal(rows_X, np.arange(written, last)):
                raise ValueError(f"rows {written} to {last - 1} come next, the block is of other ones")
            identity = Identity(m.corpus_hash, m.encoder_hash, written, last, m.width, m.dtype)
            with (temporary / identity.name).open("xb", buffering=0) as stream:
                shards.write(stream, identity, embeddings_XE)
            identities.append(identity)
            written = last
        if written != m.n_passages:
            raise ValueError(f"{written} embeddings were written, the manifest says {m.n_passages}")
        known = {shard.path.name: entry for shard, entry in shared}
        table = [asdict(identity) for identity in identities]
        files.write_manifest(temporary, KIND, VERSION, {**asdict(m), "shards": table}, known)
    return open_snapshot(directory)


def from_job(job_dir: str | Path, corpus: Corpus, out: str | Path, overwrite: bool = False) -> Snapshot:
    """The snapshot of a finished encode job, whose files it shares.

    corpus: the present corpus; InputError where it is not the one that was embedded, or shards are missing or damaged.
    """
    directory = Path(job_dir)
    job = encode_job.read_job(directory)
    again = f"rag-jax encode {job.run} --corpus {job.corpus} --out"
    if corpus.hash != job.corpus_hash:
        raise InputError(
            f"{directory}: embeds a corpus with hash {job.corpus_hash[:16]}, and {corpus.directory} has "
            f"{corpus.hash[:16]}; embed that one: rag-jax encode {job.run} --corpus {corpus.directory} --out OTHER"
        )
    missing = [identity for identity in job.shards if not (directory / identity.name).exists()]
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} of {len(job.shards)} shards are missing, the first {missing[0].name}; "
            f"finish it with: {again} {directory}"
        )
    mend = f"remove that file and embed its rows again: {again} {directory}"
    try:
        shared = [(shard, shard.entry()) for shard in shards.read_all(directory, job.shards, mend)]
    except InputError as error:
        raise InputError(str(error) if mend in str(error) else f"{error}; {mend}") from None
    found = {field.name: getattr(job, field.name) for field in fields(Manifest)}
    return write(out, Manifest(**found | {"corpus": str(corpus.directory.resolve())}), (), overwrite, shared)


def update(
    old: Snapshot,
    manifest: Manifest,
    corpus: Corpus,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    out: str | Path,
    overwrite: bool = False,
) -> Snapshot:
    """The snapshot of an updated corpus: shares the files of the old one; `blocks` (see `write`) are the rows after.

    InputError where the encoder is another one, or the corpus is no update of the old one.
    """
    check_update(old, manifest, corpus)
    entries = files.read_manifest(old.directory, KIND, VERSION, OLDEST)["files"]
    shared = [(shard, entries[shard.path.name]) for shard in old.shards]
    return write(out, manifest, blocks, overwrite, shared)


def check_update(old: Snapshot, manifest: Manifest, corpus: Corpus) -> None:
    """InputError with both values where the rows of the old snapshot cannot be the first rows of the new one."""
    was = old.manifest
    anew = f"embed it all: rag-jax index RUN --corpus {corpus.directory} --out DIR"
    for name in ("encoder_hash", "tokenizer_hash", "width", "dtype"):
        have, want = (str(getattr(of, name))[:16] for of in (was, manifest))
        if have != want:
            raise InputError(f"{old.directory}: was made with {name} {have}, and this is {want}; {anew}")
    if not same_form(was.form, manifest.form):
        raise InputError(f"{old.directory}: its vectors are {was.form}, and these are {manifest.form}; {anew}")
    if not corpus.is_update_of(was.corpus_hash, was.n_passages):
        raise InputError(
            f"{old.directory}: is of a corpus with hash {was.corpus_hash[:16]}, and {corpus.directory}, "
            f"{corpus.hash[:16]}, is no update of that one; {anew}"
        )


def shared_rows(one: Snapshot, other: Snapshot) -> int:
    """Number of first rows whose embeddings are equal bit for bit in both snapshots, by their leading equal shards."""
    rows = 0
    for a, b in zip(one.shards, other.shards, strict=False):
        places = [(s.identity.first, s.identity.last, s.identity.dtype, s.sha256) for s in (a, b)]
        if places[0] != places[1]:
            break
        rows = a.identity.last
    return rows


def open_snapshot(directory: str | Path) -> Snapshot:
    """Opens a snapshot by its manifest and the sizes and headers of its files.

    InputError where the directory is no snapshot, is of another format, or does not match its own manifest; damaged
    rows raise it later, when they are read.
    """
    directory = Path(directory)
    found = files.read_manifest(directory, KIND, VERSION, OLDEST)
    with files.described(directory / files.MANIFEST, shards.AGAIN):
        return _opened(directory, found)


def _opened(directory: Path, found: dict[str, Any]) -> Snapshot:
    manifest = Manifest(**{field.name: found[field.name] for field in fields(Manifest) if field.name in found})
    identities = [Identity(**entry) for entry in found["shards"]]
    opened = tuple(shards.read_all(directory, identities, shards.AGAIN, found["files"]))
    embeddings = [ArrayFile(shard.identity.rows, shard.embeddings_XE) for shard in opened]
    rows_NE = stack(embeddings, jnp.dtype(manifest.dtype), (manifest.width,))
    if rows_NE.shape != (manifest.n_passages, manifest.width):
        shape = (manifest.n_passages, manifest.width)
        raise InputError(f"{directory}: shards hold {rows_NE.shape}, the manifest says {shape}; build the index again")
    scale_N, embeddings_NE = None, rows_NE
    if manifest.dtype == "int8":
        scale_N = Stacked([ArrayFile(shard.identity.rows, shard.scale_X) for shard in opened], np.float32)
        embeddings_NE = Scaled(Stacked(embeddings, np.int8, (manifest.width,)), scale_N)
    named = {name: value for name, value in asdict(manifest).items() if name != "corpus" and (name != "form" or value)}
    # of the content alone, so that it is the same with block sums and without
    content = {name: {key: entry[key] for key in ("bytes", "sha256")} for name, entry in found["files"].items()}
    digest = files.canonical_sha256({**named, "files": content})
    return Snapshot(directory, manifest, digest, opened, embeddings_NE, rows_NE, scale_N)


def same_form(stored: str, form: str) -> bool:
    """Whether embeddings of two forms (`RagConfig.passage_form`) may be compared.

    stored: "" in old snapshots, which were made when there were no prefixes and only the poolings cls and mean.
    """
    return stored == form if stored else "ids" not in form and form.split()[0] in ("cls", "mean")


def check(
    snapshot: Snapshot, corpus_hash: str, encoder_hash: str, tokenizer_hash: str | None = None, form: str | None = None
) -> None:
    """InputError with both values where a snapshot is of another tokenizer, corpus or encoder, or of another form.

    tokenizer_hash, form: None to skip their check.
    """
    found = snapshot.manifest
    for have, want, now in (
        (found.tokenizer_hash, tokenizer_hash or found.tokenizer_hash, "a tokenizer other than the run's, which is"),
        (found.corpus_hash, corpus_hash, f"the corpus {found.corpus}, which is now"),
        (found.encoder_hash, encoder_hash, "an encoder other than the run's, which is"),
    ):
        if have != want:
            raise InputError(
                f"{snapshot.directory}: made with {now} {want[:16]} and was {have[:16]}; "
                f"make a new one with: rag-jax index RUN --corpus {found.corpus} --out DIR"
            )
    if form is not None and not same_form(found.form, form):
        raise InputError(
            f"{snapshot.directory}: its vectors are {found.form or 'without a prefix'}, the run's are {form}; "
            f"make a new one with: rag-jax index RUN --corpus {found.corpus} --out DIR"
        )
