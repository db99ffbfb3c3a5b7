"""Row-major index of every array element, and a hash of it: random numbers that are the same on every mesh.

They depend on the element's index alone, so each device computes those of its own shard.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def numbers(shape: Sequence[int]) -> jax.Array:
    """Row-major index of every element, uint32 of this shape; in arrays of more than 2^32 elements it wraps around."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def mixed(x: jax.Array) -> jax.Array:
    """Hash of 32-bit numbers, a permutation: every bit of the result depends on all bits of x (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)
