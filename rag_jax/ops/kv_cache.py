"""Keys and values of a decoder's layers, kept while it writes, and which of them each token sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KeyValues(NamedTuple):
    """Keys [B, G, C, L] and values [B, G, L, C] of all layers of a decoder; G heads, or groups of heads.

    Attention multiplies them as they lie: while decoding, nothing is transposed.
    """

    key: list[jax.Array]
    value: list[jax.Array]


class Tree(NamedTuple):
    """Where the tokens of a call stand when they do not simply follow one another: beams or candidates in one cache.

    position_BT of the tokens, position_BS of the cache's entries (B may be 1 in both), and which entries a token sees,
    itself among them: visible_BTS.
    """

    position_BT: jax.Array
    position_BS: jax.Array
    visible_BTS: jax.Array


def empty_cache(shape: tuple[int, int, int, int], layers: int, dtype: Any) -> KeyValues:
    """Zeros for `layers` layers; shape: (B, G, L, C)."""
    B, G, L, C = shape
    keys = [jnp.zeros((B, G, C, L), dtype) for _ in range(layers)]
    return KeyValues(keys, [jnp.zeros(shape, dtype) for _ in range(layers)])


def line(length: int, size: int, slot: jax.Array | int) -> Tree:
    """The tree that is a line: `length` tokens after `slot` others in a cache of `size`."""
    query, key = jnp.arange(length) + slot, jnp.arange(size)
    return Tree(query[None], key[None], (key <= query[:, None])[None])


def write_cache(
    cache: tuple[jax.Array, jax.Array, jax.Array | int], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of a cache (keys, values, slot) with new ones written from the slot on."""
    key, value, slot = cache
    return (
        jax.lax.dynamic_update_slice_in_dim(key, new[0].astype(key.dtype), slot, axis=3),
        jax.lax.dynamic_update_slice_in_dim(value, new[1].astype(value.dtype), slot, axis=2),
    )
