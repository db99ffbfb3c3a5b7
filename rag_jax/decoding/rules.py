"""Decoding options, and the rules on next-token scores: banned tokens, forced tokens, and allowed outputs.

No model is used here. X rows are searched together, with M beams each; the first t tokens of sequences_XMT are written,
the start token included. The rules and their order are those of transformers 5, so that a search finds the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class DecodingOptions:
    """Decoding options, with the names (but _id for _token_id) and meanings of transformers.

    num_beams: M; 1 without do_sample is greedy search.
    max_length, min_length: tokens of a sequence, the start token included.
    length_penalty: a hypothesis has the score (sum of log p) / (tokens after the start) ** length_penalty.
    early_stopping: True ends a row with its num_beams-th hypothesis; False when its best unfinished beam is worse than
        all hypotheses at its present length; "never" when it is so at any length.
    forced_bos_id, forced_eos_id: token right after the start, and last token at max_length; None: not forced.
    bad_words: token sequences that are never written.
    suppress_ids, begin_suppress_ids: tokens that are never written, and never as the first one.
    repetition_penalty: see `_penalise`; 1: none.
    no_repeat_ngram_size: no n-gram of this many tokens is written twice; 0: no such rule.
    temperature, top_k, top_p: of sampling, see `warp`; top_k 0: all tokens.
    end_ids: all tokens that end an answer; (): eos_id alone.
    """

    num_beams: int = 1
    max_length: int = 32
    min_length: int = 0
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppress_ids: tuple[int, ...] = ()
    begin_suppress_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    start_id: int = 0
    eos_id: int = 2
    end_ids: tuple[int, ...] = ()
    pad_id: int = 1

    def __post_init__(self) -> None:
        """ValueError that names the field and what it may be, for values out of range."""
        object.__setattr__(self, "bad_words", tuple(tuple(int(token) for token in word) for word in self.bad_words))
        for name, good, rule in (
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("max_length", self.max_length >= 2, "2 or more: the start and a token"),
            ("min_length", self.min_length >= 0, "0 or more"),
            ("num_return_sequences", self.num_return_sequences >= 1, "1 or more"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("bad_words", all(self.bad_words), "token sequences, none of them empty"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 or more"),
            ("temperature", self.temperature > 0, "more than 0; for the likeliest token leave do_sample off"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.num_return_sequences > self.num_beams and not (self.do_sample and self.num_beams == 1):
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} of num_beams={self.num_beams}: a search has as many "
                "results as beams; ask for more beams, or set do_sample"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return self.end_ids or (self.eos_id,)

    @property
    def lanes(self) -> int:
        """M, the number of sequences of a row that are extended together."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @classmethod
    def check_names(cls, names: Sequence[str]) -> None:
        """TypeError for a name that is no option."""
        known = [field.name for field in fields(cls)]
        for name in names:
            if name not in known:
                raise TypeError(f"unknown decoding option {name!r}; there are {', '.join(known)}")


class PrefixTree(NamedTuple):
    """Allowed outputs as a tree of their prefixes: node 0 is the root; in the last node nothing is allowed.

    first_N: edges of node n are those from first_N[n] up to, not including, first_N[n + 1].
    token_E, child_E: token of every edge, and the node that it leads to.
    widest_W: 0, 1, ..., W - 1, where W is the most edges of a node; an array, so that W is static in jitted programs.
    """

    first_N: jax.Array
    token_E: jax.Array
    child_E: jax.Array
    widest_W: jax.Array


def prefix_tree(outputs: Sequence[Sequence[int]], eos_id: int) -> PrefixTree:
    """Prefix tree of token sequences without the start token; eos is appended to those that do not end with it.

    ValueError for no outputs, or one that is empty or has eos inside.
    """
    if not outputs:
        raise ValueError("no allowed outputs were given; give one or more token sequences")
    children: list[dict[int, int]] = [{}]
    for output in outputs:
        tokens = [int(token) for token in output]
        tokens = tokens if tokens[-1:] == [eos_id] else [*tokens, eos_id]
        if len(tokens) < 2 or eos_id in tokens[:-1]:
            raise ValueError(f"allowed output {list(output)} must have tokens, and eos ({eos_id}) at its end only")
        node = 0
        for token in tokens:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
    children.append({})
    counts = [len(edges) for edges in children]
    edges = [(token, child) for node in children for token, child in sorted(node.items())]
    token_E, child_E = np.asarray(edges, np.int32).T
    first_N = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return PrefixTree(*(jnp.asarray(x) for x in (first_N, token_E, child_E, np.arange(max(counts), dtype=np.int32))))


def _edges(tree: PrefixTree, node: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of a node's edges [..., W], and True where there is an edge: nodes may have fewer than W."""
    at = tree.first_N[node][..., None] + tree.widest_W
    return jnp.minimum(at, len(tree.token_E) - 1), at < tree.first_N[node + 1][..., None]


def child(tree: PrefixTree, node: jax.Array, token: jax.Array) -> jax.Array:
    """Node that `token` leads to; the last node, where nothing is allowed, if the token is not allowed."""
    at, real = _edges(tree, node)
    nowhere = len(tree.first_N) - 2
    next_node = jnp.where(real & (tree.token_E[at] == token[..., None]), tree.child_E[at], -1).max(-1)
    return jnp.where(next_node < 0, nowhere, next_node)


def has_rules(o: DecodingOptions) -> bool:
    """Whether any rule or sampling needs all scores as log-probabilities, not only the best ones."""
    penalised = o.repetition_penalty != 1.0 or o.no_repeat_ngram_size or o.bad_words or o.min_length or o.do_sample
    return (
        bool(penalised or o.suppress_ids or o.begin_suppress_ids)
        or o.forced_bos_id is not None
        or o.forced_eos_id is not None
    )


def constrain(
    options: DecodingOptions,
    scores_XMV: jax.Array,
    sequences_XMT: jax.Array,
    t: jax.Array,
    tree: PrefixTree | None,
    node_XM: jax.Array,
) -> jax.Array:
    """Scores after all rules but those of sampling (`warp`).

    t: tokens written so far, the start included.
    node_XM: node of the prefix tree that each beam is at.
    """
    o, scores = options, scores_XMV
    if o.repetition_penalty != 1.0:
        scores = _penalise(scores, sequences_XMT, t, o.repetition_penalty)
    if o.no_repeat_ngram_size:
        scores = _ban(scores, *_repeats(sequences_XMT, t, o.no_repeat_ngram_size))
    words = [word for word in o.bad_words if word not in {(end,) for end in o.ends}]
    if words:
        scores = _ban(scores, *_bad(sequences_XMT, t, words))
    if o.min_length:
        scores = _without(scores, o.ends, t < o.min_length)
    if tree is not None:
        at, real = _edges(tree, node_XM)
        tokens = jnp.where(real, tree.token_E[at], scores.shape[-1])
        scores = jnp.where(_scattered(tokens, scores), scores, -jnp.inf)
    vocabulary = jnp.arange(scores.shape[-1])
    for token, when in ((o.forced_bos_id, t == 1), (o.forced_eos_id, t == o.max_length - 1)):
        if token is not None:
            scores = jnp.where(when, jnp.where(vocabulary == token, 0.0, -jnp.inf), scores)
    first = 1 if o.forced_bos_id is None else 2  # begin_suppress_ids applies to the first token that is not forced
    for banned, now in ((o.suppress_ids, t >= 1), (o.begin_suppress_ids, t == first)):
        scores = _without(scores, banned, now) if banned else scores
    return scores


def is_one_of(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Whether each token is among `ids`."""
    return jnp.isin(token, jnp.asarray(ids, jnp.int32))


def _without(scores_XMV: jax.Array, tokens: tuple[int, ...], when: jax.Array) -> jax.Array:
    """Scores with -inf for these tokens, where `when` is True."""
    banned = is_one_of(jnp.arange(scores_XMV.shape[-1]), tokens)
    return jnp.where(banned & when, -jnp.inf, scores_XMV)


def _scattered(tokens_XMN: jax.Array, scores_XMV: jax.Array) -> jax.Array:
    """Mask [X, M, V], True at these tokens; token ids of V and more are ignored."""
    X, M, V = scores_XMV.shape
    x, m = jnp.arange(X)[:, None, None], jnp.arange(M)[None, :, None]
    return jnp.zeros((X, M, V), bool).at[x, m, tokens_XMN].set(True, mode="drop")


def _ban(scores_XMV: jax.Array, tokens_XMN: jax.Array, when_XMN: jax.Array) -> jax.Array:
    """Scores with -inf at these tokens of each beam, where `when` is True."""
    banned = _scattered(jnp.where(when_XMN, tokens_XMN, scores_XMV.shape[-1]), scores_XMV)
    return jnp.where(banned, -jnp.inf, scores_XMV)


def _penalise(scores_XMV: jax.Array, sequences_XMT: jax.Array, t: jax.Array, penalty: float) -> jax.Array:
    """Repetition penalty (Keskar et al. 2019) on tokens written before: positive scores / it, negative ones * it."""
    said = jnp.where(jnp.arange(sequences_XMT.shape[-1]) < t, sequences_XMT, scores_XMV.shape[-1])
    penalised = jnp.where(scores_XMV < 0, scores_XMV * penalty, scores_XMV / penalty)
    return jnp.where(_scattered(said, scores_XMV), penalised, scores_XMV)


def _tail(sequences_XMT: jax.Array, t: jax.Array, n: int) -> jax.Array:
    """The last n of the t tokens written [X, M, n]; -1 where there are fewer."""
    padded = jnp.pad(sequences_XMT, ((0, 0), (0, 0), (n, 0)), constant_values=-1)
    return jax.lax.dynamic_slice_in_dim(padded, t, n, axis=2)


def _repeats(sequences_XMT: jax.Array, t: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Tokens that would repeat an n-gram, one for every n-gram's position [X, M, T - n + 1], and where they would."""
    T = sequences_XMT.shape[-1]
    starts = max(T - n + 1, 0)
    tail = _tail(sequences_XMT, t, n - 1)
    same = jnp.arange(starts) + n - 1 < t
    for i in range(n - 1):
        same = same & (sequences_XMT[..., i : i + starts] == tail[..., i : i + 1])
    last = sequences_XMT[..., n - 1 : n - 1 + starts]
    return last, jnp.broadcast_to(same, last.shape)


def _bad(sequences_XMT: jax.Array, t: jax.Array, words: list[tuple[int, ...]]) -> tuple[jax.Array, jax.Array]:
    """The last token of every bad word [X, M, W], and whether the tokens before it have just been written."""
    longest = max(len(word) for word in words) - 1
    before = np.full((len(words), longest), -2)  # -2: anything
    for i, word in enumerate(words):
        before[i, longest - len(word) + 1 :] = word[:-1]
    tail = _tail(sequences_XMT, t, longest)[:, :, None]
    said = ((tail == before) | (before == -2)).all(-1)
    return jnp.broadcast_to(np.asarray([word[-1] for word in words]), said.shape), said


def warp(options: DecodingOptions, scores: jax.Array, keep: int) -> jax.Array:
    """Temperature, top-k and top-p (Holtzman et al. 2020) on scores [..., V]; at least `keep` tokens remain."""
    o, V = options, scores.shape[-1]
    scores = scores / o.temperature
    if o.top_k:
        least = jax.lax.top_k(scores, min(max(o.top_k, keep), V))[0][..., -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if o.top_p < 1:
        # in ascending order, as in transformers: the least likely tokens go while together they have 1 - top_p at most
        order = jnp.argsort(scores, axis=-1)
        p = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, -1), axis=-1), axis=-1)
        gone = (p <= 1 - o.top_p) & (jnp.arange(V) < V - keep)
        gone = jnp.take_along_axis(gone, jnp.argsort(order, axis=-1), -1)
        scores = jnp.where(gone, -jnp.inf, scores)
    return scores
