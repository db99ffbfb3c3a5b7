"""Building blocks shared by every Transformer here: attention as a plain function, modules that only own parameters.

Parameters are float32 and carry logical axis names (`rag_jax.sharding.RULES` maps them to mesh axes); matrix products
run in `dtype`, LayerNorm and softmax in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Init = Literal["hf", "copy", "lexical"]
NormPlacement = Literal["post", "pre"]
Activation = Literal["gelu", "gelu_new", "relu", "silu"]
Dtype = Any

# under the names of Hugging Face's configurations: gelu is the exact one (erf), gelu_new its tanh approximation
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class KeyValues(NamedTuple):
    """Keys and values of all layers of a decoder, each a list of [B, L, G, C]; G heads, or groups of heads."""

    key: list[jax.Array]
    value: list[jax.Array]


def kernel_init(init: Init) -> Callable:
    """`hf`: normal with std 0.02 (BERT, BART); `copy`, `lexical`: fan-in scaled, for training from scratch."""
    return nn.initializers.normal(0.02) if init == "hf" else nn.initializers.lecun_normal()


def embedding_init(init: Init) -> Callable:
    """`hf`: std 0.02; `copy`, `lexical`: unit scale, so that at the start all tokens are told apart."""
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
    """`hf`: normal with std 0.02; `copy`, `lexical`: sinusoids, still learned."""
    return nn.initializers.normal(0.02) if init == "hf" else sinusoids(offset)


def attention(
    query_BTHC: jax.Array,
    key_BLGC: jax.Array,
    value_BLGC: jax.Array,
    mask_B1TL: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    bias_1HTL: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1). C is the width of a head; mask is True where to
    look.

    H / G neighbouring heads share keys and values (Ainslie et al. 2023). The bias is added to the scores, which are
    multiplied by `scale`, C ** -0.5 by default. A row whose mask is all False gives the mean of the values, never NaN.
    """
    query_BTHC = query_BTHC * (query_BTHC.shape[-1] ** -0.5 if scale is None else scale)
    copies = query_BTHC.shape[2] // key_BLGC.shape[2]
    if copies > 1:
        key_BLGC, value_BLGC = (jnp.repeat(x, copies, axis=2) for x in (key_BLGC, value_BLGC))
    query_BHTC, key_BHLC, value_BHLC = (x.swapaxes(1, 2) for x in (query_BTHC, key_BLGC, value_BLGC))
    if dropout is None:
        return _attend(query_BHTC, key_BHLC, value_BHLC, mask_B1TL, bias_1HTL).swapaxes(1, 2)
    weights_BHTL = dropout(_weights(query_BHTC, key_BHLC, mask_B1TL, bias_1HTL)).astype(value_BHLC.dtype)
    return jnp.einsum("bhtl,bhlc->bthc", weights_BHTL, value_BHLC)


def _weights(
    query_BHTC: jax.Array, key_BHLC: jax.Array, mask_B1TL: jax.Array, bias_1HTL: jax.Array | None
) -> jax.Array:
    scores_BHTL = jnp.einsum("bhtc,bhlc->bhtl", query_BHTC, key_BHLC, preferred_element_type=jnp.float32)
    if bias_1HTL is not None:
        scores_BHTL = scores_BHTL + bias_1HTL.astype(jnp.float32)
    return jax.nn.softmax(jnp.where(mask_B1TL, scores_BHTL, jnp.finfo(jnp.float32).min), axis=-1)


@jax.custom_vjp
def _attend(
    query_BHTC: jax.Array,
    key_BHLC: jax.Array,
    value_BHLC: jax.Array,
    mask_B1TL: jax.Array,
    bias_1HTL: jax.Array | None,
) -> jax.Array:
    """Attention without dropout. Its own gradient passes over the [B, H, T, L] scores half as often as the derived
    one.
    """
    return _attend_forward(query_BHTC, key_BHLC, value_BHLC, mask_B1TL, bias_1HTL)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
    weights = _weights(query, key, mask, bias).astype(value.dtype)
    out = jnp.einsum("bhtl,bhlc->bhtc", weights, value)
    return out, (query, key, value, mask, bias, weights, out)


def _attend_backward(saved: tuple, d_out: jax.Array) -> tuple:
    query, key, value, mask, bias, weights, out = saved
    d_value = jnp.einsum("bhtl,bhtc->bhlc", weights, d_out)
    d_weights = jnp.einsum("bhtc,bhlc->bhtl", d_out, value)
    # the softmax's gradient needs sum_l w_l dw_l, which is out . d_out
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - inner)
    # where all is masked the weights are even, but no score was used
    d_scores = jnp.where(mask.any(-1, keepdims=True), d_scores, 0.0).astype(query.dtype)
    d_bias = None if bias is None else d_scores.astype(bias.dtype).sum(0, keepdims=True)
    d_query = jnp.einsum("bhtl,bhlc->bhtc", d_scores, key)
    return d_query, jnp.einsum("bhtl,bhtc->bhlc", d_scores, query), d_value, None, d_bias


_attend.defvjp(_attend_forward, _attend_backward)


def write_cache(
    cache: tuple[jax.Array, jax.Array, jax.Array | int], new: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The keys and values [B, T, G, C] of a cache (keys, values, position) with new ones written at the position."""
    key, value, position = cache
    return (
        jax.lax.dynamic_update_slice_in_dim(key, new[0].astype(key.dtype), position, axis=1),
        jax.lax.dynamic_update_slice_in_dim(value, new[1].astype(value.dtype), position, axis=1),
    )


def rotate(x_BTHC: jax.Array, position_BT: jax.Array, frequency_C2: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): dimensions i and i + C/2 of a head turned by position * frequency[i]."""
    angle_BT1C = (position_BT[..., None].astype(jnp.float32) * frequency_C2)[:, :, None]
    sin, cos = jnp.sin(angle_BT1C), jnp.cos(angle_BT1C)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHC.dtype)


class Dense(nn.Module):
    """y = x W + b with W [in, out] and logical axis names for both. `out`: type of y, `dtype` if None."""

    features: int
    names: tuple[str, str]
    init: Init = "hf"
    dtype: Dtype = jnp.float32
    use_bias: bool = True
    out: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(kernel_init(self.init), self.names), shape)
        y = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=self.out)
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


class RMSNorm(nn.Module):
    """x / rms(x), with a scale and no bias (Zhang and Sennrich 2019), computed in float32."""

    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale).astype(self.dtype)


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
        """hidden [..., D] -> [..., rows] in float32: logits rounded to bfloat16 would be off by several thousandths."""
        return jnp.matmul(hidden, self.embedding.astype(self.dtype).T, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """Multi-head attention; `project` gives keys and values, `__call__` attends to them.

    By default as in BERT and BART: head_width = width / heads, a key and a value for every head, biased projections.
    `turn` (rotary positions) is applied to the heads of queries and keys.
    """

    heads: int
    width: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    head_width: int = 0
    groups: int = 0  # of heads that share keys and values; 0: every head has its own
    use_bias: bool = True  # of queries, keys and values
    use_out_bias: bool = True
    scale: float | None = None  # of the scores; None: head_width ** -0.5

    def setup(self) -> None:
        size, groups = self.head_width or self.width // self.heads, self.groups or self.heads

        def inner(heads: int) -> Dense:
            return Dense(heads * size, ("embed", "heads"), self.init, self.dtype, self.use_bias)

        self.query, self.key, self.value = inner(self.heads), inner(groups), inner(groups)
        self.out = Dense(self.width, ("heads", "embed"), self.init, self.dtype, self.use_out_bias)
        self.drop = nn.Dropout(self.dropout)

    def split(self, x_BLX: jax.Array) -> jax.Array:
        """[B, L, heads * C] -> [B, L, heads, C]"""
        return x_BLX.reshape(*x_BLX.shape[:-1], -1, self.head_width or self.width // self.heads)

    def project(
        self, source_BLD: jax.Array, turn: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, L, G, C] of the source."""
        key = self.split(self.key(source_BLD))
        return key if turn is None else turn(key), self.split(self.value(source_BLD))

    def __call__(
        self,
        x_BTD: jax.Array,
        kv: tuple[jax.Array, jax.Array],
        mask_B1TL: jax.Array,
        deterministic: bool = True,
        bias_1HTL: jax.Array | None = None,
        turn: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        drop = None if deterministic or self.dropout == 0.0 else lambda w: self.drop(w, deterministic=False)
        query = self.split(self.query(x_BTD))
        query = query if turn is None else turn(query)
        out_BTHC = attention(query, *kv, mask_B1TL, drop, bias_1HTL, self.scale)
        return self.out(out_BTHC.reshape(*x_BTD.shape[:-1], -1))


class FeedForward(nn.Module):
    """W2 f(W1 x), f the exact gelu as in BERT and BART by default; gated: W2 (f(W1 x) * W3 x) (Shazeer 2020)."""

    width: int
    hidden: int
    init: Init = "hf"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    activation: Activation = "gelu"
    gated: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        def inner(name: str) -> jax.Array:
            return Dense(self.hidden, ("embed", "mlp"), self.init, self.dtype, self.use_bias, name=name)(x)

        h = ACTIVATIONS[self.activation](inner("inner"))
        h = h * inner("linear") if self.gated else h
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        return Dense(self.width, ("mlp", "embed"), self.init, self.dtype, self.use_bias, name="outer")(h)


def residual(norm: Callable, placement: NormPlacement, x: jax.Array, sublayer: Callable) -> jax.Array:
    """x + f(LN(x)) for `pre`, LN(x + f(x)) for `post`."""
    return x + sublayer(norm(x)) if placement == "pre" else norm(x + sublayer(x))
