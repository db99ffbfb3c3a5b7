"""Adam whose two moments take 2 bytes (bfloat16) or 1 byte (int8) per parameter each, instead of 4.

One step changes a moment by less than the spacing of such small numbers, so rounding to the nearest would often leave
it unchanged. It is rounded up or down at random instead, with the right mean. The random bits are a hash of position
and step: every device rounds its own shards, and a resumed run, on any mesh, rounds as the uninterrupted one.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rag_jax.ops import position_hash

Kind = Literal["bfloat16", "int8"]

OCTAVE = 8  # int8 codes per doubling of the value


class State(NamedTuple):
    """State of the optimiser.

    step: updates so far.
    mu, nu: first and second moments as stored.
    mu_scale, nu_scale: for int8 the largest magnitude of each row [..., 1], which its levels are multiplied by; a
        single unused number for parameters and kinds without scales.
    """

    step: jax.Array
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any


def dice(shape: tuple[int, ...], step: jax.Array, salt: int) -> jax.Array:
    """Uniform uint32 for every element of an array, different at each step and for each salt."""
    h = step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(salt)
    return position_hash.mixed(position_hash.numbers(shape) ^ position_hash.mixed(h))


def to_bfloat16(x: jax.Array, rolled: jax.Array) -> jax.Array:
    """x in bfloat16, stochastically rounded: up with the probability that makes the mean x. rolled: from `dice`."""
    # bfloat16 is the upper half of float32: a carry from the random lower half rounds the magnitude up
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (rolled & 0xFFFF)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def signed_level(code: jax.Array) -> jax.Array:
    """Value of a signed code: 0, or with its sign one of 127 magnitudes up to 1, an eighth of an octave apart."""
    return jnp.where(code == 0, 0.0, jnp.exp2((jnp.abs(code) - 127.0) / OCTAVE)) * jnp.sign(code)


def unsigned_level(code: jax.Array) -> jax.Array:
    """Value of an unsigned code: one of 256 up to 1, an eighth of an octave apart.

    None is 0, so that no update is divided by a second moment of 0.
    """
    return jnp.exp2((code - 255.0) / OCTAVE)


def to_int8(x: jax.Array, rolled: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(codes, scale) of x, stochastically rounded to one of the two levels around |x| / scale, so that the mean is x.

    rolled: from `dice`.
    signed: codes are int8, else uint8.

    The scale [..., 1] is the largest magnitude along the last axis.
    """
    scale = jnp.abs(x).max(-1, keepdims=True)
    share = jnp.abs(x) / jnp.where(scale == 0, 1.0, scale)
    top, level = (127, signed_level) if signed else (255, unsigned_level)
    low = jnp.clip(jnp.floor(top + OCTAVE * jnp.log2(jnp.maximum(share, 1e-30))), 0, top - 1)
    below, above = level(low), level(low + 1)
    up = rolled.astype(jnp.float32) * 2.0**-32 < (share - below) / (above - below)
    code = low + up
    return (jnp.sign(x) * code).astype(jnp.int8) if signed else code.astype(jnp.uint8), scale


def small(x: jax.Array) -> bool:
    """Whether a parameter is a bias or scale, whose moments stay float32."""
    return x.ndim < 2


def scale_by_adam(b1: float, b2: float, eps: float, kind: Kind) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments stored as `kind`."""

    def init(params: Any) -> State:
        def kept(signed: bool) -> Any:
            types = {"bfloat16": jnp.bfloat16, "int8": jnp.int8 if signed else jnp.uint8}
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32 if small(p) else types[kind]), params)

        def scales() -> Any:
            with_scale = kind == "int8"
            return jax.tree.map(
                lambda p: jnp.zeros((*p.shape[:-1], 1) if with_scale and not small(p) else (1,) * p.ndim), params
            )

        return State(jnp.zeros([], jnp.int32), kept(True), kept(False), scales(), scales())

    def read(stored: jax.Array, scale: jax.Array, signed: bool) -> jax.Array:
        if small(stored) or kind == "bfloat16":
            return stored.astype(jnp.float32)
        return (signed_level if signed else unsigned_level)(stored.astype(jnp.float32)) * scale

    def write(x: jax.Array, step: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
        blank = jnp.zeros((1,) * x.ndim)
        if small(x):
            return x, blank
        rolled = dice(x.shape, step, int(signed))
        return (to_bfloat16(x, rolled), blank) if kind == "bfloat16" else to_int8(x, rolled, signed)

    def update(gradients: Any, state: State, _params: Any = None) -> tuple[Any, State]:
        step = optax.safe_increment(state.step)

        def one(g: jax.Array, mu: Any, nu: Any, mu_scale: Any, nu_scale: Any) -> tuple:
            g = g.astype(jnp.float32)
            mu = b1 * read(mu, mu_scale, True) + (1 - b1) * g
            nu = b2 * read(nu, nu_scale, False) + (1 - b2) * jnp.square(g)
            update = (mu / (1 - b1**step)) / (jnp.sqrt(nu / (1 - b2**step)) + eps)
            return update, *write(mu, step, True), *write(nu, step, False)

        results = jax.tree.map(one, gradients, state.mu, state.nu, state.mu_scale, state.nu_scale)
        is_result = lambda x: isinstance(x, tuple) and len(x) == 5  # noqa: E731
        updates, mu, mu_scale, nu, nu_scale = (
            jax.tree.map(lambda x, i=i: x[i], results, is_leaf=is_result) for i in range(5)
        )
        return updates, State(step, mu, nu, mu_scale, nu_scale)

    return optax.GradientTransformation(init, update)
