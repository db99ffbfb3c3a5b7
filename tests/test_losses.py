"""Marginal likelihoods and retriever losses: loops in float64, transformers, and sums over all sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rag_jax import losses as loss_functions

PAD = 1


def rag_nll(objective, logits_BKTV, *args, chunk=4096, **kwargs):
    """The loss of given logits: they serve as hidden states of an output layer that is the identity."""
    V = logits_BKTV.shape[-1]
    head = loss_functions.OutputLayer(jnp.eye(V), jnp.zeros(V), chunk=chunk)
    return loss_functions.rag_nll(objective, jnp.asarray(logits_BKTV), head, *args, **kwargs)


B, K, T, V = 4, 3, 5, 7
LENGTHS = (5, 3, 2, 1)  # scored tokens of each question; the last one is too short for transformers' prior


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    targets = rng.integers(2, V, (B, T))
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    return {
        "logits_BKTV": rng.normal(0, 2, (B, K, T, V)).astype(np.float32),
        "targets_BT": np.where(mask, targets, PAD).astype(np.int32),
        "mask_BT": mask,
        "scores_BK": rng.normal(0, 2, (B, K)).astype(np.float32),
    }


def brute_force(case, objective, prior="paper", smoothing=0.0):
    """The loss of each question, with loops over documents, tokens and the vocabulary."""
    result = []
    for logits, targets, n, scores in zip(
        case["logits_BKTV"], case["targets_BT"], LENGTHS, case["scores_BK"], strict=True
    ):
        p, p_z, y = oracles.softmax(logits), oracles.softmax(scores), targets[:n]
        counts = lambda target: prior == "paper" or len(target) > 1  # noqa: E731
        if objective == "rag_token":
            likelihood = oracles.rag_token(p, y, p_z)
            smooth = sum(np.log(sum(p_z[k] * p[k, t, v] for k in range(K))) for t in range(n) for v in range(V))
        else:
            likelihood = oracles.rag_sequence(p, y, p_z, counts)
            # the prior stands at one position, and there once for each of the V tokens that are smoothed over
            times = V if counts(y) else 0
            products = [p_z[k] ** times * np.prod(p[k, :n]) for k in range(K)]
            smooth = np.log(sum(products))
        result.append((1 - smoothing) * -np.log(likelihood) - smoothing / V * smooth)
    return np.array(result)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("prior", ["paper", "hf_compat"])
@pytest.mark.parametrize("objective", ["rag_sequence", "rag_token"])
def test_nll_is_that_of_loops(case, objective, prior, smoothing):
    nll, token_logp = rag_nll(objective, **case, prior=prior, label_smoothing=smoothing)
    np.testing.assert_allclose(nll, brute_force(case, objective, prior, smoothing), rtol=2e-5)
    p = oracles.softmax(case["logits_BKTV"])
    expected = np.log(np.take_along_axis(p, case["targets_BT"][:, None, :, None].repeat(K, 1), -1)[..., 0])
    np.testing.assert_allclose(token_logp, expected, rtol=1e-4, atol=1e-5)


def test_the_two_priors_differ_only_for_a_single_target_token(case):
    paper, quirk = (np.asarray(rag_nll("rag_sequence", **case, prior=p)[0]) for p in ("paper", "hf_compat"))
    np.testing.assert_allclose(paper[:-1], quirk[:-1], rtol=1e-6)
    assert quirk[-1] < paper[-1] - 0.1  # K documents, each with weight one
    one = {**case, **{name: case[name][:, :1] for name in ("targets_BT", "mask_BT")}}
    one["logits_BKTV"] = case["logits_BKTV"][:, :, :1]  # T = 1: there is no second position at all
    nll, _ = rag_nll("rag_sequence", **one, prior="hf_compat")
    np.testing.assert_allclose(nll[-1], quirk[-1], rtol=1e-6)


def test_what_padding_says_does_not_count(case):
    other = case["logits_BKTV"] + np.where(case["mask_BT"], 0, 50.0)[:, None, :, None] * np.arange(V)
    for objective in loss_functions.MARGINALS:
        a, b = (rag_nll(objective, **{**case, "logits_BKTV": x})[0] for x in (case["logits_BKTV"], other))
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(("vocabulary", "steps"), [(3, 3), (4, 4)])
def test_probabilities_of_all_sequences_sum_to_one(vocabulary, steps):
    """With any tables p(y_t | z, y_<t) and any prior, both marginals are distributions over sequences."""
    rng = np.random.default_rng(vocabulary)
    eos, documents = 2, 3
    tables: dict = {}
    every = oracles.sequences(vocabulary, steps, eos)
    logits = np.zeros((len(every), documents, steps, vocabulary), np.float32)
    targets = np.full((len(every), steps), PAD, np.int32)
    mask = np.zeros((len(every), steps), bool)
    for i, tokens in enumerate(every):
        targets[i, : len(tokens)], mask[i, : len(tokens)] = tokens, True
        for t in range(steps):
            table = tables.setdefault(tokens[:t], rng.normal(0, 2, (documents, vocabulary)))
            logits[i, :, t] = table
    scores = np.repeat(rng.normal(0, 2, (1, documents)), len(every), 0).astype(np.float32)
    total = {}
    for objective in loss_functions.MARGINALS:
        for prior in ("paper", "hf_compat"):
            nll, _ = rag_nll(objective, logits, targets, mask, scores, prior=prior)
            total[objective, prior] = np.exp(-np.asarray(nll, np.float64)).sum()
    for case in (("rag_sequence", "paper"), ("rag_token", "paper"), ("rag_token", "hf_compat")):
        np.testing.assert_allclose(total[case], 1.0, rtol=1e-5)
    # transformers' quirk is no distribution: a lone eos is counted with weight one under every document
    extra = ((1 - oracles.softmax(scores[0])) * oracles.softmax(tables[()])[:, eos]).sum()
    np.testing.assert_allclose(total["rag_sequence", "hf_compat"], 1 + extra, rtol=1e-5)


def test_gradient_in_the_scores_is_prior_minus_posterior(case):
    def gradient(objective):
        return jax.grad(lambda s: rag_nll(objective, **{**case, "scores_BK": s})[0].sum())(case["scores_BK"])

    p, prior = oracles.softmax(case["logits_BKTV"]), oracles.softmax(case["scores_BK"])
    sequence, token = np.zeros((B, K)), np.zeros((B, K))
    for b, n in enumerate(LENGTHS):
        chosen = p[b][:, np.arange(n), case["targets_BT"][b, :n]]
        joint = prior[b] * chosen.prod(1)
        sequence[b] = prior[b] - joint / joint.sum()
        for t in range(n):
            joint_t = prior[b] * chosen[:, t]
            token[b] += prior[b] - joint_t / joint_t.sum()
    np.testing.assert_allclose(gradient("rag_sequence"), sequence, atol=2e-6)
    np.testing.assert_allclose(gradient("rag_token"), token, atol=2e-6)
    _, token_logp = rag_nll("rag_sequence", **case)
    posterior = np.exp(
        loss_functions.posterior_logp(token_logp, loss_functions.prior_logp(case["scores_BK"]), case["mask_BT"])
    )
    np.testing.assert_allclose(posterior, prior - sequence, atol=2e-6)
    np.testing.assert_allclose(posterior.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("objective", list(loss_functions.MARGINALS))
@pytest.mark.parametrize(
    ("chunk", "parts", "shards"), [(3, 1, 1), (4, 2, 3), (1, 1, 1), (100, 3, 3), (0, 1, 1), (0, 2, 3)]
)
def test_a_chunk_of_the_vocabulary_at_a_time_gives_the_same_and_so_does_its_gradient(
    objective, smoothing, chunk, parts, shards
):
    """Against the plain formulas on whole logits, differentiated by JAX."""
    rng = np.random.default_rng(2)
    B, K, T, V, D, scale = 3, 2, 4, 12, 5, 0.7
    hidden, kernel, bias, scores = (
        rng.normal(0, 1, shape).astype(np.float32) for shape in ((B, K, T, D), (V, D), (V,), (B, K))
    )
    targets, mask = rng.integers(0, V, (B, T)), np.arange(T) < np.array([[4], [2], [1]])

    def whole(hidden, kernel, bias, scores):
        logp = jax.nn.log_softmax(jnp.einsum("bktd,vd->bktv", hidden, kernel) * scale + bias)
        prior = jax.nn.log_softmax(scores)
        token_logp = jnp.take_along_axis(logp, jnp.asarray(targets)[:, None, :, None], -1)[..., 0]
        if objective == "rag_token":
            marginal = jax.nn.logsumexp(logp + prior[..., None, None], axis=1)
            nll = -jnp.where(mask, jax.nn.logsumexp(token_logp + prior[..., None], axis=1), 0).sum(-1)
            smooth = jnp.where(mask, marginal.sum(-1), 0).sum(-1)
        else:
            nll = -jax.nn.logsumexp(jnp.where(mask[:, None], token_logp, 0).sum(-1) + prior, axis=-1)
            smooth = jax.nn.logsumexp(jnp.where(mask[:, None], logp.sum(-1), 0).sum(-1) + V * prior, axis=-1)
        return ((1 - smoothing) * nll - smoothing / V * smooth).sum()

    def chunked(hidden, kernel, bias, scores):
        head = loss_functions.OutputLayer(kernel, bias, scale, chunk, parts, shards)
        return loss_functions.rag_nll(objective, hidden, head, targets, mask, scores, label_smoothing=smoothing)[
            0
        ].sum()

    given = hidden, kernel, bias, scores
    expected, ours = (jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*given) for f in (whole, chunked))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    for a, b in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("objective", list(loss_functions.MARGINALS))
def test_extreme_values_stay_finite(case, objective):
    def loss(scores, logits):
        changed = {**case, "scores_BK": scores, "logits_BKTV": logits}
        return rag_nll(objective, **changed, label_smoothing=0.1)[0].sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    scores = np.tile(np.float32([1e4, -1e4, 0]), (B, 1))
    for x in (scores, scores + 1e4, -scores, np.zeros_like(scores)):
        for logits in (case["logits_BKTV"], case["logits_BKTV"] * 1e3):
            value, gradients = gradient(x, logits)
            assert np.isfinite(value)
            assert all(np.isfinite(g).all() for g in gradients)


def test_contrastive_loss_is_that_of_loops_and_so_is_its_gradient():
    rng = np.random.default_rng(1)
    queries, passages = (rng.normal(0, 1, (n, 6)).astype(np.float32) for n in (4, 7))
    positive = np.eye(4, 7, dtype=bool)
    ignore = rng.random((4, 7)) < 0.3
    ignore[0, 0] = True  # the positive is never ignored
    ignore[1] = True  # all but the positive are ignored

    def numpy(ignored):
        losses, gradient = [], np.zeros_like(queries, dtype=np.float64)
        for b in range(4):
            kept = [i for i in range(7) if i == b or not ignored[b, i]]
            p = oracles.softmax(np.array([queries[b].astype(np.float64) @ passages[i] for i in kept]))
            losses.append(-np.log(p[kept.index(b)]))
            gradient[b] = sum(w * passages[i] for w, i in zip(p, kept, strict=True)) - passages[b]
        return np.array(losses), gradient

    for ignored, argument in ((ignore, ignore), (np.zeros_like(ignore), None)):
        losses, gradient = numpy(ignored)
        ours = loss_functions.in_batch_contrastive(queries, passages, positive, argument)
        np.testing.assert_allclose(ours, losses, rtol=1e-5, atol=1e-6)
        ours = jax.grad(lambda q, a=argument: loss_functions.in_batch_contrastive(q, passages, positive, a).sum())(
            queries
        )
        np.testing.assert_allclose(ours, gradient, atol=1e-5)
    assert np.isfinite(loss_functions.in_batch_contrastive(queries * 1e4, passages, positive, ignore)).all()


def test_shapes_that_do_not_fit_are_named(case):
    logits, targets, mask, scores = case["logits_BKTV"], case["targets_BT"], case["mask_BT"], case["scores_BK"]
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        rag_nll("rag_sequence", logits, targets, mask, scores[:, :2])
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(1, 5\)"):
        rag_nll("rag_token", logits, targets[:1], mask, scores)
    with pytest.raises(ValueError, match=r"\(4, 3, 5\).*\(4, 4\)"):
        loss_functions.rag_sequence_logp(jnp.zeros((4, 3, 5)), jnp.zeros((4, 3)), mask[:, :4])
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 5\)"):
        loss_functions.rag_token_logp(jnp.zeros((4, 5)), jnp.zeros((4, 3)), mask)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        loss_functions.in_batch_contrastive(jnp.zeros((2, 4)), jnp.zeros((3, 4)), jnp.zeros(3, bool))
    with pytest.raises(KeyError):
        rag_nll("rag", logits, targets, mask, scores)


@pytest.mark.parity
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("objective", ["rag_sequence", "rag_token"])
def test_nll_is_that_of_transformers(case, objective, smoothing):
    torch = pytest.importorskip("torch")
    import transformers

    encoder = transformers.DPRConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    generator = transformers.BartConfig(
        vocab_size=V, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=8,
        bos_token_id=0, pad_token_id=PAD, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    config = transformers.RagConfig.from_question_encoder_generator_configs(encoder, generator, n_docs=K)
    kind = {"rag_sequence": "RagSequenceForGeneration", "rag_token": "RagTokenForGeneration"}[objective]
    theirs = getattr(transformers, kind)(config)
    labels = np.concatenate([np.zeros((B, 1), int), case["targets_BT"][:, :-1]], 1)
    labels[0, -1] = 2  # its last target was truncated
    targets = np.concatenate([labels[:, 1:], np.full((B, 1), PAD)], 1)
    changed = {**case, "targets_BT": targets, "mask_BT": targets != PAD}
    ours, _ = rag_nll(objective, **changed, prior="hf_compat", label_smoothing=smoothing)
    arguments = (
        torch.tensor(case["logits_BKTV"].reshape(B * K, T, V)),
        torch.tensor(case["scores_BK"]),
        torch.tensor(labels),
    )
    loss = theirs.get_nll(*arguments, reduce_loss=False, epsilon=smoothing, n_docs=K)
    np.testing.assert_allclose(ours, loss.reshape(-1), rtol=2e-5)
    total = theirs.get_nll(*arguments, reduce_loss=True, epsilon=smoothing, n_docs=K)
    np.testing.assert_allclose(ours.sum(), total, rtol=2e-5)
