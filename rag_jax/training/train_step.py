"""One training step as one pure function: retrieve, join, score, marginalise, update; jitted, donated, with no visit
to the host.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import logsumexp

from rag_jax import losses
from rag_jax.index import device_index, refresh, refresh_schedule
from rag_jax.index.device_index import Index
from rag_jax.rag import Params, Passages, Rag, join, shift_left
from rag_jax.retrieval import mips
from rag_jax.system import sharding
from rag_jax.training import optimizer
from rag_jax.training.config import SearchConfig, StageConfig, contrasts

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes. `step` counts over the whole run."""

    step: jax.Array
    params: Params
    opt_state: Any


def first_optimizer_state(rag: Rag, stage: StageConfig) -> Any:
    """That of a stage before its first step, boxed with logical axis names as the parameters are."""
    tx = optimizer.make(stage.optimizer, stage.steps)
    return tx.init(optimizer.split(stage.optimizer, rag.init(jax.random.key(0)))[0])


def first_state(rag: Rag, stage: StageConfig, mesh: jax.sharding.Mesh, params: Params, step: int) -> TrainState:
    """The state at the start of a stage: a fresh optimiser, sharded as its parameters are."""
    opt_state = sharding.init(mesh, lambda: first_optimizer_state(rag, stage))
    return TrainState(jax.device_put(np.int32(step), sharding.replicated(mesh)), params, opt_state)


class Setting(NamedTuple):
    """What a step closes over: static things and special ids. n_passages: rows that are searched, those of the corpus
    or, where it is live, all of the tables.
    """

    rag: Rag
    stage: StageConfig
    mesh: jax.sharding.Mesh
    n_passages: int
    prefix_ids: tuple[int, ...]
    search: SearchConfig = SearchConfig()
    epoch: int = 1  # steps in which all of the stage's questions come, for the words of `refresh`

    @property
    def when(self) -> refresh_schedule.Schedule:
        """When the stage makes the index anew."""
        return refresh_schedule.parse(self.stage.refresh, self.epoch)


class Fresh(NamedTuple):
    """Rows [X] of the index and what they are now [X, E], embedded without dropout: for `write_back`."""

    rows: jax.Array
    embeddings: jax.Array


def masked(length_B: jax.Array, width: int) -> jax.Array:
    return jnp.arange(width)[None] < length_B[:, None]


def embed_questions(s: Setting, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    ids = batch["question_ids"]
    return s.rag.embed_questions(params, ids, masked(batch["question_length"], ids.shape[1]), key)


def micro(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]: rows that lie on one device go evenly into all micro-batches."""
    return x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)


def in_turns(embed: Callable[..., jax.Array], count: int, key: jax.Array, *arrays: jax.Array) -> jax.Array:
    """embed(key, *arrays) [B, E] with a `count`th of the rows at a time, each computed again in the backward pass.

    The loss sees all rows, memory the activations of one part: GradCache (Gao et al. 2021).
    """
    if count == 1:
        return embed(key, *arrays)
    part = jax.checkpoint(lambda given: embed(*given), prevent_cse=False)  # within a scan nothing can be merged
    found_CXE = jax.lax.map(part, (jax.random.split(key, count), *(micro(x, count) for x in arrays)))
    return found_CXE.swapaxes(0, 1).reshape(-1, found_CXE.shape[-1])


@functools.lru_cache(maxsize=8)
def question_program(rag: Rag) -> Any:
    """(params, batch) -> q_BE without dropout, jitted; one for a model, whatever its corpus."""

    def embed(params: Params, batch: Batch) -> jax.Array:
        ids = batch["question_ids"]
        return rag.embed_questions(params, ids, masked(batch["question_length"], ids.shape[1]))

    return jax.jit(embed)


def embed_rows(s: Setting, params: Params, passages: Passages, rows: jax.Array, key: jax.Array | None) -> jax.Array:
    """Embeddings of the passages at rows [...], [..., E]."""
    flat = rows.reshape(-1)
    ids = passages.encoder_ids_NL[flat].astype(jnp.int32)
    mask = masked(passages.encoder_length_N[flat].astype(jnp.int32), ids.shape[1])
    return s.rag.embed_passages(params, ids, mask, key).reshape(*rows.shape, -1)


def contexts(s: Setting, passages: Passages, rows_BK: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Generator inputs [B, K, L] and mask: each retrieved passage joined with its question.

    L: as set, but no longer than a passage of the table (or a window) with a question of this batch can be, in tiles of
    16 tokens.
    """
    B, K = rows_BK.shape
    body = passages.generator_ids_NL.shape[1]
    if "window" in batch:
        body = min(body, s.stage.window)
    needed = len(s.prefix_ids) + body + batch["tail_ids"].shape[1]
    flat = rows_BK.reshape(-1)
    start = stop = None
    if "window" in batch:
        start, stop = (jnp.repeat(batch["window"][:, i], K) for i in (0, 1))
    ids, mask = join(
        s.prefix_ids,
        passages.generator_ids_NL[flat],
        passages.generator_length_N[flat].astype(jnp.int32),
        jnp.repeat(batch["tail_ids"], K, axis=0),
        jnp.repeat(batch["tail_length"], K),
        min(s.stage.source_length or s.rag.config.source_length, -(-needed // 16) * 16),
        s.rag.config.reader.pad_id,
        start,
        stop,
    )
    return ids.reshape(B, K, -1), mask.reshape(B, K, -1)


def is_gold(rows_BK: jax.Array, gold_BG: jax.Array) -> jax.Array:
    """True where a row is one of the question's gold passages; -1 in gold_BG is no passage."""
    return ((rows_BK[:, :, None] == gold_BG[:, None]) & (gold_BG[:, None] >= 0)).any(-1)


def find(s: Setting, q_BE: jax.Array, index: Index, k: int) -> tuple[jax.Array, jax.Array]:
    """(scores_BK, rows_BK) of the k passages with the largest inner products, in graph, without a gradient."""
    return mips.search(q_BE, index.embeddings_NE, k, recall_target=s.search.recall_target, **table(s, index))


def table(s: Setting, index: Index) -> dict[str, Any]:
    """What all searches in graph are told about the index."""
    return {"scale_N": index.scale_N, "live_N": index.live_N, "mesh": s.mesh, "n_valid": s.n_passages}


class Found(NamedTuple):
    """Passages for a batch: places in the tables, their numbers in the corpus (-1 where fewer were found), scores_BK =
    q.d (objectives.of_found), log Z or None.
    """

    rows_BK: jax.Array
    numbers_BK: jax.Array
    scores_BK: jax.Array
    log_z_B: jax.Array | None
    fresh: Fresh | None
    metrics: Metrics


def retrieve(
    s: Setting,
    params: Params,
    trains_passages: bool,
    batch: Batch,
    index: Index,
    passages: Passages,
    keys: tuple[jax.Array, jax.Array],
    now: jax.Array,
) -> Found:
    """The passages of every question, found in graph or given (`documents`: their places in the tables, found on the
    host; `document_rows`: their rows in the corpus, -1 where the search found fewer, which have no prior), and their
    scores, through which the gradient reaches the encoders.

    Passages that train are embedded afresh. With n_retrieved = L > n_docs, L are found, embedded as they are now, and
    the K best of them by that are kept (Izacard et al. 2022, Atlas, section 2.4, re-ranking).
    """
    question_key, passage_key = keys
    stage, wanted, log_rest_B = s.stage, max(s.stage.n_docs, s.stage.n_retrieved), None
    q_BE = embed_questions(s, params, batch, question_key)
    if "documents" in batch:
        rows_BK = batch["documents"]
    elif stage.normaliser == "corpus":
        _, rows_BK, log_rest_B = mips.search_with_normaliser(q_BE, index.embeddings_NE, wanted, **table(s, index))
        if index.drift_E is not None:  # rows are stored without what all have moved since
            log_rest_B += q_BE @ index.drift_E
    else:
        _, rows_BK = find(s, q_BE, index, wanted)
    numbers_BK = batch.get("document_rows", rows_BK)
    stored_BKE = jax.lax.stop_gradient(device_index.stored(index, rows_BK))
    d_BKE, fresh, moved_E = stored_BKE, None, jnp.zeros(q_BE.shape[1])
    if stage.n_retrieved:
        now_BLE = jax.lax.stop_gradient(embed_rows(s, params, passages, rows_BK, None))
        fresh = Fresh(rows_BK.reshape(-1), now_BLE.reshape(-1, now_BLE.shape[-1]))
        best_BK, log_left_B = best_of(q_BE, now_BLE, numbers_BK >= 0, stage.n_docs)
        if log_rest_B is not None:
            log_rest_B = jnp.logaddexp(log_rest_B + q_BE @ mean_change(now_BLE, stored_BKE), log_left_B)
        rows_BK, numbers_BK = (jnp.take_along_axis(x, best_BK, 1) for x in (rows_BK, numbers_BK))
        d_BKE, stored_BKE = (jnp.take_along_axis(x, best_BK[..., None], 1) for x in (now_BLE, stored_BKE))
    if trains_passages:
        d_BKE = embed_rows(s, params, passages, rows_BK, passage_key)
        as_now_BKE = jax.lax.stop_gradient(d_BKE)
        # over-retrieval has moved the rest to where it is now; the gradient alone is still to come
        moved_E = mean_change(d_BKE, as_now_BKE if stage.n_retrieved else stored_BKE)
        if fresh is None:
            fresh = Fresh(rows_BK.reshape(-1), as_now_BKE.reshape(-1, d_BKE.shape[-1]))
    scores_BK, stored_BK = (losses.inner_products("be,bke->bk", q_BE, x) for x in (d_BKE, stored_BKE))
    there_BK = numbers_BK >= 0
    age_BK = now - index.step_N[rows_BK]
    metrics = {"row_age": age_BK.mean(where=there_BK), "row_age_max": age_BK.max(where=there_BK, initial=0)}
    if fresh is not None:
        gap_BK = jnp.abs(jax.lax.stop_gradient(scores_BK - stored_BK))
        metrics["score_gap"] = gap_BK.mean(where=there_BK)
    scores_BK = losses.of_found(scores_BK, there_BK)
    log_z_B = None
    if log_rest_B is not None:
        log_z_B = fresh_normaliser(log_rest_B, stored_BK, scores_BK, q_BE @ moved_E)
        metrics["prior_mass"] = jnp.exp(logsumexp(scores_BK, axis=-1) - log_z_B).mean()
    if not stage.prior_gradient:
        scores_BK, log_z_B = jax.lax.stop_gradient((scores_BK, log_z_B))
    return Found(rows_BK, numbers_BK, scores_BK, log_z_B, fresh, metrics)


def best_of(q_BE: jax.Array, d_BLE: jax.Array, found_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Which k of the L passages of a question score best [B, k], those that were not found last; and the logsumexp of
    the scores of the others [B].
    """
    scores_BL = jnp.where(found_BL, jnp.einsum("be,ble->bl", q_BE, d_BLE), losses.ABSENT)
    best_BK = jax.lax.top_k(jax.lax.stop_gradient(scores_BL), k)[1]
    left_BL = scores_BL.at[jnp.arange(len(best_BK))[:, None], best_BK].set(-jnp.inf)
    return best_BK, logsumexp(left_BL, axis=-1)


def mean_change(now_BKE: jax.Array, stored_BKE: jax.Array) -> jax.Array:
    """How far embeddings have moved, on average over all passages of the batch [E]; see `fresh_normaliser`."""
    return (now_BKE.astype(jnp.float32) - stored_BKE).mean((0, 1))


def fresh_normaliser(
    log_rest_B: jax.Array, stored_BK: jax.Array, fresh_BK: jax.Array, moved_B: jax.Array | None = None
) -> jax.Array:
    """log Z over the corpus [B], K passages of which have just been embedded afresh:

        Z = sum_k exp(fresh_k) + exp(moved) sum_j exp(stored_j), j the rest of the corpus

    log_rest_B: log of the sum over j, without the K (`mips.search_with_normaliser`). The sum over k is exact; that over
    j is an estimate, as the rest has not been embedded: each of its scores is taken to have moved by moved_B = q . m
    since it was stored, m the mean change of the passages of this step (`mean_change`). Without moved_B it is the mean
    of fresh - stored over the question's own K.

    A shift c of all embeddings adds q.c to fresh_k and to moved, hence to log Z, and leaves log p(z_k|x) as it is. So
    does its gradient: q - (M q + (1 - M) q) = 0, with M the prior mass of the K. A rest that stays where it is would
    leave (1 - M) q, and training would lift all passages together until the next refresh.

    With e_j what the score of j has really moved beyond moved_B, log Z is wrong by at most the largest |e_j|: by
    nothing where the index is fresh, or all has moved together. m is taken over the whole batch, not over the K of one
    question: that would cancel what lifts them above the rest. (The context encoder's gradient beside that of a corpus
    of 600 passages embedded whole, batch 16: cosine 0.9, with the K alone 0.5.) With `accumulate`, of each part.
    """
    moved_B = (fresh_BK - stored_BK).mean(-1) if moved_B is None else moved_B
    return jnp.logaddexp(log_rest_B + moved_B, logsumexp(fresh_BK, axis=-1))


def rag_loss(
    s: Setting,
    params: Params,
    trains_passages: bool,
    batch: Batch,
    index: Index,
    passages: Passages,
    key: jax.Array,
    now: jax.Array,
) -> tuple[jax.Array, tuple[Metrics, Fresh | None]]:
    """The marginal likelihood of the answers under the retrieved (or gold, or given, or no) passages; mean over the
    questions.
    """
    question_key, passage_key, generator_key = jax.random.split(key, 3)
    found = None
    if s.stage.documents != "retrieved":
        rows_BK = batch["documents"] if "documents" in batch else batch["gold"][:, :1]
        scores_BK = jnp.zeros(rows_BK.shape, jnp.float32)
        if s.stage.documents == "none":  # any passage, and nothing of it
            rows_BK = jnp.zeros_like(rows_BK)
            batch = batch | {"window": jnp.zeros((len(rows_BK), 2), jnp.int32)}
    else:
        keys = question_key, passage_key
        found = retrieve(s, params, trains_passages, batch, index, passages, keys, now)
        rows_BK, scores_BK = found.rows_BK, found.scores_BK
    ids_BKL, mask_BKL = contexts(s, passages, rows_BK, batch)
    labels_BT = batch["labels"]
    if s.stage.hf_compat and len(s.rag.config.reader.opening(s.prefix_ids)) > 1:
        labels_BT = labels_BT[:, 1:]  # transformers' RAG does not put the start token before the labels
    nll_B, posterior_BK = s.rag.loss(
        params,
        ids_BKL,
        mask_BKL,
        scores_BK,
        labels_BT,
        s.stage.hf_compat,
        s.stage.label_smoothing,
        generator_key,
        log_normaliser_B=found and found.log_z_B,
        doc_chunk=s.stage.doc_chunk,
        logit_chunk=s.stage.logit_chunk,
    )
    counted = shift_left(labels_BT, s.rag.config.reader)[1].sum()
    tokens = mask_BKL.sum() + counted * rows_BK.shape[1]
    metrics = {"nll_per_token": nll_B.sum() / counted, "tokens": tokens}
    if found is None:
        return nll_B.mean(), (metrics, None)
    metrics |= found.metrics | retrieval_metrics(found.numbers_BK, scores_BK, posterior_BK, batch["gold"])
    return nll_B.mean(), (metrics, found.fresh)


def retrieval_metrics(rows_BK: jax.Array, scores_BK: jax.Array, posterior_BK: jax.Array, gold_BG: jax.Array) -> Metrics:
    """The signs of health and of collapse: entropy of the prior (nats), share of different documents in the batch,
    distance from prior to posterior (KL, nats), recall of gold passages where they are known. A row of -1 was not found
    and counts nowhere; NaN where there is nothing to measure.
    """
    prior_BK = losses.prior_logp(scores_BK)
    there_BK = rows_BK >= 0
    found_B = there_BK.any(-1)
    known_B = (gold_BG >= 0).any(-1)
    hit_BK = is_gold(rows_BK, gold_BG)
    ordered = jnp.sort(rows_BK.reshape(-1))
    best_B = hit_BK[jnp.arange(len(hit_BK)), scores_BK.argmax(-1)]
    different = (ordered[:1] >= 0).sum() + ((ordered[1:] != ordered[:-1]) & (ordered[1:] >= 0)).sum()
    return {
        "prior_entropy": -(jnp.exp(prior_BK) * prior_BK).sum(-1).mean(where=found_B),
        "unique_documents": different / there_BK.sum(),
        "posterior_prior_gap": (jnp.exp(posterior_BK) * (posterior_BK - prior_BK)).sum(-1).mean(where=found_B),
        "recall_at_1": (best_B & known_B).sum() / known_B.sum(),
        f"recall_at_{rows_BK.shape[1]}": (hit_BK.any(-1) & known_B).sum() / known_B.sum(),
    }


def contrastive_loss(
    s: Setting, params: Params, batch: Batch, index: Index, passages: Passages, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Contrastive loss of each question against the first gold passages of all questions of the (global) batch.

    With `hard_negatives`, also against the passages that the index now ranks highest for any of them (as ANCE, Xiong et
    al. 2021, section 4), or against those given in the batch; right ones among those are left out, and -1. Where the
    batch brings its passages along (inverse cloze), those are embedded. With `accumulate`, a part of the batch is
    embedded at a time; the loss is the same.
    """
    question_key, passage_key = jax.random.split(key)

    def questions(key: jax.Array, ids: jax.Array, length: jax.Array) -> jax.Array:
        return embed_questions(s, params, {"question_ids": ids, "question_length": length}, key)

    turns = s.stage.accumulate
    q_BE = in_turns(questions, turns, question_key, batch["question_ids"], batch["question_length"])
    B = len(q_BE)
    if "passage_ids" in batch:
        own = {"encoder_ids_NL": batch["passage_ids"], "encoder_length_N": batch["passage_length"]}
        passages, rows_P, numbers_P = passages._replace(**own), jnp.arange(B), batch["gold"][:, 0]
    elif "documents" in batch:
        rows_P, numbers_P = batch["documents"], batch["document_rows"]
    else:
        numbers_P = batch["gold"][:, 0]
        if s.stage.hard_negatives:
            hard = batch["negatives"] if "negatives" in batch else find(s, q_BE, index, s.stage.hard_negatives)[1]
            numbers_P = jnp.concatenate([numbers_P, hard.reshape(-1)])
        rows_P = jnp.maximum(numbers_P, 0)
    d_PE = in_turns(lambda key, rows: embed_rows(s, params, passages, rows, key), turns, passage_key, rows_P)
    also_right_BP = is_gold(jnp.broadcast_to(numbers_P[None], (B, len(rows_P))), batch["gold"])
    there_P = numbers_P >= 0
    loss_B = losses.in_batch_contrastive(q_BE, d_PE, jnp.eye(B, len(rows_P), dtype=bool), also_right_BP | ~there_P)
    right_B = also_right_BP[jnp.arange(B), jnp.where(there_P, q_BE @ d_PE.T, -jnp.inf).argmax(-1)]
    read_P = jnp.where(there_P, passages.encoder_length_N[rows_P].astype(jnp.int32), 0)
    tokens = batch["question_length"].sum() + read_P.sum()
    return loss_B.mean(), {"in_batch_accuracy": right_B.mean(), "tokens": tokens}


def denoise_loss(s: Setting, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
    """BART's pretraining: the passage from its corrupted form; mean over tokens."""
    empty = jnp.zeros((len(batch["labels"]), 1), jnp.int32)
    ids, mask = join(
        s.prefix_ids,
        empty,
        empty[:, 0],
        batch["tail_ids"],
        batch["tail_length"],
        batch["tail_ids"].shape[1] + len(s.prefix_ids),
        s.rag.config.reader.pad_id,
    )
    one = jnp.zeros((len(ids), 1), jnp.float32)  # the score of the only passage there is
    how: dict[str, Any] = {
        "label_smoothing": s.stage.label_smoothing,
        "dropout": key,
        "logit_chunk": s.stage.logit_chunk,
    }
    nll_B = s.rag.nll(params, ids[:, None], mask[:, None], one, batch["labels"], **how)
    counted = shift_left(batch["labels"], s.rag.config.reader)[1].sum()
    nll = nll_B.sum() / counted
    return nll, {"nll_per_token": nll, "tokens": mask.sum() + counted}


def accumulated(s: Setting, differentiate: Callable, trainable: Params, batch: Batch, key: jax.Array) -> Any:
    """What `differentiate(trainable, batch, key)`, a value_and_grad, gives for the batch, from micro-batches one after
    another: value and gradient are those of the whole batch (but for dropout), metrics mostly means of theirs.
    """
    count = s.stage.accumulate
    parts = {name: micro(x, count) for name, x in batch.items()}
    weight_C = jnp.full(count, 1 / count)
    if s.stage.objective == "denoise":  # a mean over tokens
        tokens_C = shift_left(batch["labels"], s.rag.config.reader)[1].sum(-1)
        weight_C = (share := micro(tokens_C, count).sum(-1)) / share.sum()

    def one(total: Params, given: tuple[Batch, jax.Array, jax.Array]) -> tuple[Params, Any]:
        part, weight, key = given
        part = {name: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in part.items()}
        (value, aux), gradients = differentiate(trainable, part, key)
        return jax.tree.map(lambda a, b: a + weight * b, total, gradients), (weight * value, aux)

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    gradients, (values, (metrics, fresh)) = jax.lax.scan(one, zeros, (parts, weight_C, jax.random.split(key, count)))
    if fresh is not None:
        fresh = Fresh(fresh.rows.reshape(-1), fresh.embeddings.reshape(-1, fresh.embeddings.shape[-1]))
    metrics = {name: TOGETHER.get(name, jnp.nanmean)(x) for name, x in metrics.items()}
    return (values.sum(), (metrics, fresh)), gradients


TOGETHER: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tokens": jnp.sum,
    "row_age_max": jnp.max,
}  # of the metrics of micro-batches; of the others the mean


def changes_index(s: Setting) -> bool:
    """Whether the step gives an index back: rolling refresh, and write-back."""
    return s.when.kind == "rolling" or s.stage.write_back


def make_step(s: Setting, steps_before: int) -> Callable[..., tuple[TrainState, Index | None, Metrics]]:
    """step(state, batch, index, passages, key) -> (state, index or None, metrics), not yet jitted. `steps_before`:
    those of earlier stages.

    The index comes back where the step changes it. Rolling refresh and write-back use the parameters before the update.
    """
    config = s.stage.optimizer
    tx, rate = optimizer.make(config, s.stage.steps), optimizer.schedule(config, s.stage.steps)
    side = "question_encoder" if s.rag.config.tie_encoders else "context_encoder"
    when = s.when

    def loss(
        trainable: Params,
        frozen: Params,
        batch: Batch,
        index: Index,
        passages: Passages,
        key: jax.Array,
        now: jax.Array,
    ) -> Any:
        params = {**frozen, **trainable}
        if contrasts(s.stage):
            value, metrics = contrastive_loss(s, params, batch, index, passages, key)
            return value, (metrics, None)
        if s.stage.objective == "denoise":
            value, metrics = denoise_loss(s, params, batch, key)
            return value, (metrics, None)
        return rag_loss(s, params, side in trainable, batch, index, passages, key, now)

    def step(state: TrainState, batch: Batch, index: Index, passages: Passages, key: jax.Array) -> Any:
        with sharding.on(s.mesh):
            return on_mesh(state, batch, index, passages, key)

    def on_mesh(state: TrainState, batch: Batch, index: Index, passages: Passages, key: jax.Array) -> Any:
        trainable, frozen = optimizer.split(config, state.params)
        key = jax.random.fold_in(key, state.step)
        differentiate = jax.value_and_grad(
            lambda trainable, batch, key: loss(trainable, frozen, batch, index, passages, key, state.step), has_aux=True
        )
        if s.stage.accumulate > 1 and not contrasts(s.stage):
            (value, (metrics, fresh)), gradients = accumulated(s, differentiate, trainable, batch, key)
        else:
            (value, (metrics, fresh)), gradients = differentiate(trainable, batch, key)
        new_index = None
        if changes_index(s):
            new_index = index
            if when.kind == "rolling":
                new_index = refresh.roll(s.rag, s.mesh, state.params, new_index, passages, state.step, when.turn)
            if s.stage.write_back and fresh is not None:
                measure = when.kind != "rolling"
                new_index = refresh.put(new_index, fresh.rows, fresh.embeddings, state.step, measure)
        updates, opt_state = tx.update(gradients, state.opt_state, trainable)
        params = {**frozen, **optax.apply_updates(trainable, updates)}
        metrics |= {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": rate(state.step - steps_before),
        }
        return TrainState(state.step + 1, params, opt_state), new_index, metrics

    return step


def jit_step(s: Setting, steps_before: int, state: TrainState, index: Index | None = None) -> Any:
    """The step, jitted; it takes the memory of the old state (and of an index that it changes), and each array of the
    new one lies where the old one lay.

    (Left free, the compiler may move them after the first step, and a resumed run would compile another program.)
    """
    places = jax.tree.map(lambda x: x.sharding, (state, index if changes_index(s) else None))
    donated = (0, 2) if changes_index(s) else 0
    return jax.jit(make_step(s, steps_before), donate_argnums=donated, out_shardings=(*places, None))


def make_drift(s: Setting) -> Any:
    """drift(params, batch, index, passages, rows_S) -> recall@k of the index as it stands against one made now, for
    this batch's questions, among the passages at rows_S; jitted. k: n_docs, or the number of hard negatives.
    """
    k = s.stage.n_docs if s.stage.objective == "rag" else s.stage.hard_negatives

    @jax.jit
    def drift(params: Params, batch: Batch, index: Index, passages: Passages, rows_S: jax.Array) -> jax.Array:
        live_S = jnp.ones(rows_S.shape, bool) if index.live_N is None else index.live_N[rows_S]
        q_BE, fresh_SE = embed_questions(s, params, batch, None), embed_rows(s, params, passages, rows_S, None)
        return refresh.overlap(q_BE, device_index.stored(index, rows_S), fresh_SE, live_S, min(k, len(rows_S)))

    return drift
