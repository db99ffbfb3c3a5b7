"""Retrieval inside a training step: passages are found, and scored so that gradients reach the encoders.

If the context encoder is trained, the passages found are re-embedded; with a prior over the whole corpus, its
normaliser is corrected for the change of the embeddings.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from rag_jax import losses
from rag_jax.index import device_index
from rag_jax.rag import Params
from rag_jax.retrieval import mips
from rag_jax.retrieve import embed_questions, embed_rows, find, table
from rag_jax.training.stage import Fresh, LossInput, Metrics, StepSetting


class Retrieval(NamedTuple):
    """How passages are found and scored; see `training.objectives.rag`."""

    n_docs: int
    n_retrieved: int = 0
    normaliser: Literal["retrieved", "corpus"] = "retrieved"


class FoundPassages(NamedTuple):
    """Passages for the questions of a batch, with their scores.

    rows_BK: int32 rows of the token tables.
    numbers_BK: int32 rows of the corpus, -1 where fewer than K were found.
    scores_BK: inner products q.d, float32; of passages that were not found see losses.of_found.
    log_z_B: log of the normaliser of a prior over the corpus, None for one over the K passages.
    fresh: rows that were re-embedded on the way, None for none.
    """

    rows_BK: jax.Array
    numbers_BK: jax.Array
    scores_BK: jax.Array
    log_z_B: jax.Array | None
    fresh: Fresh | None
    metrics: Metrics


def retrieve(
    s: StepSetting, how: Retrieval, params: Params, given: LossInput, keys: tuple[jax.Array, jax.Array]
) -> FoundPassages:
    """Finds K passages for every question and scores them; the gradient of the scores reaches the encoders.

    The search runs here, in graph, unless the host has searched: then the batch has `documents`, rows of the tables,
    and `document_rows`, rows of the corpus, -1 where fewer were found; those get no share of the prior.

    If the context encoder is trained, the K passages are re-embedded with gradient. With n_retrieved = L > n_docs = K,
    L passages are found, re-embedded, and the K best by the new scores are kept (Izacard et al. 2022, Atlas, section
    2.4, re-ranking). keys: for the dropout of questions and of passages.
    """
    question_key, passage_key = keys
    batch, passages, index = given.batch, given.passages, given.index
    wanted, log_rest_B = max(how.n_docs, how.n_retrieved), None
    q_BE = embed_questions(s, params, batch, question_key)
    if "documents" in batch:
        rows_BK = batch["documents"]
    elif how.normaliser == "corpus":
        _, rows_BK, log_rest_B = mips.search_with_normaliser(q_BE, index.embeddings_NE, wanted, **table(s, index))
        if index.drift_E is not None:  # rows are stored less the common drift, so every score lacks q . drift
            log_rest_B += losses.inner_products("be,e->b", q_BE, index.drift_E)
    else:
        _, rows_BK = find(s, q_BE, index, wanted)
    numbers_BK = batch.get("document_rows", rows_BK)
    stored_BKE = jax.lax.stop_gradient(device_index.stored(index, rows_BK))
    d_BKE, fresh, moved_E = stored_BKE, None, jnp.zeros(q_BE.shape[1])
    if how.n_retrieved:
        now_BLE = jax.lax.stop_gradient(embed_rows(s, params, passages, rows_BK, None))
        fresh = Fresh(rows_BK.reshape(-1), now_BLE.reshape(-1, now_BLE.shape[-1]))
        best_BK, log_left_B = best_of(q_BE, now_BLE, numbers_BK >= 0, how.n_docs)
        if log_rest_B is not None:
            moved_B = losses.inner_products("be,e->b", q_BE, mean_change(now_BLE, stored_BKE))
            log_rest_B = jnp.logaddexp(log_rest_B + moved_B, log_left_B)
        rows_BK, numbers_BK = (jnp.take_along_axis(x, best_BK, 1) for x in (rows_BK, numbers_BK))
        d_BKE, stored_BKE = (jnp.take_along_axis(x, best_BK[..., None], 1) for x in (now_BLE, stored_BKE))
    if given.trains_passages:
        d_BKE = embed_rows(s, params, passages, rows_BK, passage_key)
        as_now_BKE = jax.lax.stop_gradient(d_BKE)
        # after re-ranking log_rest_B has the change already: this difference is 0, and only its gradient counts
        moved_E = mean_change(d_BKE, as_now_BKE if how.n_retrieved else stored_BKE)
        if fresh is None:
            fresh = Fresh(rows_BK.reshape(-1), as_now_BKE.reshape(-1, d_BKE.shape[-1]))
    scores_BK, stored_BK = (losses.inner_products("be,bke->bk", q_BE, x) for x in (d_BKE, stored_BKE))
    there_BK = numbers_BK >= 0
    age_BK = given.now - index.step_N[rows_BK]
    metrics = {"row_age": age_BK.mean(where=there_BK), "row_age_max": age_BK.max(where=there_BK, initial=0)}
    if fresh is not None:
        gap_BK = jnp.abs(jax.lax.stop_gradient(scores_BK - stored_BK))
        metrics["score_gap"] = gap_BK.mean(where=there_BK)
    scores_BK = losses.of_found(scores_BK, there_BK)
    log_z_B = None
    if log_rest_B is not None:
        moved_B = losses.inner_products("be,e->b", q_BE, moved_E)
        log_z_B = fresh_normaliser(log_rest_B, stored_BK, scores_BK, moved_B)
        metrics["prior_mass"] = jnp.exp(logsumexp(scores_BK, axis=-1) - log_z_B).mean()
    return FoundPassages(rows_BK, numbers_BK, scores_BK, log_z_B, fresh, metrics)


def best_of(q_BE: jax.Array, d_BLE: jax.Array, found_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Positions [B, k] of the k best scores among L passages, and the logsumexp [B] of the other L - k scores.

    Passages that were not found come last.
    """
    scores_BL = jnp.where(found_BL, losses.inner_products("be,ble->bl", q_BE, d_BLE), losses.ABSENT)
    best_BK = jax.lax.top_k(jax.lax.stop_gradient(scores_BL), k)[1]
    left_BL = scores_BL.at[jnp.arange(len(best_BK))[:, None], best_BK].set(-jnp.inf)
    return best_BK, logsumexp(left_BL, axis=-1)


def mean_change(now_BKE: jax.Array, stored_BKE: jax.Array) -> jax.Array:
    """Mean change of the embeddings over all passages of the batch [E], float32; see `fresh_normaliser`."""
    return (now_BKE.astype(jnp.float32) - stored_BKE).mean((0, 1))


def fresh_normaliser(
    log_rest_B: jax.Array, stored_BK: jax.Array, fresh_BK: jax.Array, moved_B: jax.Array | None = None
) -> jax.Array:
    """log Z over the corpus [B] when K of its passages have just been re-embedded:

        Z = sum_k exp(fresh_k) + exp(moved) sum_j exp(stored_j), j the rest of the corpus

    log_rest_B: log of the sum over j, without the K (`mips.search_with_normaliser`).
    moved_B: q . m, where m is the mean change of the embeddings re-embedded in this step (`mean_change`); None: the
      mean of fresh - stored over the question's own K.

    The sum over k is exact. The sum over j is an estimate, as the rest has not been re-embedded: the score of each j is
    taken to have changed by moved_B since it was stored.

    Why: a shift c of all embeddings adds q.c to fresh_k and to moved_B, hence to log Z, and leaves log p(z_k|x)
    unchanged. The gradient of log p(z_k|x) by c is then q - (M q + (1 - M) q) = 0, with M the prior mass of the K. If
    the stored scores of the rest were used unchanged, (1 - M) q would remain, and training would lift all passages
    together until the next refresh.

    Error: if the score of j has really changed by moved_B + e_j, log Z is wrong by at most max |e_j|, which is 0 where
    the index is fresh or all embeddings have changed alike. m is a mean over the whole batch (micro-batch, with
    `accumulate`), not over the K of one question, which would cancel what lifts these above the rest. (Cosine of the
    context encoder's gradient with that of a corpus of 600 passages embedded whole, batch 16: 0.9; with the K alone:
    0.5.)
    """
    moved_B = (fresh_BK - stored_BK).mean(-1) if moved_B is None else moved_B
    return jnp.logaddexp(log_rest_B + moved_B, logsumexp(fresh_BK, axis=-1))
