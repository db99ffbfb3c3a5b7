"""Makes an index from an encode job, from a run and a corpus in one go, or from an older index of a smaller corpus."""

from pathlib import Path

from rag_jax.corpus.directory import Corpus
from rag_jax.index import encode_job
from rag_jax.index import snapshot as snapshots
from rag_jax.inference.encode_corpus import read_encoder


def from_job(job_dir: Path, corpus_dir: Path | None, out: Path, overwrite: bool = False) -> snapshots.Snapshot:
    """The snapshot of a finished encode job; corpus_dir: None for the path that the job was begun with."""
    return snapshots.from_job(job_dir, Corpus.open(corpus_dir or encode_job.read_job(job_dir).corpus), out, overwrite)


def from_run(
    run_dir: Path, corpus_dir: Path, out: Path, overwrite: bool = False, dtype: str = "float32"
) -> snapshots.Snapshot:
    """Embeds a corpus with a run's encoder and writes the snapshot, in one go."""
    corpus = Corpus.open(corpus_dir)
    encoder = read_encoder(run_dir, corpus)
    blocks = encode_job.blocks(encoder.rows(corpus), range(len(corpus)))
    return snapshots.write(out, encoder.manifest(corpus, dtype), blocks, overwrite)


def from_snapshot(
    old_dir: Path, run_dir: Path, corpus_dir: Path, out: Path, overwrite: bool = False
) -> snapshots.Snapshot:
    """The snapshot of an updated corpus: embeds only the rows that the old snapshot's corpus lacks."""
    old, corpus = snapshots.open_snapshot(old_dir), Corpus.open(corpus_dir)
    encoder = read_encoder(run_dir, corpus)
    manifest = encoder.manifest(corpus, old.manifest.dtype)
    snapshots.check_update(old, manifest, corpus)
    blocks = encode_job.blocks(encoder.rows(corpus), range(old.manifest.n_passages, len(corpus)))
    return snapshots.update(old, manifest, corpus, blocks, out, overwrite)
