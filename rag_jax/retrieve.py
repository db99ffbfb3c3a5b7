"""From questions to passages to the generator's input: pure functions that training and inference share.

question ids -> q_BE -> rows_BK of the index -> passage tokens, joined with the question -> [B, K, L]
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rag_jax.index.device_index import Index
from rag_jax.ops.masks import length_mask
from rag_jax.rag import Params, Rag, TokenTables, join
from rag_jax.retrieval import mips
from rag_jax.retrieval.config import SearchConfig

Batch = dict[str, jax.Array]


class Searched(Protocol):
    """The static settings of a program that the functions in this file use.

    n_passages: rows that are searched; all rows of the corpus or, for a live corpus, of its tables.
    prefix_ids: special ids at the start of a generator's input.
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


class InferenceSetting(NamedTuple):
    """Static settings of an inference program; a training step has training.stage.StepSetting instead."""

    rag: Rag
    mesh: jax.sharding.Mesh
    n_passages: int
    prefix_ids: tuple[int, ...]
    search: SearchConfig = SearchConfig()


def embed_questions(s: Searched, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Vectors q_BE of the batch's questions; key: of dropout, None for evaluation."""
    ids = batch["question_ids"]
    return s.rag.embed_questions(params, ids, length_mask(batch["question_length"], ids.shape[1]), key)


@functools.lru_cache(maxsize=8)
def question_program(rag: Rag) -> Any:
    """Jitted (params, batch) -> q_BE without dropout; cached by model, so that all its corpora share one program."""

    def embed(params: Params, batch: Batch) -> jax.Array:
        ids = batch["question_ids"]
        return rag.embed_questions(params, ids, length_mask(batch["question_length"], ids.shape[1]))

    return jax.jit(embed)


def embed_rows(s: Searched, params: Params, passages: TokenTables, rows: jax.Array, key: jax.Array | None) -> jax.Array:
    """Embeddings [..., E] of the passages at rows [...], by the encoder; key: of dropout, None for evaluation."""
    flat = rows.reshape(-1)
    ids = passages.encoder_ids_NL[flat].astype(jnp.int32)
    mask = length_mask(passages.encoder_length_N[flat], ids.shape[1])
    return s.rag.embed_passages(params, ids, mask, key).reshape(*rows.shape, -1)


def find(s: Searched, q_BE: jax.Array, index: Index, k: int) -> tuple[jax.Array, jax.Array]:
    """(scores_BK, rows_BK) of the k passages with the largest inner products, inside a jitted program, no gradient."""
    return mips.search(q_BE, index.embeddings_NE, k, recall_target=s.search.recall_target, **table(s, index))


def table(s: Searched, index: Index) -> dict[str, Any]:
    """Keyword arguments that describe the index to the search functions of retrieval.mips."""
    return {"scale_N": index.scale_N, "live_N": index.live_N, "mesh": s.mesh, "n_valid": s.n_passages}


def contexts(
    s: Searched, passages: TokenTables, rows_BK: jax.Array, batch: Batch, length: int = 0, window: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Generator inputs [B, K, L] and their mask: each retrieved passage joined with its question.

    batch: may have "window" [B, 2], start and stop in tokens of the part of its passages that a question reads.
    length: upper bound of L; 0: the model's source_length.
    window: longest window, in tokens.

    L is the longest that passage (or window) and question can be together by their shapes, rounded up to a multiple of
    16, and at most `length`.
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
