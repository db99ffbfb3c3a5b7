"""The lexical initialisation: the inner products of an untrained encoder are nearly those of TF-IDF."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models.bert import Bert, BertConfig
from rag_jax.models.init_lexical import FILLER, inverse_document_frequency, lexical_start

V, N, L, Q = 400, 120, 30, 5
CONFIG = BertConfig(
    vocab_size=V, width=1024, layers=1, heads=4, hidden=64, positions=L, norm="pre", init="lexical", pooling="mean",
    vector_norm=3.0, dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    """Passages [N, L] of different lengths; tokens 0 to 9 are in all of them, higher ones are rarer."""
    rng = np.random.default_rng(0)
    odds = 1.0 / np.arange(1, V + 1)
    ids = rng.choice(V, (N, L), p=odds / odds.sum())
    ids[:, :10] = np.arange(10)
    return ids, rng.integers(15, L + 1, N)


def test_inverse_document_frequency_is_that_of_counting(corpus):
    ids, lengths = corpus
    found = inverse_document_frequency(ids, lengths, V)
    for token in (0, 3, 12, 57, 391, V - 1):
        n = max(1, sum(token in set(row[:length]) for row, length in zip(ids, lengths, strict=True)))
        assert np.isclose(found[token], np.log(N / n) / np.log(N))
    assert not found[:10].any() and found.max() == 1.0
    part = inverse_document_frequency(ids, lengths, V, sample=10)
    chosen = np.unique(np.linspace(0, N - 1, 10).astype(int))
    n = sum(12 in set(ids[row][: lengths[row]]) for row in chosen)
    assert np.isclose(part[12], np.log(10 / max(n, 1)) / np.log(10))


@pytest.mark.parametrize("layers", [0, 1])
def test_inner_products_are_those_of_tf_idf(corpus, layers):
    ids, lengths = corpus
    weight = inverse_document_frequency(ids, lengths, V)
    module = Bert(dataclasses.replace(CONFIG, layers=layers))
    mask = np.arange(L) < lengths[:, None]
    params = nn.unbox(module.init(jax.random.key(0), jnp.asarray(ids[:1]), jnp.asarray(mask[:1]))["params"])
    start = lexical_start(params, weight)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, params)
    embed = jax.jit(lambda p, i, m: module.apply({"params": p}, i, m))
    rng = np.random.default_rng(1)
    gold = rng.choice(N, 60, replace=False)
    questions = np.stack([rng.permutation(ids[row][10 : lengths[row]])[:Q] for row in gold])
    passages = embed(start, ids, mask)
    np.testing.assert_allclose(np.linalg.norm(passages, axis=1), 3.0, rtol=1e-5)
    scores = embed(start, questions, np.ones_like(questions, bool)) @ passages.T

    def bag(rows):
        counts = np.stack([np.bincount(row, minlength=V) for row in rows]) * weight
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    sparse = bag(questions) @ bag([row[:length] for row, length in zip(ids, lengths, strict=True)]).T
    agreement = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(np.asarray(scores), sparse, strict=True)])
    assert agreement > 0.7  # positions and layers add a small common part
    plain = embed(params, questions, np.ones_like(questions, bool)) @ embed(params, ids, mask).T
    found, before, best = ((np.argmax(s, 1) == gold).mean() for s in (scores, plain, sparse))
    assert found > best - 0.15 and found > before + 0.2


def test_the_filler_is_taken_out(corpus):
    ids, _ = corpus
    module = Bert(CONFIG)
    params = nn.unbox(module.init(jax.random.key(0), jnp.asarray(ids[:1]), jnp.ones((1, L), bool))["params"])
    start = lexical_start(params, np.linspace(0, 1, V))
    hidden = module.apply({"params": start}, ids, np.ones_like(ids, bool), method="hidden")
    assert not np.asarray(hidden[..., :FILLER]).any() and np.std(hidden[..., FILLER:]) > 0.1
    word = np.asarray(start["word"]["embedding"])
    np.testing.assert_allclose(np.linalg.norm(word, axis=1), 32.0, rtol=1e-5)  # sqrt(width): LayerNorm keeps it


def test_an_encoder_without_a_last_norm_is_refused():
    module = Bert(dataclasses.replace(CONFIG, norm="post"))
    params = nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 4), int), jnp.ones((1, 4), bool))["params"])
    with pytest.raises(ValueError, match="norm='pre'"):
        lexical_start(params, np.ones(V))
