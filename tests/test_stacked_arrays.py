"""Rows in several files, read like one array by NumPy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.corpus import stacked_arrays
from rag_jax.corpus.stacked_arrays import ArrayFile, Scaled, Stacked, stack
from rag_jax.system import sharding

N, E = 23, 5
WHOLE = np.random.default_rng(0).integers(-99, 99, (N, E)).astype(np.int8)
SCALE = np.random.default_rng(1).random(N).astype(np.float32)


def parts(array, cuts):
    edges = [0, *sorted(cuts), len(array)]
    return [ArrayFile(b - a, lambda a=a, b=b: array[a:b]) for a, b in itertools.pairwise(edges)]


cuts = st.lists(st.integers(0, N), max_size=6)
index = st.integers(-N, N - 1)
keys = st.one_of(
    index,
    st.slices(N),
    st.lists(index, max_size=9).map(lambda x: np.array(x, np.int64)),
    st.lists(index, min_size=6, max_size=6).map(lambda x: np.array(x, np.int32).reshape(2, 3)),
    st.lists(st.booleans(), min_size=N, max_size=N).map(np.array),
)


@settings(max_examples=200)
@given(cuts, keys, st.sampled_from([None, 2, slice(1, 4), slice(None, None, -1)]))
def test_indexing_is_numpys(where, key, column):
    two, one = Stacked(parts(WHOLE, where), np.int8, (E,)), Stacked(parts(SCALE, where), np.float32)
    scaled = Scaled(two, one)
    floats = WHOLE.astype(np.float32) * SCALE[:, None]
    for have, want in ((two, WHOLE), (scaled, floats)):
        expected = want[key] if column is None else want[(*np.index_exp[key], column)]
        if column is not None and isinstance(key, np.ndarray) and key.dtype != bool:
            expected = want[key][..., column]
        found = have[key] if column is None else have[key, column]
        assert found.dtype == want.dtype and have.shape == want.shape and len(have) == N
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(one[key], SCALE[key])


def test_out_of_range_and_other_keys_are_refused():
    rows = Stacked(parts(WHOLE, [7, 11]), np.int8, (E,))
    for key in (N, -N - 1, [0, N], np.ones(N - 1, bool), 1.5):
        with pytest.raises(IndexError):
            rows[key]
    assert [row.tolist() for row in rows] == WHOLE.tolist()
    np.testing.assert_array_equal(np.asarray(rows), WHOLE)
    assert np.asarray(rows, np.float32).dtype == np.float32


def test_few_parts_are_open_at_a_time(monkeypatch):
    monkeypatch.setattr(stacked_arrays, "OPEN", 3)
    rows = Stacked(parts(WHOLE, range(1, N)), np.int8, (E,))
    np.testing.assert_array_equal(rows[np.arange(N)[::-1]], WHOLE[::-1])
    assert len(rows._open) == 3


def test_one_part_is_the_array_itself():
    assert stack([ArrayFile(N, lambda: WHOLE)], np.int8, (E,)) is WHOLE


def test_rows_go_to_eight_devices():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    rows = Stacked(parts(WHOLE, [2, 9]), np.int8, (E,))
    placed = sharding.shard_rows(mesh, Scaled(rows, Stacked(parts(SCALE, [2, 9]), np.float32)), 0)
    np.testing.assert_array_equal(placed[:N], WHOLE.astype(np.float32) * SCALE[:, None])
    assert placed.shape == (24, E) and not np.asarray(placed[N:]).any()
