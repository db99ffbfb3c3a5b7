"""`rag-jax bench encode` on a tiny load: its figures, and that both sides run the same model."""

import itertools
import json

import jax
import numpy as np
import pytest
import tiny

from rag_jax.aot import operation_count
from rag_jax.bench import encode as bench_encode
from rag_jax.bench import machine_limits
from rag_jax.bench.encode import EncodeLoad
from rag_jax.corpus.directory import Corpus
from rag_jax.index import encode

TINY = {
    "passages": 24, "shortest": 3, "length": 16, "batch": 8, "width": 16, "layers": 1, "hidden": 24, "heads": 2,
    "vocabulary": 64,
}  # fmt: skip
WORDS = [word for name, value in TINY.items() for word in (f"--{name}", value)]


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """Replaces the measurement of the machine's limit, which takes seconds."""
    monkeypatch.setattr(bench_encode, "matmul_limit", lambda dtype: {"float32": 1e9}[dtype])
    monkeypatch.setattr(machine_limits, "PAUSE", 0)


def run(capsys, *words):
    capsys.readouterr()
    assert tiny.rag_jax("bench", "encode", *WORDS, "--repeats", 1, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_figures(capsys):
    r = run(capsys, "--alone")
    seconds = r["seconds"]["median_ms"] / 1e3
    _, length_N = bench_encode.drawn(EncodeLoad(**TINY))
    assert r["passages_per_second"] == pytest.approx(24 / seconds, rel=1e-3)
    assert r["tokens_per_second"] == pytest.approx(int(length_N.sum()) / seconds, rel=1e-3)
    assert r["fraction_of_limit"] == pytest.approx(r["flops"] / seconds / r["matmul_limit_flops_per_second"], rel=1e-3)
    assert r["matmul_limit_flops_per_second"] == 8e9
    assert "transformers" not in r and r["devices"] == 8


@pytest.mark.parity
def test_transformers_gives_the_same_embeddings(capsys):
    r = run(capsys)
    assert r["largest_difference"] < 1e-5 and r["times_faster"] > 0 and r["transformers"]["median_ms"] > 0


def test_the_work_is_that_of_the_products_without_padding():
    """The count equals the program's matmuls if all passages fill the table; padding adds to the program alone."""
    load = EncodeLoad(**{**TINY, "shortest": 16})
    rag, params = bench_encode.random_model(load)
    ids, mask = np.ones((8, 16), np.int32), np.ones((8, 16), bool)
    program = jax.make_jaxpr(lambda p: rag.encoder.apply({"params": p}, ids, mask))(params["question_encoder"])
    assert bench_encode.flops(load, np.full(8, 16)) == operation_count.matmul_flops(program.jaxpr)
    assert bench_encode.padded_tokens(load, np.full(24, 16)) == 24 * 16
    assert bench_encode.padded_tokens(load, np.full(17, 5)) == 24 * 6


def test_batches_are_in_order_of_length_and_as_wide_as_they_need():
    length_N = np.random.default_rng(0).integers(1, 161, 1000)
    batches = encode.plan(length_N, 64, 160)
    assert sorted(np.concatenate([here for here, _ in batches]).tolist()) == list(range(1000))
    assert all(wide - 20 < length_N[here].max() <= wide and wide % 20 == 0 for here, wide in batches)
    assert all(length_N[a].max() <= length_N[b].min() for (a, _), (b, _) in itertools.pairwise(batches))


def test_passages_of_a_corpus(capsys, tiny_data):
    r = run(capsys, "--alone", "--corpus", tiny_data / "corpus")
    lengths = Corpus.open(tiny_data / "corpus").encoder_length[:24]
    assert (r["passages"], r["length"], r["vocabulary"]) == (24, 96, 400) and r["shortest"] == lengths.min()
    assert r["tokens_per_second"] / r["passages_per_second"] == pytest.approx(lengths.mean())


def test_bad_loads_are_refused(capsys):
    for words, message in (
        (("--heads", 3), "multiple of the heads"),
        (("--dtype", "int8"), "float32 or bfloat16"),
        (("--shortest", 17), "the shortest no longer than the length"),
        (("--batch", 0), "--batch 0: at least 1"),
    ):
        assert tiny.rag_jax("bench", "encode", *WORDS, *words, "--alone") == 2
        assert message in capsys.readouterr().err
