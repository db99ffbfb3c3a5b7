"""The Rag model: joining, the loss computed by hand, and answers against searches without caches."""

import dataclasses
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.data import joining
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.t5 import T5Config
from rag_jax.rag import Rag, RagConfig, join, shift_left

B, K, L, T, V = 2, 3, 6, 5, 7
BOS, PAD, EOS = 0, 1, 2
MODEL = RagConfig(
    encoder=BertConfig(vocab_size=11, width=8, layers=1, heads=2, hidden=8, positions=8),
    generator=BartConfig(
        vocab_size=V, width=8, encoder_layers=1, decoder_layers=1, heads=2, hidden=8, positions=8, dropout=0.0
    ),
)
RNG = np.random.default_rng(0)
MASK = np.arange(L) < RNG.integers(3, L + 1, (B, K, 1))
IDS = np.where(MASK, RNG.integers(3, V, (B, K, L)), PAD).astype(np.int32)
SCORES = RNG.normal(0, 1, (B, K)).astype(np.float32)
LABELS = np.array([[BOS, 4, 5, 3, EOS], [BOS, 6, EOS, PAD, PAD]], np.int32)
VARIANTS = ("sequence", "token")


def rag(variant="sequence", **changes):
    return Rag(dataclasses.replace(MODEL, variant=variant, **changes))


@pytest.fixture(scope="module")
def params():
    """Random parameters at a scale at which documents disagree, and some answers end while others do not."""
    shapes = nn.unbox(jax.eval_shape(rag().init, jax.random.key(0)))
    rng = np.random.default_rng(4)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        centre, spread = (1.0, 0.3) if "scale" in name else (0.0, 0.15 if "bias" in name else 1.0)
        louder = 3.0 if ("cross" in name or "position" in name) and centre == 0 and spread == 1 else 1.0
        return jnp.asarray(rng.normal(centre, spread * louder, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# --- joining ----------------------------------------------------------------------------------------------------------

PREFIX, WIDTH, TAIL, ROWS = (3, 4), 6, 5, 4


@cache
def jitted_join(length, windowed):
    def joined(passage, n, tail, m, *window):
        return join(PREFIX, passage, n, tail, m, length, PAD, *window)

    return jax.jit(joined)


@given(st.data(), st.sampled_from([7, 9, 13, 20]), st.booleans())
@settings(max_examples=60)
def test_join_is_that_of_lists(data, length, windowed):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    passage, tail = rng.integers(5, 99, (ROWS, WIDTH)), rng.integers(100, 199, (ROWS, TAIL))
    n, m = (np.array(data.draw(st.lists(st.integers(0, x), min_size=ROWS, max_size=ROWS))) for x in (WIDTH, TAIL))
    window = rng.integers(0, WIDTH + 3, (2, ROWS)) if windowed else ()
    ids, mask = jitted_join(length, windowed)(passage.astype(np.uint16), n, tail, m, *window)
    for i in range(ROWS):
        cut = slice(*(w[i] for w in window)) if windowed else slice(None)
        body = passage[i, : n[i]][cut].tolist()
        question = tail[i, : m[i]].tolist()
        expected = [*PREFIX, *body[: length - len(PREFIX) - m[i]], *question]
        assert ids[i].tolist() == oracles.pad(expected, length, PAD)
        assert mask[i].tolist() == [j < len(expected) for j in range(length)]
        if not windowed:
            assert expected == joining.join(PREFIX, passage[i, : n[i]].tolist(), question, length)


def test_join_refuses_questions_that_cannot_fit():
    with pytest.raises(ValueError, match="5 tokens after 2 prefix ids do not fit 6"):
        jitted_join(6, False)(*(np.zeros(s, np.int32) for s in ((1, 6), 1, (1, 5), 1)))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_shift_left_predicts_the_next_token():
    targets, mask = shift_left(LABELS, MODEL.generator)
    assert targets.tolist() == [[4, 5, 3, EOS, PAD], [6, EOS, PAD, PAD, PAD]]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]


def test_the_first_end_counts_where_the_end_is_also_padding():
    generator = dataclasses.replace(MODEL.generator, pad_id=EOS)
    labels = np.array([[BOS, 4, 5, 3, 6], [BOS, 4, 5, EOS, EOS], [BOS, EOS, EOS, EOS, EOS]])
    targets, mask = shift_left(labels, generator)
    assert targets.tolist() == [[4, 5, 3, 6, EOS], [4, 5, EOS, EOS, EOS], [EOS] * 5]
    assert mask.sum(1).tolist() == [4, 3, 1] and mask[:, 0].all()


@pytest.fixture(scope="module")
def token_probabilities(params):
    """p(y_t|x,z,y_<t) [B, K, T, V] from the generator alone, one document at a time."""
    model = rag().generator
    one = jax.jit(lambda *args: model.apply({"params": params["generator"]}, *args))
    logits = [[one(IDS[b, k][None], MASK[b, k][None], LABELS[b][None])[0] for k in range(K)] for b in range(B)]
    return oracles.softmax(np.array(logits))


def test_loss_is_put_together_by_hand(params, token_probabilities):
    p, prior = token_probabilities, oracles.softmax(SCORES)
    targets = [LABELS[0, 1:], LABELS[1, 1:3]]
    likelihood = {
        "sequence": [oracles.rag_sequence(p[b], targets[b], prior[b]) for b in range(B)],
        "token": [oracles.rag_token(p[b], targets[b], prior[b]) for b in range(B)],
    }
    assert np.abs(np.log(likelihood["sequence"]) - np.log(likelihood["token"])).max() > 0.05  # documents disagree
    for variant in VARIANTS:
        nll, posterior, *_ = jax.jit(rag(variant).likelihood)(params, IDS, MASK, SCORES, LABELS)
        np.testing.assert_allclose(nll, -np.log(likelihood[variant]), rtol=1e-4)
        joint = [
            [oracles.rag_sequence(p[b][k : k + 1], targets[b], prior[b, k : k + 1]) for k in range(K)] for b in range(B)
        ]
        np.testing.assert_allclose(np.exp(posterior), joint / np.sum(joint, 1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_hf_compat_drops_the_prior_of_a_lone_eos(params, token_probabilities):
    labels = np.array([LABELS[0], [BOS, EOS, PAD, PAD, PAD]], np.int32)
    both = jax.jit(lambda *args: [jnp.exp(-rag().nll(*args, hf_compat=hf_compat)) for hf_compat in (True, False)])
    p, paper = both(params, IDS, MASK, SCORES, labels)
    first = token_probabilities[1, :, 0, EOS]
    np.testing.assert_allclose(p, [paper[0], first.sum()], rtol=1e-4)
    np.testing.assert_allclose(paper[1], first @ oracles.softmax(SCORES)[1], rtol=1e-4)
    for hf_compat, prior in ((True, np.ones(K)), (False, oracles.softmax(SCORES)[1])):  # the posterior is of the same
        posterior = rag().likelihood(params, IDS, MASK, SCORES, labels, hf_compat).posterior_BK
        np.testing.assert_allclose(np.exp(posterior[1]), first * prior / (first @ prior), rtol=1e-3)


def test_posterior_without_the_first_token(params):
    """If bos is not scored, it does not count in the posterior of documents either."""
    labels = np.concatenate([np.full((B, 1), EOS), LABELS[:, :4]], 1).astype(np.int32)
    nll, posterior, *_ = rag().likelihood(params, IDS, MASK, SCORES, labels, exclude_bos_score=True)
    whole = rag().likelihood(params, IDS, MASK, SCORES, labels).posterior_BK
    model = rag().generator
    targets, counted = (np.asarray(x) for x in shift_left(jnp.asarray(labels), MODEL.generator))
    for b in range(B):
        logits = [
            model.apply({"params": params["generator"]}, IDS[b, k][None], MASK[b, k][None], labels[b][None])[0]
            for k in range(K)
        ]
        p = oracles.softmax(np.array(logits))[:, np.arange(T), targets[b]]
        joint = oracles.softmax(SCORES)[b] * np.prod(np.where(counted[b] & (np.arange(T) > 0), p, 1), 1)
        np.testing.assert_allclose(nll[b], -np.log(joint.sum()), rtol=1e-4)
        np.testing.assert_allclose(np.exp(posterior[b]), joint / joint.sum(), rtol=1e-3, atol=1e-6)
    assert np.abs(whole - posterior).max() > 0.01


def test_shapes_that_do_not_fit_are_named(params):
    model = rag()
    with pytest.raises(ValueError, match=r"\(2, 3, 6\).*\(2, 3, 5\)"):
        model.nll(params, IDS, MASK[..., :5], SCORES, LABELS)
    with pytest.raises(ValueError, match=r"\(6, 6\)"):
        model.nll(params, IDS.reshape(6, 6), MASK.reshape(6, 6), SCORES, LABELS)
    for call in (partial(model.nll, labels_BT=LABELS), model.generate):
        with pytest.raises(ValueError, match=r"\(2, 3, 6\).*\(2, 3\).*\(2, 2\)"):
            call(params, IDS, MASK, SCORES[:, :2])
    with pytest.raises(ValueError, match=r"\(2, 3, 6\).*\(1, 5\)"):
        model.nll(params, IDS, MASK, SCORES, LABELS[:1])
    for wrong in ({"num_beams": 0}, {"max_length": 1}, {"mode": "quick"}, {"max_length": 9}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            jax.eval_shape(partial(model.generate, **wrong), params, IDS, MASK, SCORES)


def test_tied_encoders_are_one(params):
    tied, apart = (rag(tie_encoders=tie) for tie in (True, False))
    assert set(jax.eval_shape(tied.init, jax.random.key(0))) == {"question_encoder", "generator"}
    assert set(params) == {"question_encoder", "context_encoder", "generator"}
    question, same, other = (
        jax.jit(embed)(params, IDS[0], MASK[0])
        for embed in (apart.embed_questions, tied.embed_passages, apart.embed_passages)
    )
    assert question.shape == (K, MODEL.encoder.output_width)
    np.testing.assert_array_equal(same, question)
    assert np.abs(other - question).max() > 0.01


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def naive(params):
    """(b, tokens so far) -> log p(next | document k) [K, V], by the whole forward pass without a cache."""
    logits = jax.jit(rag().logits)

    @cache
    def look_up(b, tokens):
        labels = np.array([oracles.pad(tokens, T, PAD)] * B, np.int32)
        return np.log(oracles.softmax(logits(params, IDS, MASK, labels)[b, :, len(tokens) - 1]))

    return look_up


def log_likelihood(naive, b, tokens):
    """log p(y|x,z_k) [K]; padding tokens do not count, as in the loss."""
    steps = [naive(b, tokens[:t])[:, token] for t, token in enumerate(tokens) if t > 0 and token != PAD]
    return np.sum(steps, axis=0)


def generate(variant, params, beams, mode="thorough", docs=K):
    run = jax.jit(partial(rag(variant).generate, num_beams=beams, max_length=T, mode=mode))
    return run(params, IDS[:, :docs], MASK[:, :docs], SCORES[:, :docs])


def search(next_logp, beams):
    """Token tuples and their log-probabilities, best first, by the plain search that `decoding.search` must equal."""
    if beams == 1:
        return [oracles.greedy(next_logp, T, BOS, EOS)]
    return [(tokens, logp) for tokens, _, logp in oracles.beam_search(next_logp, beams, T, BOS, EOS)]


def check(found, b, tokens, joint):
    """Compares an answer with `tokens` and its posterior with joint [K] = log p(z_k|x) + log p(y|x,z_k)."""
    np.testing.assert_array_equal(found.sequences[b], oracles.pad(tokens, T, PAD))
    np.testing.assert_allclose(found.doc_posterior[b], oracles.softmax(joint), atol=1e-4)
    np.testing.assert_allclose(found.doc_posterior[b].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_rag_token_answers_by_the_marginal_next_token(params, naive, beams):
    found, prior = generate("token", params, beams), oracles.softmax(SCORES)
    for b in range(B):
        tokens, _ = search(lambda y, b=b: np.log(prior[b] @ np.exp(naive(b, y))), beams)[0]
        check(found, b, tokens, np.log(prior[b]) + log_likelihood(naive, b, tokens))
        marginal = sum(
            np.log(prior[b] @ np.exp(naive(b, tokens[:t])[:, token]))
            for t, token in enumerate(tokens)
            if t > 0 and token != PAD
        )
        np.testing.assert_allclose(found.scores[b], marginal, rtol=1e-4)


@pytest.mark.parametrize(("beams", "mode"), [(1, "thorough"), (3, "thorough"), (1, "fast"), (3, "fast")])
def test_rag_sequence_answers_by_candidates(params, naive, beams, mode):
    found, prior = generate("sequence", params, beams, mode), oracles.softmax(SCORES)
    for b in range(B):
        own = [dict(search(lambda y, k=k, b=b: naive(b, y)[k], beams)) for k in range(K)]
        joint = {}
        for tokens in {tokens for beam in own for tokens in beam}:
            if mode == "thorough":
                logp = log_likelihood(naive, b, tokens)
            else:
                logp = np.array([beam.get(tokens, -np.inf) for beam in own])
            joint[tokens] = np.log(prior[b]) + logp
        best = max(joint, key=lambda tokens: np.exp(joint[tokens]).sum())
        check(found, b, best, joint[best])
        np.testing.assert_allclose(found.scores[b], np.log(np.exp(joint[best]).sum()), rtol=1e-4)


def test_with_one_document_both_are_plain_search(params, naive):
    for variant in VARIANTS:
        found = generate(variant, params, 1, docs=1)
        for b in range(B):
            tokens, logp = search(lambda y, b=b: naive(b, y)[0], 1)[0]
            check(found, b, tokens, np.zeros(1))
            np.testing.assert_allclose(found.scores[b], logp, rtol=1e-4)


@pytest.mark.parametrize("mode", ["thorough", "fast"])
def test_beams_that_found_nothing_do_not_answer(params, naive, mode):
    """With more beams than sequences, the empty beams must not win with the likelihood of no token at all."""
    model = rag(generator=dataclasses.replace(MODEL.generator, pad_id=V))  # no token is the padding
    found = jax.jit(partial(model.generate, num_beams=V + 3, max_length=2, mode=mode))(params, IDS, MASK, SCORES)
    prior = oracles.softmax(SCORES)
    marginal = np.array([prior[b] @ np.exp(naive(b, (BOS,))) for b in range(B)])
    np.testing.assert_array_equal(found.sequences[:, 1], marginal.argmax(-1))
    np.testing.assert_allclose(found.scores, np.log(marginal.max(-1)), atol=1e-4)


# --- other generators -------------------------------------------------------------------------------------------------

OTHERS = {
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


@pytest.fixture(scope="module", params=OTHERS)
def other(request):
    """(generator configuration, parameters at a scale at which documents disagree)"""
    generator = OTHERS[request.param]
    shapes = nn.unbox(jax.eval_shape(rag(generator=generator).init, jax.random.key(0)))["generator"]
    rng = np.random.default_rng(1)

    def draw(path, x):
        return jnp.asarray(rng.normal(1.0 if "scale" in jax.tree_util.keystr(path) else 0.0, 0.8, x.shape), x.dtype)

    return generator, {"generator": jax.tree_util.tree_map_with_path(draw, shapes)}


def next_logp(generator, params):
    """(b, tokens so far) -> log p(next | document k) [K, V], one document at a time, by the whole forward pass."""
    model = rag(generator=generator).generator
    run = jax.jit(lambda *args: model.apply({"params": params["generator"]}, *args))

    @cache
    def look_up(b, tokens):
        labels = np.array([oracles.pad(tokens, T, generator.pad_id)], np.int32)
        rows = [run(IDS[b, k][None], MASK[b, k][None], labels)[0, len(tokens) - 1] for k in range(K)]
        return np.log(oracles.softmax(np.array(rows)))

    return look_up


def test_any_generator_is_scored(other):
    generator, params = other
    look_up, prior = next_logp(generator, params), oracles.softmax(SCORES)
    answers = [(4, 5, 3, EOS), (6, EOS)]
    labels = np.array([oracles.pad((generator.bos_id, *y), 5, generator.pad_id) for y in answers], np.int32)
    for variant in VARIANTS:
        found = jax.jit(rag(variant, generator=generator).nll)(params, IDS, MASK, SCORES, labels)
        for b, y in enumerate(answers):
            steps = [look_up(b, (generator.bos_id, *y[:t])) for t in range(len(y))]
            p = np.exp(np.stack(steps, axis=1))  # [K, T, V]
            score = {"sequence": oracles.rag_sequence, "token": oracles.rag_token}[variant](p, y, prior[b])
            np.testing.assert_allclose(found[b], -np.log(score), rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_any_generator_answers(other, beams):
    """RAG-Token by the marginal next token, RAG-Sequence by candidates of each document, with each kind of cache."""
    generator, params = other
    look_up, prior = next_logp(generator, params), oracles.softmax(SCORES)
    bos, pad = generator.bos_id, generator.pad_id

    def find(next_token):
        if beams == 1:
            return [oracles.greedy(next_token, T, bos, EOS)]
        return [(y, logp) for y, _, logp in oracles.beam_search(next_token, beams, T, bos, EOS)]

    def likelihood(b, y):
        return np.sum([look_up(b, y[:t])[:, token] for t, token in enumerate(y) if t], axis=0)

    def run(variant):
        model = rag(variant, generator=generator)
        return jax.jit(partial(model.generate, num_beams=beams, max_length=T))(params, IDS, MASK, SCORES)

    token, sequence = run("token"), run("sequence")
    for b in range(B):
        y, _ = find(lambda y, b=b: np.log(prior[b] @ np.exp(look_up(b, y))))[0]
        np.testing.assert_array_equal(token.sequences[b], oracles.pad(y, T, pad))
        candidates = {y for k in range(K) for y, _ in find(lambda y, k=k, b=b: look_up(b, y)[k])}
        joint = {y: np.log(prior[b]) + likelihood(b, y) for y in candidates}
        best = max(joint, key=lambda y: np.exp(joint[y]).sum())
        np.testing.assert_array_equal(sequence.sequences[b], oracles.pad(best, T, pad))
        np.testing.assert_allclose(sequence.scores[b], np.log(np.exp(joint[best]).sum()), rtol=1e-4)
