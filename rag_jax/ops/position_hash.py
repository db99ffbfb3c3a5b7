"""The number of each place of an array, and a hash of it: the same on every mesh, each device makes its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def numbers(shape: Sequence[int]) -> jax.Array:
    """uint32 [shape], 0 to its size - 1 in row-major order; arrays of more than 2^32 begin again."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which every bit of the result depends on all bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)
