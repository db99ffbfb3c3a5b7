"""Attention as a function of queries, keys, values and a mask, with a custom gradient; rotary positions."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.ops import matmul
from rag_jax.ops.dropout import Drop, dropped
from rag_jax.system import sharding

Source = tuple[jax.Array, jax.Array]  # keys [B, G, C, L] and values [B, G, L, C]


def attention(
    query_BHTC: jax.Array,
    sources: Sequence[Source],
    mask_B1TL: jax.Array,
    drop: Drop | None = None,
    bias_BHTL: jax.Array | None = None,
    scale: float | None = None,
    whole: bool = True,
) -> jax.Array:
    """Scaled dot-product attention [B, H, T, C] (Vaswani et al. 2017, equation 1); C is the width of a head.

    sources: keys and values, attended to as if they were concatenated along L, without a copy in memory. H / G
        neighbouring heads share keys and values (Ainslie et al. 2023).
    mask_B1TL: True where a query attends. A query with none gives the mean of the values, never NaN.
    drop: dropout of the weights.
    bias_BHTL: added to the scaled scores; its B may be 1.
    scale: factor of the scores; None: C ** -0.5.
    whole: False for a step of decoding with a cache. The fused kernel has another layout of the keys and would
        transpose the cache at every step, so it is used only where the queries are all tokens of a text.
    """
    if whole and drop is None and has_fused(query_BHTC, sources):
        return fused_attention(query_BHTC, *sources[0], mask_B1TL, bias_BHTL, scale, "cudnn")
    query_BHTC = query_BHTC * (query_BHTC.shape[-1] ** -0.5 if scale is None else scale)
    keys, values = [key for key, _ in sources], [value for _, value in sources]
    copies = query_BHTC.shape[1] // keys[0].shape[1]
    if copies > 1:
        keys, values = ([_repeated(x, copies) for x in side] for side in (keys, values))
    words, rate = drop or (None, 0.0)
    return _attend(query_BHTC, keys, values, mask_B1TL, bias_BHTL, words, rate)


def _repeated(x_BGXY: jax.Array, copies: int) -> jax.Array:
    """Every group [B, G, ...] repeated for each of its heads: [B, G * copies, ...]."""
    B, G, *rest = x_BGXY.shape
    # broadcast in float32, so that the gradient, a sum over the copies, is summed in float32
    copied = jnp.broadcast_to(x_BGXY[:, :, None].astype(jnp.float32), (B, G, copies, *rest))
    return copied.astype(x_BGXY.dtype).reshape(B, G * copies, *rest)


def has_fused(query_BHTC: jax.Array, sources: Sequence[Source]) -> bool:
    """Whether cuDNN's attention, which never writes the scores to memory, supports these arguments.

    It needs a program for a GPU, 2-byte types, one source, even lengths, and C a multiple of 8 and at most 128. And a
    GPU here: a program that is only counted, for GPUs elsewhere, cannot be traced without cuDNN.
    """
    T, C, L = *query_BHTC.shape[2:], sources[0][0].shape[3]
    fits = len(sources) == 1 and T % 2 == 0 and L % 2 == 0 and C % 8 == 0 and C <= 128
    return fits and query_BHTC.dtype.itemsize == 2 and sharding.platform() == jax.default_backend() == "gpu"


def fused_attention(
    query_BHTC: jax.Array,
    key_BGCL: jax.Array,
    value_BGLC: jax.Array,
    mask_B1TL: jax.Array,
    bias_BHTL: jax.Array | None,
    scale: float | None,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """`attention` computed by jax.nn.dot_product_attention, whose arrays are [B, L, H, C]."""
    query, key, value = query_BHTC.swapaxes(1, 2), key_BGCL.transpose(0, 3, 1, 2), value_BGLC.swapaxes(1, 2)
    bias = None if bias_BHTL is None else bias_BHTL.astype(query.dtype)
    mask = jnp.broadcast_to(mask_B1TL, (mask_B1TL.shape[0], 1, query.shape[1], key.shape[1]))
    out = jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation=implementation)
    return out.swapaxes(1, 2)


def _parts(x_BHTL: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
    """x [B, H, T, L] split along L into the part of each source."""
    ends = np.cumsum([value.shape[2] for value in values])
    return jnp.split(x_BHTL, ends[:-1], axis=-1) if len(values) > 1 else [x_BHTL]


def _products(equation: str, x_BHTC: jax.Array, sources: list[jax.Array], **kind: Any) -> jax.Array:
    """einsum `equation` of x with every source, concatenated along the last axis: [B, H, T, L]."""
    products = [matmul.einsum(equation, x_BHTC, source, **kind) for source in sources]
    return jnp.concatenate(products, axis=-1) if len(products) > 1 else products[0]


def _mix(sums: str, weights: list[jax.Array], sources: list[jax.Array]) -> jax.Array:
    """Weighted sums over all sources [B, H, T, C]; `sums` is the einsum of one."""
    pairs = zip(weights, sources, strict=True)
    return reduce(jnp.add, [matmul.einsum(sums, weight, source) for weight, source in pairs])


def _weights(
    query_BHTC: jax.Array, keys: list[jax.Array], mask_B1TL: jax.Array, bias_BHTL: jax.Array | None
) -> jax.Array:
    """Attention weights [B, H, T, L], float32."""
    scores_BHTL = _products("bhtc,bhcl->bhtl", query_BHTC, keys, preferred_element_type=jnp.float32)
    if bias_BHTL is not None:
        scores_BHTL = scores_BHTL + bias_BHTL.astype(jnp.float32)
    # the least finite number, not -inf: the softmax of a row that is all -inf would be NaN
    return jax.nn.softmax(jnp.where(mask_B1TL, scores_BHTL, jnp.finfo(jnp.float32).min), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    query_BHTC: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    mask_B1TL: jax.Array,
    bias_BHTL: jax.Array | None,
    words: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Attention of scaled queries with a custom gradient.

    The gradient passes over the scores [B, H, T, L] half as often as the derived one.

    words, rate: dropout of the weights, whose mask the backward pass recomputes from the words.
    """
    return _attend_forward(query_BHTC, keys, values, mask_B1TL, bias_BHTL, words, rate)[0]


def _attend_forward(
    query: jax.Array,
    keys: list[jax.Array],
    values: list[jax.Array],
    mask: jax.Array,
    bias: jax.Array | None,
    words: jax.Array | None,
    rate: float,
) -> tuple[jax.Array, tuple]:
    weights = _weights(query, keys, mask, bias).astype(values[0].dtype)
    out = _mix("bhtl,bhlc->bhtc", _parts(dropped(weights, words, rate), values), values)
    return out, (query, keys, values, mask, bias, words, weights, out)


def _each(weights_BHTL: jax.Array, x_BHTC: jax.Array) -> jax.Array:
    """Sums over T of x, weighted: [B, H, L, C].

    On a CPU the weights are transposed in memory first: XLA's fast matmul there needs them in this order, and the
    other one takes twice as long.
    """
    return matmul.einsum("bhlt,bhtc->bhlc", matmul.in_rows(weights_BHTL.swapaxes(2, 3)), x_BHTC)


def _attend_backward(rate: float, saved: tuple, d_out: jax.Array) -> tuple:
    query, keys, values, mask, bias, words, weights, out = saved
    used = dropped(weights, words, rate)
    d_values = [_each(part, d_out) for part in _parts(used, values)]
    d_weights = dropped(_products("bhtc,bhlc->bhtl", d_out, values, preferred_element_type=jnp.float32), words, rate)
    wide = weights.astype(jnp.float32)
    # d_scores = w (d_w - sum_l w d_w), where sum_l w d_w = out . d_out in exact arithmetic. A CPU's float32 matmuls
    # are precise enough to use that. Rounded ones are not: what all values have in common cancels in d_w - inner only
    # if inner is summed from these very weights and d_weights, and divided by the sum of the rounded weights, not 1.
    if wide.dtype == weights.dtype and sharding.platform() == "cpu":
        inner = (out * d_out).sum(-1, keepdims=True)
    else:
        inner = (wide * d_weights).sum(-1, keepdims=True) / wide.sum(-1, keepdims=True)
    d_scores = wide * (d_weights - inner)
    # in a row that is all masked the weights are uniform and depend on no score
    d_scores = jnp.where(mask.any(-1, keepdims=True), d_scores, 0.0)
    d_bias = None
    if bias is not None:
        d_bias = d_scores.sum(0, keepdims=True) if len(bias) == 1 else d_scores
        d_bias = d_bias.astype(bias.dtype)
    d_scores = d_scores.astype(query.dtype)
    parts = _parts(d_scores, values)
    d_keys = [_each(part, query).swapaxes(2, 3) for part in parts]
    return _mix("bhtl,bhcl->bhtc", parts, keys), d_keys, d_values, None, d_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


def rotate(x_BHTC: jax.Array, position_BT: jax.Array, frequency_C2: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021): dimensions i and i + C/2 of a head are rotated by position * frequency[i]."""
    angle_B1TC = (position_BT[..., None].astype(jnp.float32) * frequency_C2)[:, None]
    sin, cos = jnp.sin(angle_B1TC), jnp.cos(angle_B1TC)
    first, second = jnp.split(x_BHTC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTC.dtype)
