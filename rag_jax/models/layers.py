"""Building blocks shared by every Transformer here: attention as a plain function, modules that only own parameters.

Parameters are float32 and carry logical axis names (`rag_jax.sharding.RULES` maps them to mesh axes); matrix products
run in `dtype`, LayerNorm and softmax in float32.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Init = Literal["hf", "copy"]
NormPlacement = Literal["post", "pre"]
Dtype = Any


def kernel_init(init: Init) -> Callable:
    """`hf`: normal with std 0.02 (BERT, BART); `copy`: fan-in scaled, for training from scratch."""
    return nn.initializers.normal(0.02) if init == "hf" else nn.initializers.lecun_normal()


def embedding_init(init: Init) -> Callable:
    """`hf`: std 0.02; `copy`: unit scale, so that at the start every token is told apart from every other."""
    return nn.initializers.normal(0.02 if init == "hf" else 1.0)


def sinusoids(offset: int) -> Callable:
    """Initialiser of a position table [P, D]: sinusoids (Vaswani et al. 2017, section 3.5) from row `offset` on.

    A shift by one position is then a linear map, so "the token after this one" is easy to learn from scratch.
    """

    def init(_key: jax.Array, shape: tuple[int, int], dtype: Dtype = jnp.float32) -> jax.Array:
        positions = np.arange(shape[0])[:, None] - offset
        rates = np.exp(-np.log(10_000.0) * np.arange(0, shape[1], 2) / shape[1])
        table = np.zeros(shape)
        table[:, 0::2] = np.sin(positions * rates)
        table[:, 1::2] = np.cos(positions * rates)[:, : shape[1] // 2]
        return jnp.asarray(table, dtype)

    return init


def position_init(init: Init, offset: int = 0) -> Callable:
    """`hf`: normal with std 0.02; `copy`: sinusoids, still learned."""
    return nn.initializers.normal(0.02) if init == "hf" else sinusoids(offset)


def attention(
    query_BTHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_B1TL: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1). C is the width of a head; mask is True where to
    look.

    A row whose mask is all False gives the mean of the values, never NaN.
    """
    query_BHTC, key_BHLC, value_BHLC = (x.swapaxes(1, 2) for x in (query_BTHC, key_BLHC, value_BLHC))
    query_BHTC = query_BHTC * query_BHTC.shape[-1] ** -0.5
    if dropout is None:
        return _attend(query_BHTC, key_BHLC, value_BHLC, mask_B1TL).swapaxes(1, 2)
    weights_BHTL = dropout(_weights(query_BHTC, key_BHLC, mask_B1TL)).astype(value_BHLC.dtype)
    return jnp.einsum("bhtl,bhlc->bthc", weights_BHTL, value_BHLC)


def _weights(query_BHTC: jax.Array, key_BHLC: jax.Array, mask_B1TL: jax.Array) -> jax.Array:
    scores_BHTL = jnp.einsum("bhtc,bhlc->bhtl", query_BHTC, key_BHLC).astype(jnp.float32)
    return jax.nn.softmax(jnp.where(mask_B1TL, scores_BHTL, jnp.finfo(jnp.float32).min), axis=-1)


@jax.custom_vjp
def _attend(query_BHTC: jax.Array, key_BHLC: jax.Array, value_BHLC: jax.Array, mask_B1TL: jax.Array) -> jax.Array:
    """Attention without dropout. Its own gradient passes over the [B, H, T, L] scores half as often as the derived
    one.
    """
    return _attend_forward(query_BHTC, key_BHLC, value_BHLC, mask_B1TL)[0]


def _attend_forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple]:
    weights = _weights(query, key, mask).astype(value.dtype)
    out = jnp.einsum("bhtl,bhlc->bhtc", weights, value)
    return out, (query, key, value, weights, out)


def _attend_backward(saved: tuple, d_out: jax.Array) -> tuple:
    query, key, value, weights, out = saved
    d_value = jnp.einsum("bhtl,bhtc->bhlc", weights, d_out)
    d_weights = jnp.einsum("bhtc,bhlc->bhtl", d_out, value)
    # the softmax's gradient needs sum_l w_l dw_l, which is out . d_out
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (weights * (d_weights - inner)).astype(query.dtype)
    d_query = jnp.einsum("bhtl,bhlc->bhtc", d_scores, key)
    return d_query, jnp.einsum("bhtl,bhtc->bhlc", d_scores, query), d_value, None


_attend.defvjp(_attend_forward, _attend_backward)


class Dense(nn.Module):
    """y = x W + b with W [in, out] and logical axis names for both."""

    features: int
    names: tuple[str, str]
    init: Init = "hf"
    dtype: Dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(kernel_init(self.init), self.names), shape)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.names[1:])
            y = y + self.param("bias", zeros, shape[1:]).astype(self.dtype)
        return y


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, computed in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = ("norm",)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), names), x.shape[-1:])
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), names), x.shape[-1:])
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * inverse * scale + bias).astype(self.dtype)


class Embed(nn.Module):
    """A table [rows, D]; `attend` uses it as the output projection (tied)."""

    rows: int
    features: int
    names: tuple[str, str]
    initializer: Callable
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        init = nn.with_logical_partitioning(self.initializer, self.names)
        self.embedding = self.param("embedding", init, (self.rows, self.features))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding.astype(self.dtype)[ids]

    def attend(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> [..., rows]"""
        return hidden @ self.embedding.astype(self.dtype).T


class Attention(nn.Module):
    """Multi-head attention with biased projections; `project` gives keys and values, `__call__` attends to them."""

    heads: int
    width: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        def dense(names: tuple[str, str]) -> Dense:
            return Dense(self.width, names, self.init, self.dtype)

        self.query, self.key, self.value = (dense(("embed", "heads")) for _ in range(3))
        self.out = dense(("heads", "embed"))
        self.drop = nn.Dropout(self.dropout)

    def split(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD.reshape(*x_BLD.shape[:-1], self.heads, self.width // self.heads)

    def project(self, source_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, L, H, C] of the source."""
        return self.split(self.key(source_BLD)), self.split(self.value(source_BLD))

    def __call__(
        self,
        x_BTD: jax.Array,
        kv: tuple[jax.Array, jax.Array],
        mask_B1TL: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        drop = None if deterministic or self.dropout == 0.0 else lambda w: self.drop(w, deterministic=False)
        out_BTHC = attention(self.split(self.query(x_BTD)), *kv, mask_B1TL, drop)
        return self.out(out_BTHC.reshape(x_BTD.shape))


class FeedForward(nn.Module):
    """W2 gelu(W1 x) with the exact (erf) gelu, as in BERT and BART."""

    width: int
    hidden: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        h = Dense(self.hidden, ("embed", "mlp"), self.init, self.dtype, name="inner")(x)
        h = jax.nn.gelu(h, approximate=False)
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        return Dense(self.width, ("mlp", "embed"), self.init, self.dtype, name="outer")(h)


def residual(norm: Callable, placement: NormPlacement, x: jax.Array, sublayer: Callable) -> jax.Array:
    """x + f(LN(x)) for `pre`, LN(x + f(x)) for `post`."""
    return x + sublayer(norm(x)) if placement == "pre" else norm(x + sublayer(x))
