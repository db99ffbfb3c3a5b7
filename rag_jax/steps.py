"""One training step as one pure function: retrieve, join, score, marginalise, update; jitted, donated, with no visit
to the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rag_jax import objectives, optimizer
from rag_jax.config import StageConfig
from rag_jax.rag import Params, Passages, Rag, join, shift_left
from rag_jax.retrieval import mips

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes. `step` counts over the whole run."""

    step: jax.Array
    params: Params
    opt_state: Any


class Index(NamedTuple):
    """Passage embeddings, rows sharded over the mesh and padded, and the step of the encoder that made them."""

    embeddings_NE: jax.Array
    step: jax.Array


class Setting(NamedTuple):
    """What a step closes over: static things and special ids."""

    rag: Rag
    stage: StageConfig
    mesh: jax.sharding.Mesh
    n_passages: int
    prefix_ids: tuple[int, ...]


def masked(length_B: jax.Array, width: int) -> jax.Array:
    return jnp.arange(width)[None] < length_B[:, None]


def embed_questions(s: Setting, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    ids = batch["question_ids"]
    return s.rag.embed_questions(params, ids, masked(batch["question_length"], ids.shape[1]), key)


def embed_rows(s: Setting, params: Params, passages: Passages, rows: jax.Array, key: jax.Array | None) -> jax.Array:
    """Embeddings of the passages at rows [...], [..., E]."""
    flat = rows.reshape(-1)
    ids = passages.encoder_ids_NL[flat].astype(jnp.int32)
    mask = masked(passages.encoder_length_N[flat].astype(jnp.int32), ids.shape[1])
    return s.rag.embed_passages(params, ids, mask, key).reshape(*rows.shape, -1)


def contexts(
    s: Setting, passages: Passages, rows_BK: jax.Array, batch: Batch, length: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Generator inputs [B, K, L] and mask: each retrieved passage joined with its question. L: `length`, or as set."""
    B, K = rows_BK.shape
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
        length or s.stage.source_length or s.rag.config.source_length,
        s.rag.config.reader.pad_id,
        start,
        stop,
    )
    return ids.reshape(B, K, -1), mask.reshape(B, K, -1)


def is_gold(rows_BK: jax.Array, gold_BG: jax.Array) -> jax.Array:
    """True where a row is one of the question's gold passages; -1 in gold_BG is no passage."""
    return ((rows_BK[:, :, None] == gold_BG[:, None]) & (gold_BG[:, None] >= 0)).any(-1)


def rag_loss(
    s: Setting, params: Params, trains_passages: bool, batch: Batch, index: Index, passages: Passages, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The marginal likelihood of the answers under the retrieved (or gold, or given) passages; mean over the
    questions.
    """
    question_key, passage_key, generator_key = jax.random.split(key, 3)
    if s.stage.documents == "gold":
        rows_BK = batch["gold"][:, :1]
        scores_BK = jnp.zeros(rows_BK.shape, jnp.float32)
    else:
        q_BE = embed_questions(s, params, batch, question_key)
        if "documents" in batch:
            rows_BK = batch["documents"]
        else:
            _, rows_BK = mips.search(
                jax.lax.stop_gradient(q_BE), index.embeddings_NE, s.stage.n_docs, mesh=s.mesh, n_valid=s.n_passages
            )
        if trains_passages:
            d_BKE = embed_rows(s, params, passages, rows_BK, passage_key)
        else:
            d_BKE = jax.lax.stop_gradient(index.embeddings_NE[rows_BK])
        scores_BK = jnp.einsum("be,bke->bk", q_BE, d_BKE)
        if not s.stage.prior_gradient:
            scores_BK = jax.lax.stop_gradient(scores_BK)
    ids_BKL, mask_BKL = contexts(s, passages, rows_BK, batch)
    nll_B, posterior_BK = s.rag.loss(
        params,
        ids_BKL,
        mask_BKL,
        scores_BK,
        batch["labels"],
        s.stage.hf_compat,
        s.stage.label_smoothing,
        generator_key,
    )
    counted = shift_left(batch["labels"], s.rag.config.reader)[1].sum()
    tokens = mask_BKL.sum() + counted * rows_BK.shape[1]
    metrics = {"nll_per_token": nll_B.sum() / counted, "tokens": tokens}
    if s.stage.documents != "gold":
        metrics |= retrieval_metrics(rows_BK, scores_BK, posterior_BK, batch["gold"])
    return nll_B.mean(), metrics


def retrieval_metrics(rows_BK: jax.Array, scores_BK: jax.Array, posterior_BK: jax.Array, gold_BG: jax.Array) -> Metrics:
    """The signs of health and of collapse: entropy of the prior (nats), share of different documents in the batch,
    distance from prior to posterior (KL, nats), recall of gold passages where they are known (NaN where none is).
    """
    prior_BK = objectives.prior_logp(scores_BK)
    known_B = (gold_BG >= 0).any(-1)
    hit_BK = is_gold(rows_BK, gold_BG)
    ordered = jnp.sort(rows_BK.reshape(-1))
    best_B = hit_BK[jnp.arange(len(hit_BK)), scores_BK.argmax(-1)]
    return {
        "prior_entropy": -(jnp.exp(prior_BK) * prior_BK).sum(-1).mean(),
        "unique_documents": (1 + (ordered[1:] != ordered[:-1]).sum()) / ordered.size,
        "posterior_prior_gap": (jnp.exp(posterior_BK) * (posterior_BK - prior_BK)).sum(-1).mean(),
        "recall_at_1": (best_B & known_B).sum() / known_B.sum(),
        f"recall_at_{rows_BK.shape[1]}": (hit_BK.any(-1) & known_B).sum() / known_B.sum(),
    }


def contrastive_loss(
    s: Setting, params: Params, batch: Batch, index: Index, passages: Passages, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Contrastive loss of each question against the first gold passages of all questions of the (global) batch.

    With `hard_negatives`, also against the passages that the index now ranks highest for any of them (as ANCE, Xiong et
    al. 2021, section 4); right ones among those are left out.
    """
    question_key, passage_key = jax.random.split(key)
    q_BE = embed_questions(s, params, batch, question_key)
    B, rows_P = len(q_BE), batch["gold"][:, 0]
    if s.stage.hard_negatives:
        _, hard = mips.search(q_BE, index.embeddings_NE, s.stage.hard_negatives, mesh=s.mesh, n_valid=s.n_passages)
        rows_P = jnp.concatenate([rows_P, hard.reshape(-1)])
    d_PE = embed_rows(s, params, passages, rows_P, passage_key)
    also_right_BP = is_gold(jnp.broadcast_to(rows_P[None], (B, len(rows_P))), batch["gold"])
    loss_B = objectives.in_batch_contrastive(q_BE, d_PE, jnp.eye(B, len(rows_P), dtype=bool), also_right_BP)
    right_B = also_right_BP[jnp.arange(B), (q_BE @ d_PE.T).argmax(-1)]
    tokens = batch["question_length"].sum() + passages.encoder_length_N[rows_P].astype(jnp.int32).sum()
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
    targets, counted = shift_left(batch["labels"], s.rag.config.reader)
    logits = s.rag.logits(params, ids[:, None], mask[:, None], batch["labels"], key)[:, 0]
    logp = jnp.where(counted, objectives.target_logp(logits, targets), 0.0)
    right = (logits.argmax(-1) == targets) & counted
    return -logp.sum() / counted.sum(), {
        "token_accuracy": right.sum() / counted.sum(),
        "tokens": mask.sum() + counted.sum(),
    }


def make_step(s: Setting, steps_before: int) -> Callable[..., tuple[TrainState, Metrics]]:
    """step(state, batch, index, passages, key) -> (state, metrics), not yet jitted. `steps_before`: those of earlier
    stages.
    """
    config = s.stage.optimizer
    tx, rate = optimizer.make(config, s.stage.steps), optimizer.schedule(config, s.stage.steps)

    def loss(trainable: Params, frozen: Params, batch: Batch, index: Index, passages: Passages, key: jax.Array) -> Any:
        params = {**frozen, **trainable}
        if s.stage.objective == "contrastive":
            return contrastive_loss(s, params, batch, index, passages, key)
        if s.stage.objective == "denoise":
            return denoise_loss(s, params, batch, key)
        side = "question_encoder" if s.rag.config.tie_encoders else "context_encoder"
        return rag_loss(s, params, side in trainable, batch, index, passages, key)

    def step(state: TrainState, batch: Batch, index: Index, passages: Passages, key: jax.Array) -> Any:
        trainable, frozen = optimizer.split(config, state.params)
        key = jax.random.fold_in(key, state.step)
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch, index, passages, key
        )
        updates, opt_state = tx.update(gradients, state.opt_state, trainable)
        params = {**frozen, **optax.apply_updates(trainable, updates)}
        metrics |= {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": rate(state.step - steps_before),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def jit_step(s: Setting, steps_before: int, state: TrainState) -> Any:
    """The step, jitted; it takes the memory of the old state, and each array of the new one lies where the old one lay.

    (Left free, the compiler may move them after the first step, and a resumed run would compile another program.)
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(make_step(s, steps_before), donate_argnums=0, out_shardings=(places, None))
