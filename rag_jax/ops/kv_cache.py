"""Cache of the keys and values of a decoder's layers, and which of its entries each token sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LayerKeyValues = tuple[jax.Array, jax.Array]  # of one layer


class KeyValues(NamedTuple):
    """Keys [B, G, C, L] and values [B, G, L, C] of all layers of a decoder; G heads, or groups of heads.

    Keys are stored transposed, as attention's matmuls read them, so that decoding transposes nothing. Layers are lists,
    or in training, where they run as a loop (models.layer_scan), the first axis of two arrays.
    """

    key: list[jax.Array] | jax.Array
    value: list[jax.Array] | jax.Array


class Tree(NamedTuple):
    """Positions and visibility of tokens that do not follow one another in the cache: beams or candidates in one cache.

    position_BT: positions of the tokens of this call (B may be 1).
    position_BS: positions of the cache's entries (B may be 1).
    visible_BTS: which entries each token attends to, its own included.
    """

    position_BT: jax.Array
    position_BS: jax.Array
    visible_BTS: jax.Array


def empty_cache(shape: tuple[int, int, int, int], layers: int, dtype: Any) -> KeyValues:
    """A cache of zeros for `layers` layers; shape: (B, G, L, C)."""
    B, G, L, C = shape
    keys = [jnp.zeros((B, G, C, L), dtype) for _ in range(layers)]
    return KeyValues(keys, [jnp.zeros(shape, dtype) for _ in range(layers)])


def line(length: int, size: int, slot: jax.Array | int) -> Tree:
    """The tree of plain decoding: `length` consecutive tokens after `slot` others, in a cache of `size` entries."""
    query, key = jnp.arange(length) + slot, jnp.arange(size)
    return Tree(query[None], key[None], (key <= query[:, None])[None])


def write_cache(
    cache: tuple[jax.Array, jax.Array, jax.Array | int], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer's cache (keys, values, slot) with the new ones written from the slot on."""
    key, value, slot = cache
    return (
        jax.lax.dynamic_update_slice_in_dim(key, new[0].astype(key.dtype), slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(value, new[1].astype(value.dtype), slot, axis=2),
    )
