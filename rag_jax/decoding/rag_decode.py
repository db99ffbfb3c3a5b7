"""How RAG answers (Lewis et al. 2020, section 2.5): RAG-Token, and RAG-Sequence thorough and fast, inside one jit.

Rows R = B * K are (question, document) pairs, a question's documents contiguous. Every source is read once; its keys
and values for cross-attention are shared by all beams and candidates. Beams stand side by side in one cache of
self-attention, at slot t * M + m, and never move: which slots a beam sees is a table of its ancestors, and that is all
a reordering touches. The candidates of RAG-Sequence are scored the same way, a tree of their beginnings in one cache.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rag_jax.decoding import search as decoding_search
from rag_jax.decoding.search import Options, PrefixTree
from rag_jax.losses import absent
from rag_jax.ops.kv_cache import KeyValues, Tree
from rag_jax.ops.vocab_loss import vocabulary_norm
from rag_jax.system import sharding

Mode = Literal["thorough", "fast"]
TOKENS_AT_ONCE = 1024  # of candidates that are scored in one call of the decoder, in all rows together


class Reader(NamedTuple):
    """A generator with its parameters, and how its tokens are counted. `hf_compat`: see losses.sequence_joint."""

    module: nn.Module
    params: Any
    bos_id: int
    hf_compat: bool = False

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.module.apply({"params": self.params}, *args, method=method, **kwargs)


class Contexts(NamedTuple):
    """What the decoder looks at: keys and values of every joined input and its mask; row b*K + k is document k of b."""

    cross: KeyValues
    mask_RL: jax.Array


class Generation(NamedTuple):
    """sequences [B, T]: the start token, the answer, eos, padding; scores [B]: log p(y|x); doc_posterior [B, K]:
    p(z_k|x,y). RAG-Token: token_posterior [B, T - 1, K], p(z_k|x,y_t,y_<t) of every token after the start (figure 2),
    0 where there is none; RAG-Sequence: None.

    With num_return_sequences N > 1 all have an axis N after B, best first; where there are fewer answers than N, the
    rest have score -inf.
    """

    sequences: jax.Array
    scores: jax.Array
    doc_posterior: jax.Array
    token_posterior: jax.Array | None


class Lanes(NamedTuple):
    """Cache of M beams side by side: keys and values of (T-1)*M slots; ancestor_XMT [X, M, T - 1], the beam that
    each token of a beam's past was written by; t, how many tokens there are.
    """

    kv: KeyValues
    ancestor_XMT: jax.Array
    t: jax.Array


def by_documents(function: Callable, chunk: int, *arguments: Any) -> Any:
    """function(*arguments), whose leaves are [B, K, ...] as are those of its result, `chunk` documents at a time."""
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
    """What the generator's encoder makes of every joined (passage, question), leaves [B, K, ...]."""
    return documents(reader("encode", rows(ids_BKL), rows(mask_BKL)), ids_BKL.shape[1])


def contexts(reader: Reader, hidden: Any, mask_BKL: jax.Array) -> Contexts:
    return Contexts(reader("cross", rows(hidden)), rows(mask_BKL))


class Head(NamedTuple):
    """The generator's output layer as RAG-Token's steps use it: kernel [V', D], padded to whole blocks of the
    vocabulary, which makes it a copy; exp(bias - most) [V'] in float32, 0 for padding; most, the highest bias; what
    the products are multiplied by; and V.
    """

    kernel_VD: jax.Array
    weight_V: jax.Array
    most: jax.Array
    scale: float
    size: int

    @classmethod
    def of(cls, layer: tuple[jax.Array, jax.Array], scale: float, dtype: Any) -> "Head":
        kernel_VD, bias_V = sharding.gathered(layer[0], ("vocab", "embed"), dtype), layer[1].astype(jnp.float32)
        padding = (0, -len(bias_V) % decoding_search.BLOCK)
        whole = jnp.pad(kernel_VD, (padding, (0, 0)), mode="edge")  # zeros could have the highest product
        return cls(whole, jnp.pad(jnp.exp(bias_V - bias_V.max()), padding), bias_V.max(), scale, len(bias_V))


def marginal(logits_XKNV: jax.Array, weight_XKN: jax.Array) -> jax.Array:
    """logsumexp over K of logits + weight [X, N, V], a document at a time.

    As one sum over the axis K, XLA makes several passes of it on a CPU, seven times slower.
    """
    terms = [logits_XKNV[:, k] + weight_XKN[:, k, :, None] for k in range(logits_XKNV.shape[1])]
    most = jnp.maximum(reduce(jnp.maximum, terms), jnp.finfo(jnp.float32).min)  # -inf under all documents stays so
    return most + jnp.log(sum(jnp.exp(term - most) for term in terms))


def mixed(
    products_XKNV: jax.Array, head: Head, prior_XK: jax.Array, logits: Callable[[], jax.Array]
) -> tuple[decoding_search.Mixture, jax.Array]:
    """p(y_t|x,y_<t), RAG-Token's sum over the documents, and the logsumexp of the logits [X, K, N].

    products: of the states with the head's kernel, [X, K, N, V']; logits: makes the logits [X, K, N, V] anew, where
    something is less likely than float32 can tell from a sum. Else one exponential of every product serves all. The
    bias is a factor of it, which spares a CPU a pass through memory, and nothing needs the products later, so that it
    can take their place there.
    """
    most_XKN = products_XKNV.max(-1)
    exp_XKNV = jnp.exp((products_XKNV - most_XKN[..., None]) * head.scale)
    sum_XKN = jnp.matmul(exp_XKNV, head.weight_V, precision="highest")  # a sum, which a TPU shall not round
    # less only where the likeliest by the products are far below the highest bias: then terms may be lost
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
    options: Options,
    prior_BK: jax.Array | None,
    tree: PrefixTree | None,
    key: jax.Array | None,
) -> decoding_search.Found:
    """One search per row, of which log p of every token is kept [R, N, T-1]; with a prior one per question over the
    marginal next token, of which log p under every document is kept [B, N, T-1, K].
    """
    R, M, T = len(source.mask_RL), options.lanes, options.max_length
    X, K = (R, 1) if prior_BK is None else prior_BK.shape
    slots = (T - 1) * M

    def step(tokens_XN: jax.Array, cache: Lanes) -> tuple[decoding_search.Scores, Lanes, decoding_search.Read]:
        N, t = tokens_XN.shape[1], cache.t  # N is 1 or M
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
            return jnp.minimum(logits_XJK - norm_XJK, 0.0)  # the two are not rounded alike

        return mixture, moved, read

    def reorder(cache: Lanes, beam_XM: jax.Array) -> Lanes:
        return cache._replace(ancestor_XMT=decoding_search.take(cache.ancestor_XMT, beam_XM))

    c = reader.module.config
    head = None if prior_BK is None else Head.of(reader("head"), c.logit_scale, jnp.dtype(c.dtype))
    lanes = jnp.broadcast_to(jnp.arange(M)[:, None], (X, M, T - 1))
    cache = Lanes(reader.module.init_cache(R, slots), lanes, jnp.int32(0))
    return decoding_search.search(step, cache, X, options, reorder, prior_BK is not None, tree, key)


def counted(sequences: jax.Array, options: Options) -> jax.Array:
    """Which tokens after the start are part of the likelihood [..., T - 1]: up to eos, and no padding."""
    at = jnp.arange(sequences.shape[-1] - 1)
    inside = at < decoding_search.lengths(sequences, options.ends)[..., None]
    padding_counts = options.pad_id in options.ends
    return inside if padding_counts else inside & (sequences[..., 1:] != options.pad_id)


def rag_token(
    reader: Reader,
    ids_BKL: jax.Array,
    mask_BKL: jax.Array,
    prior_BK: jax.Array,
    options: Options,
    tree: PrefixTree | None = None,
    key: jax.Array | None = None,
    doc_chunk: int = 0,
) -> Generation:
    """One search over the marginal next token. doc_chunk: documents encoded at a time, 0 for all."""
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
    options: Options,
    mode: Mode,
    returned: int,
    tree: PrefixTree | None = None,
    key: jax.Array | None = None,
    doc_chunk: int = 0,
) -> Generation:
    """A search per document gives the candidates, as many as `options` returns; the best `returned` of all are the
    result.

    `thorough` scores every candidate under every document that did not produce it, but for those that cannot be among
    the best whatever those documents say of them; `fast` takes p(y|x,z) as 0 where the beam of z did not produce y.
    doc_chunk: documents encoded, searched and scored at a time, 0 for all.
    """
    B, K, _ = ids_BKL.shape
    each = options.num_return_sequences
    said = reader.bos_id if options.forced_bos_id is None else options.forced_bos_id  # likely the first token
    opening = (options.start_id,) if options.start_id == said else (options.start_id, said)

    def propose(
        ids_BKL: jax.Array, mask_BKL: jax.Array, number_BK: jax.Array
    ) -> tuple[Any, decoding_search.Found, Any]:
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
    if reader.hf_compat:  # there the prior counts at the second scored token alone
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
    """The answers that the documents propose, C = K * (as many as each returns).

    counted_BCT: tokens that a score is summed over. first_BC: the first of those that are the same answer. known_BCK:
    whether document k proposed it; logp_BCK: then log p(y|x,z_k), else -inf.
    """

    sequences_BCT: jax.Array
    counted_BCT: jax.Array
    first_BC: jax.Array
    known_BCK: jax.Array
    logp_BCK: jax.Array


def candidates_of(found: decoding_search.Found, prior_BK: jax.Array, reader: Reader, options: Options) -> Candidates:
    """Of a search per document [B, K, ...]."""
    (B, K), each = prior_BK.shape, options.num_return_sequences
    sequences_BCT = found.sequences.reshape(B, K * each, -1)
    real_BC = found.scores.reshape(B, K * each) > decoding_search.NEVER
    real_BC &= ~jnp.repeat(absent(prior_BK), each, axis=1)  # a passage that was not found proposes nothing
    same_BCC = (sequences_BCT[:, :, None] == sequences_BCT[:, None]).all(-1) & real_BC[:, None]
    first_BC = real_BC & (same_BCC.argmax(-1) == jnp.arange(K * each))  # the same answer from two documents is one
    counted_BCT = counted(sequences_BCT, options)
    if options.start_id != reader.bos_id or reader.hf_compat:  # a bos that all say is no part of the answer
        says_bos_B = (~real_BC | (sequences_BCT[:, :, 1] == reader.bos_id)).all(-1)
        counted_BCT = counted_BCT.at[..., 0].set(counted_BCT[..., 0] & ~says_bos_B[:, None])
    own_BC = jnp.where(counted_BCT, found.kept.reshape(counted_BCT.shape), 0.0).sum(-1)
    logp_BCK = jnp.where(same_BCC, own_BC[:, None], -jnp.inf).reshape(B, K * each, K, each).max(-1)
    known_BCK = same_BCC.reshape(B, K * each, K, each).any(-1)
    return Candidates(sequences_BCT, counted_BCT, first_BC, known_BCK, logp_BCK)


def may_win(lower_BCK: jax.Array, upper_BCK: jax.Array, first_BC: jax.Array, returned: int) -> jax.Array:
    """Which candidates can still be among the best `returned`, given bounds of log p(y, z_k|x) [B, C]."""
    sure_BC = jnp.where(first_BC, jax.nn.logsumexp(lower_BCK, axis=-1), -jnp.inf)
    least_B1 = jax.lax.top_k(sure_BC, returned)[0][:, -1:]
    return jax.nn.logsumexp(upper_BCK, axis=-1) >= least_B1 - 1e-3  # more than rounding can do


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
    """What log p(y|x,z_k) cannot exceed [B, C, K]: log p of the first token after the opening, or 0."""
    (state_BKD, norm_BK), n = opened, len(opening)
    if sequences_BCT.shape[-1] <= n:
        return jnp.zeros((*sequences_BCT.shape[:2], norm_BK.shape[1]))
    logits_BCK = logits_at(reader, state_BKD, sequences_BCT[..., n], "bkd,bcd->bck")
    logp_BCK = logits_BCK - norm_BK[:, None]
    opens_BC = (sequences_BCT[..., :n] == jnp.asarray(opening)).all(-1) & counted_BCT1[..., n - 1]
    return jnp.where(opens_BC[..., None], jnp.minimum(logp_BCK, 0.0), 0.0)


def logits_at(reader: Reader, states: jax.Array, tokens: jax.Array, product: str) -> jax.Array:
    """Logits of single tokens: states [..., D] and the tokens' rows of the kernel [..., D] multiplied as `product`."""
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

    Every row works through the candidates it needs in waves of `wave`. A wave is the tree of its candidates'
    beginnings: a beginning that several share is one node, run once. counted_BCT1: which tokens after the start count.
    """
    (B, K, C), T1 = need_BKC.shape, sequences_BCT.shape[-1] - 1
    W = min(wave, C)
    slots = W * T1
    calls = max(1, round(B * K * slots / TOKENS_AT_ONCE))
    width = -(-slots // calls)
    order_BKC = jnp.argsort(~need_BKC, axis=-1, stable=True)
    count_BK = need_BKC.sum(-1)

    def wave_of(i: jax.Array, logp_BKC: jax.Array) -> jax.Array:
        at_W = jnp.minimum(i * W + jnp.arange(W), C - 1)
        mine_BKW = order_BKC[..., at_W]
        needed_BKW = (i * W + jnp.arange(W) < count_BK[..., None]) & (i * W + jnp.arange(W) < C)
        tokens_BKWT = jax.vmap(lambda one, at: one[at])(sequences_BCT, mine_BKW)
        counts_BKWT1 = jax.vmap(lambda one, at: one[at])(counted_BCT1, mine_BKW) & needed_BKW[..., None]
        found_BKW = _score_tree(reader, source, tokens_BKWT, counts_BKWT1, width)
        written = jnp.where(needed_BKW, mine_BKW, C)
        return jax.vmap(jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop")))(logp_BKC, written, found_BKW)

    def one(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] + 1, wave_of(*carry)

    nothing = jnp.full((B, K, C), -jnp.inf)
    waves = -(-count_BK.max() // W)
    return jax.lax.while_loop(lambda carry: carry[0] < waves, one, (jnp.int32(0), nothing))[1]


def _score_tree(
    reader: Reader, source: Contexts, tokens_BKWT: jax.Array, counts_BKWT1: jax.Array, width: int
) -> jax.Array:
    """Sum of the log p of the tokens that count [B, K, W], `width` nodes of a row's tree at a time."""
    B, K, W, T = tokens_BKWT.shape
    T1 = T - 1
    slots = -(-W * T1 // width) * width
    inputs_BKWT1, targets_BKWT1 = tokens_BKWT[..., :-1], tokens_BKWT[..., 1:]
    # a node is needed as long as something that counts follows; it belongs to the first candidate that needs it
    useful = jnp.flip(jnp.cumsum(jnp.flip(counts_BKWT1, -1), -1), -1) > 0
    apart = inputs_BKWT1[:, :, :, None] != inputs_BKWT1[:, :, None]
    same = (jnp.cumsum(apart, axis=-1) == 0) & useful[:, :, None]
    owner = same.argmax(3)
    mine = useful & (owner == jnp.arange(W)[:, None])
    slot = (jnp.cumsum(mine.reshape(B, K, -1), axis=-1) - 1).reshape(mine.shape)
    slot = jnp.take_along_axis(slot, owner, axis=2)  # of the node of every (candidate, position)
    slot = jnp.where(useful, slot, slots)
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
