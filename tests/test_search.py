"""Every search through the one interface; exact search and hybrid against brute force in NumPy."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from rag_jax.errors import InputError
from rag_jax.retrieval import mips, scann_index, search
from rag_jax.retrieval.bm25 import Bm25, Bm25Config
from rag_jax.retrieval.hybrid import Fusion, Hybrid
from rag_jax.retrieval.search import Exact, IndexSource, Queries, Searcher
from rag_jax.system import sharding

N, E, B = 203, 12, 9
SOURCE = IndexSource("a" * 64, "e" * 64, 3)
HAS = {name: importlib.util.find_spec(name) is not None for name in ("scann", "bm25s", "Stemmer")}
needs_bm25 = pytest.mark.skipif(not (HAS["bm25s"] and HAS["Stemmer"]), reason="needs the extra bm25")
needs_scann = pytest.mark.skipif(not HAS["scann"], reason="needs the extra scann")


def passages() -> tuple[np.ndarray, list[str]]:
    """Embeddings and texts; rows 20 to 29 are one passage. Integers: scores are exact, so ties are well-defined."""
    rng = np.random.default_rng(0)
    embeddings = rng.integers(-4, 5, (N, E)).astype(np.float32)
    embeddings[20:30] = embeddings[20]
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 40, 8)) for _ in range(N)]
    texts[20:30] = [texts[20]] * 10
    return embeddings, texts


def questions(n: int = B) -> Queries:
    """Question i is about passage 18 + i, so some have ten right answers."""
    embeddings, texts = passages()
    noise = np.random.default_rng(1).integers(-1, 2, (n, E)).astype(np.float32)
    rows = (18 + np.arange(n)) % N
    return Queries(3 * embeddings[rows] + noise, [texts[row] for row in rows])


def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh()


def exact(gone: tuple[int, ...] = ()) -> Searcher:
    live = ~np.isin(np.arange(N), gone)
    return Exact(passages()[0], mesh(), SOURCE, live_N=live if gone else None)


def scann(gone: tuple[int, ...] = ()) -> Searcher:
    tree = scann_index.AnnConfig(leaves=10, leaves_to_search=10, reorder=N, reorder_dtype="float32")
    index = scann_index.build(passages()[0], SOURCE, tree)
    return index.delete(gone) if gone else index


def bm25(gone: tuple[int, ...] = ()) -> Bm25:
    return Bm25.build(passages()[1], SOURCE.corpus_hash, Bm25Config(language="none")).without(gone)


def hybrid(gone: tuple[int, ...] = ()) -> Hybrid:
    return Hybrid(exact(gone), bm25(gone), passages()[0], Fusion(candidates=30))


EVERY: list[Any] = [
    exact,
    pytest.param(scann, marks=needs_scann),
    pytest.param(bm25, marks=needs_bm25),
    pytest.param(hybrid, marks=[needs_bm25]),
]


@pytest.mark.parametrize("make", EVERY)
def test_the_interface(make: Callable[..., Searcher]) -> None:
    searcher, queries = make(), questions()
    assert searcher.size == N
    about = json.loads(json.dumps(dict(searcher.manifest)))
    assert set(about) == {"kind", "corpus_hash", "encoder_hash", "step", "settings"}
    assert about["corpus_hash"] == "a" * 64 and (about["encoder_hash"], about["step"]) in (("e" * 64, 3), (None, None))
    whole = searcher.search(queries, 40)
    for k in (1, 7, 40, N + 10):
        ids, scores = searcher.search(queries, k)
        assert type(ids) is type(scores) is np.ndarray
        assert (ids.dtype, scores.dtype, ids.shape, scores.shape) == (np.int32, np.float32, (B, k), (B, k))
        assert (ids < N).all() and (ids >= -1).all()
        np.testing.assert_array_equal(ids < 0, np.isneginf(scores))
        assert not np.isnan(scores).any()
        np.testing.assert_array_equal(np.lexsort((np.where(ids < 0, N, ids), -scores)), np.tile(np.arange(k), (B, 1)))
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)
        if k <= 7:  # asking for fewer gives the first of them
            np.testing.assert_array_equal(ids, whole.ids_BK[:, :k])
    one = [searcher.search(Queries(queries.embeddings_BE[i : i + 1], [queries.texts[i]]), 7) for i in range(B)]
    np.testing.assert_array_equal(np.concatenate([x.ids_BK for x in one]), whole.ids_BK[:, :7])
    # of ten equal passages the first rows, in order
    np.testing.assert_array_equal(whole.ids_BK[3, :5], [20, 21, 22, 23, 24])
    nothing = searcher.search(Queries(queries.embeddings_BE[:0], []), 3)
    assert nothing.ids_BK.shape == nothing.scores_BK.shape == (0, 3)
    with pytest.raises(InputError, match="k = 0"):
        searcher.search(queries, 0)
    with pytest.raises(InputError, match="Queries"):
        searcher.search(Queries(), 3)


@pytest.mark.parametrize("make", EVERY)
def test_deleted_rows_do_not_come_back(make: Callable[..., Searcher]) -> None:
    gone = (20, 22, 23, 25, *range(100, 180))
    searcher, queries = make(gone), questions()
    assert searcher.size == N - len(gone)
    ids = searcher.search(queries, N).ids_BK
    assert not np.isin(ids, gone).any()
    np.testing.assert_array_equal(ids[3, :4], [21, 24, 26, 27])
    left = make().search(queries, N).ids_BK
    expected = [row[~np.isin(row, gone)][:5] for row in left]
    if make is not hybrid:  # whose scores depend on the other candidates
        np.testing.assert_array_equal(ids[:, :5], expected)


@pytest.mark.parametrize("n_devices", [1, 8])
@pytest.mark.parametrize("n_questions", [1, 5, 300])
def test_exact_equals_brute_force(n_devices: int, n_questions: int) -> None:
    embeddings, _ = passages()
    queries = questions(n_questions).embeddings_BE
    searcher = Exact(embeddings, sharding.make_mesh(devices=jax.devices()[:n_devices]), SOURCE)
    ids, scores = searcher.search(Queries(queries), 15)
    all_scores = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    expected = np.argsort(-all_scores, axis=1, kind="stable")[:, :15]
    np.testing.assert_allclose(scores, np.take_along_axis(all_scores, expected, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ids, expected)


def test_exact_takes_an_index_that_is_on_the_devices() -> None:
    embeddings, _ = passages()
    rows = sharding.shard_rows(mesh(), embeddings, 9.0)  # padding rows would have the best scores
    found = Exact(rows, mesh(), SOURCE, n_valid=N).search(questions(), N + 1)
    for mine, other in zip(found, exact().search(questions(), N + 1), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_exact_in_eight_bits() -> None:
    embeddings, _ = passages()
    small, scale = (np.asarray(x) for x in mips.quantise(embeddings))
    stored = small.astype(np.float32) * scale[:, None]
    found = Exact(small, mesh(), SOURCE, scale_N=scale).search(questions(), 10)
    expected = np.sort(questions().embeddings_BE @ stored.T, axis=1)[:, ::-1][:, :10]
    np.testing.assert_allclose(found.scores_BK, expected, rtol=1e-5)


def test_few_programs_are_compiled() -> None:
    searcher = Exact(np.ones((50, 5), np.float32), mesh(), SOURCE)
    before = mips.search._cache_size()
    for n in range(1, 70):
        searcher.search(Queries(np.ones((n, 5), np.float32)), 3)
    assert mips.search._cache_size() - before == 6  # 1, 8, 16, 32, 64, 128


@pytest.mark.parametrize("make", [exact, pytest.param(scann, marks=needs_scann)])
def test_bad_embeddings(make: Callable[..., Searcher]) -> None:
    with pytest.raises(InputError, match=r"\(3, 11\) must be \[B,12\]"):
        make().search(Queries(np.zeros((3, 11), np.float32)), 2)
    queries = questions().embeddings_BE
    queries[4, 2] = np.inf
    with pytest.raises(InputError, match="query 4: its embedding is not finite"):
        make().search(Queries(queries), 2)


def test_best() -> None:
    ids = np.array([[4, 7, -1, 2, 9, 3], [5, 1, 8, -1, -1, 0]])
    scores = np.array([[1, 3, 99, 3, np.nan, -np.inf], [2, 2, 2, np.nan, -np.inf, -1]])
    found = search.best(ids, scores, 4)
    np.testing.assert_array_equal(found.ids_BK, [[2, 7, 4, -1], [1, 5, 8, 0]])
    np.testing.assert_array_equal(found.scores_BK, np.array([[3, 3, 1, -np.inf], [2, 2, 2, -1]], np.float32))
    assert search.best(ids, scores, 8).ids_BK[0].tolist() == [2, 7, 4, -1, -1, -1, -1, -1]


def fused(dense: np.ndarray, words: np.ndarray, fusion: Fusion) -> np.ndarray:
    """Fused scores of one question's candidates, in plain loops."""

    def scaled(scores: list[float]) -> list[float]:
        if fusion.kind == "rrf":
            return [1 / (fusion.rrf_k + 1 + sum(other > score for other in scores)) for score in scores]
        if fusion.norm == "minmax":
            low, high = min(scores), max(scores)
            return [(score - low) / (high - low) if high > low else 0.0 for score in scores]
        mean = sum(scores) / len(scores)
        deviation = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
        return [(score - mean) / deviation if deviation else 0.0 for score in scores]

    parts = scaled(dense.tolist()), scaled(words.tolist())
    return np.array([fusion.weight * one + (1 - fusion.weight) * other for one, other in zip(*parts, strict=True)])


@needs_bm25
@pytest.mark.parametrize("fusion", [
    Fusion(candidates=10), Fusion(candidates=3, weight=0.8), Fusion(candidates=10, weight=0.3, norm="zscore"),
    Fusion("rrf", candidates=10), Fusion("rrf", candidates=25, weight=0.7, rrf_k=10),
])  # fmt: skip
def test_hybrid_equals_brute_force(fusion: Fusion) -> None:
    embeddings, words, queries = passages()[0], bm25(), questions(12)
    queries = Queries(np.roll(queries.embeddings_BE, 40, 0), queries.texts)  # the two searches disagree
    queries.texts[5] = "nothing known"
    found = Hybrid(exact(), words, embeddings, fusion).search(queries, 60)
    dense_scores = queries.embeddings_BE.astype(np.float64) @ embeddings.astype(np.float64).T
    word_scores = words.scores(queries.texts, np.tile(np.arange(N), (12, 1))).astype(np.float64)
    for b in range(12):
        n = max(60, fusion.candidates)
        tops = [np.argsort(-scores[b], kind="stable")[:n] for scores in (dense_scores, word_scores)]
        tops[1] = tops[1][word_scores[b, tops[1]] > 0]
        rows = np.union1d(*tops)
        expected = fused(dense_scores[b, rows], word_scores[b, rows], fusion)
        count = min(60, len(rows))
        np.testing.assert_allclose(found.scores_BK[b, :count], np.sort(expected)[::-1][:count], rtol=1e-4, atol=1e-6)
        by_row = dict(zip(rows.tolist(), expected, strict=True))
        mine = [by_row[row] for row in found.ids_BK[b, :count].tolist()]
        np.testing.assert_allclose(found.scores_BK[b, :count], mine, rtol=1e-4, atol=1e-6)
        assert (found.ids_BK[b, count:] == -1).all()


@needs_bm25
def test_hybrid_at_its_ends_is_one_of_the_two() -> None:
    embeddings, words, queries = passages()[0], bm25(), questions()
    dense = Hybrid(exact(), words, embeddings, Fusion(weight=1)).search(queries, 5)
    np.testing.assert_array_equal(dense.ids_BK, exact().search(queries, 5).ids_BK)
    sparse = Hybrid(exact(), words, embeddings, Fusion(weight=0)).search(queries, 5)
    np.testing.assert_array_equal(sparse.ids_BK, words.search(queries, 5).ids_BK)


@needs_bm25
def test_hybrid_refuses_what_does_not_belong_together() -> None:
    embeddings, texts = passages()
    other = Bm25.build(texts, "b" * 64, Bm25Config(language="none"))
    with pytest.raises(InputError, match=r"corpus a{16}, BM25 of b{16}"):
        Hybrid(exact(), other, embeddings)
    with pytest.raises(InputError, match="returns 203 passages, BM25 202"):
        Hybrid(exact(), bm25((5,)), embeddings)
    with pytest.raises(InputError, match="9 embeddings and 8 texts"):
        Hybrid(exact(), bm25(), embeddings).search(Queries(questions().embeddings_BE, questions().texts[:8]), 3)
    with pytest.raises(InputError, match="fusion 'sum'"):
        Fusion("sum")
    with pytest.raises(InputError, match="norm 'max'"):
        Fusion(norm="max")
    with pytest.raises(InputError, match="weight lies in 0"):
        Fusion(weight=1.5)
