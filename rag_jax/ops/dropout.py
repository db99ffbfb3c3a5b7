"""Dropout masks drawn by a hash of the position, the same on every mesh."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.ops import position_hash


class Drop(NamedTuple):
    """The randomness of one dropout: two random words, uint32 [2], and the rate; see `kept`."""

    words: jax.Array
    rate: float

    @classmethod
    def drawn(cls, key: jax.Array, rate: float) -> "Drop":
        return cls(jax.random.bits(key, (2,), jnp.uint32), rate)


def dropped(x: jax.Array, words: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 - rate) where `kept`, else 0; x itself where there are no words."""
    return x if words is None else jnp.where(kept(Drop(words, rate), x.shape), x / (1 - rate), 0)


def kept(drop: Drop, shape: Sequence[int]) -> jax.Array:
    """bool [shape]: each True with probability 1 - rate (to 2^-32), by its position in the array and the words alone.

    Two rounds of an integer hash of the position (`position_hash.mixed`), each after a random word: four products a
    number, which a compiler computes where the mask is used. jax.random's cipher takes 20 rounds and a pass through
    memory, a tenth of a small step on a CPU; a mask needs no such strength. Arrays of more than 2^32 repeat.
    """
    before, between = drop.words
    bits = position_hash.mixed(position_hash.mixed(position_hash.numbers(shape) ^ before) + between)
    return bits >= np.uint32(min(round(drop.rate * 2**32), 2**32 - 1))
