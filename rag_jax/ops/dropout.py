"""Dropout with masks that are a hash of the position, the same on every mesh."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.ops import position_hash


class Drop(NamedTuple):
    """The randomness of one dropout; see `kept`.

    words: two random numbers, uint32 [2].
    rate: probability of 0.
    """

    words: jax.Array
    rate: float

    @classmethod
    def drawn(cls, key: jax.Array, rate: float) -> "Drop":
        """A dropout of this rate, its words drawn from a random key."""
        return cls(jax.random.bits(key, (2,), jnp.uint32), rate)


def dropped(x: jax.Array, words: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 - rate) where `kept`, else 0; x itself where `words` is None."""
    return x if words is None else jnp.where(kept(Drop(words, rate), x.shape), x / (1 - rate), 0)


def kept(drop: Drop, shape: Sequence[int]) -> jax.Array:
    """Mask of this shape, each element True with probability 1 - rate (to 2^-32), by its position and the words only.

    It is two rounds of an integer hash of the position (`position_hash.mixed`), a random word before each: four
    multiplications per element, which XLA fuses into the use of the mask. jax.random's cipher takes 20 rounds and a
    pass through memory, a tenth of a small training step on a CPU; a mask does not need its strength. In arrays of more
    than 2^32 elements the mask repeats.
    """
    before, between = drop.words
    bits = position_hash.mixed(position_hash.mixed(position_hash.numbers(shape) ^ before) + between)
    return bits >= np.uint32(min(round(drop.rate * 2**32), 2**32 - 1))
