"""Greedy search, beam search and sampling over `step(tokens, cache) -> (logits, cache, read)`, for any model.

X rows are searched together, each with M beams that share one cache. A search is one while_loop of static shapes, and
stops as soon as every row is finished. Sequences begin with the start token and are padded after eos. The bounds and
the order of choices are those of transformers 5 (`generation/utils.py`), so that the same tokens are found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.decoding.rules import (
    DecodingOptions,
    PrefixTree,
    child,
    constrain,
    has_rules,
    is_one_of,
    prefix_tree,
    warp,
)

__all__ = ["NEVER", "DecodingOptions", "Mixture", "PrefixTree", "Sequences", "lengths", "prefix_tree", "search"]

Cache = Any  # a pytree: a model's state after the tokens of every beam
# (beam_XJ, token_XJ, their log p by the step's scores [X, J]) -> values to keep for these choices, leaves [X, J, ...]
Read = Callable[[jax.Array, jax.Array, jax.Array], Any]


class Mixture(NamedTuple):
    """Next-token scores as probabilities, so that a search takes the logarithm of the best ones only.

    p_XNV: probabilities [X, N, V]; may have padding of probability 0 after the vocabulary. A row that cannot be
        computed so is all NaN.
    logs: returns log-probabilities [X, N, V] without padding, correct for all rows and however small.
    """

    p_XNV: jax.Array
    logs: Callable[[], jax.Array]


Scores = jax.Array | Mixture
# tokens_XM, the last token of each beam -> next-token scores [X, M, V], before softmax or after. The first call has the
# start token alone, [X, 1], since all beams are equal then.
Step = Callable[[jax.Array, Cache], tuple[Scores, Cache, Read | None]]
Reorder = Callable[[Cache, jax.Array], Cache]  # (cache, beam_XM) -> cache in which beam m continues beam_XM[:, m]

NEVER = -1e9  # score of a sequence that is not there


class Sequences(NamedTuple):
    """Result of a search: N sequences per row, best first.

    sequences: [X, N, T].
    scores: [X, N], sum of the log-probabilities, as changed by the rules, / length ** length_penalty; NEVER where
        there are fewer than N sequences.
    kept: results of `read` for every token after the start [X, N, T - 1, ...]; undefined after eos.
    """

    sequences: jax.Array
    scores: jax.Array
    kept: Any


def lengths(sequences: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """Number of tokens after the start, the end token included, of sequences [..., T] from a search."""
    ended = is_one_of(sequences[..., 1:], ends)
    return jnp.where(ended.any(-1), ended.argmax(-1) + 1, ended.shape[-1])


def every(scores: Scores) -> jax.Array:
    """All scores [X, N, V] in float32; for a Mixture its logs."""
    return (scores.logs() if isinstance(scores, Mixture) else scores).astype(jnp.float32)


def take(x: jax.Array, beam_XN: jax.Array) -> jax.Array:
    """Entries [X, N, ...] of x [X, M, ...] at these beams."""
    return jax.vmap(lambda one, beams: one[beams])(x, beam_XN)


def picked(x_XMV: jax.Array, beam_XN: jax.Array, token_XN: jax.Array) -> jax.Array:
    """Entries [X, N] of x at these beams and tokens."""
    return jax.vmap(lambda one, beams, tokens: one[beams, tokens])(x_XMV, beam_XN, token_XN)


def take_beams(cache: Cache, beam_XM: jax.Array) -> Cache:
    """Default reordering, for a cache whose leaves are [X, M, ...]."""
    return jax.tree.map(lambda x: take(x, beam_XM), cache)


BLOCK = 128  # tokens of a block of the vocabulary, see _highest
FAINT = 1e-24  # a sum of probabilities smaller than this may have lost terms that underflow in float32


def _highest(scores_XNV: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scores, tokens, block maxima): the `count` highest scores of every beam [X, N, count], and their tokens.

    The vocabulary is divided into blocks. The `count` highest scores are in the `count` blocks with the highest maxima,
    so that top_k only sorts those. Of equal scores the lower token comes first.
    """
    X, N, V = scores_XNV.shape
    size = BLOCK if 2 * count * BLOCK < V else V
    padding = ((0, 0), (0, 0), (0, -V % size))
    blocks_XNYW = jnp.pad(scores_XNV, padding, constant_values=-jnp.inf).reshape(X, N, -1, size)
    most_XNY = blocks_XNYW.max(-1)
    if size == V:
        return *jax.lax.top_k(scores_XNV, count), most_XNY
    # sorted by position, so that of equal scores the lower token comes first
    chosen_XNC = jnp.sort(jax.lax.top_k(most_XNY, count)[1], axis=-1)
    some_XNCW = jnp.take_along_axis(blocks_XNYW, chosen_XNC[..., None], 2)
    scores, at = jax.lax.top_k(some_XNCW.reshape(X, N, count * size), count)
    return scores, jnp.take_along_axis(chosen_XNC, at // size, -1) * size + at % size, most_XNY


def best_of(
    scores_XNV: Scores, live_XM: jax.Array, count: int, normalised: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The `count` best continuations of a row, best first: (scores - norm + live, beams, tokens, scores - norm).

    All four are [X, count]; of equal ones (for a Mixture, of equal probabilities) the first is taken.

    scores_XNV: next-token scores; N is M, or 1 for all beams alike.
    live_XM: scores of the beams so far.
    normalised: scores are log-probabilities and the norm is 0; else it is their logsumexp.

    The best of each beam are found first, for which neither norm nor live matters, then the best of those. (One top_k
    over [X, M * V] is slower on a CPU, where the reshape keeps XLA from vectorising the operations before it.)
    """
    if isinstance(scores_XNV, Mixture):
        p_XNV, logs = scores_XNV
        p, tokens, _ = _highest(p_XNV, min(count, p_XNV.shape[-1]))
        return jax.lax.cond(
            (p >= FAINT).all(),
            lambda: _best_of_beams(jnp.log(p), tokens, live_XM, count),
            lambda: best_of(logs(), live_XM, count, True),
        )
    scores_XNV = every(scores_XNV)
    scores, tokens, most_XNY = _highest(scores_XNV, min(count, scores_XNV.shape[-1]))
    if not normalised:
        most_XN1 = most_XNY.max(-1, keepdims=True)
        scores = scores - most_XN1 - jnp.log(jnp.exp(scores_XNV - most_XN1).sum(-1, keepdims=True))
    return _best_of_beams(scores, tokens, live_XM, count)


def _best_of_beams(
    logp_XNC: jax.Array, token_XNC: jax.Array, live_XM: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`best_of` from the best log-probabilities of each beam and their tokens."""
    (X, M), each = live_XM.shape, logp_XNC.shape[-1]
    logp, tokens = (jnp.broadcast_to(x, (X, M, each)) for x in (logp_XNC, token_XNC))
    best, at = jax.lax.top_k((logp + live_XM[..., None]).reshape(X, M * each), count)
    tokens, logp = (jnp.take_along_axis(x.reshape(X, M * each), at, 1) for x in (tokens, logp))
    return best, at // each, tokens.astype(jnp.int32), logp


class _Beams(NamedTuple):
    """State of a beam search over X rows, with M unfinished beams (live) and M hypotheses (done) each.

    t: tokens of every beam, the start included.
    live, live_scores, live_kept: unfinished sequences [X, M, T], their sums of log p, and what is kept of them.
    node: node of the prefix tree that each unfinished beam is at.
    done, done_scores, done_kept: the same for hypotheses; their scores have the length penalty.
    is_done: whether there is such a hypothesis [X, M].
    open: whether the hypotheses of a row may still change [X].
    ended: whether every continuation of the last step has ended.
    """

    t: jax.Array
    cache: Cache
    live: jax.Array
    live_scores: jax.Array
    live_kept: Any
    node: jax.Array
    done: jax.Array
    done_scores: jax.Array
    done_kept: Any
    is_done: jax.Array
    open: jax.Array
    ended: jax.Array
    key: jax.Array


def search(
    step: Step,
    cache: Cache,
    rows: int,
    options: DecodingOptions,
    reorder: Reorder = take_beams,
    normalised: bool = False,
    tree: PrefixTree | None = None,
    key: jax.Array | None = None,
) -> Sequences:
    """The N = num_return_sequences best sequences of every row, by the search that `options` describes.

    step: next-token scores of all beams.
    cache: state before the start token.
    rows: X.
    reorder: moves the cache's beams.
    normalised: the step's scores are log-probabilities already.
    tree: the only sequences allowed.
    key: random key, for do_sample; ValueError without.
    """
    if options.do_sample and key is None:
        raise ValueError("do_sample needs a key: pass key=jax.random.key(seed)")
    key = jax.random.key(0) if key is None else key
    if options.num_beams == 1:
        return _sample(step, cache, rows, options, normalised, tree, key)
    return _beam_search(step, cache, rows, options, reorder, normalised, tree, key)


def _begin(options: DecodingOptions, rows: int, beams: int) -> jax.Array:
    """Sequences [X, M, T] with the start token and padding."""
    empty = jnp.full((rows, beams, options.max_length), options.pad_id, jnp.int32)
    return empty.at[:, :, 0].set(options.start_id)


def _empty(read: Read | None, rows: int, beams: int, length: int) -> Any:
    """Zeros in the shape of what `read` keeps of all tokens [X, N, T - 1, ...]."""
    if read is None:
        return None
    one = jnp.zeros((rows, beams), jnp.int32)
    shapes = jax.eval_shape(read, one, one, jnp.zeros((rows, beams)))
    return jax.tree.map(lambda x: jnp.zeros((rows, beams, length - 1, *x.shape[2:]), x.dtype), shapes)


def _keep(kept: Any, t: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda old, x: old.at[:, :, t - 1].set(x), kept, new)


def _walk(
    tree: PrefixTree | None, options: DecodingOptions, node: jax.Array, token: jax.Array, t: jax.Array
) -> jax.Array:
    """Node of the prefix tree after `token`; a forced bos is before the tree and does not move."""
    if tree is None:
        return node
    return jnp.where((t == 1) & (options.forced_bos_id is not None), node, child(tree, node, token))


def _sample(
    step: Step, cache: Cache, rows: int, o: DecodingOptions, normalised: bool, tree: PrefixTree | None, key: jax.Array
) -> Sequences:
    """Greedy search, or sampling of num_return_sequences independent sequences.

    The rules are applied to the step's scores as they are; in beam search, to log-probabilities.
    """
    X, M, T = rows, o.num_return_sequences, o.max_length
    lane = jnp.broadcast_to(jnp.arange(M), (X, M))
    rules = has_rules(o) or tree is not None

    def choose(state: tuple, logits: Scores, read: Read | None, only: bool) -> tuple:
        t, sequences, scores, kept, done, node, key = state
        key, now = jax.random.split(key)
        if not rules:  # one lane
            logp, _, choice, own = best_of(logits, jnp.zeros((X, 1)), 1, normalised)
            token = jnp.where(done, o.pad_id, choice)
        else:
            logits = every(logits)
            logits = jnp.broadcast_to(logits, (X, M, logits.shape[-1]))
            ruled = constrain(o, logits, sequences, t, tree, node)
            choice = jax.random.categorical(now, warp(o, ruled, 1), axis=-1) if o.do_sample else ruled.argmax(-1)
            token = jnp.where(done, o.pad_id, choice.astype(jnp.int32))
            said = jnp.take_along_axis(ruled, choice[..., None], -1)[..., 0]
            logp = said if normalised else said - jax.nn.logsumexp(ruled, axis=-1)
            own = picked(logits if normalised else jax.nn.log_softmax(logits), lane, token)
        scores = scores + jnp.where(done, 0.0, logp)
        if read is not None:
            kept = _keep(kept, t, read(jnp.zeros_like(lane) if only else lane, token, own))
        node = _walk(tree, o, node, token, t)
        return t + 1, sequences.at[:, :, t].set(token), scores, kept, done | is_one_of(token, o.ends), node, key

    start = _begin(o, X, M)
    logits, cache, read = step(start[:, :1, 0], cache)
    nothing = jnp.zeros((X, M), jnp.int32)
    state = (jnp.int32(1), start, jnp.zeros((X, M)), _empty(read, X, M, T), jnp.zeros((X, M), bool), nothing, key)
    state = choose(state, logits, read, True)

    def one(carry: tuple) -> tuple:
        state, cache = carry
        logits, cache, read = step(state[1][:, :, state[0] - 1], cache)
        return choose(state, logits, read, False), cache

    state, _ = jax.lax.while_loop(lambda carry: (carry[0][0] < T) & ~carry[0][4].all(), one, (state, cache))
    _, sequences, scores, kept, *_ = state
    return Sequences(sequences, scores / lengths(sequences, o.ends) ** o.length_penalty, kept)


def _beam_search(
    step: Step,
    cache: Cache,
    rows: int,
    o: DecodingOptions,
    reorder: Reorder,
    normalised: bool,
    tree: PrefixTree | None,
    key: jax.Array,
) -> Sequences:
    """Beam search over the M * (1 + number of end tokens) best continuations of every step.

    The M best unfinished ones become the beams of the next step. A finished one becomes a hypothesis if it is among the
    M best of all. Sequences that are unfinished at max_length are hypotheses as they are.
    """
    X, M, T = rows, o.num_beams, o.max_length
    J = M * (1 + len(o.ends))  # at most M * len(ends) of them are finished, so M unfinished ones remain
    penalty_T = jnp.asarray(np.maximum(np.arange(T), 1.0) ** o.length_penalty, jnp.float32)  # by tokens after the start

    def choose(s: _Beams, logits: Scores, cache: Cache, read: Read | None, only: bool) -> _Beams:
        t, (key, now) = s.t, jax.random.split(s.key)
        scores, beam, token, said = _continuations(o, normalised, tree, s, logits, J, now)
        grown = take(s.live, beam).at[:, :, t].set(token)
        kept = None
        if read is not None:
            new = read(jnp.zeros_like(beam) if only else beam, token, said)
            kept = _keep(take_beams(s.live_kept, beam), t, new)
        ended = is_one_of(token, o.ends) | (t + 1 == T)
        s = _with_hypotheses(o, penalty_T, s, grown, scores, kept, ended)
        live_scores, going_on = jax.lax.top_k(_less(scores, ended), M)
        # a row stays open while its best beam could beat its worst hypothesis at this length or, for "never", at any
        source = jnp.take_along_axis(beam, going_on, 1)
        longest = T - 1 if o.early_stopping == "never" and o.length_penalty > 0 else t
        worst_done = jnp.where(s.is_done, s.done_scores.min(1, keepdims=True), NEVER)
        better = (live_scores[:, :1] / penalty_T[longest] > worst_done).any(-1)
        return s._replace(
            t=t + 1,
            cache=reorder(cache, source),
            live=take(grown, going_on),
            live_scores=live_scores,
            live_kept=take_beams(kept, going_on),
            node=_walk(tree, o, jnp.take_along_axis(s.node, source, 1), jnp.take_along_axis(token, going_on, 1), t),
            open=s.open & better,
            ended=ended.all(),
            key=key,
        )

    def go_on(s: _Beams) -> jax.Array:
        return s.open.any() & ~(s.is_done.all() & (o.early_stopping is True)) & ~s.ended

    def one(s: _Beams) -> _Beams:
        logits, cache, read = step(s.live[:, :, s.t - 1], s.cache)
        return choose(s, logits, cache, read, False)

    start = _begin(o, X, M)
    logits, cache, read = step(start[:, :1, 0], cache)
    first = _first_beams(start, cache, _empty(read, X, M, T), key)
    s = jax.lax.while_loop(go_on, one, choose(first, logits, cache, read, True))
    # scores of hypotheses were divided by the length penalty, NEVER included
    real = s.done_scores > NEVER / 2 / jnp.maximum(penalty_T.max(), 1.0)
    found = Sequences(s.done, jnp.where(real, s.done_scores, NEVER), s.done_kept)
    return jax.tree.map(lambda x: x[:, : o.num_return_sequences], found)


def _first_beams(start_XMT: jax.Array, cache: Cache, kept: Any, key: jax.Array) -> _Beams:
    """State before the first step: M beams of the start token, all but the first with score NEVER; no hypotheses."""
    X, M, _ = start_XMT.shape
    scores_XM = jnp.full((X, M), NEVER)
    return _Beams(
        t=jnp.int32(1),
        cache=cache,
        live=start_XMT,
        live_scores=scores_XM.at[:, 0].set(0.0),
        live_kept=kept,
        node=jnp.zeros((X, M), jnp.int32),
        done=start_XMT,
        done_scores=scores_XM,
        done_kept=kept,
        is_done=jnp.zeros((X, M), bool),
        open=jnp.ones(X, bool),
        ended=jnp.zeros((), bool),
        key=key,
    )


def _continuations(
    o: DecodingOptions, normalised: bool, tree: PrefixTree | None, s: _Beams, logits: Scores, count: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(scores, beams, tokens, log p) [X, count]: the `count` best continuations of a row's beams, best first.

    Scores are those of the sequences; log p is that of the tokens by the step, before the rules. With do_sample
    continuations are drawn without replacement, by adding Gumbel noise (Kool et al. 2019).
    """
    if not has_rules(o) and tree is None:
        return best_of(logits, s.live_scores, count, normalised)
    logits, (X, M) = every(logits), s.live_scores.shape
    own = jnp.broadcast_to(logits if normalised else jax.nn.log_softmax(logits), (X, M, logits.shape[-1]))
    logp = constrain(o, own, s.live, s.t, tree, s.node)
    if o.do_sample:
        total = warp(o, logp, 1 + len(o.ends)) + s.live_scores[..., None]
        drawn = total + jax.random.gumbel(key, total.shape)
        _, beam, token, _ = best_of(drawn, jnp.zeros((X, M)), count, True)
        scores = picked(total, beam, token)
    else:
        scores, beam, token, _ = best_of(logp, s.live_scores, count, True)
    return scores, beam, token, picked(own, beam, token)


def _with_hypotheses(
    o: DecodingOptions,
    penalty_T: jax.Array,
    s: _Beams,
    grown_XJT: jax.Array,
    scores_XJ: jax.Array,
    kept: Any,
    ended_XJ: jax.Array,
) -> _Beams:
    """The state with the M best of old hypotheses and newly finished sequences; a closed row keeps its hypotheses."""
    M = s.done_scores.shape[1]
    counts_XJ = ended_XJ & (jnp.arange(scores_XJ.shape[1]) < M)
    closed_X = ~s.open | (s.is_done.all(-1) & (o.early_stopping is True))
    new_XJ = _less(_less(scores_XJ / penalty_T[s.t], closed_X[:, None]), ~counts_XJ)
    done_scores, best = jax.lax.top_k(jnp.concatenate([s.done_scores, new_XJ], 1), M)

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
        return take(jnp.concatenate([old, new], 1), best)

    return s._replace(
        done=merged(s.done, grown_XJT),
        done_scores=done_scores,
        done_kept=jax.tree.map(merged, s.done_kept, kept),
        is_done=merged(s.is_done, counts_XJ),
    )


def _less(scores: jax.Array, where: jax.Array) -> jax.Array:
    """Scores with NEVER added where `where` is True."""
    return scores + jnp.where(where, NEVER, 0.0)
