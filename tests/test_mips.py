"""Exact search against a NumPy sort of all scores, on 1 and on 8 devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.errors import InputError
from rag_jax.retrieval import mips
from rag_jax.system import sharding


def brute_force(queries: np.ndarray, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 and ids, by descending score, NaN last, ties by id."""
    with np.errstate(invalid="ignore"):
        scores = queries.astype(np.float64) @ index.astype(np.float64).T
    scores[np.isnan(scores)] = -np.inf
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def search_on(
    n_devices: int, queries: np.ndarray, index: np.ndarray, k: int, **options
) -> tuple[np.ndarray, np.ndarray]:
    """Searches on so many devices, 0 for no mesh; arrays among the options have a value for each row."""
    arrays = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    if n_devices == 0:  # no mesh at all
        options |= {name: jnp.asarray(x) for name, x in arrays.items()}
        return tuple(np.asarray(x) for x in mips.search(jnp.asarray(queries), jnp.asarray(index), k, **options))
    mesh = sharding.make_mesh(devices=jax.devices()[:n_devices])
    rows = sharding.shard_rows(mesh, index, 0)  # padding scores 0: better than half of the random rows
    options |= {name: sharding.shard_rows(mesh, x, 1) for name, x in arrays.items()}  # padding rows would be valid
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


@settings(max_examples=15, derandomize=True)
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


SMALL = ["bfloat16", "bits", "int8"]


def stored(index: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(rows in this type, their scale or None, the float32 values that they stand for)"""
    if kind == "int8":
        rows, scale = (np.asarray(x) for x in mips.quantise(jnp.asarray(index)))
        return rows, scale, rows.astype(np.float32) * scale[:, None]
    if kind == "float32":
        return index, None, index
    half = np.asarray(jnp.asarray(index, jnp.bfloat16))
    return (half.view(np.uint16) if kind == "bits" else half), None, half.astype(np.float32)


@pytest.mark.parametrize("n_devices", [0, 8])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "clustered"])
@pytest.mark.parametrize("dtype", SMALL)
def test_small_types_score_the_stored_rows_in_float32(n_devices: int, kind: str, dtype: str) -> None:
    queries, index = data(kind, 5003)
    rows, scale, worth = stored(index, dtype)
    scores, ids = search_on(n_devices, queries, rows, 20, scale_N=scale, chunk=700, oversample=4)
    expected_scores, expected_ids = brute_force(queries, worth, 20)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    if kind in ("tied", "constant"):
        np.testing.assert_array_equal(ids, expected_ids)
    else:
        returned = np.einsum("BE,BKE->BK", queries.astype(np.float64), worth[ids].astype(np.float64))
        np.testing.assert_allclose(returned, expected_scores, rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == 20 for row in ids)
    np.testing.assert_array_equal(
        mips.rows_at(jnp.asarray(rows), ids, None if scale is None else jnp.asarray(scale)), worth[ids]
    )


def test_rounded_queries_lose_little_and_candidates_make_up_for_it() -> None:
    """int8, the best 1,000 of 20,000: rounded queries alone miss some, with twice as many candidates none."""
    queries, index = data("random", 20_000, width=64, batch=16)
    rows, scale, worth = stored(index, "int8")
    expected = brute_force(queries, worth, 1000)[1]
    recall = [
        np.mean([len(set(a) & set(b)) / 1000 for a, b in zip(expected, found, strict=True)])
        for found in (search_on(8, queries, rows, 1000, scale_N=scale, oversample=x)[1] for x in (1, 2))
    ]
    assert 0.9 < recall[0] < recall[1] == 1.0


@pytest.mark.parametrize("dtype", ["float32", *SMALL])
def test_equal_rows_stand_by_id_on_every_mesh_and_chunk(dtype: str) -> None:
    """50 different rows, 60 times each: all scores are ties, and the results are equal to the last bit."""
    queries, index = data("random", 50)
    index = index[np.random.default_rng(1).integers(0, 50, 3001)]
    rows, scale, worth = stored(index, dtype)
    first = search_on(0, queries, rows, 100, scale_N=scale)
    np.testing.assert_array_equal(first[1], brute_force(queries, worth, 100)[1])
    for n_devices, chunk in ((0, 200), (1, 97), (8, None), (8, 64)):
        again = search_on(n_devices, queries, rows, 100, scale_N=scale, chunk=chunk)
        np.testing.assert_array_equal(again[1], first[1])
        np.testing.assert_array_equal(again[0], first[0])


@pytest.mark.parametrize("n_devices", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("left", [0, 1, 9, 300, 3001])
def test_deleted_rows_are_never_returned(n_devices: int, dtype: str, left: int) -> None:
    queries, index = data("tied", 3001)
    live = np.zeros(3001, bool)
    live[np.random.default_rng(left).choice(3001, left, replace=False)] = True
    rows, scale, worth = stored(index, dtype)
    scores, ids = search_on(n_devices, queries, rows, 10, scale_N=scale, live_N=live, chunk=256)
    found = min(left, 10)
    expected_scores, expected_ids = brute_force(queries, worth[live], found)
    np.testing.assert_array_equal(ids[:, :found], np.flatnonzero(live)[expected_ids])
    np.testing.assert_allclose(scores[:, :found], expected_scores, rtol=1e-6)
    assert np.all(ids[:, found:] == -1) and np.all(np.isneginf(scores[:, found:]))


@pytest.mark.parametrize("n_devices", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", *SMALL])
def test_extreme_numbers(n_devices: int, dtype: str) -> None:
    """Infinite scores of both signs, near the largest float32, both zeros, NaN, and deleted rows among them."""
    values = [3e38, -3e38, 1e30, 0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-30, 2.0]
    index = np.stack([np.tile(np.float32(values), 50), np.zeros(600, np.float32)], 1)
    queries = np.float32([[1, 1], [-1, 1], [8, 0]])
    live = np.ones(600, bool)
    live[::7] = False
    rows, scale, worth = stored(index, dtype)
    if dtype == "int8":  # a row that is not finite scores as NaN does
        assert np.array_equal(np.isnan(scale), ~np.isfinite(index[:, 0]))
    scores, ids = search_on(n_devices, queries, rows, 600, scale_N=scale, live_N=live, chunk=64)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = queries[:, :1] * worth[:, 0]
    exact[np.isnan(exact)] = -np.inf
    n_live = live.sum()
    order = np.flatnonzero(live)[np.argsort(-exact[:, live], axis=1, kind="stable")]
    np.testing.assert_array_equal(ids[:, :n_live], order)
    np.testing.assert_array_equal(scores[:, :n_live], np.take_along_axis(exact, order, 1))
    assert np.all(ids[:, n_live:] == -1) and np.all(np.isneginf(scores[:, n_live:]))


def test_small_queries_and_large_rows_do_not_overflow_as_integers() -> None:
    queries, index = data("random", 2000)
    rows, scale, worth = stored(index * np.float32(1e36), "int8")
    ids = search_on(8, queries * np.float32(1e-20), rows, 5, scale_N=scale)[1]
    np.testing.assert_array_equal(ids, brute_force(queries, worth, 5)[1])


def test_denormal_numbers_are_kept_or_zero() -> None:
    """Every row is found once, and its score is exact, or zero on a device that flushes denormal numbers."""
    index = np.float32(np.arange(-150, 150)[:, None] * 1e-43)
    scores, ids = search_on(8, np.ones((1, 1), np.float32), index, 300)
    assert sorted(ids[0]) == list(range(300))
    assert np.all((scores[0] == index[ids[0], 0]) | (scores[0] == 0))


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2}])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("batch", [8, 24])
def test_results_cut_as_the_batch_is(shape: dict[str, int], dtype: str, batch: int) -> None:
    queries, index = data("tied", 3001, batch=batch)
    rows, scale, worth = stored(index, dtype)
    mesh = sharding.make_mesh(shape)
    placed = [sharding.shard_rows(mesh, x, 0) for x in (rows, np.ones(3001, np.float32) if scale is None else scale)]
    options = {"mesh": mesh, "n_valid": 3001, "chunk": 100, "scale_N": None if scale is None else placed[1]}
    expected = brute_force(queries, worth, 30)
    for out_axes in (("data", "fsdp"), ("tensor",), ("fsdp", "data")):  # a merge must not rely on the order of devices

        @jax.jit
        def call(queries_BE, out_axes=out_axes):
            return mips.search(queries_BE, placed[0], 30, out_axes=out_axes, **options)

        scores, ids = call(sharding.shard_batch(mesh, queries))
        wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(out_axes))
        assert ids.sharding.is_equivalent_to(wanted, 2) and scores.sharding.is_equivalent_to(wanted, 2)
        np.testing.assert_array_equal(ids, expected[1])
        np.testing.assert_allclose(scores, expected[0], rtol=1e-6)


@pytest.mark.parametrize("n_devices", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", *SMALL])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_normaliser_and_its_gradient(n_devices: int, dtype: str, spread: float) -> None:
    """Against the logsumexp of all scores, in float64."""
    queries, index = data("random", 2003, batch=8)
    queries *= np.float32(spread)
    live = np.random.default_rng(2).random(2003) < 0.7
    rows, scale, worth = stored(index, dtype)
    mesh = sharding.make_mesh(devices=jax.devices()[:n_devices]) if n_devices else None
    options = {"chunk": 128, "mesh": mesh, "n_valid": 2000}
    place = jnp.asarray if mesh is None else lambda x: sharding.shard_rows(mesh, x, 0)
    placed = place(rows)
    options |= {"live_N": place(live), "scale_N": None if scale is None else place(scale)}
    weight_B = np.arange(8.0) - 3

    usable = worth[:2000][live[:2000]].astype(np.float64)
    scores = queries.astype(np.float64) @ usable.T
    best = np.argsort(-scores, 1, kind="stable")[:, :5]
    rest = scores.copy()
    np.put_along_axis(rest, best, -np.inf, 1)

    def expected(scores):
        """The logsumexp of all scores, and the gradient of its weighted sum with respect to the queries."""
        top = scores.max(1, keepdims=True)
        log_z = top[:, 0] + np.log(np.exp(scores - top).sum(1))
        return log_z, weight_B[:, None] * (np.exp(scores - log_z[:, None]) @ usable)

    for out_axes in [(), ("data",)] if n_devices else [()]:

        def loss(queries_BE, out_axes=out_axes):
            found = mips.search_with_normaliser(queries_BE, placed, 5, out_axes=out_axes, **options)
            return found[2] @ weight_B + found[0].sum(), found

        (_, (top_scores, ids, log_rest)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(queries)
        np.testing.assert_allclose(log_rest, expected(rest)[0], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(gradient, expected(rest)[1], rtol=2e-5, atol=2e-5)
        together = jnp.logaddexp(log_rest, jax.nn.logsumexp(top_scores, axis=-1))
        np.testing.assert_allclose(together, expected(scores)[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(ids, np.flatnonzero(live[:2000])[best])
    np.testing.assert_allclose(top_scores, -np.sort(-scores, 1)[:, :5], rtol=1e-5)


@pytest.mark.parametrize("n_devices", [0, 8])
def test_normaliser_of_nothing_and_of_rows_that_are_not_finite(n_devices: int) -> None:
    queries, index = data("random", 160)
    mesh = sharding.make_mesh(devices=jax.devices()[:n_devices]) if n_devices else None
    place = jnp.asarray if mesh is None else lambda x: sharding.shard_rows(mesh, x, 0)

    def first(queries, rows, live):
        return mips.search_with_normaliser(queries, rows, 1, live_N=live, mesh=mesh, chunk=16)[2][0]

    value = jax.value_and_grad(first)
    log_z, gradient = value(queries, place(index), place(np.zeros(160, bool)))
    assert np.isneginf(log_z) and not np.any(gradient)
    live = np.arange(160) % 2 == 0
    expected = value(queries, place(index), place(live & (np.arange(160) > 20)))
    index[:20] = np.nan
    index[20] = -np.inf * np.sign(queries[0])
    index[1::2] = np.inf  # not live
    found = value(queries, place(index), place(live))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_normaliser_gives_no_gradient_to_the_index() -> None:
    queries, index = data("random", 300)
    gradient = jax.grad(lambda x: mips.search_with_normaliser(jnp.asarray(queries), x, 1)[2].sum())(jnp.asarray(index))
    assert not np.any(gradient)


def test_recall_target_is_exact_here_and_an_instruction_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, index = data("random", 5003)
    found = search_on(8, queries, index, 20, chunk=512, recall_target=0.9)
    np.testing.assert_array_equal(found[1], search_on(8, queries, index, 20, chunk=512)[1])

    def lowered(recall_target: float) -> str:
        program = jax.jit(lambda q, x: mips.search(q, x, 20, recall_target=recall_target))
        return program.trace(queries, index).lower(lowering_platforms=("tpu",)).as_text()

    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")
    assert "ApproxTopK" in lowered(0.9) and "recall_target = 0.89" in lowered(0.9)
    assert "ApproxTopK" not in lowered(1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bits", "int8"])
@pytest.mark.parametrize("what", ["search", "normaliser", "gradient"])
@pytest.mark.parametrize("cut", [False, True])
def test_compiled_program_moves_candidates_only(dtype: str, what: str, cut: bool) -> None:
    """With queries sharded over the data axis, in a jitted step: what is sent, and the size of the largest arrays."""
    n, batch, k, chunk, width = 64_000, 24, 5, 512, 16
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})

    def array(shape: tuple, kind: str, names: tuple) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding.sharding(mesh, names))

    index = array((n, width), {"bits": "uint16"}.get(dtype, dtype), ("rows", None))
    scale = array((n,), "float32", ("rows",)) if dtype == "int8" else None
    live, queries = array((n,), "bool", ("rows",)), array((batch, width), "float32", ("batch", None))
    options = {"mesh": mesh, "chunk": chunk, "n_valid": n - 3, "out_axes": ("data", "fsdp") if cut else ()}

    def step(queries, index, scale, live):
        if what == "search":
            return mips.search(queries, index, k, scale_N=scale, live_N=live, **options)
        find = functools.partial(mips.search_with_normaliser, scale_N=scale, live_N=live, **options)
        if what == "normaliser":
            return find(queries, index, k)
        return jax.grad(lambda queries: find(queries, index, k)[2].sum())(queries)

    text = jax.jit(step).lower(queries, index, scale, live).compile().as_text()
    exchanges = re.findall(r"= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", text)
    assert exchanges
    assert max(size for kind in exchanges for size in shape_sizes(kind)) <= batch * max(width, k * 2 * mesh.size)
    # On a device: the shard of the index, a chunk of it, and the scores of one chunk; never scores of the whole shard.
    rows = n // mesh.size
    sizes = sorted(set(shape_sizes(text)))
    assert sizes[-1] == rows * width
    assert batch * rows not in sizes and batch * n not in sizes
    assert dtype == "float32" or f"f32[{rows},{width}]" not in text
    assert max(size for size in sizes if size < rows * width) <= max(rows, batch * chunk, chunk * width)


def shape_sizes(hlo: str) -> list[int]:
    return [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", hlo)]


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
    whole, scale = jnp.ones((24, 4), jnp.int8), jnp.ones(24)
    with pytest.raises(InputError, match=r"int8 without scale_N"):
        mips.search(queries, whole, 1)
    with pytest.raises(InputError, match=r"float32 with scale_N"):
        mips.search(queries, index, 1, scale_N=scale)
    with pytest.raises(InputError, match=r"scale_N is float32\[23\].*float32\[24\]"):
        mips.search(queries, whole, 1, scale_N=scale[1:])
    with pytest.raises(InputError, match=r"live_N is float32\[24\].*bool\[24\]"):
        mips.search_with_normaliser(queries, index, 1, live_N=scale)
    with pytest.raises(InputError, match="the index is float16"):
        mips.search(queries, index.astype(jnp.float16), 1)
    with pytest.raises(InputError, match="oversample = 0"):
        mips.search(queries, whole, 1, scale_N=scale, oversample=0)
    with pytest.raises(InputError, match=r"recall_target = 1.5"):
        mips.search(queries, index, 1, recall_target=1.5)
    with pytest.raises(InputError, match=r"k = 0"):
        mips.search_with_normaliser(queries, index, 0)
    with pytest.raises(InputError, match=r"out_axes = \('batch',\).*'data', 'fsdp', 'tensor'"):
        mips.search(queries, index, 1, mesh=sharding.make_mesh(), out_axes=("batch",))
    with pytest.raises(InputError, match=r"2 queries do not divide over 8 devices"):
        mips.search(queries, index, 1, mesh=sharding.make_mesh(), out_axes=("data",))
    with pytest.raises(InputError, match="chunk = 0"):
        mips.search(queries, index, 1, chunk=0)
    with pytest.raises(InputError, match="n_valid = 25 of 24"):
        mips.search(queries, index, 1, n_valid=25)
    with pytest.raises(InputError, match="23 rows do not divide over 8 devices"):
        mips.search(queries, index[:23], 1, mesh=sharding.make_mesh())
