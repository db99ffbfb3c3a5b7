"""A job that embeds a corpus: a directory of finished shards, and job.json, which says what they contain.

Every shard is written once, whole, by the process that claims it; a process that is killed loses the shard it was
working on. The same command resumes the job, on any number of processes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from rag_jax.errors import InputError
from rag_jax.index import shards
from rag_jax.index.encode import EmbedRows
from rag_jax.index.shards import Identity
from rag_jax.system import files, logs

KIND, VERSION, JOB = "encode job", 1, "job.json"
SHARD_ROWS = 16384
POLL = 0.2  # seconds between looks at shards that other processes are making


@dataclass(frozen=True)
class Job:
    """Description of an encode job: which passages it embeds, with which parameters, into which shards.

    run, corpus: paths; the hashes say what was there.
    step: updates the run was trained for.
    width: E; dtype: of the stored embeddings.
    shard_rows: passages per shard; batch: passages embedded at once.
    form: see `RagConfig.passage_form`, "" in jobs begun before there was one.
    """

    run: str
    corpus: str
    corpus_hash: str
    encoder_hash: str
    tokenizer_hash: str
    step: int
    n_passages: int
    width: int
    dtype: str
    shard_rows: int
    batch: int
    form: str = ""

    @property
    def shards(self) -> list[Identity]:
        rows = range(self.n_passages)
        return shards.cut(self.corpus_hash, self.encoder_hash, rows, self.shard_rows, self.width, self.dtype)


def is_job(directory: Path) -> bool:
    return (directory / JOB).exists()


def read_job(directory: Path) -> Job:
    """Reads job.json; InputError where there is none or it is damaged."""
    again = "name a directory made by rag-jax encode"
    found = files.read_sealed(directory / JOB, KIND, VERSION, again)
    with files.described(directory / JOB, again):
        types = {"str": str, "int": int}
        known = [field for field in fields(Job) if field.name in found or field.name != "form"]
        for field in known:
            kind = types[getattr(field.type, "__name__", str(field.type))]
            if not isinstance(found[field.name], kind):
                raise TypeError(f"{field.name} is {found[field.name]!r}")
        return Job(**{field.name: found[field.name] for field in known})


def begin(directory: Path, job: Job) -> None:
    """Writes job.json, or checks that an existing one is of the same job; InputError with both values if it is not."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # looked at before job.json, which is written first: another process may be beginning the same job
        strange = [path.name for path in directory.iterdir() if not path.name.startswith(f".{JOB}.")]
        if not is_job(directory):
            if strange:
                raise InputError(f"{directory}: exists and is no {KIND}; choose another --out")
            files.write_sealed(directory / JOB, KIND, VERSION, asdict(job))
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error}); choose another --out") from error
    have = asdict(read_job(directory))
    for name, want in asdict(job).items():
        if have[name] != want and name not in ("run", "corpus"):
            was, now = (value[:16] if isinstance(value, str) else value for value in (have[name], want))
            raise InputError(
                f"{directory}: its shards are of {name} {was}, and this is {now}; go on with what it was begun with, "
                f"or begin another: rag-jax encode {job.run} --corpus {job.corpus} --out OTHER"
            )


def finished(directory: Path, job: Job) -> Iterator[shards.Shard]:
    """The finished shards, by their checked headers; InputError for one that is damaged or of another job."""
    there = [identity for identity in job.shards if (directory / identity.name).exists()]
    return shards.read_all(directory, there, "remove that file and give the rag-jax encode command again")


def make(directory: Path, job: Job, embed_rows: EmbedRows, process: int = 0, processes: int = 1) -> int:
    """Embeds missing shards until the job is done; returns the number of shards made here.

    Each of P processes first takes every P-th shard, then those of the others that nobody has claimed. It returns when
    the whole job is done, by whichever process: a shard that a killed process leaves is claimed by another.
    """
    work, made = job.shards, 0
    order = [shard for turn in range(processes) for shard in work[(process + turn) % processes :: processes]]
    done = {shard.identity for shard in finished(directory, job)}
    rows = sum(identity.rows for identity in done)
    with logs.Progress(job.n_passages, "embedding passages", "passage", initial=rows) as progress:
        while left := [identity for identity in order if identity not in done]:
            before = len(done)
            for identity in left:
                if (directory / identity.name).exists():  # another process has made it
                    progress.update(identity.rows)
                elif _make_one(directory, identity, embed_rows, progress):
                    made += 1
                else:
                    continue
                done.add(identity)
            if len(done) == before:
                time.sleep(POLL)
                progress.update(0)
    for left_over in (*directory.glob(".rows-*.building"), *directory.glob(f".{JOB}.*")):  # by killed processes
        left_over.unlink(missing_ok=True)
    return made


def blocks(
    embed_rows: EmbedRows, rows: range, shard_rows: int = SHARD_ROWS, alone: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Embeds rows without a job directory: (rows [X], embeddings [X, E]) shard by shard, for `snapshot.write`.

    Several processes share the work, and each gets all embeddings. alone: this process embeds everything by itself.
    """
    embed = embed_rows if alone or jax.process_count() == 1 else shared(embed_rows)
    with logs.Progress(len(rows), "embedding passages", "passage") as progress:
        for first in range(rows.start, rows.stop, shard_rows):
            last = min(first + shard_rows, rows.stop)
            yield np.arange(first, last), embed(first, last, progress.update)


def shared(embed_rows: EmbedRows) -> EmbedRows:
    """An `embed_rows` shared by all processes: each embeds an equal part of a range, and all get the whole range."""

    def embed(first: int, last: int, done: Callable[[int], None]) -> np.ndarray:
        part = -(-(last - first) // jax.process_count())
        begin = min(first + jax.process_index() * part, last - 1)  # past the end: one row, which is cut off below
        mine_XE = embed_rows(begin, min(begin + part, last), lambda n: None)
        padded_XE = np.pad(mine_XE, ((0, part - len(mine_XE)), (0, 0)))
        done(last - first)
        return multihost_utils.process_allgather(padded_XE).reshape(-1, mine_XE.shape[1])[: last - first]

    return embed


def _make_one(directory: Path, identity: Identity, embed_rows: EmbedRows, progress: logs.Progress) -> bool:
    """Makes one shard; False where it is there already or another process has claimed it."""
    path = directory / identity.name
    try:
        with files.claimed(path) as stream:
            if stream is None:
                return False
            shards.write(stream, identity, embed_rows(identity.first, identity.last, progress.update))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); finished shards are kept: mend it and give the same command again"
        ) from error
    return True
