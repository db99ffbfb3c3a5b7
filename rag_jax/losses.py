"""The marginal likelihoods of RAG (Lewis et al. 2020, section 2) and losses of the retriever, as functions of arrays.

No model is used here. Letters: B questions, K documents per question, T target length, D width of the states,
V vocabulary, E retrieval width, P passages of a batch. `mask_BT` is True where a target token counts. All
log-probabilities are natural logarithms in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, logsumexp

from rag_jax.ops.vocab_loss import Logits, OutputLayer, summed_marginal

Prior = Literal["paper", "hf_compat"]
# Score of a missing document, where a search found fewer than K. Its prior, the exponential, is exactly 0 in float32;
# unlike -inf it gives 0, not NaN, when it is multiplied by 0.
ABSENT = -1e9


# q . d in full float32, also in the gradient: a TPU would multiply in bfloat16. The gradient in q is a sum over
# passages of (prior - posterior) d, in which the large part that all embeddings have in common must cancel.
inner_products = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def prior_logp(scores_BK: jax.Array, log_normaliser_B: jax.Array | None = None) -> jax.Array:
    """log p(z_k|x) [B, K]: log-softmax of the raw inner products over the K retrieved documents (section 2.2).

    log_normaliser_B: logsumexp of the scores of all passages; p(z|x) is then over the whole corpus, and those of the
        K documents sum to less than 1. None: over the K documents only.
    """
    scores_BK = scores_BK.astype(jnp.float32)
    return log_softmax(scores_BK, axis=-1) if log_normaliser_B is None else scores_BK - log_normaliser_B[:, None]


def of_found(scores_BK: jax.Array, found_BK: jax.Array) -> jax.Array:
    """Scores [B, K] in which missing documents have prior 0 and no gradient.

    found_BK: False where the search had no passage to return.

    Where nothing was found for a question, its first document has prior 1: the generator reads an empty passage there.
    """
    first_K = jnp.arange(scores_BK.shape[1]) == 0
    nothing_B1 = ~found_BK.any(-1, keepdims=True)
    return jnp.where(found_BK, scores_BK, jnp.where(nothing_B1 & first_K, 0.0, ABSENT))


def absent(prior_logp_BK: jax.Array) -> jax.Array:
    """True where a document is missing (see ABSENT), from its log prior."""
    return prior_logp_BK < ABSENT / 2


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

    prior: "hf_compat" adds the prior at the second target token, as transformers does, so that it is dropped where
        that token is padding.
    """
    _check(token_logp_BKT, prior_BK, mask_BT)
    logp_BK = jnp.where(mask_BT[:, None], token_logp_BKT, 0.0).sum(-1)
    if prior == "paper":
        return logp_BK + prior_BK
    counted_B = mask_BT[:, 1] if mask_BT.shape[1] > 1 else jnp.zeros(len(mask_BT), bool)
    # a missing document keeps its prior of 0 even where the others' priors are dropped
    return logp_BK + jnp.where(counted_B[:, None] | absent(prior_BK), prior_BK, 0.0)


def rag_sequence_logp(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """RAG-Sequence: log p(y|x) [B] = logsumexp_k(log p(z_k|x) + sum_t log p(y_t|x,z_k,y_<t))."""
    return logsumexp(sequence_joint(token_logp_BKT, prior_BK, mask_BT, prior), axis=-1)


def rag_token_logp(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """RAG-Token: log p(y|x) [B] = sum_t logsumexp_k(log p(z_k|x) + log p(y_t|x,z_k,y_<t)).

    `prior` has no effect: transformers counts the prior of RAG-Token as the paper does.
    """
    _check(token_logp_BKT, prior_BK, mask_BT)
    marginal_BT = logsumexp(token_logp_BKT + prior_BK[..., None], axis=1)
    return jnp.where(mask_BT, marginal_BT, 0.0).sum(-1)


def posterior_logp(
    token_logp_BKT: jax.Array, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior = "paper"
) -> jax.Array:
    """log p(z_k|x,y) [B, K], the posterior of each document given the whole answer, from `sequence_joint`."""
    return log_softmax(sequence_joint(token_logp_BKT, prior_BK, mask_BT, prior), axis=-1)


def _sequence_smooth(
    hidden_BKTD: jax.Array, head: OutputLayer, read: Logits, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior
) -> jax.Array:
    """Label-smoothing term of RAG-Sequence [B]: logsumexp_k of the sum over t and V of log p(v|x,z_k,y_<t).

    The prior counts V times: transformers adds it to all V log-probabilities of the second token.
    """
    V = len(head.kernel_VD)
    return logsumexp(sequence_joint(read.total - V * read.norm, prior_BK * V, mask_BT, prior), axis=-1)


def _token_smooth(
    hidden_BKTD: jax.Array, head: OutputLayer, read: Logits, prior_BK: jax.Array, mask_BT: jax.Array, prior: Prior
) -> jax.Array:
    """Label-smoothing term of RAG-Token [B]: the sum over t and V of the marginal log-probabilities."""
    kernel_VD, bias_V, *how = head
    marginal_BT = summed_marginal(hidden_BKTD, kernel_VD, bias_V, read.norm, prior_BK, *how)
    return jnp.where(mask_BT, marginal_BT, 0.0).sum(-1)


MARGINALS = {"rag_sequence": (rag_sequence_logp, _sequence_smooth), "rag_token": (rag_token_logp, _token_smooth)}


def rag_nll(
    objective: str,
    hidden_BKTD: jax.Array,
    head: OutputLayer,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    scores_BK: jax.Array,
    *,
    prior: Prior = "paper",
    label_smoothing: float = 0.0,
    first_counts: jax.Array | bool = True,
    log_normaliser_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Negative log marginal likelihood nll_B, summed over tokens (not averaged), and token_logp_BKT.

    It is computed from the decoder's last states and the output layer, without the logits [B, K, T, V] in memory.

    objective: a key of MARGINALS.
    label_smoothing: e in (1 - e) * nll - (e / V) * smooth, as in transformers.
    first_counts: scalar; whether the first target token is part of the likelihood. The smoothing term always has it.
    log_normaliser_B: see prior_logp.

    KeyError for an unknown objective; ValueError for shapes that do not fit together.
    """
    logp, smooth = MARGINALS[objective]
    B, K, T, _ = hidden_BKTD.shape
    if targets_BT.shape != (B, T) or scores_BK.shape != (B, K):
        raise ValueError(
            f"states [B, K, T, D] {hidden_BKTD.shape} need targets [B, T] = {(B, T)} and scores [B, K] = {(B, K)}; "
            f"got {targets_BT.shape} and {scores_BK.shape}"
        )
    read = head.read(hidden_BKTD, targets_BT)
    token_logp_BKT = read.target - read.norm
    prior_BK = prior_logp(scores_BK, log_normaliser_B)
    counted_BKT = token_logp_BKT
    if first_counts is not True:
        counted_BKT = token_logp_BKT.at[..., 0].set(jnp.where(first_counts, token_logp_BKT[..., 0], 0.0))
    nll_B = -logp(counted_BKT, prior_BK, mask_BT, prior)
    if label_smoothing:
        smooth_B = smooth(hidden_BKTD, head, read, prior_BK, mask_BT, prior)
        nll_B = (1 - label_smoothing) * nll_B - label_smoothing / len(head.kernel_VD) * smooth_B
    return nll_B, token_logp_BKT


def in_batch_contrastive(
    queries_BE: jax.Array, passages_PE: jax.Array, positive_BP: jax.Array, ignore_BP: jax.Array | None = None
) -> jax.Array:
    """DPR's loss [B] (Karpukhin et al. 2020, equation 2): -log softmax of the positive among all passages of the batch.

    positive_BP: one-hot, the positive passage of each question.
    ignore_BP: True for passages left out of a question's softmax: its other correct passages, which are no negatives,
        and padding.

    ValueError for shapes that do not fit together.
    """
    scores_BP = inner_products("be,pe->bp", queries_BE, passages_PE)
    for name, mask in (("positive", positive_BP), ("ignore", ignore_BP)):
        if mask is not None and mask.shape != scores_BP.shape:
            raise ValueError(f"{name} passages {mask.shape} must be [B, P] = {scores_BP.shape}")
    if ignore_BP is not None:
        scores_BP = jnp.where(ignore_BP & ~positive_BP, -jnp.inf, scores_BP)
    return logsumexp(scores_BP, axis=-1) - jnp.where(positive_BP, scores_BP, 0.0).sum(-1)


def emdr2(scores_BK: jax.Array, token_logp_BKT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """EMDR2's loss of the retriever [B] (Singh et al. 2021, equation 5): -log sum_k p(z_k|x) SG[p(y|x,z_k)].

    p(y|x,z_k) is that of the whole answer; SG stops the gradient, so that the generator has none.
    """
    logp_BK = jax.lax.stop_gradient(jnp.where(mask_BT[:, None], token_logp_BKT, 0.0).sum(-1))
    return -logsumexp(prior_logp(scores_BK) + logp_BK, axis=-1)


def perplexity_distillation(scores_BK: jax.Array, token_logp_BKT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Perplexity distillation of Atlas [B] (Izacard et al. 2022, section 2.2): KL(p_T || p(z|x)).

    p_T is the softmax over documents of the mean log-probability of the answer's tokens. The generator has no gradient.
    """
    prior_BK = prior_logp(scores_BK)
    mean_BK = jnp.where(mask_BT[:, None], token_logp_BKT, 0.0).sum(-1) / jnp.maximum(mask_BT.sum(-1), 1)[:, None]
    teacher_BK = log_softmax(jnp.where(absent(prior_BK), ABSENT, jax.lax.stop_gradient(mean_BK)), axis=-1)
    return jnp.where(absent(prior_BK), 0.0, jnp.exp(teacher_BK) * (teacher_BK - prior_BK)).sum(-1)


# (scores_BK, token_logp_BKT, mask_BT) -> loss_B; token_logp_BKT: log p(y_t|x,z_k,y_<t), counted where mask_BT is True
RetrieverLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
RETRIEVER_LOSSES: dict[str, RetrieverLoss] = {"emdr2": emdr2, "pdist": perplexity_distillation}
