"""Checksums of arrays: independent of their sharding, and changed by every flipped bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rag_jax.runs import array_checksums
from rag_jax.system import sharding

TYPES = ("float32", "bfloat16", "int8", "int32", "uint32", "bool")


def drawn(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def by_hand(array):
    """The checksum's formula with Python integers, one element at a time."""
    bits = np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}").reshape(-1)
    total, limit = 0, 2**32
    for i, value in enumerate(bits.tolist()):
        mixed = ((i ^ (i >> 16)) * 0x85EBCA6B) % limit
        mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) % limit
        total += value * (mixed | 1)
    return total % limit


@pytest.mark.parametrize("dtype", TYPES)
def test_on_every_place_the_sum_by_hand(dtype, monkeypatch):
    monkeypatch.setattr(array_checksums, "CHUNK", 100)
    array = drawn((16, 9, 3), dtype)
    expected = by_hand(array)
    assert array_checksums.on_host(array) == expected
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert array_checksums.of_array(jax.device_put(array)) == expected
    for spec in ((), ("data",), (("data", "fsdp", "tensor"),), ("tensor", None)):
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert array_checksums.of_array(placed) == expected
        assert array_checksums.of_tree({"a": placed, "b": array}) == {"['a']": expected, "['b']": expected}


def test_of_a_number_and_of_nothing():
    assert array_checksums.on_host(np.float32(1.5).reshape(())) == by_hand(np.asarray([1.5], np.float32))
    assert array_checksums.of_tree({"x": jnp.float32(1.5), "y": jnp.zeros((0, 3))}) == {
        "['x']": by_hand(np.asarray([1.5], np.float32)),
        "['y']": 0,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_flipped_bit_is_seen(dtype):
    array = drawn((5, 7), dtype, 1)
    expected, raw = array_checksums.on_host(array), array.tobytes()
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        assert array_checksums.on_host(np.frombuffer(bytes(changed), array.dtype).reshape(array.shape)) != expected


def test_rows_that_change_places_are_seen():
    array = drawn((6, 4), "float32", 2)
    sums = {array_checksums.on_host(array[np.random.default_rng(seed).permutation(6)]) for seed in range(20)}
    assert len(sums) == len({tuple(np.random.default_rng(seed).permutation(6)) for seed in range(20)})
