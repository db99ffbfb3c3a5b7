"""The output layer, computed a chunk of the vocabulary at a time, so that losses need no logits [B, K, T, V] in memory.

Letters as in `losses`; also P parts of the vocabulary with v rows of a chunk each, and S shards of X tokens each. All
log-probabilities are natural logarithms in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from rag_jax.ops.matmul import dot_general, einsum
from rag_jax.system import sharding

NAMES = ("vocab", "embed")  # logical axes of the kernel


class OutputLayer(NamedTuple):
    """The output layer: logits [..., V] = scale * hidden [..., D] @ kernel_VD^T + bias_V.

    kernel_VD: the parameter; matmuls have the type of the hidden states, its gradient is summed in the parameter's.
    chunk: tokens of the vocabulary whose logits are in memory at a time, see `logits_of`.
    parts: shards of the vocabulary over devices; V is a multiple of it.
    shards: shards of the batch over devices; the first axis of the states is a multiple of it. The gradient of the
        kernel is summed over them once, not for every chunk.
    """

    kernel_VD: jax.Array
    bias_V: jax.Array
    scale: float = 1.0
    chunk: int = 4096
    parts: int = 1
    shards: int = 1

    def read(self, hidden_BKTD: jax.Array, targets_BT: jax.Array) -> "Logits":
        """Logsumexp, target's logit and sum of the logits of every state."""
        kernel_VD, bias_V, *how = self
        return logits_of(hidden_BKTD, kernel_VD, bias_V, targets_BT, *how)


class Logits(NamedTuple):
    """Summary of logits [..., V].

    norm: logsumexp over V [...].
    target: the target's logit [...]; 0 without targets.
    total: sum over V [...].
    """

    norm: jax.Array
    target: jax.Array
    total: jax.Array


def vocabulary_norm(
    hidden: jax.Array,
    kernel_VD: jax.Array,
    bias_V: jax.Array,
    scale: float = 1.0,
    chunk: int = 4096,
    parts: int = 1,
    shards: int = 1,
) -> jax.Array:
    """Logsumexp over V [...] of the logits hidden [..., D] @ kernel^T * scale + bias; see `logits_of`."""
    return logits_of(hidden, kernel_VD, bias_V, None, scale, chunk, parts, shards).norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def logits_of(
    hidden: jax.Array,
    kernel_VD: jax.Array,
    bias_V: jax.Array,
    targets_BT: jax.Array | None,
    scale: float,
    chunk: int,
    parts: int,
    shards: int,
) -> Logits:
    """Summary of the logits hidden [B, K, T, D] @ kernel^T * scale + bias; without targets hidden may be [..., D].

    The logits [..., V] are never in memory at once: the backward pass, a custom one, computes them a second time, chunk
    by chunk. With chunk = 0 all are computed once and kept for it: a quarter less work, for 4 bytes a logit.

    The gradient with respect to the logits, p - 1 at the target and p elsewhere, is complete before it is rounded to
    the type of the matmuls. If p and 1 were rounded separately, their difference would be lost where p is near 1.
    """
    return _logits_forward(hidden, kernel_VD, bias_V, targets_BT, scale, chunk, parts, shards)[0]


class _Chunks(NamedTuple):
    """The vocabulary in chunks of the same rows of every part, so that all devices work on every chunk.

    kernel_PVD, bias_PV: the output layer, split into the parts.
    size: v, rows of a chunk in each part. Shapes are static, so the last chunk may overlap the one before; the rows
        that they share are masked in the last.
    """

    kernel_PVD: jax.Array
    bias_PV: jax.Array
    scale: float
    size: int

    @classmethod
    def of(cls, kernel_VD: jax.Array, bias_V: jax.Array, scale: float, chunk: int, parts: int) -> "_Chunks":
        V, D = kernel_VD.shape
        each = V // parts
        size = min(max(chunk // parts, 1), each) if chunk else each
        return cls(kernel_VD.reshape(parts, each, D), bias_V.reshape(parts, each), scale, size)

    @property
    def steps(self) -> int:
        """Number of chunks."""
        return -(-self.bias_PV.shape[1] // self.size)

    def at(self, number: jax.Array | int) -> jax.Array:
        """First row of a chunk in every part."""
        return jnp.minimum(number * self.size, self.bias_PV.shape[1] - self.size)

    def rows(self, number: jax.Array | int) -> jax.Array:
        """The kernel's rows of a chunk [P, v, D]."""
        return jax.lax.dynamic_slice_in_dim(self.kernel_PVD, self.at(number), self.size, 1)

    def new(self, number: jax.Array | int) -> jax.Array:
        """True for rows that the chunk before did not have [v]."""
        return jnp.arange(self.size) + self.at(number) >= number * self.size

    def tokens(self, number: jax.Array | int) -> jax.Array:
        """Token ids of the rows of a chunk [P, v]; -1 where the chunk before had them."""
        parts, each = self.bias_PV.shape
        tokens_PV = jnp.arange(parts)[:, None] * each + self.at(number) + jnp.arange(self.size)
        return jnp.where(self.new(number), tokens_PV, -1)

    def bias(self, number: jax.Array | int) -> jax.Array:
        """Biases of the rows of a chunk [P, v]; -inf where the chunk before had them, which makes their p 0."""
        bias_PV = jax.lax.dynamic_slice_in_dim(self.bias_PV, self.at(number), self.size, 1)
        return jnp.where(self.new(number), bias_PV, -jnp.inf)

    def logits(self, hidden: jax.Array, number: jax.Array) -> jax.Array:
        """Logits [..., P, v] of a chunk."""
        products = einsum("...d,pvd->...pv", hidden, self.rows(number), preferred_element_type=jnp.float32)
        return products * self.scale + self.bias(number)

    def products(self, hidden_SXD: jax.Array, number: jax.Array | int) -> jax.Array:
        """hidden @ kernel^T of a chunk [P, v, S, X], without scale and bias; for the axis order see `_gradients`."""
        return _product(self.rows(number), hidden_SXD, ((2,), (2,)))

    def biased(self, products_PVSX: jax.Array, number: jax.Array | int) -> jax.Array:
        """Logits of a chunk from its `products`."""
        return products_PVSX * self.scale + self.bias(number)[..., None, None]


def _product(one: jax.Array, other: jax.Array, contracted: Any, batch: Any = ((), ()), **kind: Any) -> jax.Array:
    return dot_general(one, other, (contracted, batch), preferred_element_type=jnp.float32, **kind)


def _at_targets(hidden_BKTD: jax.Array, kernel_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Products of the states with their targets' rows of the kernel [B, K, T]."""
    return jnp.einsum("bktd,btd->bkt", hidden_BKTD, kernel_VD[targets_BT], preferred_element_type=jnp.float32)


def _logits_forward(
    hidden: jax.Array,
    kernel_VD: jax.Array,
    bias_V: jax.Array,
    targets_BT: jax.Array | None,
    scale: float,
    chunk: int,
    parts: int,
    shards: int,
) -> tuple[Logits, tuple]:
    used_VD = sharding.gathered(kernel_VD, NAMES, hidden.dtype)
    chunks, kept_PVSX = _Chunks.of(used_VD, bias_V, scale, chunk, parts), None
    if chunk:

        def one(norm: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            return jnp.logaddexp(norm, logsumexp(chunks.logits(hidden, number), axis=(-2, -1))), None

        norm = jax.lax.scan(one, jnp.full(hidden.shape[:-1], -jnp.inf), jnp.arange(chunks.steps))[0]
    else:
        kept_PVSX = chunks.products(hidden.reshape(shards, -1, hidden.shape[-1]), 0)
        norm = logsumexp(chunks.biased(kept_PVSX, 0), axis=(0, 1)).reshape(hidden.shape[:-1])
    target = jnp.zeros_like(norm)
    if targets_BT is not None:
        target = _at_targets(hidden, used_VD, targets_BT) * scale + bias_V[targets_BT][:, None]
    # the sum of the logits is the product with the sum of the kernel's rows, which a TPU must not round to bfloat16
    sum_D = used_VD.astype(jnp.float32).sum(0)
    total = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), sum_D, precision="highest")
    summary = Logits(norm, target, total * scale + bias_V.sum())
    # the empty array carries the parameter's type
    return summary, (hidden, used_VD, bias_V, targets_BT, norm, kept_PVSX, jnp.zeros(0, kernel_VD.dtype))


def _gradients(
    chunks: _Chunks,
    hidden: jax.Array,
    shards: int,
    d_logits: Callable[[jax.Array, jax.Array], jax.Array],
    kept_PVSX: jax.Array | None = None,
) -> tuple:
    """Gradients of hidden, kernel [V, D] and bias [V], and the sum over V of the gradient of the logits [...].

    d_logits: (logits of a chunk [P, v, S, X], number of the chunk) -> the gradient of these logits.
    kept_PVSX: products that the forward pass kept, if there is only one chunk.

    The vocabulary axes of logits come first, so that the two matmuls only transpose their small operands, never the
    logits. (einsum would choose another order.)
    """
    hidden_SXD = hidden.reshape(shards, -1, hidden.shape[-1])
    S, X, D = hidden_SXD.shape
    ones_SX = jnp.ones((S, X))

    def add(total: jax.Array, part: jax.Array, number: jax.Array) -> jax.Array:
        start = chunks.at(number)
        old = jax.lax.dynamic_slice_in_dim(total, start, chunks.size, 2)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)

    def one(sums: tuple, number: jax.Array) -> tuple[tuple, None]:
        hidden_DSX, d_kernel_SPVD, d_bias_SPV, total_SX = sums
        products_PVSX = chunks.products(hidden_SXD, number) if kept_PVSX is None else kept_PVSX
        d_PVSX = d_logits(chunks.biased(products_PVSX, number), number)
        # a sum over X, as a matmul with ones; at the default precision a TPU would round its operand
        d_bias = _product(d_PVSX, ones_SX, ((3,), (1,)), ((2,), (0,)), precision="highest")
        total_SX = total_SX + d_PVSX.sum((0, 1))
        d_PVSX = d_PVSX.astype(hidden.dtype)
        hidden_DSX = hidden_DSX + _product(chunks.rows(number), d_PVSX, ((0, 1), (0, 1)))
        d_kernel = _product(d_PVSX, hidden_SXD, ((3,), (1,)), ((2,), (0,)))
        return (hidden_DSX, add(d_kernel_SPVD, d_kernel, number), add(d_bias_SPV, d_bias, number), total_SX), None

    shapes = ((D, S, X), (S, *chunks.kernel_PVD.shape), (S, *chunks.bias_PV.shape), (S, X))
    sums = jax.lax.scan(one, tuple(jnp.zeros(shape) for shape in shapes), jnp.arange(chunks.steps))[0]
    hidden_DSX, d_kernel_SPVD, d_bias_SPV, total_SX = sums
    # only here are the shards of the batch summed: one reduction between devices, not one for every chunk
    d_hidden = (hidden_DSX * chunks.scale).transpose(1, 2, 0).reshape(hidden.shape).astype(hidden.dtype)
    d_kernel_VD = (d_kernel_SPVD.sum(0) * chunks.scale).reshape(-1, D)
    return d_hidden, d_kernel_VD, d_bias_SPV.sum(0).reshape(-1), total_SX.reshape(hidden.shape[:-1])


def _logits_backward(scale: float, chunk: int, parts: int, shards: int, saved: tuple, d_found: Logits) -> tuple:
    hidden, used_VD, bias_V, targets_BT, norm, kept, like = saved
    chunks = _Chunks.of(used_VD, bias_V, scale, chunk, parts)
    flat = functools.partial(jnp.reshape, shape=(shards, -1))  # one long axis: XLA vectorises no other on a CPU
    norm_SX, d_norm_SX, d_total_SX = flat(norm), flat(d_found.norm), flat(d_found.total)
    d_target_SX = flat(d_found.target)
    if targets_BT is not None:
        targets_SX = flat(jnp.broadcast_to(targets_BT[:, None], norm.shape))

    def d_logits(logits_PVSX: jax.Array, number: jax.Array) -> jax.Array:
        tokens_PV11 = chunks.tokens(number)[..., None, None]
        d_PVSX = jnp.exp(logits_PVSX - norm_SX) * d_norm_SX + jnp.where(tokens_PV11 >= 0, d_total_SX, 0.0)
        if targets_BT is None:
            return d_PVSX
        return d_PVSX + jnp.where(tokens_PV11 == targets_SX, d_target_SX, 0.0)

    d_hidden, d_kernel, d_bias, _ = _gradients(chunks, hidden, shards, d_logits, kept)
    return d_hidden, sharding.constrain(d_kernel.astype(like.dtype), *NAMES), d_bias, None


logits_of.defvjp(_logits_forward, _logits_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def summed_marginal(
    hidden_BKTD: jax.Array,
    kernel_VD: jax.Array,
    bias_V: jax.Array,
    norm_BKT: jax.Array,
    prior_BK: jax.Array,
    scale: float,
    chunk: int,
    parts: int,
    shards: int,
) -> jax.Array:
    """Sum over V of log sum_k p(z_k|x) p(v|z_k) [B, T], computed a chunk of the vocabulary at a time.

    norm_BKT: logsumexp of the logits, an argument with a gradient of its own.
    prior_BK: log p(z_k|x).
    scale, chunk, parts, shards: see `OutputLayer`.
    """
    return _marginal_forward(hidden_BKTD, kernel_VD, bias_V, norm_BKT, prior_BK, scale, chunk, parts, shards)[0]


def _marginal_forward(
    hidden: jax.Array,
    kernel_VD: jax.Array,
    bias_V: jax.Array,
    norm: jax.Array,
    prior: jax.Array,
    scale: float,
    chunk: int,
    parts: int,
    shards: int,
) -> tuple[jax.Array, tuple]:
    used_VD = sharding.gathered(kernel_VD, NAMES, hidden.dtype)
    chunks, add_BKT = _Chunks.of(used_VD, bias_V, scale, chunk, parts), prior[..., None] - norm

    def one(total_BT: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        marginal = logsumexp(chunks.logits(hidden, number) + add_BKT[..., None, None], axis=1)
        return total_BT + jnp.where(jnp.isneginf(marginal), 0.0, marginal).sum((-2, -1)), None

    total_BT = jax.lax.scan(one, jnp.zeros((len(norm), norm.shape[2])), jnp.arange(chunks.steps))[0]
    return total_BT, (hidden, used_VD, bias_V, norm, prior, jnp.zeros(0, kernel_VD.dtype))


def _marginal_backward(scale: float, chunk: int, parts: int, shards: int, saved: tuple, d_total_BT: jax.Array) -> tuple:
    hidden, used_VD, bias_V, norm, prior, like = saved
    chunks, add_BKT = _Chunks.of(used_VD, bias_V, scale, chunk, parts), prior[..., None] - norm
    add = add_BKT.reshape(shards, -1, *add_BKT.shape[1:])
    d_SX = jnp.broadcast_to(d_total_BT[:, None], add_BKT.shape).reshape(shards, -1)

    def d_logits(logits_PVSX: jax.Array, _: jax.Array) -> jax.Array:
        """Gradient of the logits of a chunk: each document's share in a token's probability, times d."""
        logits_PVSBKT = logits_PVSX.reshape(*logits_PVSX.shape[:3], -1, *hidden.shape[1:-1])
        share_PVSBKT = jax.nn.softmax(logits_PVSBKT + add, axis=-2)
        return jnp.where(jnp.isneginf(logits_PVSBKT), 0.0, share_PVSBKT).reshape(logits_PVSX.shape) * d_SX

    d_hidden, d_kernel, d_bias, d_add_BKT = _gradients(chunks, hidden, shards, d_logits)
    d_kernel = sharding.constrain(d_kernel.astype(like.dtype), *NAMES)
    return d_hidden, d_kernel, d_bias, -d_add_BKT, d_add_BKT.sum(-1)


summed_marginal.defvjp(_marginal_forward, _marginal_backward)
