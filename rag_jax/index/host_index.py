"""The index on the host: ScaNN, BM25 or both find passages between steps, and their table rows are gathered here.

The step is the same as with the search in graph, but its tables are small: they have only the passages of its batch.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import encode, encode_job
from rag_jax.index.device_index import Index
from rag_jax.index.refresh import Make
from rag_jax.rag import Params, Rag, TokenTables
from rag_jax.retrieval import scann_index
from rag_jax.retrieval.bm25 import Bm25, passage_texts
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieval.hybrid import Hybrid
from rag_jax.retrieval.search import Exact, IndexSource, Searcher
from rag_jax.system import files, sharding
from rag_jax.system.configuration import plain
from rag_jax.system.logs import info

STALE = 0.1  # ScaNN's index is rebuilt when a larger share of its rows was added or deleted since it was built


class HostIndex(NamedTuple):
    """The index on the host.

    embeddings_NE: in memory or in files; float32, or the type of a snapshot's.
    step_N: int32, training step of the encoder that embedded the row.
    searcher: what searches them.
    live_N: bool, False for deleted rows; None: none is deleted.
    """

    embeddings_NE: Any
    step_N: np.ndarray
    searcher: Searcher
    live_N: np.ndarray | None = None


def gather(corpus: Corpus, index: HostIndex | None, rows_X: np.ndarray) -> tuple[Index | None, TokenTables]:
    """Tables of only the rows rows_X, in this order, from the memory-mapped ones of the corpus.

    A row of -1, where a search found nothing, becomes an empty passage for the generator. For the encoder it is row 0,
    as embeddings must be finite; whoever scores it has to leave it out (losses.of_found).
    """
    tables: Any = (corpus.encoder_ids, corpus.encoder_length, corpus.generator_ids, corpus.generator_length)
    there_X, rows_X = rows_X >= 0, np.maximum(rows_X, 0)
    kept: Any = index and (np.asarray(index.embeddings_NE[rows_X], np.float32), index.step_N[rows_X])
    found: list[Any] = [table[rows_X] for table in tables]
    found[-1] = np.where(there_X, found[-1], 0).astype(found[-1].dtype)
    return kept and Index(*kept), TokenTables(*found)


def places(mesh: jax.sharding.Mesh, rows: np.ndarray) -> np.ndarray:
    """Positions, int32 [b, ...], of rows [b, ...] in the global tables made of them by `gather` and `shard_batch`.

    rows: those of this process's part of a batch.
    """
    cuts = mesh.shape["data"] * mesh.shape["fsdp"]
    total = rows.size // len(sharding.own_rows(mesh, cuts)) * cuts
    return sharding.own_rows(mesh, total).reshape(rows.shape).astype(np.int32)


class Searchers:
    """Builds the searches of a configuration. cache: directory in which slow builds are kept, None for none."""

    def __init__(self, cfg: SearchConfig, corpus: Corpus, mesh: jax.sharding.Mesh, cache: Path | None = None) -> None:
        self.cfg, self.corpus, self.mesh, self.cache = cfg, corpus, mesh, cache
        self._bm25: Bm25 | None = None

    def make(self, embeddings_NE: Any, encoder_hash: str | None, step: int, keep: bool = False) -> Searcher:
        """Builds the search over these embeddings.

        encoder_hash, step: of the encoder that made them, for the manifest.
        keep: look for the search in the cache, and store it there.
        """
        return self._of(self.cfg.kind, embeddings_NE, IndexSource(self.corpus.hash, encoder_hash, step), keep)

    def _of(self, kind: str, embeddings_NE: Any, source: IndexSource, keep: bool) -> Searcher:
        return SEARCHERS[kind](self, embeddings_NE, source, keep)

    def exact(self, embeddings_NE: Any, source: IndexSource, keep: bool) -> Searcher:
        mesh = sharding.own_mesh(self.mesh)  # each process searches for its own questions
        return Exact(embeddings_NE, mesh, source, live_N=self.corpus.live_N)

    def hybrid(self, embeddings_NE: Any, source: IndexSource, keep: bool) -> Searcher:
        return self._with_bm25(self._of(self.cfg.dense, embeddings_NE, source, keep), embeddings_NE)

    def update(self, searcher: Searcher, old: Corpus, embeddings_NE: Any, step: int) -> Searcher:
        """The search over an update of the corpus `old`, of which `searcher` is the search.

        ScaNN's index is updated, and rebuilt only if a share above STALE of its rows has changed since it was built.
        All other searches are rebuilt.
        """
        dense = searcher.dense if isinstance(searcher, Hybrid) else searcher
        if not isinstance(dense, scann_index.Scann):
            return self.make(embeddings_NE, None, step)
        now_N = np.ones(len(self.corpus), bool) if self.corpus.live_N is None else self.corpus.live_N
        was_N = np.ones(len(old), bool) if old.live_N is None else old.live_N
        came = len(old) + np.flatnonzero(now_N[len(old) :])
        dense = dense.upsert(came, embeddings_NE[came]).delete(np.flatnonzero(was_N & ~now_N[: len(old)]))
        if dense.stale > STALE:
            return self.make(embeddings_NE, None, step)
        dense = replace(dense, source=IndexSource(self.corpus.hash, None, step))
        return self._with_bm25(dense, embeddings_NE) if isinstance(searcher, Hybrid) else dense

    def _with_bm25(self, dense: Searcher, embeddings_NE: Any) -> Searcher:
        return Hybrid(dense, self.bm25(), embeddings_NE, self.cfg.fusion)

    def bm25(self) -> Bm25:
        """BM25 over the corpus, built once."""
        if self._bm25 is None:

            def build() -> Bm25:
                texts, total, live_N = passage_texts(self.corpus), len(self.corpus), self.corpus.live_N
                made = Bm25.build(texts, self.corpus.hash, self.cfg.bm25, total)
                return made if live_N is None else made.without(np.flatnonzero(~live_N))

            path = self._path("bm25", [self.corpus.hash, plain(self.cfg.bm25)])
            self._bm25 = self._kept(path, lambda p: Bm25.load(p, self.corpus.hash), build)
        return self._bm25

    def scann(self, embeddings_NE: Any, source: IndexSource, keep: bool) -> scann_index.Scann:
        def build() -> scann_index.Scann:
            if self.corpus.live_N is None:
                return scann_index.build(embeddings_NE, source, self.cfg.scann)
            rows = np.flatnonzero(self.corpus.live_N)
            return scann_index.build(embeddings_NE[rows], source, self.cfg.scann, rows)

        path = self._path("scann", [*source, plain(self.cfg.scann)]) if keep else None
        return self._kept(path, lambda p: scann_index.Scann.load(p, source), build)

    def _path(self, kind: str, made_of: list[Any]) -> Path | None:
        return self.cache and self.cache / f"{kind}-{files.canonical_sha256(made_of)[:12]}"

    def _kept(self, path: Path | None, load: Callable[[Path], Any], build: Callable[[], Any]) -> Any:
        if path is not None and path.is_dir():
            try:
                return load(path)
            except InputError as error:
                info(f"{error}; it is built anew")
        made = build()
        if path is not None and jax.process_index() == 0:
            try:
                made.save(path, overwrite=True)
            except (OSError, InputError) as error:  # a run on a medium that cannot be written to still answers
                info(f"{path}: not kept ({error})")
        return made


# By SearchConfig.kind and .dense: (searchers, embeddings_NE, source, keep) -> Searcher. Your own search is a row here,
# and its name one of the kinds of SearchConfig.
SEARCHERS: dict[str, Callable[[Searchers, Any, IndexSource, bool], Searcher]] = {
    "exact": Searchers.exact,
    "scann": Searchers.scann,
    "bm25": lambda searchers, embeddings_NE, source, keep: searchers.bm25(),
    "hybrid": Searchers.hybrid,
}


def on_host(rag: Rag, searchers: Searchers) -> Make:
    """A function that embeds all passages into memory and builds the search over them."""
    corpus = searchers.corpus

    def make(encoder: Params, step: int, old: Any, quiet: bool) -> HostIndex:
        # in the thread beside training (quiet) each process embeds everything: it must not wait for the others there
        embeddings_NE = embedded(rag, encoder, corpus, 0, alone=quiet)
        step_N = np.full(len(corpus), step, np.int32)
        return HostIndex(embeddings_NE, step_N, searchers.make(embeddings_NE, None, step), corpus.live_N)

    return make


def embedded(rag: Rag, encoder: Params, corpus: Corpus, first: int, alone: bool = False) -> np.ndarray:
    """Float32 embeddings [N - first, E] of the corpus' rows from `first` on.

    encoder: the parameters that embed passages; alone: see `encode_job.blocks`.
    """
    params = jax.tree.map(np.asarray, encoder)
    embed_rows = encode.row_embedder(rag.embed_passages, params, corpus.encoder_ids, corpus.encoder_length)
    embeddings_ME = np.empty((len(corpus) - first, rag.config.encoder.output_width), np.float32)
    for rows, some in encode_job.blocks(embed_rows, range(first, len(corpus)), alone=alone):
        embeddings_ME[rows - first] = some
    return embeddings_ME
