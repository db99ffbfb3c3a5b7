"""One interface to every search that a host program calls (ScaNN, BM25, `hybrid`), and exact search behind it.

A search returns rows of the corpus, best first. Its `manifest` names the corpus, encoder and settings behind it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rag_jax.errors import InputError
from rag_jax.retrieval import mips
from rag_jax.system import sharding

BATCH = 256  # questions searched at once on the devices


class Queries(NamedTuple):
    """Questions in the forms that searches read.

    embeddings_BE: float32, for dense searches.
    texts: for BM25.
    """

    embeddings_BE: np.ndarray | None = None
    texts: Sequence[str] | None = None


class SearchResult(NamedTuple):
    """The passages that a search returns for each question.

    ids_BK: int32 rows of the corpus, best first, ties to the lower id; -1 where there are fewer than k.
    scores_BK: float32, -inf where the id is -1.
    """

    ids_BK: np.ndarray
    scores_BK: np.ndarray


class IndexSource(NamedTuple):
    """The corpus and encoder that an index was built from.

    corpus_hash: hash of the corpus with the passages.
    encoder_hash: hash of the context encoder that embedded them; None: no dense search, or not recorded.
    step: training steps of that encoder.
    """

    corpus_hash: str
    encoder_hash: str | None = None
    step: int | None = None


class Searcher(Protocol):
    """A search that a host program calls.

    size: passages that can be returned.
    manifest: kind, corpus_hash, encoder_hash, step and settings, for reports.
    """

    @property
    def size(self) -> int: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    def search(self, queries: Queries, k: int) -> SearchResult: ...


class Rescorer(Searcher, Protocol):
    """A search that can also score given rows: float32 [B,K] for texts [B] and ids_BK."""

    def scores(self, texts: Sequence[str], ids_BK: np.ndarray) -> np.ndarray: ...


def manifest(kind: str, source: IndexSource, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `manifest` of a search, as a dict for JSON."""
    return {"kind": kind, **source._asdict(), "settings": dict(settings)}


def query_embeddings(queries: Queries, width: int, k: int) -> np.ndarray:
    """The questions' embeddings, float32 [B,E], contiguous.

    InputError where they are missing, of another width or not finite, and for k below 1.
    """
    check_k(k)
    if queries.embeddings_BE is None:
        raise InputError("a dense search needs the questions' embeddings: Queries(embeddings_BE=...)")
    queries_BE = np.ascontiguousarray(queries.embeddings_BE, np.float32)
    if queries_BE.ndim != 2 or queries_BE.shape[1] != width:
        raise InputError(f"queries {queries_BE.shape} must be [B,{width}], as wide as the indexed passages")
    finite_B = np.isfinite(queries_BE).all(1)
    if not finite_B.all():
        raise InputError(f"query {int(np.argmin(finite_B))}: its embedding is not finite; the encoder has diverged")
    return queries_BE


def query_texts(queries: Queries, k: int) -> Sequence[str]:
    """The questions' texts; InputError where they are missing, and for k below 1."""
    check_k(k)
    if queries.texts is None:
        raise InputError("BM25 needs the questions' texts: Queries(texts=...)")
    return queries.texts


def check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"k = {k}; ask for at least 1 passage")


def best(ids_BX: np.ndarray, scores_BX: np.ndarray, k: int) -> SearchResult:
    """The k best candidates of each question, by score, then id; without those of id -1 or a score of NaN or -inf."""
    valid_BX = (ids_BX >= 0) & (scores_BX > -np.inf)  # false for NaN
    scores_BX = np.where(valid_BX, scores_BX, -np.inf).astype(np.float32)
    ids_BX = np.where(valid_BX, ids_BX, -1).astype(np.int32)
    order_BK = np.lexsort((ids_BX, -scores_BX))[:, :k]
    missing = ((0, 0), (0, max(k - ids_BX.shape[1], 0)))
    return SearchResult(
        np.pad(np.take_along_axis(ids_BX, order_BK, 1), missing, constant_values=-1),
        np.pad(np.take_along_axis(scores_BX, order_BK, 1), missing, constant_values=-np.inf),
    )


class Exact:
    """Exact search on the devices (`mips.search`), for callers on the host.

    embeddings_NE, scale_N, live_N, n_valid: as in `mips.search`; host arrays, which are sharded over the mesh here, or
        the sharded arrays of a training state.

    Questions are padded to a few batch sizes, so that few programs are compiled. With several processes all must search
    for the same questions at the same time.
    """

    def __init__(
        self,
        embeddings_NE: np.ndarray | jax.Array,
        mesh: Mesh,
        source: IndexSource,
        *,
        scale_N: np.ndarray | jax.Array | None = None,
        live_N: np.ndarray | jax.Array | None = None,
        n_valid: int | None = None,
    ) -> None:
        def placed(array_NX: np.ndarray | jax.Array) -> jax.Array:
            return array_NX if isinstance(array_NX, jax.Array) else sharding.shard_rows(mesh, array_NX, 0)

        self._n_valid = int(embeddings_NE.shape[0]) if n_valid is None else n_valid
        self.size = self._n_valid if live_N is None else int(live_N[: self._n_valid].sum())
        self._mesh, self._index_NE = mesh, placed(embeddings_NE)
        self._scale_N = None if scale_N is None else placed(scale_N)
        self._live_N = None if live_N is None else placed(live_N)
        self.manifest = manifest("exact", source, {"dtype": str(embeddings_NE.dtype), "devices": mesh.size})

    def search(self, queries: Queries, k: int) -> SearchResult:
        """InputError for missing, misshaped or not finite embeddings. k larger than `size` is filled with -1."""
        queries_BE = query_embeddings(queries, self._index_NE.shape[1], k)
        n, found = min(k, self._n_valid), []
        for start in range(0, len(queries_BE), BATCH):
            part_BE = queries_BE[start : start + BATCH]
            padded_BE = np.pad(part_BE, ((0, _padded(len(part_BE)) - len(part_BE)), (0, 0)))
            on_mesh = jax.device_put(padded_BE, sharding.replicated(self._mesh))
            pair = mips.search(
                on_mesh,
                self._index_NE,
                n,
                scale_N=self._scale_N,
                live_N=self._live_N,
                mesh=self._mesh,
                n_valid=self._n_valid,
            )
            found.append([np.asarray(x)[: len(part_BE)] for x in pair])
        empty = [np.zeros((0, n), np.float32), np.zeros((0, n), np.int32)]
        scores_BK, ids_BK = (np.concatenate(parts) for parts in zip(empty, *found, strict=True))
        return best(ids_BK, scores_BK, k)


def _padded(n: int) -> int:
    """The batch size to which n questions are padded: 1, or a power of two from 8 on."""
    return 1 if n == 1 else max(8, 1 << (n - 1).bit_length())
