"""Answers: every generator, chunks of documents, candidates scored as a tree, rules, and 1 device against 8."""

import dataclasses
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rag_jax.decoding import rag_decode, search
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.t5 import T5Config
from rag_jax.rag import GENERATORS, Rag, RagConfig
from rag_jax.rag import shift_left as shifted
from rag_jax.system import sharding

B, K, L, T, V = 2, 4, 6, 7, 13
BOS, PAD, EOS = 0, 1, 2
ENCODER = BertConfig(vocab_size=11, width=8, layers=1, heads=2, hidden=8, positions=8)
CONFIGS = {
    "bart": BartConfig(
        vocab_size=V, width=8, encoder_layers=1, decoder_layers=2, heads=2, hidden=8, positions=16, dropout=0.0
    ),
    "t5": T5Config(
        vocab_size=V, width=8, encoder_layers=1, decoder_layers=2, heads=2, head_width=4, hidden=8, buckets=4,
        max_distance=6, dropout=0.0, bos_id=PAD, pad_id=PAD, eos_id=EOS,
    ),  # starts from its padding
    "lm": LmConfig(
        vocab_size=V, width=8, layers=2, heads=2, groups=1, head_width=4, hidden=8, positions=24, dropout=0.0,
        norm_kind="rms", position_kind="rotary", gated=True, activation="silu", qkv_bias=False, out_bias=False,
        mlp_bias=False, tied=False, bos_id=BOS, pad_id=EOS, eos_id=EOS,
    ),  # pads with its end
}  # fmt: skip
RNG = np.random.default_rng(0)
MASK = np.arange(L) < RNG.integers(3, L + 1, (B, K, 1))
IDS = np.where(MASK, RNG.integers(3, V, (B, K, L)), PAD).astype(np.int32)
SCORES = RNG.normal(0, 1, (B, K)).astype(np.float32)


def rag(variant="sequence", kind="bart", **changes):
    generator = dataclasses.replace(CONFIGS[kind], **changes)
    return Rag(RagConfig(variant, ENCODER, generator, n_docs=K, context_encoder=False))


def drawn(model, seed=1, spread=0.9):
    """Random parameters at a scale at which documents disagree."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return jnp.asarray(rng.normal("scale" in jax.tree_util.keystr(path), spread, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@lru_cache(maxsize=64)
def program(model, options):
    return jax.jit(partial(model.generate, **dict(options)))


def answers(model, params, **options):
    options = {"num_beams": 3, "max_length": T} | options
    try:
        jitted = program(model, tuple(sorted(options.items())))
    except TypeError:  # an option with no hash
        jitted = jax.jit(partial(model.generate, **options))
    return jitted(params, IDS, MASK, SCORES)


def equal(a, b, **tolerance):
    np.testing.assert_array_equal(a.sequences, b.sequences)
    for x, y in zip(a[1:], b[1:], strict=True):
        if x is not None:
            np.testing.assert_allclose(x, y, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("wave", "width"), [(1, 3), (3, 4), (9, 100)])
def test_candidates_are_scored_as_by_the_whole_forward_pass(kind, wave, width, monkeypatch):
    """Candidates with common beginnings, in waves and chunks of any size; those not asked for are left out."""
    model = rag(kind=kind)
    params, c = drawn(model), model.config.generator
    rng = np.random.default_rng(3)
    C = 7
    tokens = rng.integers(3, V, (B, C, T))
    tokens[:, 1:4, :3] = tokens[:, :1, :3]  # four candidates have a common beginning
    tokens[:, 4] = tokens[:, 5]
    tokens[..., 0] = c.start_id
    for i, end in enumerate((2, 4, 6, 7, 3, 3, 6)):
        tokens[:, i, end - 1 : end], tokens[:, i, end:] = c.eos_id, c.pad_id
    need = rng.random((B, K, C)) < 0.6
    need[0, 0] = False
    monkeypatch.setattr(rag_decode, "TOKENS_AT_ONCE", B * K * width)
    reader = rag_decode.Reader(model.generator, params["generator"], c.bos_id)
    options = search.DecodingOptions(start_id=c.start_id, eos_id=c.eos_id, pad_id=c.pad_id, max_length=T)

    @jax.jit
    def score(tokens):
        source = rag_decode.contexts(reader, rag_decode.encode(reader, IDS, MASK), MASK)
        counted = rag_decode.counted(tokens, options)
        return rag_decode.score_candidates(reader, source, tokens, counted, need, wave)

    found = score(jnp.asarray(tokens))
    for i in range(C):
        logits = jax.jit(model.logits)(params, IDS, MASK, tokens[:, i])
        targets, mask = shifted(jnp.asarray(tokens[:, i]), c)
        logp = np.log(oracles.softmax(logits))
        for b in range(B):
            for k in range(K):
                whole = sum(logp[b, k, t, targets[b, t]] for t in range(T) if mask[b, t])
                np.testing.assert_allclose(found[b, k, i], whole if need[b, k, i] else -np.inf, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_scores_are_the_likelihood_of_the_answers(variant, kind):
    model = rag(variant, kind)
    params = drawn(model)
    found = answers(model, params, num_return_sequences=2)
    assert found.sequences.shape == (B, 2, T) and found.doc_posterior.shape == (B, 2, K)
    for n in range(2):
        if kind != "t5":  # whose padding is its start: labels cannot begin with it twice
            nll = jax.jit(model.nll)(params, IDS, MASK, SCORES, found.sequences[:, n])
            np.testing.assert_allclose(found.scores[:, n], -nll, rtol=1e-4)
    np.testing.assert_allclose(found.doc_posterior.sum(-1), 1, rtol=1e-5)
    if variant == "sequence":
        assert (found.scores[:, 0] >= found.scores[:, 1]).all() and found.token_posterior is None


def test_every_token_has_a_posterior():
    """p(z|x,y_t,y_<t), proportional to p(z|x) p(y_t|x,z,y_<t) (the paper's figure 2); nothing after the end."""
    model = rag("token")
    params = drawn(model)
    params["generator"]["logits_bias"] = params["generator"]["logits_bias"].at[EOS].add(7.0)
    found = answers(model, params)
    logp = np.log(oracles.softmax(jax.jit(model.logits)(params, IDS, MASK, found.sequences)))
    prior = oracles.softmax(SCORES)
    ends = search.lengths(found.sequences, (EOS,))
    assert ends.min() < T - 1
    for b in range(B):
        for t in range(T - 1):
            token = int(found.sequences[b, t + 1])
            joint = prior[b] * np.exp(logp[b, :, t, token])
            counts = t < ends[b] and token != PAD
            expected = joint / joint.sum() if counts else np.zeros(K)
            np.testing.assert_allclose(found.token_posterior[b, t], expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(("variant", "mode"), [("sequence", "thorough"), ("sequence", "fast"), ("token", "thorough")])
def test_documents_in_chunks_are_documents_at_once(variant, mode, chunk):
    model = rag(variant)
    params = drawn(model)
    equal(answers(model, params, mode=mode, doc_chunk=chunk), answers(model, params, mode=mode))


@pytest.mark.parametrize("kind", CONFIGS)
def test_thorough_with_one_document_is_plain_beam_search(kind):
    sequence, token = rag("sequence", kind), rag("token", kind)
    params = drawn(sequence)
    found = [
        jax.jit(partial(model.generate, num_beams=4, max_length=T, length_penalty=0.0))(
            params, IDS[:, :1], MASK[:, :1], SCORES[:, :1]
        )
        for model in (sequence, token)
    ]
    np.testing.assert_array_equal(found[0].sequences, found[1].sequences)
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-4)


def test_fewer_candidates_than_beams():
    """The candidates are the best beams of each document: with one each, the documents' first beams."""
    model = rag()
    params = drawn(model)
    found = answers(model, params, candidates=1, num_return_sequences=K)
    alone = jax.jit(partial(model.generate, num_beams=3, max_length=T, candidates=1))
    best = set()
    for k in range(K):
        own = alone(params, IDS[:, k : k + 1], MASK[:, k : k + 1], SCORES[:, k : k + 1])
        best |= {(b, *map(int, own.sequences[b])) for b in range(B)}
    real = np.asarray(found.scores) > -np.inf
    assert {(b, *map(int, found.sequences[b, n])) for b in range(B) for n in range(K) if real[b, n]} == best
    assert (answers(model, params).scores >= found.scores[:, 0]).all()


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_only_allowed_answers(variant):
    """The answer is the most likely of the allowed ones, by scoring each of them."""
    model = rag(variant)
    params = drawn(model, spread=0.5)
    allowed = [(5, 6, 7), (5, 8), (9,), (10, 11, 12, 4), (3, 3)]
    tree = search.prefix_tree(allowed, EOS)
    labels = np.array([oracles.pad((BOS, *y, EOS), T, PAD) for y in allowed], np.int32)
    nll = jax.jit(model.nll)
    scores = np.stack([-nll(params, IDS, MASK, SCORES, np.tile(y, (B, 1))) for y in labels], 1)
    found = answers(model, params, tree=tree, num_beams=8, length_penalty=0.0)
    np.testing.assert_array_equal(found.sequences, labels[scores.argmax(1)])
    np.testing.assert_allclose(found.scores, scores.max(1), rtol=1e-4)


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_samples_are_those_of_their_key(variant):
    model = rag(variant)
    params = drawn(model, spread=0.5)
    draw = partial(answers, model, params, num_beams=1, do_sample=True, num_return_sequences=3)
    once, again, other = (draw(key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(once.sequences, again.sequences)
    assert once.sequences.shape == (B, 3, T) and (once.sequences != other.sequences).any()
    with pytest.raises(ValueError, match="needs a key"):
        draw()


def test_documents_draw_apart():
    """K copies of one document get different samples, since each has a key of its own."""
    model = rag()
    params = drawn(model, spread=0.3)
    same = [np.repeat(x[:, :1], K, axis=1) for x in (IDS, MASK, SCORES)]
    run = partial(model.generate, num_beams=1, max_length=T, do_sample=True, num_return_sequences=K, candidates=1)
    for chunk in (0, 1):
        found = jax.jit(partial(run, doc_chunk=chunk, key=jax.random.key(0)))(params, *same)
        assert len({tuple(y) for y in np.asarray(found.sequences[0]).tolist()}) > 1


@pytest.mark.parametrize(("variant", "mode"), [("sequence", "thorough"), ("token", "thorough")])
def test_one_device_is_eight(variant, mode):
    model = rag(variant)
    params = drawn(model)
    ids, mask, scores = (np.concatenate([x, x[:, ::-1], x, x[:, ::-1]]) for x in (IDS, MASK, SCORES))
    run = jax.jit(partial(model.generate, num_beams=3, max_length=T, mode=mode))
    mesh = sharding.make_mesh()
    place = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    many = run(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), *map(place, (ids, mask, scores)))
    equal(run(params, ids, mask, scores), jax.device_get(many))
    assert len(many.sequences.sharding.device_set) == 8


@pytest.mark.parametrize(
    ("variant", "bias"),
    [("token", 0.9), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("token", 40.0), ("sequence", 0.9)))],
)
def test_one_device_is_eight_that_share_the_parameters(variant, bias):
    """The vocabulary, no whole number of blocks, is sharded over `tensor`, the width over `fsdp`; also with a bias of
    40 deviations, which makes RAG-Token recompute its logits.
    """
    model = rag(variant, vocab_size=1050)
    params = drawn(model)
    params["generator"]["logits_bias"] *= bias / 0.9
    ids, mask, scores = (np.concatenate([x, x[:, ::-1]]) for x in (IDS, MASK, SCORES))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = sharding.described(mesh, jax.eval_shape(model.init, jax.random.key(0)))
    spread = jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), params, places)
    assert len({str(x.sharding.spec) for x in jax.tree.leaves(spread)}) > 3

    def run(params, *given):
        return jax.jit(partial(model.generate, num_beams=3, max_length=T))(params, *given)

    with sharding.on(mesh):
        many = run(spread, *(sharding.shard_batch(mesh, x) for x in (ids, mask, scores)))
    equal(run(params, ids, mask, scores), jax.device_get(many))


def test_what_cannot_be_is_refused():
    model = rag()
    params = jax.eval_shape(lambda: drawn(model))

    def given(**wrong):
        return jax.eval_shape(partial(model.generate, **wrong), params, IDS, MASK, SCORES)

    with pytest.raises(TypeError, match=r"unknown decoding option 'beams'.*num_beams"):
        given(beams=3)
    with pytest.raises(ValueError, match="candidates=4"):
        given(num_beams=3, max_length=T, candidates=4)
    with pytest.raises(ValueError, match="4 documents with 1 candidates each give 4"):
        given(num_beams=5, max_length=T, candidates=1, num_return_sequences=5)
    assert set(GENERATORS) == set(CONFIGS)


@pytest.mark.parametrize(("start", "returned"), [("bos", 2), ("eos", 1)])
def test_candidates_that_cannot_win_are_not_scored(start, returned, monkeypatch):
    """Answers are the same as when all are scored; a sure reader scores few candidates, an unsure one all."""
    model = rag(start_id=EOS if start == "eos" else BOS)
    asked = []

    def watched(reader, source, sequences, counted, need, wave):
        jax.debug.callback(lambda n: asked.append(int(n)), need.sum())
        return plain(reader, source, sequences, counted, need, wave)

    plain, bound = rag_decode.score_candidates, rag_decode.first_token_bound
    monkeypatch.setattr(rag_decode, "score_candidates", watched)
    counts = []
    for limit in (bound, lambda *x: jnp.full_like(bound(*x), jnp.inf)):
        monkeypatch.setattr(rag_decode, "first_token_bound", limit)
        options = {"num_beams": 3, "max_length": T, "num_return_sequences": returned}
        generate = jax.jit(partial(model.generate, **options))
        for spread in (2.5, 0.3):
            params = drawn(model, spread=spread)
            if start == "eos":  # then every answer begins with bos, as the released checkpoints write it
                params["generator"]["logits_bias"] = params["generator"]["logits_bias"].at[BOS].add(3.0)
            asked.clear()
            found = generate(params, IDS, MASK, SCORES)
            jax.effects_barrier()
            counts.append((asked[0], found))
    (few, a), (unsure, c), (all_, b), (every, d) = counts
    equal(a, b)
    equal(c, d)
    assert unsure <= every and (few < all_ or returned > 1)  # the second-best answer is seldom decided early


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("bias", ["even", "drawn", "in bfloat16", "forbids the likeliest"])
@pytest.mark.parametrize(("vocabulary", "shift"), [(50, 0.0), (1100, -80.0)])
def test_the_sum_over_documents_is_exact_for_the_least_likely_token(spread, bias, vocabulary, shift):
    """It is exact even where the exponential of each single logit is 0; and the tokens with the best sums have the best
    logs.

    shift: added to the products of all tokens, but not to padding.
    """
    rng = np.random.default_rng(0)
    X, K, M, D, scale = 2, 3, 4, 8, 0.5
    states = (rng.normal(0, 8, (X, K, M, D)).round() / 8).astype(np.float32)  # so that their matmul is exact
    states[..., 0] = 1.0
    kernel = (rng.normal(0, 4 * spread, (vocabulary, D)).round() / 4).astype(np.float32)
    kernel[:, 0] += shift
    bias_V = jnp.asarray(rng.normal(0, spread * (bias in ("drawn", "in bfloat16")), vocabulary), jnp.float32)
    bias_V = bias_V.astype(jnp.bfloat16) if bias == "in bfloat16" else bias_V
    products = states.astype(np.float64) @ kernel.T
    if bias.startswith("forbids"):
        bias_V = bias_V.at[np.unique(products.argmax(-1))].set(-jnp.inf)
    logits = scale * products + np.asarray(bias_V, np.float64)
    prior = np.log(oracles.softmax(rng.normal(0, 1, (X, K))))
    norm = logits.max(-1) + np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    joint = logits - norm[..., None] + prior[..., None, None]
    most = joint.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        wanted = (most + np.log(np.exp(joint - most).sum(1, keepdims=True)))[:, 0]
    wanted = np.where(np.isneginf(most[:, 0]), -np.inf, wanted)
    live = rng.normal(0, 1, (X, M)).astype(np.float32)

    @jax.jit
    def found(states, kernel, bias, prior):
        head = rag_decode.PaddedHead.of((kernel, bias), scale, jnp.float32)
        mixture, norms = rag_decode.mixed(
            states @ head.kernel_VD.T, head, prior, lambda: scale * (states @ kernel.T) + bias.astype(jnp.float32)
        )
        return mixture.p_XNV, mixture.logs(), norms, search.best_of(mixture, live, 8, True)

    p, logs, norms, best = found(states, kernel, bias_V, jnp.asarray(prior, jnp.float32))
    close = {"rtol": 1e-6, "atol": 1e-6 * spread + 1e-5}
    np.testing.assert_allclose(logs, wanted, **close)
    np.testing.assert_allclose(norms, norm, rtol=1e-6, atol=1e-5)
    if bias == "even":
        assert (spread > 1) == (wanted.min() < np.log(search.FAINT)) and (p[..., vocabulary:] == 0).all()
    p, lost = np.asarray(p)[..., :vocabulary], np.isnan(p).any()
    assert lost == (spread > 1) if bias.startswith("forbids") else not lost or (spread > 1 and bias != "even")
    sure = (wanted > np.log(search.FAINT)) & ~np.isnan(p)
    np.testing.assert_allclose(np.log(p[sure]), wanted[sure], **close)
    total = wanted + live[..., None]
    np.testing.assert_allclose(best[0], -np.sort(-total.reshape(X, -1))[:, :8], **close)
    for x in range(X):
        np.testing.assert_allclose(best[0][x], total[x, best[1][x], best[2][x]], **close)
