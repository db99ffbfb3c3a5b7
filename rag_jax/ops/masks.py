"""Masks for padded rows."""

import jax
import jax.numpy as jnp


def length_mask(length_B: jax.Array, width: int) -> jax.Array:
    """Mask bool [B, width], True at the first `length` positions of each row; lengths may be of any integer type."""
    return jnp.arange(width)[None] < length_B.astype(jnp.int32)[:, None]
