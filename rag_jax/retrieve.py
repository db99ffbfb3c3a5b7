"""From questions to passages to the generator's input, as pure functions that training and answering share.

question ids -> q_BE -> rows_BK of the index -> passage tokens, joined with the question -> [B, K, L]
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rag_jax.index.device_index import Index
from rag_jax.ops.masks import length_mask
from rag_jax.rag import Params, Passages, Rag, join
from rag_jax.retrieval import mips
from rag_jax.retrieval.config import SearchConfig

Batch = dict[str, jax.Array]


class Searched(Protocol):
    """What these functions read of a program's static setting.

    n_passages: rows that are searched: those of the corpus or, where it is live, all of the tables.
    prefix_ids: the special ids that a generator's input begins with.
    """

    @property
    def rag(self) -> Rag: ...

    @property
    def mesh(self) -> jax.sharding.Mesh: ...

    @property
    def n_passages(self) -> int: ...

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...

    @property
    def search(self) -> SearchConfig: ...


class Setting(NamedTuple):
    """The setting of a program that only answers; a training step has its own (training.stage.Setting)."""

    rag: Rag
    mesh: jax.sharding.Mesh
    n_passages: int
    prefix_ids: tuple[int, ...]
    search: SearchConfig = SearchConfig()


def embed_questions(s: Searched, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    ids = batch["question_ids"]
    return s.rag.embed_questions(params, ids, length_mask(batch["question_length"], ids.shape[1]), key)


@functools.lru_cache(maxsize=8)
def question_program(rag: Rag) -> Any:
    """(params, batch) -> q_BE without dropout, jitted; one for a model, whatever its corpus."""

    def embed(params: Params, batch: Batch) -> jax.Array:
        ids = batch["question_ids"]
        return rag.embed_questions(params, ids, length_mask(batch["question_length"], ids.shape[1]))

    return jax.jit(embed)


def embed_rows(s: Searched, params: Params, passages: Passages, rows: jax.Array, key: jax.Array | None) -> jax.Array:
    """Embeddings of the passages at rows [...], [..., E]."""
    flat = rows.reshape(-1)
    ids = passages.encoder_ids_NL[flat].astype(jnp.int32)
    mask = length_mask(passages.encoder_length_N[flat], ids.shape[1])
    return s.rag.embed_passages(params, ids, mask, key).reshape(*rows.shape, -1)


def find(s: Searched, q_BE: jax.Array, index: Index, k: int) -> tuple[jax.Array, jax.Array]:
    """(scores_BK, rows_BK) of the k passages with the largest inner products, in graph, without a gradient."""
    return mips.search(q_BE, index.embeddings_NE, k, recall_target=s.search.recall_target, **table(s, index))


def table(s: Searched, index: Index) -> dict[str, Any]:
    """What all searches in graph are told about the index."""
    return {"scale_N": index.scale_N, "live_N": index.live_N, "mesh": s.mesh, "n_valid": s.n_passages}


def contexts(
    s: Searched, passages: Passages, rows_BK: jax.Array, batch: Batch, length: int = 0, window: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Generator inputs [B, K, L] and mask: each retrieved passage joined with its question.

    length: L at most, 0: the model's; window: tokens of a passage at most, where the batch has windows. L is no longer
    than a passage of the table (or a window) with a question of this batch can be, in tiles of 16 tokens.
    """
    B, K = rows_BK.shape
    body = passages.generator_ids_NL.shape[1]
    if "window" in batch:
        body = min(body, window)
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
        min(length or s.rag.config.source_length, -(-needed // 16) * 16),
        s.rag.config.reader.pad_id,
        start,
        stop,
    )
    return ids.reshape(B, K, -1), mask.reshape(B, K, -1)


def is_gold(rows_BK: jax.Array, gold_BG: jax.Array) -> jax.Array:
    """True where a row is one of the question's gold passages; -1 in gold_BG is no passage."""
    return ((rows_BK[:, :, None] == gold_BG[:, None]) & (gold_BG[:, None] >= 0)).any(-1)
