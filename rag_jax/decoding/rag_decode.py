"""Decoding of RAG (Lewis et al. 2020, section 2.5): RAG-Token, and RAG-Sequence thorough and fast, inside one jit.

Rows R = B * K are (question, document) pairs; the documents of a question are contiguous. Every source is encoded once,
and its keys and values for cross-attention are shared by all beams and candidates. The M beams of a row share one cache
of self-attention, in which token t of beam m is at slot t * M + m. Entries never move: a table of ancestors says which
slots a beam sees, and reordering the beams changes this table alone. The candidates of RAG-Sequence are scored in the
same way, as a tree of their prefixes in one cache.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rag_jax.decoding import search as decoding_search
from rag_jax.decoding.search import DecodingOptions, PrefixTree
from rag_jax.losses import absent
from rag_jax.ops.kv_cache import KeyValues, Tree
from rag_jax.ops.vocab_loss import vocabulary_norm
from rag_jax.system import sharding

Mode = Literal["thorough", "fast"]
TOKENS_AT_ONCE = 1024  # tokens of candidates in one call of the decoder, over all rows


class Reader(NamedTuple):
    """A generator with its parameters; reader(method, ...) applies a method of the module.

    bos_id: id of the bos token, which may not be part of the likelihood, see `candidates_of`.
    hf_compat: see losses.sequence_joint.
    """

    module: nn.Module
    params: Any
    bos_id: int
    hf_compat: bool = False

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.module.apply({"params": self.params}, *args, method=method, **kwargs)


class Contexts(NamedTuple):
    """Cross-attention keys and values of every joined input, and their mask; row b * K + k is document k of b."""

    cross: KeyValues
    mask_RL: jax.Array


class Generation(NamedTuple):
    """Answers with their scores and posteriors.

    sequences: [B, T], the start token, the answer, eos, padding.
    scores: [B], log p(y|x).
    doc_posterior: [B, K], p(z_k|x,y).
    token_posterior: for RAG-Token [B, T - 1, K], p(z_k|x,y_t,y_<t) of every token after the start (figure 2), 0 where
        there is none; None for RAG-Sequence.

    With num_return_sequences N > 1 all have an axis N after B, best first. Where there are fewer answers than N, the
    others have score -inf.
    """

    sequences: jax.Array
    scores: jax.Array
    doc_posterior: jax.Array
    token_posterior: jax.Array | None


class Lanes(NamedTuple):
    """Cache shared by the M beams of each of X searches.

    kv: keys and values of (T - 1) * M slots.
    ancestor_XMT: [X, M, T - 1], the lane m in which each past token of a beam was written.
    t: how many tokens each beam has.
    """

    kv: KeyValues
    ancestor_XMT: jax.Array
    t: jax.Array


def by_documents(function: Callable, chunk: int, *arguments: Any) -> Any:
    """function(*arguments) computed `chunk` documents at a time; leaves of arguments and result are [B, K, ...].

    K is padded to a multiple of the chunk. A chunk of 0, or of K and more: all at once.
    """
    K = jax.tree.leaves(arguments)[0].shape[1]
    if not 0 < chunk < K:
        return function(*arguments)
    count = -(-K // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * chunk - K)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(len(x), count, chunk, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * chunk, *x.shape[3:])[:, :K]

    return jax.tree.map(joined, jax.lax.map(lambda some: function(*some), jax.tree.map(cut, arguments)))


def rows(x: Any) -> Any:
    """[B, K, ...] -> [B*K, ...]"""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)


def documents(x: Any, K: int) -> Any:
    """[B*K, ...] -> [B, K, ...]"""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, K, *leaf.shape[1:]), x)


def encode(reader: Reader, ids_BKL: jax.Array, mask_BKL: jax.Array) -> Any:
    """Encodings of every joined (passage, question) by the generator, leaves [B, K, ...]."""
    return documents(reader("encode", rows(ids_BKL), rows(mask_BKL)), ids_BKL.shape[1])


def contexts(reader: Reader, hidden: Any, mask_BKL: jax.Array) -> Contexts:
    """Cross-attention keys and values of these encodings."""
    return Contexts(reader("cross", rows(hidden)), rows(mask_BKL))


class PaddedHead(NamedTuple):
    """The generator's output layer in the form that RAG-Token's steps use.

    kernel_VD: [V', D], a copy padded to whole blocks of the vocabulary (decoding.search.BLOCK).
    weight_V: exp(bias - most) [V'] in float32, 0 for padding.
    most: highest bias.
    scale: factor of the products, logit_scale.
    size: V, without padding.
    """

    kernel_VD: jax.Array
    weight_V: jax.Array
    most: jax.Array
    scale: float
    size: int

    @classmethod
    def of(cls, layer: tuple[jax.Array, jax.Array], scale: float, dtype: Any) -> "PaddedHead":
        kernel_VD, bias_V = sharding.gathered(layer[0], ("vocab", "embed"), dtype), layer[1].astype(jnp.float32)
        padding = (0, -len(bias_V) % decoding_search.BLOCK)
        # padded with copies of the last row: a row of zeros could have the highest product
        padded = jnp.pad(kernel_VD, (padding, (0, 0)), mode="edge")
        return cls(padded, jnp.pad(jnp.exp(bias_V - bias_V.max()), padding), bias_V.max(), scale, len(bias_V))


def marginal(logits_XKNV: jax.Array, weight_XKN: jax.Array) -> jax.Array:
    """logsumexp over K of logits + weight [X, N, V], one document at a time.

    Written as one sum over the axis K, XLA makes several passes over memory on a CPU, seven times slower.
    """
    terms = [logits_XKNV[:, k] + weight_XKN[:, k, :, None] for k in range(logits_XKNV.shape[1])]
    # finite, so that a token that is -inf under all documents gives -inf, not NaN from -inf - -inf
    most = jnp.maximum(reduce(jnp.maximum, terms), jnp.finfo(jnp.float32).min)
    return most + jnp.log(sum(jnp.exp(term - most) for term in terms))


def mixed(
    products_XKNV: jax.Array, head: PaddedHead, prior_XK: jax.Array, logits: Callable[[], jax.Array]
) -> tuple[decoding_search.Mixture, jax.Array]:
    """p(y_t|x,y_<t), RAG-Token's sum over the documents, and the logsumexp of the logits [X, K, N].

    products_XKNV: products of the states with the head's kernel, [X, K, N, V'].
    prior_XK: log p(z_k|x).
    logits: recomputes the logits [X, K, N, V]; called only where probabilities are too small for sums in float32.

    Usually one exponential of every product serves normaliser and mixture. The bias is a factor of it, exp(bias), which
    saves a CPU a pass through memory, and the products are not needed later, so that it can take their place in memory.
    """
    most_XKN = products_XKNV.max(-1)
    exp_XKNV = jnp.exp((products_XKNV - most_XKN[..., None]) * head.scale)
    sum_XKN = jnp.matmul(exp_XKNV, head.weight_V, precision="highest")  # a sum, whose terms a TPU must not round
    # smaller only where the tokens with the highest products have biases far below the highest one: then terms that
    # matter may have underflowed
    whole_XKN = sum_XKN >= 1e-6
    norm_XKN = jax.lax.cond(
        whole_XKN.all(),
        lambda: most_XKN * head.scale + jnp.log(sum_XKN) + head.most,
        lambda: jax.nn.logsumexp(logits(), axis=-1),
    )
    share_XKN = jnp.where(whole_XKN, jnp.exp(prior_XK)[..., None] / sum_XKN, jnp.nan)
    p_XNV = reduce(jnp.add, [exp_XKNV[:, k] * share_XKN[:, k, :, None] for k in range(prior_XK.shape[1])])
    p_XNV = p_XNV * head.weight_V

    def logs() -> jax.Array:
        own_XNV = p_XNV[..., : head.size]
        return jax.lax.cond(
            (own_XNV >= decoding_search.FAINT).all(),
            lambda: jnp.log(own_XNV),
            lambda: marginal(logits(), prior_XK[..., None] - norm_XKN),
        )

    return decoding_search.Mixture(p_XNV, logs), norm_XKN


def search(
    reader: Reader,
    source: Contexts,
    options: DecodingOptions,
    prior_BK: jax.Array | None,
    tree: PrefixTree | None,
    key: jax.Array | None,
) -> decoding_search.Sequences:
    """Searches over the generator's next-token probabilities.

    prior_BK: None searches once per row; what is kept of every token is its log p [R, N, T - 1]. With log p(z_k|x) it
        searches once per question, over the marginal next token of RAG-Token, and keeps the log p of every token under
        every document [B, N, T - 1, K].
    tree: the only answers allowed, or None.
    key: random key, for do_sample.
    """
    R, M, T = len(source.mask_RL), options.lanes, options.max_length
    X, K = (R, 1) if prior_BK is None else prior_BK.shape
    slots = (T - 1) * M

    def step(tokens_XN: jax.Array, cache: Lanes) -> tuple[decoding_search.Scores, Lanes, decoding_search.Read]:
        N, t = tokens_XN.shape[1], cache.t  # N is M, and 1 in the first call
        ancestor_XMT = cache.ancestor_XMT.at[:, :, t].set(jnp.arange(M) if N == M else 0)
        written = jnp.arange(T - 1)[:, None] <= t
        visible_XNTM = (ancestor_XMT[:, :N, :, None] == jnp.arange(M)) & written
        visible_RNS = jnp.repeat(visible_XNTM.reshape(X, N, slots), K, axis=0)
        stands = Tree(jnp.broadcast_to(t, (1, N)), jnp.arange(slots)[None] // M, visible_RNS)
        ids_RN = jnp.repeat(tokens_XN, K, axis=0)
        hidden_RND, kv = reader("states", ids_RN, *source, cache.kv, t * M, tree=stands)
        moved = Lanes(kv, ancestor_XMT, t + 1)
        if prior_BK is None or head is None:
            return reader("logits", hidden_RND), moved, lambda beam_XJ, token_XJ, logp_XJ: logp_XJ
        hidden_XKND = documents(hidden_RND, K)
        products_XKNV = jnp.matmul(hidden_XKND, head.kernel_VD.T, preferred_element_type=jnp.float32)
        mixture, norm_XKN = mixed(products_XKNV, head, prior_BK, lambda: documents(reader("logits", hidden_RND), K))

        def read(beam_XJ: jax.Array, token_XJ: jax.Array, _logp_XJ: jax.Array) -> jax.Array:
            states_XKJD = jnp.take_along_axis(hidden_XKND, beam_XJ[:, None, :, None], 2)
            logits_XJK = logits_at(reader, states_XKJD, token_XJ, "xkjd,xjd->xjk")
            norm_XJK = jnp.take_along_axis(norm_XKN, beam_XJ[:, None], 2).swapaxes(1, 2)
            return jnp.minimum(logits_XJK - norm_XJK, 0.0)  # rounded differently, so the difference could exceed 0

        return mixture, moved, read

    def reorder(cache: Lanes, beam_XM: jax.Array) -> Lanes:
        return cache._replace(ancestor_XMT=decoding_search.take(cache.ancestor_XMT, beam_XM))

    c = reader.module.config
    head = None if prior_BK is None else PaddedHead.of(reader("head"), c.logit_scale, jnp.dtype(c.dtype))
    lanes = jnp.broadcast_to(jnp.arange(M)[:, None], (X, M, T - 1))
    cache = Lanes(reader.module.init_cache(R, slots), lanes, jnp.int32(0))
    return decoding_search.search(step, cache, X, options, reorder, prior_BK is not None, tree, key)


def counted(sequences: jax.Array, options: DecodingOptions) -> jax.Array:
    """True for tokens after the start that are part of the likelihood [..., T - 1]: up to eos, and no padding."""
    at = jnp.arange(sequences.shape[-1] - 1)
    inside = at < decoding_search.lengths(sequences, options.ends)[..., None]
    padding_counts = options.pad_id in options.ends
    return inside if padding_counts else inside & (sequences[..., 1:] != options.pad_id)


def rag_token(
    reader: Reader,
    ids_BKL: jax.Array,
    mask_BKL: jax.Array,
    prior_BK: jax.Array,
    options: DecodingOptions,
    tree: PrefixTree | None = None,
    key: jax.Array | None = None,
    doc_chunk: int = 0,
) -> Generation:
    """RAG-Token: one search per question over the marginal next token.

    doc_chunk: documents encoded at a time, 0 for all.
    """
    hidden = by_documents(lambda *x: encode(reader, *x), doc_chunk, ids_BKL, mask_BKL)
    found = search(reader, contexts(reader, hidden, mask_BKL), options, prior_BK, tree, key)
    mask_BNT1 = counted(found.sequences, options)[..., None]
    joint_BNTK = jnp.where(mask_BNT1, found.kept + prior_BK[:, None, None], 0.0)
    scores_BN = jnp.where(mask_BNT1[..., 0], jax.nn.logsumexp(joint_BNTK, axis=-1), 0.0).sum(-1)
    scores_BN = jnp.where(found.scores > decoding_search.NEVER, scores_BN, -jnp.inf)
    logp_BNK = jnp.where(mask_BNT1, found.kept, 0.0).sum(-2) + prior_BK[:, None]
    token_posterior = jnp.where(mask_BNT1, jax.nn.softmax(joint_BNTK, axis=-1), 0.0)
    return Generation(found.sequences, scores_BN, jax.nn.softmax(logp_BNK, axis=-1), token_posterior)


def rag_sequence(
    reader: Reader,
    ids_BKL: jax.Array,
    mask_BKL: jax.Array,
    prior_BK: jax.Array,
    options: DecodingOptions,
    mode: Mode,
    returned: int,
    tree: PrefixTree | None = None,
    key: jax.Array | None = None,
    doc_chunk: int = 0,
) -> Generation:
    """RAG-Sequence: a search per document proposes candidates, which are ranked by p(y|x).

    options: of the search per document; its num_return_sequences is the number of candidates of each.
    mode: `thorough` also scores the candidates under the documents that did not propose them, but for candidates that
        an upper bound excludes from the best; `fast` takes p(y|x,z) as 0 where the beam of z did not produce y.
    returned: answers that are returned, the best of all candidates.
    doc_chunk: documents encoded, searched and scored at a time, 0 for all.
    """
    B, K, _ = ids_BKL.shape
    each = options.num_return_sequences
    # tokens that most candidates begin with; the distribution after them bounds the candidates' likelihoods
    first_id = reader.bos_id if options.forced_bos_id is None else options.forced_bos_id
    opening = (options.start_id,) if options.start_id == first_id else (options.start_id, first_id)

    def propose(
        ids_BKL: jax.Array, mask_BKL: jax.Array, number_BK: jax.Array
    ) -> tuple[Any, decoding_search.Sequences, Any]:
        hidden = encode(reader, ids_BKL, mask_BKL)
        source = contexts(reader, hidden, mask_BKL)
        now = None if key is None else jax.random.fold_in(key, number_BK[0, 0])
        found = search(reader, source, options, None, tree, now)
        opened = after(reader, source, opening) if mode == "thorough" else ()
        return hidden, *documents((found, opened), ids_BKL.shape[1])

    number_BK = jnp.broadcast_to(jnp.arange(K), (B, K))
    hidden, found, opened = by_documents(propose, doc_chunk, ids_BKL, mask_BKL, number_BK)
    c = candidates_of(found, prior_BK, reader, options)
    prior_BCK = jnp.broadcast_to(prior_BK[:, None], c.logp_BCK.shape)
    if reader.hf_compat:  # the prior counts at the second token alone, see losses.sequence_joint
        second_BC1 = c.counted_BCT[..., 1:2] if options.max_length > 2 else jnp.zeros_like(c.counted_BCT[..., :1])
        prior_BCK = jnp.where(second_BC1 | absent(prior_BCK), prior_BCK, 0.0)
    logp_BCK = c.logp_BCK
    if mode == "thorough":

        def score(hidden: Any, mask_BKL: jax.Array, need_BKC: jax.Array) -> jax.Array:
            source = contexts(reader, hidden, mask_BKL)
            return score_candidates(reader, source, c.sequences_BCT, c.counted_BCT, need_BKC, 2 * each)

        bound_BCK = first_token_bound(reader, opened, opening, c.sequences_BCT, c.counted_BCT)
        upper_BCK = jnp.where(c.known_BCK, logp_BCK, bound_BCK) + prior_BCK
        hopeful_BC = c.first_BC & may_win(logp_BCK + prior_BCK, upper_BCK, c.first_BC, returned)
        need_BKC = (hopeful_BC[..., None] & ~c.known_BCK).swapaxes(1, 2)
        scored_BKC = by_documents(score, doc_chunk, hidden, mask_BKL, need_BKC)
        logp_BCK = jnp.where(c.known_BCK, logp_BCK, scored_BKC.swapaxes(1, 2))
    joint_BCK = logp_BCK + prior_BCK
    scores_BC = jnp.where(c.first_BC, jax.nn.logsumexp(joint_BCK, axis=-1), -jnp.inf)
    scores_BN, best_BN = jax.lax.top_k(scores_BC, returned)
    posterior_BNK = jax.nn.softmax(decoding_search.take(joint_BCK, best_BN), axis=-1)
    return Generation(decoding_search.take(c.sequences_BCT, best_BN), scores_BN, posterior_BNK, None)


class Candidates(NamedTuple):
    """Answers that the documents propose, C = K * (candidates of each document).

    counted_BCT: tokens after the start that scores are summed over [B, C, T - 1].
    first_BC: True for the first of equal answers; the others are ignored.
    known_BCK: whether document k proposed the answer.
    logp_BCK: log p(y|x,z_k) where known, else -inf.
    """

    sequences_BCT: jax.Array
    counted_BCT: jax.Array
    first_BC: jax.Array
    known_BCK: jax.Array
    logp_BCK: jax.Array


def candidates_of(
    found: decoding_search.Sequences, prior_BK: jax.Array, reader: Reader, options: DecodingOptions
) -> Candidates:
    """Candidates from the results of a search per document, whose leaves are [B, K, ...]."""
    (B, K), each = prior_BK.shape, options.num_return_sequences
    sequences_BCT = found.sequences.reshape(B, K * each, -1)
    real_BC = found.scores.reshape(B, K * each) > decoding_search.NEVER
    real_BC &= ~jnp.repeat(absent(prior_BK), each, axis=1)  # a passage that was not found proposes nothing
    same_BCC = (sequences_BCT[:, :, None] == sequences_BCT[:, None]).all(-1) & real_BC[:, None]
    first_BC = real_BC & (same_BCC.argmax(-1) == jnp.arange(K * each))  # the same answer from two documents is one
    counted_BCT = counted(sequences_BCT, options)
    # a bos that all candidates of a question begin with is not part of the answer
    if options.start_id != reader.bos_id or reader.hf_compat:
        says_bos_B = (~real_BC | (sequences_BCT[:, :, 1] == reader.bos_id)).all(-1)
        counted_BCT = counted_BCT.at[..., 0].set(counted_BCT[..., 0] & ~says_bos_B[:, None])
    own_BC = jnp.where(counted_BCT, found.kept.reshape(counted_BCT.shape), 0.0).sum(-1)
    logp_BCK = jnp.where(same_BCC, own_BC[:, None], -jnp.inf).reshape(B, K * each, K, each).max(-1)
    known_BCK = same_BCC.reshape(B, K * each, K, each).any(-1)
    return Candidates(sequences_BCT, counted_BCT, first_BC, known_BCK, logp_BCK)


def may_win(lower_BCK: jax.Array, upper_BCK: jax.Array, first_BC: jax.Array, returned: int) -> jax.Array:
    """Which candidates can still be among the best `returned` [B, C], given bounds of log p(y,z_k|x)."""
    sure_BC = jnp.where(first_BC, jax.nn.logsumexp(lower_BCK, axis=-1), -jnp.inf)
    least_B1 = jax.lax.top_k(sure_BC, returned)[0][:, -1:]
    return jax.nn.logsumexp(upper_BCK, axis=-1) >= least_B1 - 1e-3  # a margin larger than rounding errors


def after(reader: Reader, source: Contexts, opening: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The state after the opening tokens [R, D], and the logsumexp of its logits [R]."""
    ids = jnp.broadcast_to(jnp.asarray(opening, jnp.int32), (len(source.mask_RL), len(opening)))
    state_RD = reader("states", ids, *source)[0][:, -1]
    return state_RD, log_norm(reader, state_RD)


def first_token_bound(
    reader: Reader,
    opened: tuple[jax.Array, jax.Array],
    opening: tuple[int, ...],
    sequences_BCT: jax.Array,
    counted_BCT1: jax.Array,
) -> jax.Array:
    """Upper bound of log p(y|x,z_k) [B, C, K]: log p of the first token after the opening.

    It is 0 for candidates that do not begin with the opening, or whose token there is not counted.
    """
    (state_BKD, norm_BK), n = opened, len(opening)
    if sequences_BCT.shape[-1] <= n:
        return jnp.zeros((*sequences_BCT.shape[:2], norm_BK.shape[1]))
    logits_BCK = logits_at(reader, state_BKD, sequences_BCT[..., n], "bkd,bcd->bck")
    logp_BCK = logits_BCK - norm_BK[:, None]
    opens_BC = (sequences_BCT[..., :n] == jnp.asarray(opening)).all(-1) & counted_BCT1[..., n - 1]
    return jnp.where(opens_BC[..., None], jnp.minimum(logp_BCK, 0.0), 0.0)


def logits_at(reader: Reader, states: jax.Array, tokens: jax.Array, product: str) -> jax.Array:
    """Logits of single tokens, without those of the whole vocabulary.

    product: einsum of the states [..., D] with the tokens' rows of the kernel [..., D].
    """
    kernel_VD, bias_V = reader("head")
    columns = kernel_VD[tokens].astype(states.dtype)
    products = jnp.einsum(product, states, columns, preferred_element_type=jnp.float32)
    bias = jnp.expand_dims(bias_V[tokens], tuple(range(tokens.ndim, products.ndim)))
    return products * reader.module.config.logit_scale + bias


def log_norm(reader: Reader, states: jax.Array) -> jax.Array:
    """logsumexp of the logits of states [..., D]."""
    kernel_VD, bias_V = reader("head")
    return vocabulary_norm(states, kernel_VD, bias_V, reader.module.config.logit_scale)


def score_candidates(
    reader: Reader,
    source: Contexts,
    sequences_BCT: jax.Array,
    counted_BCT1: jax.Array,
    need_BKC: jax.Array,
    wave: int,
) -> jax.Array:
    """log p(y|x,z_k) [B, K, C] of the candidates that are needed under each document, -inf for the others.

    Every row scores the candidates that it needs in waves of at most `wave`. The candidates of a wave form a tree of
    prefixes: a prefix that several share is one node and computed once.

    counted_BCT1: which tokens after the start count.
    need_BKC: which candidates are needed under document k.
    """
    (B, K, C), T1 = need_BKC.shape, sequences_BCT.shape[-1] - 1
    W = min(wave, C)
    slots = W * T1
    calls = max(1, round(B * K * slots / TOKENS_AT_ONCE))
    width = -(-slots // calls)  # nodes of a row in one call, so that a call has about TOKENS_AT_ONCE over all rows
    order_BKC = jnp.argsort(~need_BKC, axis=-1, stable=True)  # the needed candidates first
    count_BK = need_BKC.sum(-1)

    def wave_of(i: jax.Array, logp_BKC: jax.Array) -> jax.Array:
        at_W = jnp.minimum(i * W + jnp.arange(W), C - 1)
        mine_BKW = order_BKC[..., at_W]
        needed_BKW = (i * W + jnp.arange(W) < count_BK[..., None]) & (i * W + jnp.arange(W) < C)
        tokens_BKWT = jax.vmap(lambda one, at: one[at])(sequences_BCT, mine_BKW)
        counts_BKWT1 = jax.vmap(lambda one, at: one[at])(counted_BCT1, mine_BKW) & needed_BKW[..., None]
        found_BKW = _score_tree(reader, source, tokens_BKWT, counts_BKWT1, width)
        written = jnp.where(needed_BKW, mine_BKW, C)  # C is out of bounds, so that these writes are dropped
        return jax.vmap(jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop")))(logp_BKC, written, found_BKW)

    def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] + 1, wave_of(*carry)

    nothing = jnp.full((B, K, C), -jnp.inf)
    waves = -(-count_BK.max() // W)
    return jax.lax.while_loop(lambda carry: carry[0] < waves, one, (jnp.int32(0), nothing))[1]


def _score_tree(
    reader: Reader, source: Contexts, tokens_BKWT: jax.Array, counts_BKWT1: jax.Array, width: int
) -> jax.Array:
    """Sum of the log p of the tokens that count [B, K, W], by `width` nodes of each row's tree at a time.

    A node is an input token with all tokens before it. Nodes have slots in the cache in the order of candidates, then
    positions, so that a node's ancestors are in earlier slots.
    """
    B, K, W, T = tokens_BKWT.shape
    T1 = T - 1
    slots = -(-W * T1 // width) * width  # a multiple of width: every call writes a whole slice
    inputs_BKWT1, targets_BKWT1 = tokens_BKWT[..., :-1], tokens_BKWT[..., 1:]
    # a node is needed as long as something that counts follows; it belongs to the first candidate that needs it
    useful = jnp.flip(jnp.cumsum(jnp.flip(counts_BKWT1, -1), -1), -1) > 0
    apart = inputs_BKWT1[:, :, :, None] != inputs_BKWT1[:, :, None]
    same = (jnp.cumsum(apart, axis=-1) == 0) & useful[:, :, None]
    owner = same.argmax(3)
    mine = useful & (owner == jnp.arange(W)[:, None])
    slot = (jnp.cumsum(mine.reshape(B, K, -1), axis=-1) - 1).reshape(mine.shape)
    slot = jnp.take_along_axis(slot, owner, axis=2)  # slot of the node of every (candidate, position)
    slot = jnp.where(useful, slot, slots)  # outside of the cache, so that writes there are dropped
    flat = jnp.broadcast_to(jnp.arange(W * T1), (B, K, W * T1))
    node_BKS = jnp.zeros((B, K, slots), jnp.int32)
    put = jax.vmap(jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop")))
    node_BKS = put(node_BKS, jnp.where(mine, slot, slots).reshape(B, K, -1), flat)
    count = mine.sum((2, 3)).max()
    pick = jax.vmap(jax.vmap(lambda one, at: one[at]))
    position_RS = rows(node_BKS % T1)

    width_D = reader("head")[0].shape[1]

    def one(carry: tuple) -> tuple:
        first, kv, hidden_RSD, norm_RS = carry
        node_BKP = jax.lax.dynamic_slice_in_dim(node_BKS, first, width, axis=2)
        ids_BKP = pick(inputs_BKWT1.reshape(B, K, -1), node_BKP)
        past = jnp.where(jnp.arange(T1) <= (node_BKP % T1)[..., None], pick(slot, node_BKP // T1), slots)
        visible_BKPS = jnp.zeros((B, K, width, slots), bool)
        visible_BKPS = jax.vmap(put)(visible_BKPS, past, jnp.ones_like(past, bool))
        stands = Tree(rows(node_BKP % T1), position_RS, rows(visible_BKPS))
        hidden_RPD, kv = reader("states", rows(ids_BKP), *source, kv, first, tree=stands)
        norm_RP = log_norm(reader, hidden_RPD)
        put_here = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        return first + width, kv, put_here(hidden_RSD, hidden_RPD), put_here(norm_RS, norm_RP)

    empty = (
        jnp.int32(0),
        reader.module.init_cache(B * K, slots),
        jnp.zeros((B * K, slots, width_D), reader.module.config.dtype),
        jnp.zeros((B * K, slots)),
    )
    _, _, hidden_RSD, norm_RS = jax.lax.while_loop(lambda carry: carry[0] < count, one, empty)

    def read(hidden_SD: jax.Array, norm_S: jax.Array, at_N: jax.Array, target_N: jax.Array) -> jax.Array:
        return logits_at(reader, hidden_SD[at_N], target_N, "nd,nd->n") - norm_S[at_N]

    flat_at, flat_targets = (rows(x.reshape(B, K, -1)) for x in (slot, targets_BKWT1))
    logp_RN = jax.vmap(read)(hidden_RSD, norm_RS, jnp.minimum(flat_at, slots - 1), flat_targets)
    return jnp.where(counts_BKWT1, logp_RN.reshape(counts_BKWT1.shape), 0.0).sum(-1)
