"""One interface to every search that a host program calls: exact on the devices, ScaNN, BM25, and dense with BM25.

Rows of the corpus go out, best first; what a search was made of stands in its `manifest`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rag_jax.errors import InputError
from rag_jax.retrieval import mips
from rag_jax.system import sharding

BATCH = 256  # questions searched at once on the devices


class Queries(NamedTuple):
    """What a search may need; each takes its part. embeddings_BE: float32, for dense ones. texts: for BM25."""

    embeddings_BE: np.ndarray | None = None
    texts: Sequence[str] | None = None


class SearchResult(NamedTuple):
    """ids_BK: int32 rows of the corpus, best first, ties to the lower id; -1 where there are fewer than k.

    scores_BK: float32, -inf where the id is -1.
    """

    ids_BK: np.ndarray
    scores_BK: np.ndarray


class Source(NamedTuple):
    """Which passages, and for dense searches which encoder, after how many steps, embedded them."""

    corpus_hash: str
    encoder_hash: str | None = None
    step: int | None = None


class Searcher(Protocol):
    """size: passages that can be returned. manifest: kind, corpus_hash, encoder_hash, step, settings; for reports."""

    @property
    def size(self) -> int: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    def search(self, queries: Queries, k: int) -> SearchResult: ...


class Rescorer(Searcher, Protocol):
    """A search that can also score given rows."""

    def scores(self, texts: Sequence[str], ids_BK: np.ndarray) -> np.ndarray: ...


def manifest(kind: str, source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `manifest` of a search."""
    return {"kind": kind, **source._asdict(), "settings": dict(settings)}


def query_embeddings(queries: Queries, width: int, k: int) -> np.ndarray:
    """The embeddings [B,E] float32, contiguous. InputError where they are missing, of another width or not finite."""
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
    """The questions' texts; InputError where they are missing."""
    check_k(k)
    if queries.texts is None:
        raise InputError("BM25 needs the questions' texts: Queries(texts=...)")
    return queries.texts


def check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"k = {k}; ask for at least 1 passage")


def best(ids_BX: np.ndarray, scores_BX: np.ndarray, k: int) -> SearchResult:
    """The k best of candidates: by score, then id. Those with id -1 or a score of NaN or -inf are none."""
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

    embeddings_NE, scale_N, live_N: as in `mips.search`; host arrays, cut over the mesh here, or the sharded arrays of a
    training state with their `n_valid`. Questions are padded to a few batch sizes, so that few programs are compiled.
    With several processes all must search for the same questions at the same time.
    """

    def __init__(
        self,
        embeddings_NE: np.ndarray | jax.Array,
        mesh: Mesh,
        source: Source,
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
    """1, or a power of two from 8 on."""
    return 1 if n == 1 else max(8, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Fusion:
    """How the scores of dense search and BM25 become one.

    candidates: of each search, as many go into the union that both score. kind "linear": `weight` times the dense
    score plus the rest times that of BM25, each scaled per question by NORMS[norm]. kind "rrf": reciprocal rank fusion
    (Cormack et al. 2009), the sum of 1 / (rrf_k + rank); here too `weight` is the dense part's share.
    """

    kind: str = "linear"
    candidates: int = 100
    weight: float = 0.5
    norm: str = "minmax"
    rrf_k: int = 60

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "rrf") or self.norm not in NORMS:
            norms = ", ".join(NORMS)
            raise InputError(f"fusion {self.kind!r}, norm {self.norm!r}; fusions: linear, rrf; norms: {norms}")
        if not (0 <= self.weight <= 1 and self.candidates >= 1 and self.rrf_k >= 0):
            raise InputError(f"{self}: weight lies in 0..1, candidates from 1 on, rrf_k from 0 on")


class Hybrid:
    """Dense search and BM25 together: the candidates of either are scored by both (`Fusion`).

    embeddings_NE: anything that rows [B,C] of passages can be taken from as float32 [B,C,E], such as a memory map.
    Both searches must be of one corpus with the same rows deleted: InputError.
    """

    def __init__(self, dense: Searcher, bm25: Rescorer, embeddings_NE: Any, fusion: Fusion | None = None) -> None:
        self.dense, self.bm25, self.fusion = dense, bm25, fusion or Fusion()
        self._embeddings_NE = embeddings_NE
        one, other = dense.manifest, bm25.manifest
        if one["corpus_hash"] != other["corpus_hash"]:
            raise InputError(
                f"dense search is of corpus {one['corpus_hash'][:16]}, BM25 of {other['corpus_hash'][:16]}; "
                "build both of one corpus"
            )
        if dense.size != bm25.size:
            raise InputError(
                f"dense search returns {dense.size} passages, BM25 {bm25.size}; delete the same rows from both"
            )
        source = Source(one["corpus_hash"], one["encoder_hash"], one["step"])
        parts = {"dense": dict(one), "bm25": dict(other)}
        self.size = dense.size
        self.manifest = manifest("hybrid", source, {**asdict(self.fusion), **parts})

    def search(self, queries: Queries, k: int) -> SearchResult:
        """Needs embeddings and texts. No more passages come back than the candidates of both searches."""
        check_k(k)
        ids_BC, dense_BC, bm25_BC = self.candidates(queries, max(k, self.fusion.candidates))
        return best(ids_BC, fuse(ids_BC, dense_BC, bm25_BC, self.fusion), k)

    def candidates(self, queries: Queries, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids_BC ascending, -1 behind them; dense scores_BC; BM25 scores_BC): the union of the n best of each."""
        texts = query_texts(queries, n)
        found = [searcher.search(queries, n).ids_BK for searcher in (self.dense, self.bm25)]
        if len(texts) != len(found[0]):
            raise InputError(f"{len(found[0])} embeddings and {len(texts)} texts of questions; they must be as many")
        ids_BC = _union(*found)
        queries_BE = np.asarray(queries.embeddings_BE, np.float32)
        rows_BCE = np.asarray(self._embeddings_NE[np.maximum(ids_BC, 0)], np.float32)
        return ids_BC, np.einsum("BE,BCE->BC", queries_BE, rows_BCE), self.bm25.scores(texts, ids_BC)


def _union(one_BK: np.ndarray, other_BK: np.ndarray) -> np.ndarray:
    """Ids of either, each once, ascending; then -1."""
    last = np.iinfo(np.int32).max
    both_BC = np.concatenate([one_BK, other_BK], 1)
    both_BC = np.sort(np.where(both_BC < 0, last, both_BC), 1)
    both_BC[:, 1:][both_BC[:, 1:] == both_BC[:, :-1]] = last
    both_BC = np.sort(both_BC, 1)
    width = max(1, int((both_BC != last).sum(1).max(initial=0)))
    return np.where(both_BC == last, -1, both_BC)[:, :width].astype(np.int32)


def fuse(ids_BC: np.ndarray, dense_BC: np.ndarray, bm25_BC: np.ndarray, fusion: Fusion) -> np.ndarray:
    """Scores_BC of candidates from both scores of each; -inf where the id is -1."""
    valid_BC = ids_BC >= 0
    parts = []
    for scores_BC in (dense_BC, bm25_BC):
        scores_BC = np.where(valid_BC, scores_BC, 0).astype(np.float64)
        ranked = fusion.kind == "rrf"
        parts.append(_ranked(scores_BC, valid_BC, fusion.rrf_k) if ranked else NORMS[fusion.norm](scores_BC, valid_BC))
    return np.where(valid_BC, fusion.weight * parts[0] + (1 - fusion.weight) * parts[1], -np.inf).astype(np.float32)


def _ranked(scores_BC: np.ndarray, valid_BC: np.ndarray, rrf_k: int) -> np.ndarray:
    """1 / (rrf_k + rank); equal scores have one rank."""
    ordered_BC = np.sort(np.where(valid_BC, -scores_BC, np.inf), 1)
    ahead = [np.searchsorted(row, -scores) for row, scores in zip(ordered_BC, scores_BC, strict=True)]
    return 1 / (rrf_k + 1 + np.reshape(ahead, scores_BC.shape))


def _minmax(scores_BC: np.ndarray, valid_BC: np.ndarray) -> np.ndarray:
    """Of a question's candidates the worst is 0, the best 1."""
    low_B1 = np.where(valid_BC, scores_BC, np.inf).min(1, keepdims=True)
    span_B1 = np.where(valid_BC, scores_BC, -np.inf).max(1, keepdims=True) - low_B1
    return (scores_BC - low_B1) / np.where(span_B1 > 0, span_B1, 1)


def _zscore(scores_BC: np.ndarray, valid_BC: np.ndarray) -> np.ndarray:
    """Of a question's candidates the mean is 0, the standard deviation 1."""
    n_B1 = np.maximum(valid_BC.sum(1, keepdims=True), 1)
    centred_BC = scores_BC - (scores_BC * valid_BC).sum(1, keepdims=True) / n_B1
    deviation_B1 = np.sqrt((centred_BC**2 * valid_BC).sum(1, keepdims=True) / n_B1)
    return centred_BC / np.where(deviation_B1 > 0, deviation_B1, 1)


NORMS = {"minmax": _minmax, "zscore": _zscore}
