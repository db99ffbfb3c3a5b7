"""A search that found fewer passages than were asked for, or none: missing passages are never read, counted or learned
from.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rag_jax import losses
from rag_jax.cli import ask
from rag_jax.evaluation import docs_curve
from rag_jax.index import host_index
from rag_jax.index.device_index import Index
from rag_jax.inference.pipeline import Pipeline
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieval.search import Queries, SearchResult
from rag_jax.system import sharding
from rag_jax.training.config import make_stage
from rag_jax.training.objectives import rag as rag_objective
from rag_jax.training.stage import StepSetting
from rag_jax.training.stage_index import feed

NOTHING = "zzz qqq xxyyzz?"


class Few:
    """A search whose number of passages depends on the question's text: 4, 3, 2, 1, none, 4, ..."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.manifest: dict[str, Any] = {"kind": "few", "settings": {}}

    def search(self, queries: Queries, k: int) -> SearchResult:
        assert queries.texts is not None
        counts = np.array([4 - len(text.split("!")[0]) % 5 for text in queries.texts])
        rows = (np.arange(k)[None] * 7 + counts[:, None] * 3) % self.size
        there = np.arange(k) < np.minimum(counts, k)[:, None]
        scores = np.where(there, 5.0 - np.arange(k), -np.inf).astype(np.float32)
        return SearchResult(np.where(there, rows, -1).astype(np.int32), scores)


@pytest.fixture(scope="module")
def opened(tiny_run):
    """The trained run with the search `Few`."""
    pytest.importorskip("bm25s")
    pipeline = Pipeline.from_run(tiny_run, search=SearchConfig(kind="bm25"))
    searcher = Few(len(pipeline.loaded.corpus))
    return dataclasses.replace(pipeline, index=pipeline.index._replace(searcher=searcher))


def variant(opened: Pipeline, name: str) -> Pipeline:
    rag = dataclasses.replace(opened.loaded.rag, config=dataclasses.replace(opened.loaded.rag.config, variant=name))
    location = dataclasses.replace(opened.location, loaded=dataclasses.replace(opened.loaded, rag=rag))
    return dataclasses.replace(opened, programs={}, location=location)


TEXTS = ["a! Who founded the guild?", "ab! Where does it lie?", "abc! Who?", "abcd! When was it?"]  # 3, 2, 1, none


@pytest.mark.parametrize(("name", "options"), [
    ("sequence", {}),
    pytest.param("sequence", {"num_beams": 2}, marks=pytest.mark.slow),
    pytest.param("sequence", {"num_beams": 2, "mode": "fast"}, marks=pytest.mark.slow),
    pytest.param("sequence", {"prior": "search", "doc_chunk": 1}, marks=pytest.mark.slow),
    pytest.param("token", {"num_beams": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_answers_are_those_of_what_was_found(opened, name, options):
    """A question with two of three passages found is answered as with n_docs=2, one with none found as closed book."""
    mine = variant(opened, name)
    cfg = mine.answer_config(n_docs=3, n_retrieved=5, batch=8, **options)
    found = mine.answer(TEXTS, cfg)
    for side in ("passages", "retrieved"):
        assert [len(getattr(one, side)) for one in found] == [3, 2, 1, 0]
    alone = [mine.answer(TEXTS[1:2], dataclasses.replace(cfg, n_docs=2))[0]]
    alone += mine.answer(TEXTS[3:], dataclasses.replace(cfg, closed_book=True))
    for one, other in zip(found[1::2], alone, strict=True):
        assert (one.text, [p.id for p in one.passages]) == (other.text, [p.id for p in other.passages])
        assert one.score == pytest.approx(other.score, abs=2e-4)
        for side in ("prior", "posterior"):
            shares = [[getattr(p, side) for p in x.passages] for x in (one, other)]
            np.testing.assert_allclose(*shares, atol=1e-4)
            assert not shares[0] or sum(shares[0]) == pytest.approx(1, abs=1e-5)
        if name == "token" and one.passages:
            np.testing.assert_allclose(one.token_posterior, other.token_posterior, atol=1e-3)
    assert found[3].token_posterior is None
    assert "no passage was found or read" in ask.render(TEXTS[3], found[3]) and "prior" not in ask.render("", found[3])


def test_as_many_documents_as_there_are(opened, tmp_path):
    """The curve over numbers of documents, from one search."""
    cfg = opened.answer_config(n_docs=1, n_retrieved=3, batch=8)
    known = docs_curve.searched(opened, cfg, TEXTS, 3)
    right = opened.index.searcher.search(Queries(None, TEXTS), 3)
    assert [sorted(row) for row in known.ids_BK.tolist()] == [sorted(row) for row in right.ids_BK.tolist()]
    assert np.isneginf(known.scores_BK[right.ids_BK < 0]).all()


@pytest.mark.slow
def test_an_evaluation_says_so(tiny_data, tiny_run, tmp_path, capsys):
    pytest.importorskip("bm25s")
    rows = [{"id": str(i), "question": NOTHING, "answers": ["x"], "positive_passage_ids": ["world-person-1"]}
            for i in range(3)]  # fmt: skip
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", tiny_run, "--questions", file, "--out", tmp_path / "out", "--search", "bm25", "--batch", 8]
    assert tiny.rag_jax(*words, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["nothing_found"] == 3 and "nothing was found for 3 of 3 questions" in captured.err
    figures = ("recall_at_1", "recall_at_20", "mrr_at_10", "ndcg_at_10", "r_precision", "answer_recall_at_5")
    assert [report[name] for name in (*figures, "kilt_r_precision")] == [0] * 7
    assert report["curves"]["recall"]["gold"]["value"] == [0] * 40 and "prior" not in report["curves"]["calibration"]
    assert "Nothing found: for 3 of 3 questions" in (tmp_path / "out/report.md").read_text()
    made = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert all(row["retrieved"] == row["read"] == row["prior"] == [] and row["depth"] == 40 for row in made)
    closed = Pipeline.from_run(tiny_run)
    said = closed.answer([NOTHING], closed.answer_config(closed_book=True, batch=8))[0]
    assert {row["prediction"] for row in made} == {said.text}
    assert tiny.rag_jax("ask", NOTHING, "--run", tiny_run, "--search", "bm25", "--batch", 8) == 0
    assert "no passage was found" in capsys.readouterr().out
    assert tiny.rag_jax(*words, "--closed-book", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert not [
        name for name in report if "recall" in name or name in ("nothing_found", "judged_by", "kilt_r_precision")
    ]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_step_is_given_empty_passages(opened):
    """The host gathers passages for a batch whose searches found 4, 3, 2, 1 and none."""
    corpus, mesh = opened.loaded.corpus, opened.loaded.mesh
    stage = make_stage("joint", n_docs=3, batch=8)
    setting = StepSetting(opened.loaded.rag, stage, mesh, len(corpus), corpus.generator_tokenizer.prefix_ids)

    def texts(source):
        return ["!" if i == 0 else "x" * i + "!" for i in source]

    length = np.full(8, 3, np.int32)
    batch = {"question_ids": np.full((8, 4), 5, np.int32), "question_length": length, "source": np.arange(8)}
    batch |= {"tail_ids": np.full((8, 4), 5, np.int32), "tail_length": length, "labels": np.full((8, 4), 2, np.int32),
              "gold": np.full((8, 1), -1, np.int32)}  # fmt: skip
    fed = sharding.fetched(feed(setting, opened.location, texts, opened.params, batch, opened.index))
    rows = fed.batch["document_rows"]
    assert (rows >= 0).sum(1).tolist() == [3, 3, 2, 1, 0, 3, 3, 2]
    at = fed.batch["documents"]
    there = rows >= 0
    np.testing.assert_array_equal(fed.passages.generator_length_N[at[~there]], 0)
    np.testing.assert_array_equal(fed.passages.generator_length_N[at[there]], corpus.generator_length[rows[there]])
    assert (fed.passages.encoder_length_N[at] > 0).all() and np.isfinite(fed.table.embeddings_NE[at]).all()


def test_gather_of_nothing(opened):
    tables, passages = host_index.gather(opened.loaded.corpus, opened.index, np.array([-1, 5, -1]))
    assert isinstance(tables, Index) and np.isfinite(tables.embeddings_NE).all()
    assert passages.generator_length_N.tolist() == [0, opened.loaded.corpus.generator_length[5], 0]


def test_prior_and_gradient_of_what_was_found():
    scores = jnp.array([[3.0, 1.0, 2.0], [0.5, jnp.inf, -jnp.inf], [9.0, 9.0, 9.0]])
    found = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    prior = jnp.exp(losses.prior_logp(losses.of_found(scores, found)))
    np.testing.assert_allclose(prior[0], np.exp(scores[0]) / np.exp(scores[0]).sum(), rtol=1e-6)
    assert prior[1:].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert (prior > 0).tolist() == [[True, True, True], [True, False, False], [True, False, False]]

    def loss(scores):
        logp = losses.prior_logp(losses.of_found(scores, found))
        mask, token_logp = jnp.ones((3, 2), bool), jnp.log(jnp.array([[0.1, 0.2]] * 3))[None].repeat(3, 0)
        return -losses.rag_sequence_logp(token_logp * jnp.arange(1, 4)[:, None], logp, mask).sum()

    gradient = np.asarray(jax.grad(loss)(jnp.nan_to_num(scores)))
    assert np.isfinite(gradient).all() and (gradient[0] != 0).all() and (gradient[1:] == 0).all()


@pytest.mark.parametrize("prior", ["paper", "hf_compat"])
def test_a_passage_that_was_not_found_explains_nothing(prior):
    """This holds for targets of one token, too, for which transformers ignores the prior."""
    logp = losses.prior_logp(losses.of_found(jnp.zeros((2, 2)), jnp.array([[True, False], [True, True]])))
    token_logp = jnp.log(jnp.array([[[0.1, 0.5], [0.9, 0.9]]] * 2))
    for mask in ([[True, False]] * 2, [[True, True]] * 2):
        joint = losses.sequence_joint(token_logp, logp, jnp.array(mask), prior)
        assert np.exp(joint[0, 1]) == 0 and np.exp(joint[1, 1]) > 0.1
        assert np.isfinite(losses.posterior_logp(token_logp, logp, jnp.array(mask))).all()


def test_it_is_counted_nowhere():
    rows = jnp.array([[4, -1, -1], [4, 7, -1], [-1, -1, -1]])
    scores = losses.of_found(jnp.array([[1.0, 5.0, 5.0], [1.0, 2.0, 5.0], [5.0, 5.0, 5.0]]), rows >= 0)
    posterior = losses.prior_logp(scores)
    gold = jnp.array([[4, -1], [4, -1], [0, -1]])
    found = rag_objective.retrieval_metrics(rows, scores, posterior, gold)
    share = np.exp(1) / (np.exp(1) + np.exp(2))
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert float(found["unique_documents"]) == pytest.approx(2 / 3)
    assert float(found["prior_entropy"]) == pytest.approx(entropy / 2, rel=1e-5)
    assert (float(found["recall_at_1"]), float(found["recall_at_3"])) == pytest.approx((1 / 3, 2 / 3))
    assert float(found["posterior_prior_gap"]) == 0
    none = rag_objective.retrieval_metrics(rows[2:], scores[2:], posterior[2:], gold[2:])
    assert np.isnan(float(none["unique_documents"])) and float(none["recall_at_1"]) == 0
