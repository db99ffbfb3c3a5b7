"""`rag-jax bench search` on a tiny load: every program searches the same data; its figures."""

import functools
import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny

from rag_jax.aot import operation_count
from rag_jax.bench import search as bench_search
from rag_jax.bench.search import SearchLoad
from rag_jax.retrieval import mips

WORDS = ["--passages", 3000, "--width", 32, "--batch", 8, "--k", 5, 40, "--repeats", 2]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    assert tiny.rag_jax("bench", "search", *WORDS, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_programs_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rivals = [name for name in ("faiss", "numpy") if importlib.util.find_spec(name)]
    found = run(capsys, "--rivals", *rivals)
    types = ["float32", "bfloat16", "int8"]
    names = [name for dtype in types for name in (dtype, f"products {dtype}")] + rivals
    assert [(r["program"], r["k"]) for r in found["results"]] == [(name, k) for k in (5, 40) for name in names]
    bytes_of = {r["program"]: r["index_bytes"] for r in found["results"]}
    assert [bytes_of[name] for name in types] == [3000 * 32 * 4, 3000 * 32 * 2, 3000 * (32 + 4)]
    for r in found["results"]:
        seconds = r["seconds"]["median_ms"] / 1e3
        assert r["queries_per_second"] == pytest.approx(8 / seconds, rel=1e-2)
        assert r["flops_per_second"] == pytest.approx(2 * 3000 * 32 * 8 / seconds, rel=1e-2)
        assert ("recall" in r) == ("fraction_of_limit" in r) == (not r["program"].startswith("products"))
        if r["program"] in ("float32", *rivals):
            assert r["recall"] == 1.0
        elif "recall" in r:
            assert 0.8 < r["recall"] <= 1.0
    assert found["peak_bytes"] > 0 and found["passages"] == 3000


def test_only_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    programs = {r["program"] for r in run(capsys, "--dtype", "int8", "--rivals")["results"]}
    assert programs == {"float32", "products float32", "int8", "products int8"}


@pytest.mark.slow
def test_scann_finds_most(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scann")
    found = [r for r in run(capsys, "--dtype", "float32", "--rivals", "scann")["results"] if r["program"] == "scann"]
    assert len(found) == 2 and all(r["recall"] > 0.9 and r["build_seconds"] > 0 for r in found)


def test_products_alone_are_those_of_the_search() -> None:
    """The benchmark's plain matmul finds the search's best score, with the same number of multiplications."""
    load = SearchLoad(5003, 16, 4)
    index = bench_search.collected(load)
    queries = bench_search.questions(load, index, 0)
    for dtype in ("float32", "bfloat16"):
        search, alone = bench_search.ours(index, dtype)
        np.testing.assert_allclose(alone.call(5, queries)[0][:, 0], search.call(5, queries)[0][:, 0], rtol=1e-6)
    index_NE = jax.numpy.asarray(index)
    programs = (functools.partial(f, k=5) for f in (bench_search.products_alone, mips.search))
    work = [operation_count.matmul_flops(jax.make_jaxpr(program)(queries, index_NE).jaxpr) for program in programs]
    assert work[0] == work[1] >= 2 * load.passages * load.width * load.batch


def test_the_data_are_clustered_and_drawn_from_the_seed() -> None:
    load = SearchLoad(2000, 32, 16)
    index = bench_search.collected(load)
    np.testing.assert_array_equal(index, bench_search.collected(load))
    assert (index != bench_search.collected(SearchLoad(2000, 32, 16, seed=1))).any()
    assert (bench_search.questions(load, index, 0) != bench_search.questions(load, index, 1)).any()
    distance = ((index[:300, None] - index[None, :300]) ** 2).sum(-1)
    near = np.sort(distance, 1)[:, 1].mean()
    assert near < 0.5 * np.median(distance)  # the nearest other passage is of the same cluster


def test_bad_loads_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.rag_jax("bench", "search", "--k", 5, 0) == 2
    assert "--k 0: at least 1" in capsys.readouterr().err
    assert tiny.rag_jax("bench", "search", "--passages", 50, "--k", 51) == 2
    assert "--k 51: at most --passages 50" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else True)
    assert tiny.rag_jax("bench", "search", "--rivals", "faiss") == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err
