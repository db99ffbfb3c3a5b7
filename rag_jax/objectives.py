"""Arrays -> scalars: the marginal likelihoods of RAG (Lewis et al. 2020, section 2) and the losses of the retriever.

Knows no model. Letters: B questions, K documents per question, T target length, V vocabulary, E retrieval width,
P passages of a batch. `mask_BT` is True where a target token counts. Everything is natural-log, float32.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, logsumexp

from rag_jax.products import dot_general, einsum

Prior = Literal["paper", "hf_compat"]
ABSENT = -1e9  # score of a passage that was not found: its prior, exp of this, is exactly 0, and products with 0 are 0


def prior_logp(scores_BK: jax.Array, log_normaliser_B: jax.Array | None = None) -> jax.Array:
    """log p(z_k|x): softmax of the raw inner products over the K retrieved documents only (section 2.2).

    With a log_normaliser_B, that of all passages, p(z|x) is over the whole corpus, and the K sum to less than 1.
    """
    scores_BK = scores_BK.astype(jnp.float32)
    return log_softmax(scores_BK, axis=-1) if log_normaliser_B is None else scores_BK - log_normaliser_B[:, None]


def of_found(scores_BK: jax.Array, found_BK: jax.Array) -> jax.Array:
    """Scores in which passages that were not found have no share of the prior, and no gradient.

    Where a question has none at all, its first slot has all of the prior: the reader is given an empty passage there.
    """
    first_K = jnp.arange(scores_BK.shape[1]) == 0
    nothing_B1 = ~found_BK.any(-1, keepdims=True)
    return jnp.where(found_BK, scores_BK, jnp.where(nothing_B1 & first_K, 0.0, ABSENT))


def absent(prior_logp_BK: jax.Array) -> jax.Array:
    """Which passages were not found, by their log prior."""
    return prior_logp_BK < ABSENT / 2


class Head(NamedTuple):
    """The output layer: logits [..., V] = scale * hidden [..., D] @ kernel_VD^T + bias_V.

    parts: pieces of the vocabulary that lie on different devices; V is a multiple of it. chunk: how much of the
    vocabulary there are logits of at a time, see `vocabulary_norm`. shards: pieces of the batch that lie on different
    devices; the first axis of the states is a multiple of it, and the gradient of the kernel is summed over them once,
    not for every chunk.
    """

    kernel_VD: jax.Array
    bias_V: jax.Array
    scale: float = 1.0
    chunk: int = 4096
    parts: int = 1
    shards: int = 1

    def norm(self, hidden: jax.Array) -> jax.Array:
        """logsumexp of the logits over V [...]."""
        return vocabulary_norm(hidden, *self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def vocabulary_norm(
    hidden: jax.Array,
    kernel_VD: jax.Array,
    bias_V: jax.Array,
    scale: float = 1.0,
    chunk: int = 4096,
    parts: int = 1,
    shards: int = 1,
) -> jax.Array:
    """logsumexp over V of hidden [..., D] @ kernel^T * scale + bias [...], without the logits [..., V] ever existing,
    also in the gradient, which makes them a second time, a chunk of the vocabulary after the other.

    With chunk = 0 all of them are made once and kept for the gradient: a quarter less work, for 4 bytes a logit.
    """
    return _norm_forward(hidden, kernel_VD, bias_V, scale, chunk, parts, shards)[0]


class _Chunks(NamedTuple):
    """The vocabulary in chunks, each the same rows of every part; the last chunk begins inside the one before."""

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
        return -(-self.bias_PV.shape[1] // self.size)

    def at(self, number: jax.Array | int) -> jax.Array:
        return jnp.minimum(number * self.size, self.bias_PV.shape[1] - self.size)

    def rows(self, number: jax.Array | int, dtype: Any) -> jax.Array:
        """The kernel's rows of a chunk [P, v, D]."""
        return jax.lax.dynamic_slice_in_dim(self.kernel_PVD, self.at(number), self.size, 1).astype(dtype)

    def bias(self, number: jax.Array | int) -> jax.Array:
        """Their bias [P, v], -inf where the chunk before had them."""
        start = self.at(number)
        new = jnp.arange(self.size) + start >= number * self.size
        return jnp.where(new, jax.lax.dynamic_slice_in_dim(self.bias_PV, start, self.size, 1), -jnp.inf)

    def logits(self, hidden: jax.Array, number: jax.Array) -> jax.Array:
        """Logits [..., P, v] of a chunk."""
        rows = self.rows(number, hidden.dtype)
        products = einsum("...d,pvd->...pv", hidden, rows, preferred_element_type=jnp.float32)
        return products * self.scale + self.bias(number)

    def products(self, hidden_SXD: jax.Array, number: jax.Array | int) -> jax.Array:
        """hidden @ kernel^T of a chunk [P, v, S, X]; the vocabulary comes first, see `_gradients`."""
        return _product(self.rows(number, hidden_SXD.dtype), hidden_SXD, ((2,), (2,)))

    def biased(self, products_PVSX: jax.Array, number: jax.Array | int) -> jax.Array:
        """The logits that these products make."""
        return products_PVSX * self.scale + self.bias(number)[..., None, None]


def _product(one: jax.Array, other: jax.Array, contracted: Any, batch: Any = ((), ()), **kind: Any) -> jax.Array:
    return dot_general(one, other, (contracted, batch), preferred_element_type=jnp.float32, **kind)


def _norm_forward(
    hidden: jax.Array, kernel_VD: jax.Array, bias_V: jax.Array, scale: float, chunk: int, parts: int, shards: int
) -> tuple[jax.Array, tuple]:
    chunks = _Chunks.of(kernel_VD, bias_V, scale, chunk, parts)
    if not chunk:
        kept_PVSX = chunks.products(hidden.reshape(shards, -1, hidden.shape[-1]), 0)
        norm = logsumexp(chunks.biased(kept_PVSX, 0), axis=(0, 1)).reshape(hidden.shape[:-1])
        return norm, (hidden, kernel_VD, bias_V, norm, kept_PVSX)

    def one(norm: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return jnp.logaddexp(norm, logsumexp(chunks.logits(hidden, number), axis=(-2, -1))), None

    norm = jax.lax.scan(one, jnp.full(hidden.shape[:-1], -jnp.inf), jnp.arange(chunks.steps))[0]
    return norm, (hidden, kernel_VD, bias_V, norm, None)


def _gradients(
    chunks: _Chunks,
    hidden: jax.Array,
    d_SX: jax.Array,
    share_of: Callable[[jax.Array], jax.Array],
    kept_PVSX: jax.Array | None = None,
) -> tuple:
    """Gradients in hidden, kernel [P, V, D] and bias [P, V] of what has the gradient d_SX * share_of(logits) in the
    logits of a chunk [P, v, S, X]; and the sum of that over V [...]. S shards of X tokens. The products of the only
    chunk may have been kept.

    The vocabulary comes first: so only the small operands of the two products are turned over, never the logits.
    (einsum would choose another order.) And it is they that are multiplied by d, which saves a pass over the logits.
    """
    S, X = d_SX.shape
    hidden_SXD = hidden.reshape(S, X, -1)
    times_SXD = (hidden_SXD * (d_SX * chunks.scale)[..., None]).astype(hidden.dtype)

    def add(total: jax.Array, part: jax.Array, number: jax.Array) -> jax.Array:
        start = chunks.at(number)
        old = jax.lax.dynamic_slice_in_dim(total, start, chunks.size, 2)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)

    def one(found: tuple, number: jax.Array) -> tuple[tuple, None]:
        hidden_DSX, d_kernel_SPVD, d_bias_SPV, total_SX = found
        rows = chunks.rows(number, hidden.dtype)
        products_PVSX = chunks.products(hidden_SXD, number) if kept_PVSX is None else kept_PVSX
        share_PVSX = share_of(chunks.biased(products_PVSX, number))
        d_bias = _product(share_PVSX, d_SX, ((3,), (1,)), ((2,), (0,)), precision="highest")  # a sum, as it were
        total_SX = total_SX + share_PVSX.sum((0, 1))
        share_PVSX = share_PVSX.astype(hidden.dtype)
        hidden_DSX = hidden_DSX + _product(rows, share_PVSX, ((0, 1), (0, 1)))
        d_kernel = _product(share_PVSX, times_SXD, ((3,), (1,)), ((2,), (0,)))
        return (hidden_DSX, add(d_kernel_SPVD, d_kernel, number), add(d_bias_SPV, d_bias, number), total_SX), None

    shapes = ((hidden_SXD.shape[-1], S, X), (S, *chunks.kernel_PVD.shape), (S, *chunks.bias_PV.shape), (S, X))
    found = jax.lax.scan(one, tuple(jnp.zeros(shape) for shape in shapes), jnp.arange(chunks.steps))[0]
    hidden_DSX, d_kernel_SPVD, d_bias_SPV, total_SX = found
    d_hidden = (hidden_DSX * (d_SX * chunks.scale)).transpose(1, 2, 0).reshape(hidden.shape).astype(hidden.dtype)
    return d_hidden, d_kernel_SPVD.sum(0), d_bias_SPV.sum(0), (total_SX * d_SX).reshape(hidden.shape[:-1])


def _norm_backward(scale: float, chunk: int, parts: int, shards: int, saved: tuple, d_norm: jax.Array) -> tuple:
    hidden, kernel_VD, bias_V, norm, kept = saved
    chunks = _Chunks.of(kernel_VD, bias_V, scale, chunk, parts)
    norm, d_norm = (x.reshape(shards, -1) for x in (norm, d_norm))  # a CPU makes vectors of one long axis alone
    d_hidden, d_kernel, d_bias, _ = _gradients(chunks, hidden, d_norm, lambda logits: jnp.exp(logits - norm), kept)
    return d_hidden, d_kernel.reshape(kernel_VD.shape).astype(kernel_VD.dtype), d_bias.reshape(bias_V.shape)


vocabulary_norm.defvjp(_norm_forward, _norm_backward)


def logit_at(hidden_BKTD: jax.Array, head: Head, targets_BT: jax.Array) -> jax.Array:
    """The logits of the targets alone [B, K, T]."""
    rows_BTD = head.kernel_VD[targets_BT].astype(hidden_BKTD.dtype)
    products = jnp.einsum("bktd,btd->bkt", hidden_BKTD, rows_BTD, preferred_element_type=jnp.float32)
    return products * head.scale + head.bias_V[targets_BT][:, None]


def summed_logp(hidden: jax.Array, head: Head, norm: jax.Array) -> jax.Array:
    """Sum over V of log p [...], from hidden [..., D] and norm [...]: no logits are needed, the sum is linear."""
    total_D = head.kernel_VD.astype(jnp.float32).sum(0)
    products = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), total_D)
    return products * head.scale + head.bias_V.sum() - len(head.kernel_VD) * norm


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
    """Sum over V of log sum_k p(z_k|x) p(v|z_k) [B, T], a chunk of the vocabulary at a time; see `vocabulary_norm`."""
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
    chunks, add_BKT = _Chunks.of(kernel_VD, bias_V, scale, chunk, parts), prior[..., None] - norm

    def one(total_BT: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        marginal = logsumexp(chunks.logits(hidden, number) + add_BKT[..., None, None], axis=1)
        return total_BT + jnp.where(jnp.isneginf(marginal), 0.0, marginal).sum((-2, -1)), None

    total_BT = jax.lax.scan(one, jnp.zeros((len(norm), norm.shape[2])), jnp.arange(chunks.steps))[0]
    return total_BT, (hidden, kernel_VD, bias_V, norm, prior)


def _marginal_backward(scale: float, chunk: int, parts: int, shards: int, saved: tuple, d_total_BT: jax.Array) -> tuple:
    hidden, kernel_VD, bias_V, norm, prior = saved
    chunks, add_BKT = _Chunks.of(kernel_VD, bias_V, scale, chunk, parts), prior[..., None] - norm
    add, d_SX = add_BKT.reshape(shards, -1, *add_BKT.shape[1:]), jnp.broadcast_to(d_total_BT[:, None], add_BKT.shape)

    def share_of(logits_PVSX: jax.Array) -> jax.Array:
        """Of each document in a token's probability."""
        logits_PVSBKT = logits_PVSX.reshape(*logits_PVSX.shape[:3], -1, *hidden.shape[1:-1])
        share_PVSBKT = jax.nn.softmax(logits_PVSBKT + add, axis=-2)
        return jnp.where(jnp.isneginf(logits_PVSBKT), 0.0, share_PVSBKT).reshape(logits_PVSX.shape)

    d_hidden, d_kernel, d_bias, d_add_BKT = _gradients(chunks, hidden, d_SX.reshape(shards, -1), share_of)
    d_kernel = d_kernel.reshape(kernel_VD.shape).astype(kernel_VD.dtype)
    return d_hidden, d_kernel, d_bias.reshape(bias_V.shape), -d_add_BKT, d_add_BKT.sum(-1)


summed_marginal.defvjp(_marginal_forward, _marginal_backward)


def _check(token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array) -> None:
    shape = token_logp_BKT.shape
    if len(shape) != 3 or prior_BK.shape != shape[:2] or mask_BT.shape != (shape[0], shape[2]):
        raise ValueError(
            "token log-probabilities [B, K, T], prior [B, K] and mask [B, T] do not fit together: "
            f"{shape}, {prior_BK.shape} and {mask_BT.shape}"
        )


def sequence_joint(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """log p(z_k|x) + log p(y|x,z_k) [B, K].

    `hf_compat` counts the prior at the second scored token alone, as transformers does: it vanishes when that token is
    padding.
    """
    _check(token_logp_BKT, prior_BK, mask_BT)
    logp_BK = jnp.where(mask_BT[:, None], token_logp_BKT, 0.0).sum(-1)
    if prior == "paper":
        return logp_BK + prior_BK
    counted_B = mask_BT[:, 1] if mask_BT.shape[1] > 1 else jnp.zeros(len(mask_BT), bool)
    return logp_BK + jnp.where(counted_B[:, None] | absent(prior_BK), prior_BK, 0.0)


def rag_sequence_logp(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """log p(y|x) [B] = logsumexp_k(log p(z_k|x) + sum_t log p(y_t|x,z_k,y_<t)), RAG-Sequence."""
    return logsumexp(sequence_joint(token_logp_BKT, prior_BK, mask_BT, prior), axis=-1)


def rag_token_logp(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """log p(y|x) [B] = sum_t logsumexp_k(log p(z_k|x) + log p(y_t|x,z_k,y_<t)), RAG-Token. Both priors agree here."""
    _check(token_logp_BKT, prior_BK, mask_BT)
    marginal_BT = logsumexp(token_logp_BKT + prior_BK[..., None], axis=1)
    return jnp.where(mask_BT, marginal_BT, 0.0).sum(-1)


def posterior_logp(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """log p(z_k|x,y) [B, K]: which document explains the whole answer, by the joint as `sequence_joint` counts it."""
    return log_softmax(sequence_joint(token_logp_BKT, prior_BK, mask_BT, prior), axis=-1)


def _sequence_smooth(
    hidden_BKTD: jax.Array, head: Head, norm_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior
) -> jax.Array:
    """logsumexp_k of the sum over t and V of log p, the smoothing term of RAG-Sequence [B].

    transformers adds the prior to all V log-probabilities of the second token, so there it counts V times.
    """
    smooth_BKT = summed_logp(hidden_BKTD, head, norm_BKT)
    return logsumexp(sequence_joint(smooth_BKT, prior_BK * len(head.kernel_VD), mask_BT, prior), axis=-1)


def _token_smooth(
    hidden_BKTD: jax.Array, head: Head, norm_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior
) -> jax.Array:
    """Sum over t and V of the marginal log-probabilities [B]."""
    kernel_VD, bias_V, *how = head
    return jnp.where(mask_BT, summed_marginal(hidden_BKTD, kernel_VD, bias_V, norm_BKT, prior_BK, *how), 0.0).sum(-1)


OBJECTIVES = {"rag_sequence": (rag_sequence_logp, _sequence_smooth), "rag_token": (rag_token_logp, _token_smooth)}


def rag_nll(
    objective: str,
    hidden_BKTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    scores_BK: jax.Array,
    *,
    prior: Prior = "paper",
    label_smoothing: float = 0.0,
    first_counts: jax.Array | bool = True,
    log_normaliser_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Negative log marginal likelihood nll_B, summed over tokens (no mean), and token_logp_BKT.

    From the decoder's last states and the output layer: the logits [B, K, T, V] never exist. With label smoothing e:
    (1-e) * nll - (e/V) * smooth, as in transformers. `first_counts`, a scalar: whether the first target token is part
    of the likelihood (of the smoothing term it always is). log_normaliser_B: see prior_logp.
    Raises KeyError for an unknown objective and ValueError for shapes that do not fit together.
    """
    logp, smooth = OBJECTIVES[objective]
    B, K, T, _ = hidden_BKTD.shape
    if targets_BT.shape != (B, T) or scores_BK.shape != (B, K):
        raise ValueError(
            f"states [B, K, T, D] {hidden_BKTD.shape} need targets [B, T] = {(B, T)} and scores [B, K] = {(B, K)}; "
            f"got {targets_BT.shape} and {scores_BK.shape}"
        )
    norm_BKT = head.norm(hidden_BKTD)
    token_logp_BKT = logit_at(hidden_BKTD, head, targets_BT) - norm_BKT
    prior_BK = prior_logp(scores_BK, log_normaliser_B)
    counted_BKT = token_logp_BKT
    if first_counts is not True:
        counted_BKT = token_logp_BKT.at[..., 0].set(jnp.where(first_counts, token_logp_BKT[..., 0], 0.0))
    nll_B = -logp(counted_BKT, prior_BK, mask_BT, prior)
    if label_smoothing:
        smooth_B = smooth(hidden_BKTD, head, norm_BKT, prior_BK, mask_BT, prior)
        nll_B = (1 - label_smoothing) * nll_B - label_smoothing / len(head.kernel_VD) * smooth_B
    return nll_B, token_logp_BKT


def in_batch_contrastive(
    queries_BE: jax.Array, passages_PE: jax.Array, positive_BP: jax.Array, ignore_BP: jax.Array | None = None
) -> jax.Array:
    """DPR's loss [B] (Karpukhin et al. 2020, equation 2): -log softmax of the positive among all passages of the batch.

    `positive_BP` is one-hot, the passage that counts; `ignore_BP` is True for passages left out of the softmax of that
    question: its other right passages, which are no negatives, and padding. ValueError for shapes that do not fit.
    """
    scores_BP = jnp.einsum("be,pe->bp", queries_BE, passages_PE).astype(jnp.float32)
    for name, mask in (("positive", positive_BP), ("ignore", ignore_BP)):
        if mask is not None and mask.shape != scores_BP.shape:
            raise ValueError(f"{name} passages {mask.shape} must be [B, P] = {scores_BP.shape}")
    if ignore_BP is not None:
        scores_BP = jnp.where(ignore_BP & ~positive_BP, -jnp.inf, scores_BP)
    return logsumexp(scores_BP, axis=-1) - jnp.where(positive_BP, scores_BP, 0.0).sum(-1)
