"""ScaNN against exact search in NumPy: recall, added, changed and deleted rows, disk, inputs that would abort it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rag_jax.errors import InputError
from rag_jax.retrieval import scann_index
from rag_jax.retrieval.scann_index import AnnConfig, Scann
from rag_jax.retrieval.search import IndexSource, Queries

pytest.importorskip("scann")

SOURCE = IndexSource("c" * 64, "e" * 64, 7)
# All leaves and many scored again: almost exact. No two builds of ScaNN are the same, so the margins here are wide.
TREE = AnnConfig(leaves=60, leaves_to_search=60, reorder=600, reorder_dtype="float32")


def clustered(n: int = 6000, width: int = 24, batch: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Passages in 50 clusters, and questions near some of them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((50, width)).astype(np.float32)
    passages = centres[rng.integers(0, 50, n)] + 0.5 * rng.standard_normal((n, width)).astype(np.float32)
    queries = passages[rng.integers(0, n, batch)] + 0.3 * rng.standard_normal((batch, width)).astype(np.float32)
    return queries.astype(np.float32), passages.astype(np.float32)


def exact(queries: np.ndarray, passages: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    scores = queries.astype(np.float64) @ passages[rows].astype(np.float64).T
    return rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)]))


@pytest.fixture(scope="module")
def built() -> tuple[np.ndarray, np.ndarray, Scann]:
    queries, passages = clustered()
    return queries, passages, scann_index.build(passages, SOURCE, TREE)


def check_exact(index: Scann, queries: np.ndarray, passages: np.ndarray, rows: np.ndarray, k: int = 10) -> None:
    """Checks that the search finds what exact search over `rows` finds, with its scores, and no other row."""
    found = index.search(Queries(queries), k)
    assert index.size == len(rows)
    assert recall(found.ids_BK, exact(queries, passages, rows, k)) > 0.99
    assert np.isin(found.ids_BK, rows).all()
    assert all(len(set(row)) == k for row in found.ids_BK)
    expected = np.einsum("BE,BKE->BK", queries, passages[found.ids_BK])
    np.testing.assert_allclose(found.scores_BK, expected, rtol=1e-4, atol=1e-4)
    assert (np.diff(found.scores_BK, axis=1) <= 0).all()


def test_finds_what_exact_search_finds(built: tuple) -> None:
    queries, passages, index = built
    check_exact(index, queries, passages, np.arange(len(passages)))
    few = scann_index.build(passages, SOURCE, AnnConfig(leaves=60, leaves_to_search=1)).search(Queries(queries), 10)
    # it really is approximate: one leaf of 60 does not hold everything
    assert 0.1 < recall(few.ids_BK, exact(queries, passages, np.arange(len(passages)), 10)) < 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_reordering(dtype: str) -> None:
    queries, passages = clustered(2000)
    config = AnnConfig(leaves=20, leaves_to_search=20, reorder_dtype=dtype)
    found = scann_index.build(passages, SOURCE, config).search(Queries(queries), 10)
    assert recall(found.ids_BK, exact(queries, passages, np.arange(2000), 10)) > 0.9
    expected = np.einsum("BE,BKE->BK", queries, passages[found.ids_BK])
    np.testing.assert_allclose(found.scores_BK, expected, rtol=0.05, atol=0.5)


def test_few_rows_are_searched_exactly() -> None:
    queries, passages = clustered(300)
    index = scann_index.build(passages, SOURCE)
    assert index.config.leaves == 0
    found = index.search(Queries(queries), 20)
    np.testing.assert_array_equal(found.ids_BK, exact(queries, passages, np.arange(300), 20))


def test_numbers_by_size() -> None:
    assert AnnConfig().resolved(19_999).leaves == 0
    large = AnnConfig().resolved(1_000_000)
    assert (large.leaves, large.leaves_to_search) == (2000, 100)
    assert AnnConfig(leaves=8).resolved(100).leaves_to_search == 8
    assert AnnConfig(exact_below=0).resolved(15).leaves == 0  # codes of 16 values cannot be trained on 15 rows


@pytest.mark.parametrize("config", [TREE, AnnConfig()])
def test_more_than_there_are(config: AnnConfig) -> None:
    queries, passages = clustered(100, batch=3)
    index = scann_index.build(passages, SOURCE, config)
    found = index.search(Queries(queries), 130)
    np.testing.assert_array_equal(np.sort(found.ids_BK[:, :100]), np.tile(np.arange(100), (3, 1)))
    assert (found.ids_BK[:, 100:] == -1).all() and np.isneginf(found.scores_BK[:, 100:]).all()


def test_unfilled_results_are_no_passages(built: tuple) -> None:
    queries, passages, _ = built
    found = scann_index.build(passages, SOURCE, AnnConfig(leaves=60, leaves_to_search=1)).search(Queries(queries), 1000)
    missing = found.ids_BK < 0
    assert missing.any() and not missing.all(1).any()
    np.testing.assert_array_equal(missing, np.isneginf(found.scores_BK))
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found.ids_BK)


def test_rows_that_come_change_and_go(built: tuple) -> None:
    queries, passages, index = built
    n, rng = len(passages), np.random.default_rng(1)
    passages, alive = np.concatenate([passages, np.zeros((500, passages.shape[1]), np.float32)]), set(range(n))
    for round_ in range(4):
        # the best answers of some questions go, so that filtering must look further
        top = np.unique(exact(queries[round_::4], passages, np.array(sorted(alive)), 30))
        index = index.delete(top)
        alive -= set(top.tolist())
        fresh = np.concatenate([np.arange(n, n + 60), rng.choice(n, 60, replace=False), top[:20]])
        fresh, n = np.unique(fresh), n + 60
        passages[fresh] = queries[rng.integers(0, len(queries), len(fresh))] * rng.uniform(0.2, 1.2, (len(fresh), 1))
        index = index.upsert(fresh, passages[fresh])
        alive |= set(fresh.tolist())
        check_exact(index, queries, passages, np.array(sorted(alive)))
    assert 0.1 < index.stale < 0.5
    assert built[2].size == 6000 and not len(built[2].gone)  # the index it began with is as it was


def test_looks_further_where_the_best_are_gone() -> None:
    queries, passages = clustered(3000, batch=5)
    short = AnnConfig(leaves=30, leaves_to_search=30, reorder=80, reorder_dtype="float32")
    gone = np.unique(exact(queries, passages, np.arange(3000), 150))
    index = scann_index.build(passages, SOURCE, short).delete(gone)
    found, left = index.search(Queries(queries), 10).ids_BK, np.setdiff1d(np.arange(3000), gone)
    assert (found >= 0).all()
    assert recall(found, exact(queries, passages, left, 10)) > 0.8


def test_built_over_some_rows_of_the_corpus() -> None:
    queries, passages = clustered(3000)
    rows = np.random.default_rng(0).permutation(3000)[:1200].astype(np.int32)
    index = scann_index.build(passages[rows], SOURCE, TREE, rows)
    check_exact(index, queries, passages, np.sort(rows))
    check_exact(index.upsert([5000], passages[:1]), queries, np.pad(passages, ((0, 2001), (0, 0))) + np.eye(
        5001, 1, -5000, np.float32) * passages[:1], np.append(np.sort(rows), 5000))  # fmt: skip


def test_deleted_rows_are_refused_twice(built: tuple) -> None:
    index = built[2].delete([3])
    with pytest.raises(InputError, match="row 3 is not in the index of 5999 passages"):
        index.delete([3])
    with pytest.raises(InputError, match="row 6000"):
        index.delete([6000])


def test_saved_and_loaded(built: tuple, tmp_path: Path) -> None:
    queries, _, index = built
    index = index.delete([1, 2]).upsert([3, 7000], queries[:2])
    index.save(tmp_path / "ann")
    assert not list((tmp_path / "ann").rglob("*.pkl"))
    loaded = Scann.load(tmp_path / "ann", SOURCE)
    for mine, other in zip(index.search(Queries(queries), 20), loaded.search(Queries(queries), 20), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert loaded.manifest == index.manifest
    assert json.dumps(dict(loaded.manifest)) and loaded.manifest["encoder_hash"] == "e" * 64
    with pytest.raises(InputError, match=r"corpus_hash is cccc.*here it is dddd"):
        Scann.load(tmp_path / "ann", SOURCE._replace(corpus_hash="d" * 64))
    with pytest.raises(InputError, match=r"encoder_hash is eeee.*here it is ffff"):
        Scann.load(tmp_path / "ann", SOURCE._replace(encoder_hash="f" * 64))
    with pytest.raises(InputError, match="already there"):
        index.save(tmp_path / "ann")
    index.delete([4]).save(tmp_path / "ann", overwrite=True)
    assert Scann.load(tmp_path / "ann").size == index.size - 1


@pytest.mark.parametrize("name", ["scann/hashed_dataset.npy", "new_embeddings.npy", "scann/scann_config.pb"])
def test_a_flipped_byte_is_found(built: tuple, tmp_path: Path, name: str) -> None:
    built[2].upsert([3], built[0][:1]).save(tmp_path / "ann")
    content = bytearray((tmp_path / "ann" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "ann" / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*not what the manifest says"):
        Scann.load(tmp_path / "ann")
    (tmp_path / "ann" / name).write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{name}.*bytes, the manifest says"):
        Scann.load(tmp_path / "ann")


def test_a_pickle_is_not_opened(built: tuple, tmp_path: Path) -> None:
    built[2].save(tmp_path / "ann")
    (tmp_path / "ann" / "scann" / "scann_docids.pkl").write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(InputError, match=r"scann_docids\.pkl does not belong there"):
        Scann.load(tmp_path / "ann")


def test_rows_that_are_not_finite_do_not_end_the_process(tmp_path: Path) -> None:
    # in a process of its own: where the check is missing, ScaNN aborts
    code = """
import numpy as np
from rag_jax.errors import InputError
from rag_jax.retrieval import scann_index
from rag_jax.retrieval.search import Queries, IndexSource
good = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
tree = scann_index.AnnConfig(leaves=8)
index = scann_index.build(good, IndexSource("c"), tree)
for value in (np.nan, np.inf):
    bad = good.copy()
    bad[123, 5] = value
    for call in (lambda: scann_index.build(bad, IndexSource("c"), tree, np.arange(1000, 1200)),
                 lambda: index.upsert(np.arange(1000, 1200), bad), lambda: index.search(Queries(bad), 3)):
        try:
            call()
        except InputError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(("row 1123:" in line) or ("query 123:" in line) for line in lines)


def test_bad_arguments(built: tuple) -> None:
    queries, passages, index = built
    with pytest.raises(InputError, match="50 passages are too few for 60 leaves"):
        scann_index.build(passages[:50], SOURCE, TREE)
    with pytest.raises(InputError, match="10 passages are too few for 4 leaves"):
        scann_index.build(passages[:10], SOURCE, AnnConfig(leaves=4))
    with pytest.raises(InputError, match=r"\(0, 24\)"):
        scann_index.build(passages[:0], SOURCE)
    with pytest.raises(InputError, match="each given once"):
        scann_index.build(passages[:20], SOURCE, rows_N=[0] * 20)
    with pytest.raises(InputError, match=r"rows \(19,\) for 20 embeddings"):
        scann_index.build(passages[:20], SOURCE, rows_N=range(19))
    with pytest.raises(InputError, match=r"\(2, 23\) must be \[2,24\]"):
        index.upsert([1, 2], queries[:2, :23])
    with pytest.raises(InputError, match="reorder_dtype 'float16'"):
        AnnConfig(reorder_dtype="float16")


def test_without_scann(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(InputError, match="search kind `exact`"):
        scann_index.build(clustered(100)[1], SOURCE)


def test_tuned_by_measured_recall() -> None:
    queries, passages = clustered(6000, batch=200)
    truth = exact(queries, passages, np.arange(6000), 10)
    index = scann_index.build(passages, SOURCE, AnnConfig(leaves=60))
    costs = []
    for wanted in (0.7, 0.9, 0.98):
        tuned = index.tune(queries[:100], truth[:100], wanted)
        config = tuned.config
        assert recall(tuned.search(Queries(queries[:100]), 10).ids_BK, truth[:100]) >= wanted
        # smallest: one leaf fewer, or one row fewer to score again, is not enough
        for leaves, reorder in ((config.leaves_to_search - 1, 200), (config.leaves_to_search, config.reorder - 1)):
            if leaves >= 1 and reorder >= 10:
                fewer = tuned._with(leaves, reorder).search(Queries(queries[:100]), 10)
                assert recall(fewer.ids_BK, truth[:100]) < wanted
        # and it holds for questions it was not tuned on
        assert recall(tuned.search(Queries(queries[100:]), 10).ids_BK, truth[100:]) > wanted - 0.1
        costs.append(config.leaves_to_search)
    assert costs == sorted(costs) and costs[0] < costs[-1]
