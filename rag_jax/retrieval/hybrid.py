"""Hybrid search: the candidates of dense search and BM25, ranked by one score from those of both."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rag_jax.errors import InputError
from rag_jax.retrieval.search import (
    IndexSource,
    Queries,
    Rescorer,
    Searcher,
    SearchResult,
    best,
    check_k,
    manifest,
    query_texts,
)


@dataclass(frozen=True)
class Fusion:
    """How the scores of dense search and BM25 become one.

    kind: "linear": weight * dense + (1 - weight) * BM25, each scaled per question by NORMS[norm]. "rrf": reciprocal
        rank fusion (Cormack et al. 2009): the same sum of 1 / (rrf_k + rank) instead of scores.
    candidates: passages that each search adds to the union that both score.
    weight: the share of the dense search, 0 to 1.
    norm: "minmax" or "zscore"; kind "linear" only.
    rrf_k: constant of kind "rrf"; the larger, the less the first ranks stand out.
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

    embeddings_NE: the passages' embeddings, indexed by rows [B,C] into [B,C,E]; an array, a memory map or the like.
    InputError where the two searches are of different corpora or return different numbers of passages.
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
        source = IndexSource(one["corpus_hash"], one["encoder_hash"], one["step"])
        parts = {"dense": dict(one), "bm25": dict(other)}
        self.size = dense.size
        self.manifest = manifest("hybrid", source, {**asdict(self.fusion), **parts})

    def search(self, queries: Queries, k: int) -> SearchResult:
        """Needs embeddings and texts of the questions. Returns at most the candidates of both searches."""
        check_k(k)
        ids_BC, dense_BC, bm25_BC = self.candidates(queries, max(k, self.fusion.candidates))
        return best(ids_BC, fuse(ids_BC, dense_BC, bm25_BC, self.fusion), k)

    def candidates(self, queries: Queries, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The union of the n best of each search: (ids_BC ascending, then -1; dense scores_BC; BM25 scores_BC)."""
        texts = query_texts(queries, n)
        found = [searcher.search(queries, n).ids_BK for searcher in (self.dense, self.bm25)]
        if len(texts) != len(found[0]):
            raise InputError(f"{len(found[0])} embeddings and {len(texts)} texts of questions; they must be as many")
        ids_BC = _union(*found)
        queries_BE = np.asarray(queries.embeddings_BE, np.float32)
        rows_BCE = np.asarray(self._embeddings_NE[np.maximum(ids_BC, 0)], np.float32)
        return ids_BC, np.einsum("BE,BCE->BC", queries_BE, rows_BCE), self.bm25.scores(texts, ids_BC)


def _union(one_BK: np.ndarray, other_BK: np.ndarray) -> np.ndarray:
    """The ids of either array, each once, ascending, padded with -1 to the longest row."""
    last = np.iinfo(np.int32).max
    both_BC = np.concatenate([one_BK, other_BK], 1)
    both_BC = np.sort(np.where(both_BC < 0, last, both_BC), 1)
    both_BC[:, 1:][both_BC[:, 1:] == both_BC[:, :-1]] = last
    both_BC = np.sort(both_BC, 1)
    width = max(1, int((both_BC != last).sum(1).max(initial=0)))
    return np.where(both_BC == last, -1, both_BC)[:, :width].astype(np.int32)


def fuse(ids_BC: np.ndarray, dense_BC: np.ndarray, bm25_BC: np.ndarray, fusion: Fusion) -> np.ndarray:
    """One score for each candidate from its two, float32 [B,C]; -inf where the id is -1."""
    valid_BC = ids_BC >= 0
    parts = []
    for scores_BC in (dense_BC, bm25_BC):
        scores_BC = np.where(valid_BC, scores_BC, 0).astype(np.float64)
        ranked = fusion.kind == "rrf"
        parts.append(_ranked(scores_BC, valid_BC, fusion.rrf_k) if ranked else NORMS[fusion.norm](scores_BC, valid_BC))
    return np.where(valid_BC, fusion.weight * parts[0] + (1 - fusion.weight) * parts[1], -np.inf).astype(np.float32)


def _ranked(scores_BC: np.ndarray, valid_BC: np.ndarray, rrf_k: int) -> np.ndarray:
    """1 / (rrf_k + rank), ranks from 1; equal scores share a rank."""
    ordered_BC = np.sort(np.where(valid_BC, -scores_BC, np.inf), 1)
    ahead = [np.searchsorted(row, -scores) for row, scores in zip(ordered_BC, scores_BC, strict=True)]
    return 1 / (rrf_k + 1 + np.reshape(ahead, scores_BC.shape))


def _minmax(scores_BC: np.ndarray, valid_BC: np.ndarray) -> np.ndarray:
    """Scores scaled per question: the worst candidate becomes 0, the best 1."""
    low_B1 = np.where(valid_BC, scores_BC, np.inf).min(1, keepdims=True)
    span_B1 = np.where(valid_BC, scores_BC, -np.inf).max(1, keepdims=True) - low_B1
    return (scores_BC - low_B1) / np.where(span_B1 > 0, span_B1, 1)


def _zscore(scores_BC: np.ndarray, valid_BC: np.ndarray) -> np.ndarray:
    """Scores scaled per question: the candidates get mean 0 and standard deviation 1."""
    n_B1 = np.maximum(valid_BC.sum(1, keepdims=True), 1)
    centred_BC = scores_BC - (scores_BC * valid_BC).sum(1, keepdims=True) / n_B1
    deviation_B1 = np.sqrt((centred_BC**2 * valid_BC).sum(1, keepdims=True) / n_B1)
    return centred_BC / np.where(deviation_B1 > 0, deviation_B1, 1)


NORMS = {"minmax": _minmax, "zscore": _zscore}
