"""Greedy and beam search over `step(tokens, cache, position) -> (logp, cache)`; knows no model.

X rows are searched side by side. `tokens` are the last tokens [X] (beam search: [X*M], a row's beams contiguous),
`cache` any pytree whose leaves have such rows as their first axis, `logp` the next-token log-probabilities [X, V].
One while_loop, static shapes, stopped as soon as every row is finished. Sequences start with bos; after eos they are
padded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Cache = Any
Step = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]

NEVER = -1e9  # log-probability of what cannot be


class Found(NamedTuple):
    """sequences [X, M, T], best first, and their log-probabilities / lengths ** length_penalty [X, M].

    Where there are fewer than M sequences at all, the rest have score NEVER.
    """

    sequences: jax.Array
    scores: jax.Array


def lengths(sequences: jax.Array, eos_id: int) -> jax.Array:
    """Number of tokens after bos, eos included, of sequences [..., T] as they are found here."""
    ended = sequences[..., 1:] == eos_id
    return jnp.where(ended.any(-1), ended.argmax(-1) + 1, ended.shape[-1])


def greedy(
    step: Step,
    cache: Cache,
    rows: int,
    length: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    length_penalty: float = 1.0,
) -> Found:
    """The likeliest token at every step; M = 1."""
    sequences = jnp.full((rows, length), pad_id, jnp.int32).at[:, 0].set(bos_id)

    def go_on(state: tuple) -> jax.Array:
        t, _, _, done, _ = state
        return (t < length) & ~done.all()

    def one(state: tuple) -> tuple:
        t, sequences, scores, done, cache = state
        logp, cache = step(sequences[:, t - 1], cache, t - 1)
        token = jnp.where(done, pad_id, logp.argmax(-1).astype(jnp.int32))
        scores = scores + jnp.where(done, 0.0, logp.max(-1))
        return t + 1, sequences.at[:, t].set(token), scores, done | (token == eos_id), cache

    state = (jnp.int32(1), sequences, jnp.zeros(rows), jnp.zeros(rows, bool), cache)
    _, sequences, scores, _, _ = jax.lax.while_loop(go_on, one, state)
    scores = scores / lengths(sequences, eos_id) ** length_penalty
    return Found(sequences[:, None], scores[:, None])


def beam_search(
    step: Step,
    cache: Cache,
    rows: int,
    beams: int,
    length: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    length_penalty: float = 1.0,
) -> Found:
    """The M best sequences of each row; of the 2M best continuations at every step, M are always unfinished.

    A row stops when none of its unfinished beams can overtake its M-th best finished one. Sequences still unfinished at
    `length` count as they are.
    """
    X, M = rows, beams
    rowwise = jnp.arange(X)[:, None]
    start = jnp.full((X, M, length), pad_id, jnp.int32).at[:, :, 0].set(bos_id)

    def normal(scores: jax.Array, tokens: jax.Array | int) -> jax.Array:
        return scores / jnp.asarray(tokens, jnp.float32) ** length_penalty

    def go_on(state: tuple) -> jax.Array:
        t, _, live_scores, _, done_scores, _ = state
        longest = length - 1 if length_penalty > 0 else t
        hopeful = normal(live_scores[:, 0], jnp.maximum(longest, 1)) > done_scores[:, -1]
        return (t < length) & hopeful.any()

    def one(state: tuple) -> tuple:
        t, live, live_scores, done, done_scores, cache = state
        logp, cache = step(live[:, :, t - 1].reshape(X * M), cache, t - 1)
        V = logp.shape[-1]
        total = (live_scores[..., None] + logp.reshape(X, M, V)).reshape(X, M * V)
        best_scores, best = jax.lax.top_k(total, 2 * M)
        beam, token = best // V, (best % V).astype(jnp.int32)
        grown = live[rowwise, beam].at[:, :, t].set(token)
        ended = token == eos_id
        # finished: the M best of the old and the new
        new_done = jnp.where(ended & (best_scores > NEVER / 2), normal(best_scores, t), NEVER)
        done_scores, keep = jax.lax.top_k(jnp.concatenate([done_scores, new_done], 1), M)
        done = jnp.concatenate([done, grown], 1)[rowwise, keep]
        live_scores, keep = jax.lax.top_k(jnp.where(ended, NEVER, best_scores), M)
        source = (rowwise * M + beam[rowwise, keep]).reshape(X * M)
        cache = jax.tree.map(lambda x: x[source], cache)
        return t + 1, grown[rowwise, keep], live_scores, done, done_scores, cache

    live_scores = jnp.full((X, M), NEVER).at[:, 0].set(0.0)
    state = (jnp.int32(1), start, live_scores, start, jnp.full((X, M), NEVER), cache)
    t, live, live_scores, done, done_scores, _ = jax.lax.while_loop(go_on, one, state)
    unfinished = jnp.where((t >= length) & (live_scores > NEVER / 2), normal(live_scores, length - 1), NEVER)
    scores, keep = jax.lax.top_k(jnp.concatenate([done_scores, unfinished], 1), M)
    return Found(jnp.concatenate([done, live], 1)[rowwise, keep], scores)


def search(
    step: Step,
    cache: Cache,
    rows: int,
    beams: int,
    length: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    length_penalty: float = 1.0,
) -> Found:
    """Greedy for one beam, else beam search. With M beams `cache` has X*M rows."""
    if beams == 1:
        return greedy(step, cache, rows, length, bos_id, eos_id, pad_id, length_penalty)
    return beam_search(step, cache, rows, beams, length, bos_id, eos_id, pad_id, length_penalty)
