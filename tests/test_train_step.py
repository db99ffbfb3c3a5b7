"""The training step: its losses recomputed on the host with loops, its gradients, and one device against eight."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rag_jax import losses as loss_functions
from rag_jax import retrieve
from rag_jax.corpus import inverse_cloze
from rag_jax.corpus.directory import Corpus
from rag_jax.data import batching, joining
from rag_jax.data.examples import tokenise
from rag_jax.data.readers import formats
from rag_jax.index import device_index
from rag_jax.index.device_index import Index
from rag_jax.models.bart import BartConfig
from rag_jax.models.bert import BertConfig
from rag_jax.rag import Rag, RagConfig, TokenTables
from rag_jax.runs import directory as runs
from rag_jax.system import sharding
from rag_jax.training import optimizer, train_step
from rag_jax.training.config import make_stage
from rag_jax.training.objectives import rag as rag_objective
from rag_jax.training.optimizer import OptimizerConfig
from rag_jax.training.stage import LossInput, StepSetting
from rag_jax.training.train_step import TrainState

B, K, E, LENGTH = 8, 3, 6, 152


@dataclasses.dataclass(frozen=True)
class Bags(Rag):
    """A Rag whose encoders and generator are bags of words, so that its step can be computed by hand."""

    def embed_questions(self, params, ids, mask, dropout=None):
        return mean(params["question_encoder"][ids], mask)

    def embed_passages(self, params, ids, mask, dropout=None):
        return mean(params[self.config.passage_side][ids], mask)

    def states(self, params, ids, mask, labels, dropout=None, doc_chunk=0):
        table = params["generator"]
        return mean(table[ids], mask)[:, :, None] + table[labels][:, None]

    def head(self, params, logit_chunk=4096, questions=1):
        return loss_functions.OutputLayer(params["generator"], jnp.zeros(len(params["generator"])), chunk=logit_chunk)

    def logits(self, params, ids, mask, labels, dropout=None):
        return self.states(params, ids, mask, labels) @ params["generator"].T


def mean(vectors, mask):
    return (vectors * mask[..., None]).sum(-2) / mask.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


@pytest.fixture(scope="module")
def examples(tiny_data, corpus):
    questions = formats.read_questions(tiny_data / "world/train.jsonl")
    return tokenise(questions, corpus, question_length=24, target_length=14)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.fixture(scope="module")
def passages(corpus, mesh):
    return runs.load(RagConfig(encoder=BertConfig(vocab_size=0, positions=96)), corpus, mesh).passages


def bags(corpus, **changes):
    special = {"bos_id": 0, "pad_id": 1, "eos_id": 2}
    base = RagConfig(generator=BartConfig(**special), source_length=LENGTH)
    return Bags(dataclasses.replace(base, **changes))


@pytest.fixture(scope="module")
def params(corpus):
    rng = np.random.default_rng(0)
    encoder, generator = corpus.encoder_tokenizer.vocab_size, corpus.generator_tokenizer.vocab_size
    sizes = {"question_encoder": encoder, "context_encoder": encoder, "generator": generator}
    return {name: rng.normal(0, 2.0, (size, E)).astype(np.float32) for name, size in sizes.items()}


def question_batches(examples, corpus, window=0):
    """Batches of all examples, or of those whose answer fits into a window."""
    pairs = np.flatnonzero(examples.answer_P2[:, 1] > 0) if window else np.arange(len(examples.label))
    units, wanted = batching.units_of(examples, pairs, False), batching.BatchOptions(B, 0, (24, 14), window=window)
    return batching.question_batches(examples, units, corpus, wanted)


@pytest.fixture(scope="module")
def batch(examples, corpus):
    """Eight questions, one without a known gold passage and one with two."""
    data = question_batches(examples, corpus)[0]
    gold = np.concatenate([data["gold"], np.full((B, 1), -1, np.int32)], 1)
    gold[2], gold[5, 1] = -1, (gold[5, 0] + 1) % 40
    return {**data, "gold": gold}


@pytest.fixture(scope="module")
def index(params, corpus, mesh):
    """An index by an older encoder, so that searching in it and scoring with fresh embeddings differ."""
    older = params["context_encoder"] + np.random.default_rng(1).normal(0, 0.5, params["context_encoder"].shape)
    return index_of(mesh, embed_all(older, corpus))


def index_of(mesh, embeddings, step=0):
    rows = sharding.shard_rows(mesh, np.asarray(embeddings, np.float32), 0)
    steps = sharding.shard_rows(mesh, np.full(len(rows), step, np.int32), 0)
    return Index(rows, steps, drift_E=device_index.no_drift(mesh, rows.shape[1]))


def loss_of(s, params, trains_passages, batch, index, passages, key, now=0):
    """(value, (metrics, fresh rows)) of the loss of the setting's stage."""
    given = LossInput(batch, index, passages, key, jnp.int32(now), trains_passages)
    value, *rest = s.stage.objective.loss(s, params, given)
    return value, tuple(rest)


def setting(rag, stage, mesh, corpus):
    return StepSetting(rag, stage, mesh, len(corpus), corpus.generator_tokenizer.prefix_ids)


def embed_all(table, corpus):
    rows = zip(corpus.encoder_ids, corpus.encoder_length, strict=True)
    return np.stack([np.asarray(table, np.float64)[ids[:n]].mean(0) for ids, n in rows])


def questions_by_hand(params, batch):
    table = np.asarray(params["question_encoder"], np.float64)
    rows = zip(batch["question_ids"], batch["question_length"], strict=True)
    return np.stack([table[ids[:n]].mean(0) for ids, n in rows])


# --- the joint loss on the host ---------------------------------------------------------------------------------------


def by_hand(params, batch, corpus, variant, stored, fresh, rows=None):
    """(mean loss, metrics, prior, posterior, rows) in float64; stored, fresh: embeddings to search and score with."""
    table = np.asarray(params["generator"], np.float64)
    losses, priors, posteriors, found, questions, tokens, counted = [], [], [], [], [], 0, 0
    for b in range(B):
        question = batch["question_ids"][b, : batch["question_length"][b]]
        q = np.asarray(params["question_encoder"], np.float64)[question].mean(0)
        questions.append(q)
        mine = np.argsort(-(stored @ q), kind="stable")[:K] if rows is None else rows[b]
        prior = oracles.softmax(fresh[mine] @ q)
        label = batch["labels"][b][batch["labels"][b] != 1]
        p_next = []
        for row in mine:
            ids = corpus.generator_ids[row][: corpus.generator_length[row]].tolist()
            tail = batch["tail_ids"][b, : batch["tail_length"][b]].tolist()
            source = joining.join((0,), ids, tail, LENGTH)
            p_next.append(oracles.softmax((table[source].mean(0) + table[label[:-1]]) @ table.T))
            tokens += len(source) + len(label) - 1
        counted += len(label) - 1
        likelihood = {"sequence": oracles.rag_sequence, "token": oracles.rag_token}[variant]
        losses.append(-math.log(likelihood(p_next, label[1:], prior)))
        joint = np.array([prior[k] * np.prod(p_next[k][range(len(label) - 1), label[1:]]) for k in range(K)])
        priors.append(prior)
        posteriors.append(joint / joint.sum())
        found.append(mine)
    hits = [[row in batch["gold"][b] for row in found[b]] for b in range(B) if (batch["gold"][b] >= 0).any()]
    first = [found[b][np.argmax(priors[b])] in batch["gold"][b] for b in range(B) if (batch["gold"][b] >= 0).any()]
    metrics = {
        "nll_per_token": sum(losses) / counted,
        "tokens": tokens,
        "prior_entropy": np.mean([-(p * np.log(p)).sum() for p in priors]),
        "posterior_prior_gap": np.mean([(t * np.log(t / p)).sum() for p, t in zip(priors, posteriors, strict=True)]),
        "unique_documents": len({int(row) for rows in found for row in rows}) / (B * K),
        "recall_at_1": np.mean(first),
        "recall_at_3": np.mean([any(hit) for hit in hits]),
        "row_age": 3,
        "row_age_max": 3,
    }
    if fresh is not stored:
        gaps = [abs((fresh[row] - stored[row]) @ q) for q, mine in zip(questions, found, strict=True) for row in mine]
        metrics["score_gap"] = np.mean(gaps)
    return np.mean(losses), metrics, np.array(priors), np.array(posteriors), np.array(found)


@pytest.fixture(scope="module")
def joint(corpus, mesh, passages, index):
    """joint(...): jitted (params, batch) -> ((loss, metrics), gradients), compiled once for all tests."""

    @functools.cache
    def compiled(trains_passages=False, variant="sequence", **stage):
        s = setting(bags(corpus, variant=variant), make_stage("joint", n_docs=K, **stage), mesh, corpus)

        def loss(params, batch):
            value, (metrics, _) = loss_of(
                s, params, trains_passages, batch, index, passages, jax.random.key(0), jnp.int32(3)
            )
            return value, metrics

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return compiled


def assert_metrics(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_in_graph_is_on_host(params, batch, corpus, mesh, index, joint, variant):
    (value, metrics), _ = joint(variant=variant)(params, sharding.shard_batch(mesh, batch))
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    loss, expected, *_ = by_hand(params, batch, corpus, variant, stored, stored)
    np.testing.assert_allclose(value, loss, rtol=1e-4)
    assert_metrics(metrics, expected)
    assert 0 < expected["recall_at_3"] < 1 and expected["unique_documents"] < 1  # for a telling comparison


def test_passages_that_train_are_embedded_afresh(params, batch, corpus, mesh, index, joint):
    """The search uses the stored embeddings, the prior those of the present encoder."""
    (value, metrics), gradients = joint(trains_passages=True)(params, sharding.shard_batch(mesh, batch))
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    fresh = embed_all(params["context_encoder"], corpus)
    loss, expected, *_ = by_hand(params, batch, corpus, "sequence", stored, fresh)
    np.testing.assert_allclose(value, loss, rtol=1e-4)
    assert_metrics(metrics, expected)
    stale, *_ = by_hand(params, batch, corpus, "sequence", stored, stored)
    assert abs(stale - loss) > 1e-2
    assert np.abs(gradients["context_encoder"]).max() > 1e-3
    _, frozen = joint()(params, sharding.shard_batch(mesh, batch))
    assert (np.asarray(frozen["context_encoder"]) == 0).all()


def test_documents_from_outside(params, batch, corpus, mesh, index, joint):
    step, host, batch = joint(), batch, sharding.shard_batch(mesh, batch)
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    retrieved, *_, rows = by_hand(params, host, corpus, "sequence", stored, stored)
    (given, _), gradients = step(params, {**batch, "documents": rows.astype(np.int32)})
    (own, _), own_gradients = step(params, batch)
    np.testing.assert_allclose(given, own, rtol=1e-6)
    np.testing.assert_allclose(gradients["generator"], own_gradients["generator"], atol=1e-6)
    others = (rows + 7) % len(corpus)
    (value, metrics), _ = step(params, {**batch, "documents": others.astype(np.int32)})
    loss, expected, *_ = by_hand(params, host, corpus, "sequence", stored, stored, others)
    np.testing.assert_allclose(value, loss, rtol=1e-4)
    assert_metrics(metrics, expected)
    assert abs(loss - retrieved) > 0.1


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_documents_that_were_not_found_are_as_none(params, batch, corpus, mesh, joint, variant):
    """With two of three found, loss, gradients and metrics are those of two, whatever is in the third slot."""
    batch = sharding.shard_batch(mesh, batch)
    rows = np.stack([np.arange(B), np.arange(B) + 11], 1).astype(np.int32)
    two, three = rows, np.concatenate([rows, np.full((B, 1), 29, np.int32)], 1)
    known = np.where(np.arange(3) < 2, three, -1)
    for trains in (False, True):
        step = joint(trains, variant=variant)
        (value, metrics), gradients = step(params, {**batch, "documents": three, "document_rows": known})
        (right, expected), wanted = step(params, {**batch, "documents": two, "document_rows": two})
        np.testing.assert_allclose(value, right, rtol=1e-5)
        for name in wanted:
            np.testing.assert_allclose(gradients[name], wanted[name], atol=1e-5, err_msg=name)
        expected = {name.replace("recall_at_2", "recall_at_3"): one for name, one in expected.items()}
        assert_metrics({**metrics, "tokens": 0}, {**expected, "tokens": 0})


def test_over_retrieved_passages_are_ranked_afresh(params, batch, corpus, mesh, index, joint):
    """Seven are found by the stored embeddings; the best three of these by fresh embeddings are read."""
    (value, metrics), _ = joint(n_retrieved=7)(params, sharding.shard_batch(mesh, batch))
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    fresh = embed_all(params["context_encoder"], corpus)
    ids = [batch["question_ids"][b, : batch["question_length"][b]] for b in range(B)]
    q = np.stack([np.asarray(params["question_encoder"], np.float64)[row].mean(0) for row in ids])
    found = np.argsort(-(q @ stored.T), axis=1, kind="stable")[:, :7]
    kept = np.stack([row[np.argsort(-(fresh[row] @ x))[:K]] for row, x in zip(found, q, strict=True)])
    loss, expected, *_ = by_hand(params, batch, corpus, "sequence", stored, fresh, kept)
    np.testing.assert_allclose(value, loss, rtol=1e-4)
    assert_metrics(metrics, expected)
    assert (kept != found[:, :K]).any()
    (given, _), _ = joint(n_retrieved=7)(params, sharding.shard_batch(mesh, {**batch, "documents": found}))
    np.testing.assert_allclose(given, value, rtol=1e-6)
    # of those that the search did not find none is kept while there are others, whatever stands in their slots
    known = {**batch, "documents": found, "document_rows": np.where(np.arange(7) < K, found, -1)}
    (given, _), _ = joint(n_retrieved=7)(params, sharding.shard_batch(mesh, known))
    loss, *_ = by_hand(params, batch, corpus, "sequence", stored, fresh, found[:, :K])
    np.testing.assert_allclose(given, loss, rtol=1e-4)


@pytest.mark.parametrize("trains_passages", [False, True])
def test_prior_over_the_whole_corpus(params, batch, corpus, mesh, index, joint, trains_passages):
    """log p(z|x) = q.d - log Z over all passages; those not retrieved count with their stored embeddings, moved by the
    mean change of the retrieved ones.
    """
    given = sharding.shard_batch(mesh, batch)
    (value, metrics), gradients = joint(trains_passages, normaliser="corpus")(params, given)
    (plain, _), _ = joint(trains_passages)(params, given)
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    fresh = embed_all(params["context_encoder"], corpus)
    q_BE = questions_by_hand(params, batch)
    rows_BK = np.argsort(-(q_BE @ stored.T), axis=1, kind="stable")[:, :K]
    moved = (fresh - stored)[rows_BK.reshape(-1)].mean(0) if trains_passages else 0
    missing = []
    for q, found in zip(q_BE, rows_BK, strict=True):
        scores = (stored + moved) @ q
        if trains_passages:
            scores[found] = fresh[found] @ q
        missing.append(np.log(np.exp(scores).sum()) - np.log(np.exp(scores[found]).sum()))
    np.testing.assert_allclose(value - plain, np.mean(missing), rtol=1e-3)
    np.testing.assert_allclose(metrics["prior_mass"], np.exp(-np.array(missing)).mean(), rtol=1e-3)
    assert 0.05 < metrics["prior_mass"] < 0.99
    if trains_passages:  # a shift of all rows of the table shifts all embeddings
        context = np.asarray(gradients["context_encoder"], np.float64)
        assert np.abs(context.sum(0)).max() < 1e-4 * np.abs(context).sum(0).min()
    # a step along the gradient changes the loss by what the gradient says
    direction = {"question_encoder": np.random.default_rng(5).normal(size=params["question_encoder"].shape)}
    eps = 1e-3
    ends = [
        joint(trains_passages, normaliser="corpus")(
            params | {"question_encoder": (params["question_encoder"] + sign * eps * direction["question_encoder"])
                      .astype(np.float32)}, given
        )[0][0]
        for sign in (1, -1)
    ]  # fmt: skip
    slope = (np.asarray(gradients["question_encoder"], np.float64) * direction["question_encoder"]).sum()
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * eps), slope, rtol=0.03, atol=0.02)


def test_prior_over_the_whole_corpus_with_over_retrieval(params, batch, corpus, mesh, index, joint):
    """All seven found count with their fresh scores; the others have moved like these on average."""
    over = {"n_retrieved": 7, "trains_passages": True}
    (value, _), gradients = joint(normaliser="corpus", **over)(params, sharding.shard_batch(mesh, batch))
    (plain, _), _ = joint(**over)(params, sharding.shard_batch(mesh, batch))
    stored, q_BE = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)], questions_by_hand(params, batch)
    fresh = embed_all(params["context_encoder"], corpus)
    rows_BL = np.argsort(-(q_BE @ stored.T), axis=1, kind="stable")[:, :7]
    moved, missing = (fresh - stored)[rows_BL.reshape(-1)].mean(0), []
    for q, found in zip(q_BE, rows_BL, strict=True):
        scores = (stored + moved) @ q
        scores[found] = fresh[found] @ q
        kept = np.sort(scores[found])[-K:]
        missing.append(np.log(np.exp(scores).sum()) - np.log(np.exp(kept).sum()))
    np.testing.assert_allclose(value - plain, np.mean(missing), rtol=1e-3)
    context = np.asarray(gradients["context_encoder"], np.float64)
    assert np.abs(context.sum(0)).max() < 1e-4 * np.abs(context).sum(0).min()


def test_context_encoder_learns_from_the_corpus_and_not_from_the_retrieved_alone(params, batch, corpus, mesh, passages):
    """Gradients of both normalisers against that of a corpus which is embedded whole."""
    stored = embed_all(params["context_encoder"], corpus)
    index, now = index_of(mesh, stored), jnp.int32(3)
    given, key, held = sharding.shard_batch(mesh, batch), jax.random.key(0), jax.tree.map(jnp.asarray, params)

    def found(normaliser):
        s = setting(bags(corpus), make_stage("joint", n_docs=K, normaliser=normaliser), mesh, corpus)

        def loss(table):
            return loss_of(s, {**held, "context_encoder": table}, True, given, index, passages, key, now)[0]

        return np.asarray(jax.jit(jax.grad(loss))(held["context_encoder"]))

    *_, posterior_BK, rows_BK = by_hand(params, batch, corpus, "sequence", stored, stored)
    q_BE = jnp.asarray(questions_by_hand(params, batch), jnp.float32)
    mask = np.arange(corpus.encoder_ids.shape[1]) < np.asarray(corpus.encoder_length)[:, None]

    def whole(table):
        scores_BN = q_BE @ mean(table[np.asarray(corpus.encoder_ids, np.int32)], mask).T
        read_B = (posterior_BK * jnp.take_along_axis(scores_BN, rows_BK, 1)).sum(-1)
        return (jax.nn.logsumexp(scores_BN, axis=-1) - read_B).mean()

    wanted = np.asarray(jax.jit(jax.grad(whole))(held["context_encoder"]))

    def cosine(gradient):
        return (gradient * wanted).sum() / np.linalg.norm(gradient) / np.linalg.norm(wanted)

    of_corpus, of_retrieved = cosine(found("corpus")), cosine(found("retrieved"))
    assert of_corpus > of_retrieved + 0.1


def whole_step(corpus, mesh, stage, params, batch, index, passages, **model):
    """(index afterwards, metrics) of one step at step 8, with an encoder that trains."""
    rag = bags(corpus, **model)
    trained = dict.fromkeys(("question_encoder", "context_encoder", "generator"), 1.0)
    stage = dataclasses.replace(stage, optimizer=OptimizerConfig(groups=trained))
    state = TrainState(jnp.int32(8), params, optimizer.make(stage.optimizer, 1).init(params))
    step = jax.jit(train_step.make_step(setting(rag, stage, mesh, corpus), 0))
    _, after, metrics = step(state, sharding.shard_batch(mesh, batch), index, passages, jax.random.key(0))
    return after, metrics


def test_write_back_puts_into_the_index_what_was_embedded_anyway(params, batch, corpus, mesh, index, passages):
    for over in (0, 7):
        stage = make_stage("joint", n_docs=K, n_retrieved=over, write_back=True)
        after, metrics = whole_step(corpus, mesh, stage, params, batch, index, passages)
        stored, fresh = (np.asarray(index.embeddings_NE)[: len(corpus)], embed_all(params["context_encoder"], corpus))
        ids = [batch["question_ids"][b, : batch["question_length"][b]] for b in range(B)]
        q = np.stack([params["question_encoder"][row].mean(0) for row in ids])
        touched = np.unique(np.argsort(-(q @ stored.T), axis=1, kind="stable")[:, : over or K])
        rows = np.argsort(-(q @ stored.T), axis=1, kind="stable")[:, : over or K].reshape(-1)
        drift = (fresh[rows] - stored[rows]).mean(0)
        expected, ages = stored.copy(), np.zeros(len(corpus))
        expected[touched], ages[touched] = fresh[touched] - drift, 8
        np.testing.assert_allclose(after.drift_E, drift, atol=1e-5)
        np.testing.assert_allclose(np.asarray(after.embeddings_NE)[: len(corpus)], expected, atol=1e-5)
        assert np.asarray(after.step_N)[: len(corpus)].tolist() == ages.tolist()
        assert metrics["row_age"] == 8 and 0 < len(touched) < len(corpus)


def test_a_rolling_refresh_is_part_of_the_step(params, batch, corpus, mesh, index, passages):
    stage = make_stage("joint", n_docs=K, refresh="rolling:5")
    after, _ = whole_step(corpus, mesh, stage, params, batch, index, passages)
    made = np.asarray(after.step_N)[: len(corpus)] == 8
    assert made.sum() == len(corpus) // 5
    fresh = embed_all(params["context_encoder"], corpus)
    np.testing.assert_allclose(device_index.stored(after, jnp.flatnonzero(made)), fresh[made], atol=1e-5)
    untouched = np.asarray(after.embeddings_NE)[: len(corpus)][~made]
    np.testing.assert_array_equal(untouched, np.asarray(index.embeddings_NE)[: len(corpus)][~made])


def test_drift(params, batch, corpus, mesh, index, passages):
    s = setting(bags(corpus), make_stage("joint", n_docs=K), mesh, corpus)
    rows = np.sort(np.random.default_rng(0).permutation(len(corpus))[:30]).astype(np.int32)
    given = sharding.shard_batch(mesh, {name: batch[name] for name in ("question_ids", "question_length")})
    found = train_step.make_drift(s)(params, given, index, passages, rows)
    stored, fresh = np.asarray(index.embeddings_NE)[rows], embed_all(params["context_encoder"], corpus)[rows]
    shares = []
    for b in range(B):
        q = params["question_encoder"][batch["question_ids"][b, : batch["question_length"][b]]].mean(0)
        best = [set(np.argsort(-(d @ q), kind="stable")[:K].tolist()) for d in (stored, fresh)]
        shares.append(len(best[0] & best[1]) / K)
    np.testing.assert_allclose(found, np.mean(shares), rtol=1e-5)
    assert 0 < found < 1


def test_the_questions_gradient_is_prior_minus_posterior(params, batch, corpus, mesh, index, joint):
    """The only gradient to the question encoder: d loss / d q is the sum over k of (prior - posterior) d_k."""
    _, gradients = joint()(params, sharding.shard_batch(mesh, batch))
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    _, _, prior, posterior, rows = by_hand(params, batch, corpus, "sequence", stored, stored)
    expected = np.zeros(params["question_encoder"].shape)
    for b in range(B):
        q = ((prior[b] - posterior[b])[:, None] * stored[rows[b]]).sum(0)
        ids = batch["question_ids"][b, : batch["question_length"][b]]
        np.add.at(expected, ids, q / len(ids) / B)
    np.testing.assert_allclose(gradients["question_encoder"], expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3
    (value, _), stopped = joint(prior_gradient=False)(params, sharding.shard_batch(mesh, batch))
    assert (np.asarray(stopped["question_encoder"]) == 0).all()
    np.testing.assert_allclose(stopped["generator"], gradients["generator"], atol=1e-6)
    assert np.isfinite(value)


def test_gold_reading_through_a_window(params, batch, corpus, mesh, passages, index):
    """One document, the first gold one, of which only the window is read."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 40, (B, 2)).astype(np.int32)
    gold[3, 1] = -1
    start = rng.integers(0, 100, B)
    window = np.stack([start, start + 30], 1).astype(np.int32)
    s = setting(bags(corpus), make_stage("read", documents="gold", window=30, source_length=72), mesh, corpus)

    @jax.jit
    def loss(params, batch):
        return loss_of(s, params, False, batch, index, passages, jax.random.key(0), jnp.int32(0))

    value, (metrics, _) = loss(params, {**batch, "gold": gold, "window": window})
    table, losses, tokens, counted = np.asarray(params["generator"], np.float64), [], 0, 0
    for b in range(B):
        row = gold[b, 0]
        ids = corpus.generator_ids[row][: corpus.generator_length[row]][slice(*window[b])].tolist()
        source = joining.join((0,), ids, batch["tail_ids"][b, : batch["tail_length"][b]].tolist(), 72)
        label = batch["labels"][b][batch["labels"][b] != 1]
        p = oracles.softmax((table[source].mean(0) + table[label[:-1]]) @ table.T)
        losses.append(-np.log(p[range(len(label) - 1), label[1:]]).sum())
        tokens += len(source) + len(label) - 1
        counted += len(label) - 1
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)
    assert_metrics(metrics, {"nll_per_token": sum(losses) / counted, "tokens": tokens})


def test_reading_no_passage_is_answering_the_question_alone(params, batch, corpus, mesh, passages, index):
    s = setting(bags(corpus), make_stage("closed", documents="none", source_length=72), mesh, corpus)

    @jax.jit
    def loss(params, batch):
        return loss_of(s, params, False, batch, index, passages, jax.random.key(0), jnp.int32(0))

    value, (metrics, _) = loss(params, batch)
    table, losses, tokens = np.asarray(params["generator"], np.float64), [], 0
    for b in range(B):
        source = [0, *batch["tail_ids"][b, : batch["tail_length"][b]]]
        label = batch["labels"][b][batch["labels"][b] != 1]
        p = oracles.softmax((table[source].mean(0) + table[label[:-1]]) @ table.T)
        losses.append(-np.log(p[range(len(label) - 1), label[1:]]).sum())
        tokens += len(source) + len(label) - 1
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)
    assert metrics["tokens"] == tokens


# --- the other losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "hard", "given"), [(True, 0, False), (False, 2, False), (False, 2, True)])
def test_contrastive_on_host(params, batch, corpus, mesh, passages, index, tied, hard, given):
    """No negatives are: a passage that is twice in the batch, a second gold passage of a question, and padding entries
    for a question with fewer negatives.
    """
    gold = batch["gold"].copy()
    gold[2, 0], gold[3] = 4, gold[0]
    gold[6, 1] = gold[7, 0]
    ids = [batch["question_ids"][b, : batch["question_length"][b]] for b in range(B)]
    q = np.stack([np.asarray(params["question_encoder"], np.float64)[row].mean(0) for row in ids])
    d = embed_all(params["question_encoder" if tied else "context_encoder"], corpus)
    stored = np.asarray(index.embeddings_NE, np.float64)[: len(corpus)]
    found = np.argsort(-(q @ stored.T), axis=1, kind="stable")[:, :hard]
    if given:
        found = np.random.default_rng(2).integers(0, len(corpus), (B, hard)).astype(np.int32)
        found[3], found[4, 1] = -1, -1
        batch = batch | {"negatives": found}
    if hard:
        gold[1, 1] = found[1, 1]  # a right passage among those found
    how = "given" if given else "retrieved"
    stage = make_stage("retriever", objective="contrastive", hard_negatives=hard, negatives=how)
    s = setting(bags(corpus, tie_encoders=tied), stage, mesh, corpus)

    @jax.jit
    def loss(params, batch):
        value, (metrics, _) = loss_of(s, params, True, batch, index, passages, jax.random.key(0))
        return value, metrics

    value, metrics = loss(params, sharding.shard_batch(mesh, {**batch, "gold": gold}))
    pool = [*gold[:, 0].tolist(), *(row for row in found.reshape(-1).tolist() if row >= 0)]
    losses, right = [], []
    for b in range(B):
        mine = set(gold[b].tolist()) - {-1}
        scores = d[pool] @ q[b]
        others = [score for score, row in zip(scores, pool, strict=True) if row not in mine]
        losses.append(np.log(np.exp([scores[b], *others]).sum()) - scores[b])
        right.append(pool[int(np.argmax(scores))] in mine)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)
    tokens = batch["question_length"].sum() + corpus.encoder_length[pool].sum(dtype=int)
    assert_metrics(metrics, {"in_batch_accuracy": np.mean(right), "tokens": tokens})


def test_inverse_cloze_on_host(params, corpus, mesh, passages):
    """Sentences against the passages of the batch; the same row twice is no negative of itself."""
    batch = dict(inverse_cloze.batches(corpus, B, 0, 24)[0])
    batch["gold"] = batch["gold"].copy()
    batch["gold"][5] = batch["gold"][1]
    s = setting(bags(corpus, tie_encoders=True), make_stage("ict", objective="inverse_cloze"), mesh, corpus)

    @jax.jit
    def loss(params, batch):
        value, (metrics, _) = loss_of(s, params, True, batch, None, passages, jax.random.key(0))
        return value, metrics

    value, metrics = loss(params, sharding.shard_batch(mesh, batch))
    table = np.asarray(params["question_encoder"], np.float64)
    q, d = (
        np.stack([table[ids[:n]].mean(0) for ids, n in zip(batch[f"{side}_ids"], batch[f"{side}_length"], strict=True)])
        for side in ("question", "passage")
    )
    losses, right = [], []
    for b in range(B):
        scores, same = d @ q[b], batch["gold"][:, 0] == batch["gold"][b, 0]
        losses.append(np.log(np.exp(scores[b]) + np.exp(scores[~same]).sum()) - scores[b])
        right.append(same[int(np.argmax(scores))])
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)
    tokens = batch["question_length"].sum() + batch["passage_length"].sum()
    assert_metrics(metrics, {"in_batch_accuracy": np.mean(right), "tokens": tokens})


@pytest.mark.parametrize(("chunk", "smoothing"), [(0, 0.0), (100, 0.1)])
def test_denoise_on_host(params, corpus, mesh, chunk, smoothing):
    stage = make_stage("denoise", objective="denoise", source_length=48, logit_chunk=chunk, label_smoothing=smoothing)
    s = setting(bags(corpus), stage, mesh, corpus)
    batch = batching.denoise_batches(corpus, batch=B, seed=0, length=48)[0]
    batch["labels"] = np.where(np.arange(48) < 20 + np.arange(B)[:, None], batch["labels"], 1)  # of different lengths
    loss = jax.value_and_grad(lambda p, x: loss_of(s, p, False, x, None, None, jax.random.key(0)), has_aux=True)
    (value, (metrics, _)), _ = jax.jit(loss)(params, batch)
    table, logp, smooth, tokens = np.asarray(params["generator"], np.float64), [], [], 0
    for tail, n, label in zip(batch["tail_ids"], batch["tail_length"], batch["labels"], strict=True):
        source, label = [0, *tail[:n]], label[label != 1]
        p = oracles.softmax((table[source].mean(0) + table[label[:-1]]) @ table.T)
        logp += np.log(p[range(len(label) - 1), label[1:]]).tolist()
        smooth += np.log(p).mean(-1).tolist()
        tokens += len(source) + len(label) - 1
    expected = -(1 - smoothing) * np.mean(logp) - smoothing * np.mean(smooth)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert_metrics(metrics, {"nll_per_token": expected, "tokens": tokens})
    text = str(jax.make_jaxpr(loss)(params, batch))
    logits = {
        dims
        for dims in re.findall(r"f32\[([\d,]+)\]", text)
        if math.prod(map(int, dims.split(","))) == B * 48 * len(table)
    }
    assert bool(logits) == (chunk == 0), logits  # whole logits exist only without chunks


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_retrieval_metrics_of_hand_made_values():
    rows = jnp.array([[1, 2], [2, 3], [7, 1]])
    scores = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    posterior = jnp.log(jnp.array([[0.25, 0.75], [0.2, 0.8], [0.5, 0.5]]))
    gold = jnp.array([[2, -1], [3, 9], [-1, -1]])
    found = jax.jit(rag_objective.retrieval_metrics)(rows, scores, posterior, gold)
    entropy = [math.log(2), -0.2 * math.log(0.2) - 0.8 * math.log(0.8), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)]
    gap = [
        0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        0.0,
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    ]
    expected = {
        "prior_entropy": sum(entropy) / 3,
        "posterior_prior_gap": sum(gap) / 3,
        "unique_documents": 4 / 6,
        "recall_at_1": 1 / 2,  # of the two questions whose gold passage is known; the best is the one of highest prior
        "recall_at_2": 1.0,
    }
    assert_metrics(found, expected)


def test_recall_is_nan_where_no_gold_passage_is_known():
    zeros = jnp.zeros((2, 2))
    found = jax.jit(rag_objective.retrieval_metrics)(jnp.array([[0, 1], [2, -1]]), zeros, zeros, jnp.full((2, 3), -1))
    assert math.isnan(found["recall_at_1"]) and math.isnan(found["recall_at_2"])


def test_is_gold_takes_no_padding_for_a_passage():
    gold = jnp.array([[3, -1], [-1, -1]])
    assert retrieve.is_gold(jnp.array([[3, -1, 0], [3, -1, 0]]), gold).tolist() == [[True, False, False], [False] * 3]


# --- the whole step ---------------------------------------------------------------------------------------------------


def test_the_index_is_never_gathered(corpus, mesh):
    """On eight devices, no array of the compiled step has all rows of the index or of the token table."""
    n, rng = 8 * 512, np.random.default_rng(0)
    tables = rng.integers(0, 400, (2, n, 16)).astype(np.uint16)
    lengths = np.full(n, 16, np.uint16)
    table = TokenTables(*(sharding.shard_rows(mesh, x, 0) for x in (tables[0], lengths, tables[1], lengths)))
    index = index_of(mesh, rng.normal(size=(n, E)))
    stage = make_stage("joint", n_docs=K, optimizer=OptimizerConfig(groups={"question_encoder": 1.0}))
    s = StepSetting(bags(corpus), stage, mesh, n, (0,))
    params = {name: jnp.ones((400, E)) for name in ("question_encoder", "context_encoder", "generator")}
    trained = {"question_encoder": params["question_encoder"]}
    state = TrainState(jnp.int32(0), params, optimizer.make(stage.optimizer, 1).init(trained))
    batch = {
        "question_ids": np.ones((B, 8), np.int32),
        "question_length": np.full(B, 8),
        "tail_ids": np.ones((B, 8), np.int32),
        "tail_length": np.full(B, 8),
        "labels": np.ones((B, 4), np.int32),
        "gold": np.ones((B, 1), np.int32),
    }
    args = (state, sharding.shard_batch(mesh, batch), index, table, jax.random.key(0))
    text = jax.jit(train_step.make_step(s, 0)).lower(*args).compile().as_text()
    assert f"[{n // 8},{E}]" in text and f"u16[{n // 8},16]" in text  # the rows of one device
    assert not re.findall(rf"\[(?:\d+,)*{n}(?:,\d+)*\]", text)


ENCODER = BertConfig(
    vocab_size=0, width=16, layers=1, heads=2, hidden=16, positions=96, dropout=0.0, norm="pre", init="copy"
)
GENERATOR = BartConfig(
    vocab_size=0, width=16, encoder_layers=1, decoder_layers=1, heads=2, hidden=16, positions=160, dropout=0.0,
    norm="pre", init="copy", logit_scale=0.25,
)  # fmt: skip
# A large eps: with Adam's usual one, gradients that are zero but for rounding would move their parameters at full rate.
ADAM = OptimizerConfig(learning_rate=0.05, schedule="linear", eps=0.01, weight_decay=0.01)
ENCODERS = dataclasses.replace(ADAM, groups={"question_encoder": 1.0, "context_encoder": 0.5})
READER = dataclasses.replace(ADAM, groups={"generator": 1.0})
ALL_MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8})
STAGES = {
    "contrastive": (make_stage("a", objective="contrastive", optimizer=ENCODERS), "sequence", ALL_MESHES[0]),
    "inverse_cloze": (
        make_stage("f", objective="inverse_cloze", accumulate=2, optimizer=ENCODERS),
        "sequence",
        ALL_MESHES[1],
    ),
    "denoise": (make_stage("b", objective="denoise", source_length=48, optimizer=READER), "sequence", ALL_MESHES[0]),
    "read": (
        make_stage("c", objective="rag", documents="gold", window=30, source_length=72, optimizer=READER),
        "sequence",
        ALL_MESHES[1],
    ),
    "rag_sequence": (make_stage("d", n_docs=K, label_smoothing=0.1, optimizer=ADAM), "sequence", ALL_MESHES[0]),
    "rag_token": (make_stage("e", n_docs=K, optimizer=ADAM), "token", ALL_MESHES[1]),
}


def drawn_params(loaded):
    """Random parameters with their shardings, without compiling the initialisers."""
    rng = np.random.default_rng(0)

    def draw(box):
        value = rng.normal(0, 0.5 * box.value.shape[0] ** -0.5, box.value.shape).astype(np.float32)
        return jax.device_put(value, sharding.sharding(loaded.mesh, box.names))

    boxed = runs.abstract_params(loaded.rag)
    return jax.tree.map(draw, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def two_steps(stage, variant, corpus, examples, mesh):
    """Metrics of two steps and the parameters after them, with real models."""
    stage = dataclasses.replace(stage, steps=4)
    # dropout in the cheapest of them, one encoder for both in another
    encoder = dataclasses.replace(ENCODER, dropout=0.1 if stage.objective.kind == "contrastive" else 0.0)
    model = RagConfig(variant, encoder, GENERATOR, variant == "token", source_length=LENGTH, question_length=24)
    loaded = runs.load(model, corpus, mesh)
    params = drawn_params(loaded)
    state = train_step.first_state(loaded.rag, stage, mesh, params, 5)
    embeddings = np.random.default_rng(1).normal(size=(len(corpus), ENCODER.width)).astype(np.float32)
    index = index_of(mesh, embeddings)
    if stage.objective.kind == "inverse_cloze":
        data = inverse_cloze.batches(corpus, B, 0, 24)
    elif stage.objective.kind == "denoise":
        data = batching.denoise_batches(corpus, batch=B, seed=0, length=48)
    else:
        data = question_batches(examples, corpus, stage.objective.needs().window)
    before = jax.device_get(params)
    places = jax.tree.map(lambda x: x.sharding, state)
    step = train_step.jit_step(setting(loaded.rag, stage, mesh, corpus), 4, state)
    metrics = []
    for i in range(2):
        state, _, found = step(state, sharding.shard_batch(mesh, data[i]), index, loaded.passages, jax.random.key(1))
        metrics.append(jax.device_get(found))
    assert int(state.step) == 7
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, state, places))
    return before, metrics, jax.device_get(state.params)


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x == "rag_token" else pytest.mark.slow) for x in STAGES])
def test_one_device_is_eight(name, corpus, examples):
    stage, variant, shape = STAGES[name]
    before, one, params = two_steps(stage, variant, corpus, examples, sharding.make_mesh(None, jax.devices()[:1]))
    _, eight, sharded = two_steps(stage, variant, corpus, examples, sharding.make_mesh(shape))
    for a, b in zip(one, eight, strict=True):
        assert set(a) == set(b)
        for metric in a:
            np.testing.assert_allclose(a[metric], b[metric], rtol=1e-5, atol=1e-5, err_msg=metric)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, sharded)
    moved = {
        group: max(
            np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before[group], params[group])), strict=True)
        )
        for group in params
    }
    trained = set(params) & set(stage.optimizer.groups)
    assert all(moved[group] > 1e-4 for group in trained)
    assert all(moved[group] == 0.0 for group in set(params) - trained)
    np.testing.assert_allclose([m["learning_rate"] for m in one], [0.05 * 0.75, 0.05 * 0.5], rtol=1e-6)


def test_dropout_goes_by_the_step_and_the_key(corpus, examples):
    """Another step number or another key gives another loss; the same state, batch and key give the same."""
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    encoder = dataclasses.replace(ENCODER, layers=0, dropout=0.1)
    model = RagConfig(encoder=encoder, generator=GENERATOR, question_length=24)
    loaded = runs.load(model, corpus, mesh)
    stage = make_stage("a", objective="contrastive", optimizer=ENCODERS)
    state = train_step.first_state(loaded.rag, stage, mesh, drawn_params(loaded), 0)
    batch = question_batches(examples, corpus)[0]
    step = jax.jit(train_step.make_step(setting(loaded.rag, stage, mesh, corpus), 0))

    def loss(at, key):
        _, _, metrics = step(state._replace(step=jnp.int32(at)), batch, None, loaded.passages, jax.random.key(key))
        return float(metrics["loss"])

    assert loss(3, 0) == loss(3, 0)
    assert len({loss(3, 0), loss(4, 0), loss(3, 1)}) == 3
