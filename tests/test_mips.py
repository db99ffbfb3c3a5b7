"""Exact search against a NumPy sort of all scores, on 1 and on 8 devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax import sharding
from rag_jax.errors import InputError
from rag_jax.retrieval import mips


def brute_force(queries: np.ndarray, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 and ids: descending score, NaN last, ties by id."""
    with np.errstate(invalid="ignore"):
        scores = queries.astype(np.float64) @ index.astype(np.float64).T
    scores[np.isnan(scores)] = -np.inf
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def search_on(
    n_devices: int, queries: np.ndarray, index: np.ndarray, k: int, **options
) -> tuple[np.ndarray, np.ndarray]:
    if n_devices == 0:  # no mesh at all
        return tuple(np.asarray(x) for x in mips.search(jnp.asarray(queries), jnp.asarray(index), k, **options))
    mesh = sharding.make_mesh(devices=jax.devices()[:n_devices])
    rows = sharding.shard_rows(mesh, index, 0)  # padding scores 0: better than half of the random rows
    found = mips.search(jnp.asarray(queries), rows, k, mesh=mesh, n_valid=len(index), **options)
    return tuple(np.asarray(x) for x in found)


def data(kind: str, n: int, width: int = 16, batch: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((batch, width), np.float32)
    if kind == "random":
        index = rng.standard_normal((n, width), np.float32)
    elif kind == "tied":  # integers: float sums are exact, and equal scores are everywhere
        queries = rng.integers(-2, 3, (batch, width)).astype(np.float32)
        index = rng.integers(-1, 2, (n, width)).astype(np.float32)
    elif kind == "rare":  # a late block holds the best row and also one that ties with a row of an early block
        queries, index = np.ones((batch, width), np.float32), np.zeros((n, width), np.float32)
        index[:, 0] = rng.random(n) < 0.05
        late = min(n - 1, 200)
        index[late - 1 : late + 1, 0] = [1, 2][-n:]
    elif kind == "constant":
        queries, index = np.ones((batch, width), np.float32), np.ones((n, width), np.float32)
    elif kind == "negative":  # every score is lower than that of a zero padding row
        queries, index = np.ones((batch, width), np.float32), -1 - rng.random((n, width), np.float32)
    elif kind == "clustered":  # the best rows lie side by side, many in one block
        centre = rng.standard_normal((8, width), np.float32)
        index = np.sort(rng.integers(0, 8, n))
        index = centre[index] + 0.01 * rng.standard_normal((n, width)).astype(np.float32)
    return queries, index


@pytest.mark.parametrize("n_devices", [1, 8])
@pytest.mark.parametrize("kind", ["random", "tied", "rare", "constant", "negative", "clustered"])
@pytest.mark.parametrize(("n", "k", "chunk"), [(1000, 1, 8192), (5003, 5, 512), (5003, 20, 700), (3001, 1000, 256)])
def test_equals_brute_force(n_devices: int, kind: str, n: int, k: int, chunk: int) -> None:
    queries, index = data(kind, n)
    scores, ids = search_on(n_devices, queries, index, k, chunk=chunk)
    expected_scores, expected_ids = brute_force(queries, index, k)
    assert ids.dtype == np.int32 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    if kind in ("tied", "rare", "constant"):  # exact in float32: the ids are decided, ties included
        np.testing.assert_array_equal(ids, expected_ids)
    else:  # float32 and float64 may order near-equal scores differently; the rows returned must still have these scores
        returned = np.einsum("BE,BKE->BK", queries.astype(np.float64), index[ids].astype(np.float64))
        np.testing.assert_allclose(returned, expected_scores, rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == k for row in ids)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(draw: st.DataObject) -> None:
    n = draw.draw(st.integers(1, 700), "n")
    k = draw.draw(st.integers(1, n), "k")
    chunk = draw.draw(st.integers(1, 300), "chunk")
    n_devices = draw.draw(st.sampled_from([0, 8]), "n_devices")
    kind = draw.draw(st.sampled_from(["tied", "rare"]), "kind")
    queries, index = data(kind, n, width=4, batch=3, seed=draw.draw(st.integers(0, 99), "seed"))
    scores, ids = search_on(n_devices, queries, index, k, chunk=chunk)
    expected_scores, expected_ids = brute_force(queries, index, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("shape", [{"data": -1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}])
def test_same_ids_on_every_mesh(shape: dict[str, int]) -> None:
    queries, index = data("random", 5003)
    mesh = sharding.make_mesh(shape)
    found = mips.search(queries, sharding.shard_rows(mesh, index, 0), 7, mesh=mesh, n_valid=len(index), chunk=256)
    np.testing.assert_array_equal(found[1], search_on(0, queries, index, 7)[1])


@pytest.mark.parametrize("n_devices", [0, 8])
@pytest.mark.parametrize("chunk", [64, 8192])
def test_rows_that_are_not_finite_come_last(n_devices: int, chunk: int) -> None:
    queries, index = data("tied", 403)
    index[:, 0] = np.abs(index[:, 0]) + 1
    queries[:, 0] = 1
    index[::2] = np.nan
    index[1, 0] = -np.inf
    scores, ids = search_on(n_devices, queries, index, 403, chunk=chunk)  # all rows: no padding row may slip in
    finite = brute_force(queries, index[3::2], 200)
    np.testing.assert_array_equal(ids[:, :200], finite[1] * 2 + 3)
    np.testing.assert_array_equal(scores[:, :200], finite[0])
    np.testing.assert_array_equal(ids[:, 200:], np.broadcast_to([0, 1, *range(2, 403, 2)], (6, 203)))
    assert np.all(np.isneginf(scores[:, 200:]))


def test_bfloat16_index_is_scored_in_float32() -> None:
    queries, index = data("random", 2003)
    half = jnp.asarray(index, jnp.bfloat16)
    scores, ids = search_on(8, queries, np.asarray(half), 5, chunk=100)
    expected = brute_force(queries, np.asarray(half, np.float32), 5)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5)


def test_inside_a_jitted_step_with_sharded_queries() -> None:
    queries, index = data("random", 4001, batch=16)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    rows = sharding.shard_rows(mesh, index, 0)
    weight = jnp.eye(16)

    @jax.jit
    def step(weight, rows, batch):
        def loss(weight):
            queries_BE = batch @ weight
            scores_BK, ids_BK = mips.search(queries_BE, rows, 5, mesh=mesh, n_valid=4001, chunk=128)
            again_BK = jnp.einsum("BE,BKE->BK", queries_BE, rows[ids_BK])
            return again_BK.sum() + scores_BK.sum(), (scores_BK, again_BK, ids_BK)

        return jax.value_and_grad(loss, has_aux=True)(weight)

    (_, (scores, again, ids)), gradient = step(weight, rows, sharding.shard_batch(mesh, queries))
    np.testing.assert_array_equal(ids, brute_force(queries, index, 5)[1])
    np.testing.assert_allclose(scores, again, rtol=1e-5)
    # The gradient is that of the scores computed from the gathered rows, and nothing from within the search.
    expected = np.einsum("BE,BKF->EF", queries, index[np.asarray(ids)])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_no_gradient_flows() -> None:
    queries, index = data("random", 300)
    gradients = jax.grad(lambda q, x: mips.search(q, x, 5)[0].sum(), (0, 1))(jnp.asarray(queries), jnp.asarray(index))
    assert not np.any(gradients[0]) and not np.any(gradients[1])


def test_compiled_program_moves_candidates_only() -> None:
    n, batch, k, chunk = 64_000, 7, 5, 512
    mesh = sharding.make_mesh()
    index = jax.ShapeDtypeStruct((n, 16), jnp.float32, sharding=sharding.sharding(mesh, ("rows", None)))
    queries = jax.ShapeDtypeStruct((batch, 16), jnp.float32, sharding=sharding.replicated(mesh))
    text = mips.search.lower(queries, index, k, mesh=mesh, chunk=chunk).compile().as_text()
    gathers = [line for line in text.splitlines() if re.search(r"= .*all-(gather|to-all|reduce)(-start)?\(", line)]
    assert gathers
    sizes = [max(shape_sizes(line)) for line in gathers]
    assert max(sizes) <= mesh.size * batch * k, gathers
    # On a device: the shard of the index, a chunk of it, and the scores of one chunk; never scores of the whole shard.
    rows = n // mesh.size
    assert max(shape_sizes(text)) == rows * 16
    assert not re.search(rf"\[{batch},{rows}\]|\[{rows},{batch}\]|\[{batch},{n}\]", text)


def shape_sizes(hlo: str) -> list[int]:
    return [
        int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"(?:f32|s32|u32|pred)\[([\d,]+)\]", hlo)
    ]


def test_bad_arguments() -> None:
    queries, index = jnp.ones((2, 4)), jnp.ones((24, 4))
    with pytest.raises(InputError, match=r"k = 21.* 20 passages"):
        mips.search(queries, index, 21, n_valid=20)
    with pytest.raises(InputError, match=r"k = 25.* 24 passages"):
        jax.jit(lambda q, x: mips.search(q, x, 25))(queries, index)
    with pytest.raises(InputError, match="k = 0"):
        mips.search(queries, index, 0)
    with pytest.raises(InputError, match=r"\(2, 3\).*\(24, 4\)"):
        mips.search(queries[:, :3], index, 1)
    with pytest.raises(InputError, match="n_valid = 25 of 24"):
        mips.search(queries, index, 1, n_valid=25)
    with pytest.raises(InputError, match="23 rows do not divide over 8 devices"):
        mips.search(queries, index[:23], 1, mesh=sharding.make_mesh())
