"""Checksums of arrays that do not depend on their sharding: any flipped bit changes the checksum.

    sum over elements i of bits(i) * odd(i)  mod 2**32

bits(i) are the bits of element i as a number below 2**32, and odd(i) is a fixed odd number for each position. A change
of one element changes the sum, because an odd factor has an inverse mod 2**32; swapping two elements changes it, too,
but for one case in 2**31. The order of summation does not matter, so every device adds up its own shard.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rag_jax.ops import position_hash

CHUNK = 1 << 22  # elements of a host array that are summed at once


def of_tree(tree: Any) -> dict[str, int]:
    """The checksum of every array, by its path in the tree; computed on the devices for arrays that are there."""
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    on_devices = {name: leaf for name, leaf in named.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_program(on_devices))
    return {name: int(sums[name]) if name in sums else on_host(np.asarray(leaf)) for name, leaf in named.items()}


def of_array(array: jax.Array) -> int:
    """The checksum of one array; arrays of one shape share a program, so that reading a model compiles few of them."""
    return int(_one(array))


def on_device(array: jax.Array) -> jax.Array:
    """The checksum as a uint32 scalar, for use inside jit; elements may have at most 32 bits."""
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    return (bits * _odd(position_hash.numbers(array.shape))).sum(dtype=jnp.uint32)


def on_host(array: np.ndarray) -> int:
    """The checksum of an array in memory or in a file, computed CHUNK elements at a time."""
    flat, total = array.reshape(-1), 0
    for first in range(0, len(flat), CHUNK):
        part = np.ascontiguousarray(flat[first : first + CHUNK])
        bits = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)
        place = np.arange(first, first + len(part), dtype=np.uint64).astype(np.uint32)
        total += int((bits * _odd(place)).sum(dtype=np.uint32))
    return total % 2**32


def _odd(place: Any) -> Any:
    """Pseudorandom odd numbers for positions, uint32 of NumPy or JAX, by the mixing steps of MurmurHash3."""
    mixed = (place ^ (place >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return mixed | np.uint32(1)


@jax.jit
def _program(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: on_device(array) for name, array in arrays.items()}


@jax.jit
def _one(array: jax.Array) -> jax.Array:
    return on_device(array)
