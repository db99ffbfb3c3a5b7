"""Embeds a corpus with a run's context encoder, shard by shard; killed, it resumes with the shards that are missing.

Every process works with its own devices and shares only the output directory with the others.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import encode, encode_job, snapshot
from rag_jax.rag import Params
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import sharding


@dataclass(frozen=True)
class PassageEncoder:
    """A run's passage encoder, with its parameters alone.

    embed: (params, ids_BL, mask_BL) -> d_BE.
    hash: of the parameters; step: updates they were trained for; width: E; form: see `RagConfig.passage_form`.
    """

    embed: encode.Embed
    params: Params
    hash: str
    step: int
    width: int
    form: str

    def rows(self, corpus: Corpus, batch: int = encode.BATCH) -> encode.EmbedRows:
        """A function that embeds ranges of corpus rows on all devices of this process, `batch` at a time."""
        return encode.row_embedder(self.embed, self.params, corpus.encoder_ids, corpus.encoder_length, batch)

    def manifest(self, corpus: Corpus, dtype: str = "float32") -> snapshot.Manifest:
        """The manifest of a snapshot of all passages of the corpus; dtype: of the stored embeddings."""
        return snapshot.Manifest.of(corpus, self.hash, self.step, self.width, dtype, self.form)


def read_encoder(run_dir: Path, corpus: Corpus) -> PassageEncoder:
    """Reads a run's passage encoder; InputError where it has none or the corpus was not tokenised for it."""
    config = runs.read_config(run_dir)
    runs.check_tokenizers(run_dir, corpus)
    rag = runs.run_model(run_dir, config)
    if not rag.config.context_encoder:
        raise InputError(
            f"{run_dir}: has no context encoder to embed passages with; give it one: rag-jax convert "
            "--question-encoder A --context-encoder B --generator C --out DIR"
        )
    runs.check_length(rag, corpus)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    side = rag.config.passage_side
    checkpoint.check_params(run_dir / "params")
    like = runs.param_places(rag, mesh)[side]
    params = unflatten_dict(dict(checkpoint.read_part(run_dir / "params", side, like)), sep="/")
    step = runs.trained_steps(run_dir)
    return PassageEncoder(
        embed=lambda p, ids, mask: rag.embed_passages({side: p}, ids, mask),
        params=params,
        hash=checkpoint.tree_hash(params),
        step=step,
        width=rag.config.encoder.output_width,
        form=rag.config.passage_form,
    )


def encode_corpus(
    run_dir: Path,
    corpus_dir: Path,
    out: Path,
    dtype: str = "float32",
    shard_rows: int = encode_job.SHARD_ROWS,
    batch: int = encode.BATCH,
) -> dict[str, Any]:
    """Begins the encode job in `out`, or resumes it; returns a summary with the number of shards made here.

    dtype: of the stored embeddings, a key of shards.DTYPES.
    shard_rows: passages per file.
    batch: passages embedded at once, over all devices of this process.
    """
    corpus = Corpus.open(corpus_dir)
    encoder = read_encoder(run_dir, corpus)
    made_of = asdict(encoder.manifest(corpus, dtype))
    job = encode_job.Job(run=str(run_dir.resolve()), shard_rows=shard_rows, batch=batch, **made_of)
    encode_job.begin(out, job)
    begun = time.monotonic()
    made = encode_job.make(out, job, encoder.rows(corpus, batch), jax.process_index(), jax.process_count())
    return {
        "out": str(out), "n_passages": job.n_passages, "width": job.width, "dtype": job.dtype,
        "shards": len(job.shards), "made_here": made, "encoder_hash": job.encoder_hash,
        "corpus_hash": job.corpus_hash, "seconds": round(time.monotonic() - begun, 2),
    }  # fmt: skip
