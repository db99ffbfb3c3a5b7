"""Reads all files of a corpus, index, encode job, run, converted model or export, and names those that are damaged."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.corpus.directory import KIND as CORPUS
from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.segment import AGAIN, TEXTS
from rag_jax.data import example_cache
from rag_jax.errors import InputError
from rag_jax.index import encode_job, shards
from rag_jax.index import snapshot as snapshots
from rag_jax.retrieval import bm25, scann_index
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import block_checksums, files, logs

ROWS = 1 << 16  # rows of an array that are checked at once
RESTORE = "restore it from a copy"
UNKNOWN = "artifact of an unknown kind"
MEND = files.MEND | {
    snapshots.KIND: shards.AGAIN,
    checkpoint.KIND: checkpoint.AGAIN,
    example_cache.KIND: "remove the directory: rag-jax train writes it again",
    bm25.KIND: "remove the directory: it is built again",
    scann_index.KIND: "remove the directory: it is built again",
}


@dataclass
class Verification:
    """Progress of a verification: bytes read so far, and a message for each damage found."""

    progress: logs.Progress
    read: int = 0  # bytes
    damaged: list[str] = field(default_factory=list)

    def look(self, check: Callable[..., object], *args: Any) -> bool:
        """Runs a check; False, with its message in `damaged`, where it found something wrong."""
        try:
            check(*args)
        except (InputError, checkpoint.Damaged, OSError) as error:
            if str(error) not in self.damaged:
                self.damaged.append(str(error))
            return False
        return True

    def file(self, path: Path, entry: block_checksums.Entry, mend: str) -> None:
        """Reads a whole file and compares it with its entry in a manifest."""
        self.progress.update(1)
        self.look(_file, path, entry, mend)
        self.read += entry["bytes"]


def _file(path: Path, entry: block_checksums.Entry, mend: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing; {mend}")
    found = block_checksums.of_file(path)
    if found["bytes"] != entry["bytes"]:
        raise InputError(f"{path}: damaged: {found['bytes']} bytes, the manifest says {entry['bytes']}; {mend}")
    if any(found[name] != value for name, value in entry.items()):
        raise InputError(f"{path}: damaged: its content is not what the manifest says; {mend}")


def listed(directory: Path, found: Verification) -> bool:
    """Checks all files that a manifest lists; False where any is damaged."""
    before, kind = len(found.damaged), files.kind_of(directory)
    mend = MEND.get(str(kind), RESTORE)

    def read() -> None:
        manifest = files.read_sealed(directory / files.MANIFEST, str(kind), files.NEWEST, mend, 1)
        for name, entry in files.entries(directory, manifest, mend).items():
            found.file(directory / name, entry, mend)

    found.look(read)
    return len(found.damaged) == before


def corpus(directory: Path, found: Verification) -> None:
    """Checks all files, and that tables, offsets, ids and tokenizers fit each other."""
    if listed(directory, found):
        found.look(lambda: _fits(Corpus.open(directory)))


def _fits(one: Corpus) -> None:
    _ = one.live_N, one.encoder_tokenizer, one.generator_tokenizer
    for name, table, length in (
        ("encoder", one.encoder_ids, one.encoder_length),
        ("generator", one.generator_ids, one.generator_length),
    ):
        for first in range(0, len(one), ROWS):
            longest = int(length[first : first + ROWS].max(initial=0))
            if longest > table.shape[1]:
                path = one.directory / f"{name}_length.npy"
                raise InputError(f"{path}: damaged: {longest} tokens in a row of {table.shape[1]}; {AGAIN}")
    for segment in one.segments:
        offsets, (hashes, rows) = np.asarray(segment.offsets), segment.id_table
        size = (segment.directory / TEXTS).stat().st_size
        if offsets[0] != 0 or offsets[-1] != size or (offsets[1:] <= offsets[:-1]).any():
            raise InputError(f"{segment.directory / 'offsets.npy'}: damaged: not those of {TEXTS}; {AGAIN}")
        if len(hashes) != len(rows) or (hashes[1:] < hashes[:-1]).any() or (rows[:] >= segment.rows).any():
            raise InputError(f"{segment.directory / 'id_rows.npy'}: damaged: not rows of the ids; {AGAIN}")


def snapshot(directory: Path, found: Verification) -> None:
    """Checks all files, and that the index is of the corpus that it names, if that is there."""
    if listed(directory, found):
        found.look(lambda: _of_its_corpus(snapshots.open_snapshot(directory)))


def _of_its_corpus(one: snapshots.Snapshot) -> None:
    about = one.manifest
    if not Path(about.corpus).is_dir():
        logs.info(f"{one.directory}: its corpus {about.corpus} is not there, and was not looked at")
        return
    now = Corpus.open(about.corpus)
    if not now.is_update_of(about.corpus_hash, about.n_passages):
        raise InputError(
            f"{one.directory}: is of a corpus with hash {about.corpus_hash[:16]}, and {now.directory} is "
            f"{now.hash[:16]}; put that corpus back, or make an index of this one: rag-jax index"
        )


def job(directory: Path, found: Verification) -> None:
    """Checks all shards that are there; missing ones are no damage."""

    def read() -> None:
        about = encode_job.read_job(directory)
        mend = f"remove that file and go on: rag-jax encode {about.run} --corpus {about.corpus} --out {directory}"
        there = [shard for shard in about.shards if (directory / shard.name).exists()]
        if len(there) < len(about.shards):
            logs.info(f"{directory}: {len(there)} of {len(about.shards)} shards are there; the job is not finished")
        for identity in there:
            found.progress.update(1)
            found.look(_shard, directory, identity, mend)
            found.read += (directory / identity.name).stat().st_size

    found.look(read)


def _shard(directory: Path, identity: shards.Identity, mend: str) -> None:
    try:
        for shard in shards.read_all(directory, [identity], mend):
            shard.entry()
    except InputError as error:
        raise InputError(str(error) if mend in str(error) else f"{error}; {mend}") from error


def run_directory(directory: Path, found: Verification) -> None:
    """Checks configuration, tokenizers, parameters, index, checkpoints, metrics and caches of a run, and that the index
    is of the run's corpus and encoder.
    """
    if (directory / files.MANIFEST).exists():
        listed(directory, found)
    else:
        files.told_without_sums(directory, runs.KIND)
    found.look(runs.read_config, directory)
    found.look(runs.read_identity, directory)
    within = [directory / "params", directory / "index", directory / "examples", *(directory / "search").glob("*")]
    whole = {path.name: listed(path, found) for path in within if (path / files.MANIFEST).exists()}
    keeper = checkpoint.Checkpoints(directory / "checkpoints")
    for step in checkpoint.numbers(keeper.directory):
        found.progress.update(1)
        found.look(_checkpoint, keeper, step)
    if (directory / logs.METRICS_FILE).exists():
        found.look(logs.read_rows, directory / logs.METRICS_FILE)
    if whole.get("params") and whole.get("index"):
        found.look(_index_of_run, directory)


def _checkpoint(keeper: checkpoint.Checkpoints, step: int) -> None:
    try:
        keeper.verify(step)
    except checkpoint.Damaged as error:
        words = "remove it: rag-jax train goes on from the one before"
        raise InputError(f"{keeper.directory / str(step)}: damaged: {error}; {words}") from error


def _index_of_run(directory: Path) -> None:
    opened, identity = snapshots.open_snapshot(directory / "index"), runs.read_identity(directory)
    rag = runs.run_model(directory, runs.read_config(directory))
    have = {"corpus_hash": opened.manifest.corpus_hash, "encoder_hash": opened.manifest.encoder_hash}
    want = {"corpus_hash": identity["corpus_hash"], "encoder_hash": runs.stored_encoder_hash(directory, rag)}
    if runs.read_config(directory).live:
        have["corpus_hash"] = want["corpus_hash"]  # an update of what the run began with
    for name, value in want.items():
        if value and have[name] != value:
            raise InputError(
                f"{opened.directory}: its {name} is {have[name][:16]}, that of the run is {value[:16]}; make another "
                f"one: rag-jax index {directory} --corpus {opened.manifest.corpus} --out DIR"
            )
    _of_its_corpus(opened)


def unreadable(directory: Path, found: Verification) -> None:
    """Reports a manifest that no longer says what kind of artifact it is of."""
    path = directory / files.MANIFEST
    found.damaged.append(f"{path}: damaged: not a manifest; {RESTORE}, or make {directory} again")


# Checks by kind of artifact; for others, such as exports and caches, `listed` checks everything.
CHECKS: dict[str, Callable[[Path, Verification], object]] = {
    CORPUS: corpus,
    snapshots.KIND: snapshot,
    encode_job.KIND: job,
    runs.KIND: run_directory,
    "converted model": run_directory,
    UNKNOWN: unreadable,
}


def kind_of(directory: Path) -> str:
    """The kind of artifact in a directory, UNKNOWN where its manifest is unreadable; InputError where there is none."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; name a corpus, an index, an encode job, a run or an export")
    kind = files.kind_of(directory)
    if kind is not None:
        return kind
    if encode_job.is_job(directory):
        return encode_job.KIND
    if (directory / runs.IDENTITY).exists() and (directory / runs.CONFIG).exists():
        return runs.KIND
    if (directory / files.MANIFEST).exists():
        return UNKNOWN
    raise InputError(f"{directory}: nothing that rag-jax has finished: no {files.MANIFEST}, {encode_job.JOB} or run")


def verify(directory: Path) -> dict[str, Any]:
    """Reads an artifact; returns its kind, the bytes read, and a message for each damage that says how to mend it."""
    kind = kind_of(directory)
    with logs.Progress(None, f"verifying {kind}", "file") as progress:
        found = Verification(progress)
        CHECKS.get(kind, listed)(directory, found)
    return {"path": str(directory), "kind": kind, "bytes": found.read, "damaged": found.damaged}
