"""`rag-jax bench decode` on a tiny load: its figures, and that both sides run the same model."""

import json

import numpy as np
import pytest
import tiny

from rag_jax.bench import decode
from rag_jax.bench.decode import LOADS, DecodeLoad

TINY = {
    "questions": 2, "docs": 2, "source": 8, "length": 5, "beams": 2, "width": 16, "layers": 1, "hidden": 16, "heads": 2,
    "vocabulary": 64,
}  # fmt: skip
WORDS = [word for name, value in TINY.items() for word in (f"--{name}", value)]


def run(capsys, *words):
    capsys.readouterr()
    assert tiny.rag_jax("bench", "decode", *WORDS, "--repeats", 1, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_programs_and_figures(capsys):
    results = run(capsys, "--alone")
    assert [(r["variant"], r["mode"]) for r in results] == [
        ("token", ""),
        ("sequence", "thorough"),
        ("sequence", "fast"),
    ]
    for r in results:
        assert r["questions_per_second"] == pytest.approx(2e3 / r["seconds"]["median_ms"], rel=1e-3)
        assert r["fraction_of_limit"] == pytest.approx(r["limit_ms"] / r["seconds"]["median_ms"], rel=1e-3)
        assert "transformers" not in r
    assert results[1]["flops"] > results[2]["flops"] == results[0]["flops"]


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_gives_the_same_answers(capsys):
    for r in run(capsys)[:2]:
        assert r["same_answers"] == 1.0 and r["times_faster"] > 0 and r["transformers"]["median_ms"] > 0


def test_the_work_is_that_of_the_products():
    """FLOPs by hand for one layer: encoder, decoder's keys and values, every decoded token, vocabulary."""
    load = DecodeLoad(**TINY)
    D, F, L, V, sources, steps, M = 16, 16, 8, 64, 2 * 2 * 8, 4, 2
    encoder = sources * 2 * (4 * D * D + 2 * D * F + 2 * L * D)
    cross = sources * 2 * 2 * D * D
    tokens = 2 * 2 * (1 + M * (steps - 1))
    decoder = tokens * 2 * (6 * D * D + 2 * D * F + 2 * L * D + D * V)
    past = 2 * 2 * M * 2 * 2 * D * sum(range(1, steps + 1))
    assert decode.needed(load, "token", "thorough")["flops"] == encoder + cross + decoder + past
    more = decode.needed(load, "sequence", "thorough")["flops"] - (encoder + cross + decoder + past)
    scored = 2 * 2 * M * 1  # candidates under the one document that did not produce them
    assert more == scored * (steps * decoder / tokens + 2 * 2 * D * sum(range(1, steps + 1)))


def test_bad_loads_are_refused(capsys):
    for words, message in ((("--heads", 3), "multiple of the heads"), (("--dtype", "int8"), "float32 or bfloat16")):
        assert tiny.rag_jax("bench", "decode", *WORDS, *words, "--alone") == 2
        assert message in capsys.readouterr().err
    assert tiny.rag_jax("bench", "decode", "--beams", 0) == 2
    assert "--beams 0: at least 1" in capsys.readouterr().err
    assert LOADS["medium"].vocabulary == 30522 and LOADS["bart-large"].dtype == "bfloat16"


def test_the_model_is_drawn_anew_for_every_seed():
    a, b = (decode.random_inputs(DecodeLoad(**TINY), seed) for seed in (0, 1))
    assert (a[0] != b[0]).any() and a[0].shape == (2, 2, 8) and np.isfinite(a[2]).all()
