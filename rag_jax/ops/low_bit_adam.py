"""Adam whose two moments take 2 or 1 bytes a parameter instead of 4.

A moment changes by less in one step than such a number can hold, so it is rounded up or down at random, with the right
mean. The dice are a hash of place and step: nothing is drawn, every device rounds its own shards, and a run that goes
on, also on another mesh, rounds as it would have.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rag_jax.ops import position_hash

Kind = Literal["bfloat16", "int8"]

OCTAVE = 8  # codes of int8 in which the value doubles


class State(NamedTuple):
    """Moments as they are kept, and for int8 the largest of each row, by which its codes are multiplied."""

    step: jax.Array
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any


def dice(shape: tuple[int, ...], step: jax.Array, salt: int) -> jax.Array:
    """uint32 of even bits for each place of an array, at each step others."""
    h = step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(salt)
    return position_hash.mixed(position_hash.numbers(shape) ^ position_hash.mixed(h))


def to_bfloat16(x: jax.Array, rolled: jax.Array) -> jax.Array:
    """Rounded up with the probability that makes the mean x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (rolled & 0xFFFF)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def signed_level(code: jax.Array) -> jax.Array:
    """0, and 127 magnitudes up to 1, an eighth of an octave apart."""
    return jnp.where(code == 0, 0.0, jnp.exp2((jnp.abs(code) - 127.0) / OCTAVE)) * jnp.sign(code)


def unsigned_level(code: jax.Array) -> jax.Array:
    """256 values up to 1, an eighth of an octave apart. None is 0, so that no update is divided by it."""
    return jnp.exp2((code - 255.0) / OCTAVE)


def to_int8(x: jax.Array, rolled: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(codes, scale): one of the two levels beside |x| / scale, with the probability that makes the mean x.

    int8 with `signed`, else uint8. The scale is the largest magnitude along the last axis [..., 1].
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
    """Biases and scales, which stay float32."""
    return x.ndim < 2


def scale_by_adam(b1: float, b2: float, eps: float, kind: Kind) -> optax.GradientTransformation:
    """As optax.scale_by_adam, but for how the moments are kept."""

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

        found = jax.tree.map(one, gradients, state.mu, state.nu, state.mu_scale, state.nu_scale)
        is_found = lambda x: isinstance(x, tuple) and len(x) == 5  # noqa: E731
        updates, mu, mu_scale, nu, nu_scale = (
            jax.tree.map(lambda x, i=i: x[i], found, is_leaf=is_found) for i in range(5)
        )
        return updates, State(step, mu, nu, mu_scale, nu_scale)

    return optax.GradientTransformation(init, update)
