"""Answers, evaluation, asking and hot swap with a trained run, on eight devices (it was trained on one)."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import oracles
import pytest
import tiny
from conftest import ROOT

import rag_jax
from rag_jax.cli import ask
from rag_jax.corpus.directory import Corpus
from rag_jax.data import batching
from rag_jax.data.joining import join_tail
from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.evaluation import evaluate as evaluation
from rag_jax.evaluation.report import write_report
from rag_jax.index import refresh
from rag_jax.index import snapshot as snapshots
from rag_jax.inference import pipeline
from rag_jax.inference.pipeline import Pipeline
from rag_jax.metrics import matching
from rag_jax.pretrained import load
from rag_jax.rag import Rag
from rag_jax.retrieval.bm25 import Bm25Config
from rag_jax.retrieval.config import SearchConfig
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs


def copied(run, out):
    """A copy of a run directory without the files that only training needs."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    return out


@pytest.fixture(scope="module")
def run(tiny_data, tiny_run):
    """The trained run with longer answers from its generator, which would answer nothing after so little training."""
    run = copied(tiny_run, tiny_data / "talking")
    params = rag_jax.from_pretrained(run)[1]
    eos = Corpus.open(tiny_data / "corpus").generator_tokenizer.eos_id
    bias = params["generator"]["logits_bias"].at[eos].add(-1.0)
    changed = {**params, "generator": {**params["generator"], "logits_bias": bias}}
    checkpoint.save_params(run / "params", changed.items())
    return run


@pytest.fixture(scope="module")
def opened(run):
    return Pipeline.from_run(run)


@pytest.fixture(scope="module")
def questions(tiny_data):
    return formats.read_questions(tiny_data / "world/train.jsonl")[:20]


@pytest.fixture(scope="module")
def cfg(opened):
    """The answering configuration of all tests except closed book, so that they share compiled programs."""
    return opened.answer_config(batch=8)


@pytest.fixture(scope="module")
def answers(opened, questions, cfg):
    return opened.answer([q.question for q in questions], cfg)


@pytest.fixture(scope="module")
def edited_index(tiny_data, run):
    """The index of the edited corpus, made by `rag-jax index`."""
    out = tiny_data / "edited-index"
    assert tiny.rag_jax("index", run, "--corpus", tiny_data / "edited-corpus", "--out", out) == 0
    return out


@pytest.fixture
def reuse(monkeypatch, opened):
    """Makes commands that open a run reuse its compiled program."""
    from_run = Pipeline.from_run

    def with_programs(path, index=None, search=None):
        return dataclasses.replace(from_run(path, index, search), programs=opened.programs)

    monkeypatch.setattr(Pipeline, "from_run", staticmethod(with_programs))


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Turns off pictures, which take longer than the rest of a report; tests/test_evaluation_plots.py tests them."""
    monkeypatch.setattr(write_report.evaluation_plots, "draw", lambda report, out: [])
    monkeypatch.setattr(write_report, "training", lambda run, out: [])


def refused(capsys, *words):
    capsys.readouterr()
    assert tiny.rag_jax(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


# --- answers ----------------------------------------------------------------------------------------------------------


def test_passages_are_those_of_the_largest_inner_products(opened, questions, answers):
    corpus, rag = opened.loaded.corpus, opened.loaded.rag
    tables = batching.encode_questions(
        [q.question for q in questions],
        corpus.encoder_tokenizer,
        corpus.generator_tokenizer,
        rag.config.question_length,
    )
    mask = np.arange(rag.config.question_length) < tables["question_length"][:, None]
    q_BE = np.asarray(jax.jit(rag.embed_questions)(opened.params, tables["question_ids"], mask), np.float64)
    embeddings = np.asarray(snapshots.open_snapshot(opened.snapshot.directory).embeddings_NE, np.float64)
    for q, found in zip(q_BE, answers, strict=True):
        order = np.argsort(-(embeddings @ q), kind="stable")
        assert found.retrieved == tuple(corpus[row].id for row in order)  # all 40: as many as there are
        assert [p.id for p in found.passages] == list(found.retrieved[:3])
        prior = oracles.softmax((embeddings @ q)[order[:3]])
        np.testing.assert_allclose([p.prior for p in found.passages], prior, atol=1e-5)
        np.testing.assert_allclose(sum(p.posterior for p in found.passages), 1, atol=1e-5)
        for p in found.passages:
            assert (p.title, p.text) == (corpus[corpus.row(p.id)].title, corpus[corpus.row(p.id)].text)
    assert len({found.text for found in answers} - {""}) >= 2  # otherwise the tests below would prove little
    assert max(np.abs(p.prior - p.posterior) for found in answers for p in found.passages) > 1e-3


def test_the_index_on_disk_is_that_of_training(opened):
    make = refresh.on_devices(opened.loaded.rag, opened.loaded.mesh, opened.loaded.passages, "float32")
    fresh = make(opened.params, 7, None, True)
    np.testing.assert_allclose(fresh.embeddings_NE, opened.index.embeddings_NE, atol=1e-5)
    assert (np.asarray(fresh.step_N) == 7).all()
    assert (np.asarray(opened.index.step_N)[: len(opened.loaded.corpus)] == tiny.STEPS).all()


def test_answers_and_scores_are_those_of_the_model(opened, questions, answers, cfg):
    """Recomputes the first question with public functions alone: join on the host, then generate."""
    model, params = rag_jax.from_pretrained(opened.snapshot.directory.parent)
    assert Rag(model.config.unrolled()) == opened.loaded.rag and model.variant == "sequence"
    corpus, found = opened.loaded.corpus, answers[0]
    tokenizer, length = corpus.generator_tokenizer, model.config.source_length
    sources = []
    for passage in found.passages:
        row = corpus.row(passage.id)
        ids = corpus.generator_ids[row][: corpus.generator_length[row]].tolist()
        tail = join_tail(tokenizer, [questions[0].question])[0]
        room = length - 1 - len(tail)
        sources.append(oracles.pad([tokenizer.bos_id, *ids[:room], *tail], length, tokenizer.pad_id))
    ids = np.array([sources])
    scores = np.log([[p.prior for p in found.passages]])
    mask = ids != tokenizer.pad_id
    made = jax.jit(lambda p: model.generate(p, ids, mask, scores, 1, cfg.max_length))(params)
    assert tokenizer.decode(made.sequences[0]).strip() == found.text
    np.testing.assert_allclose(made.scores[0], found.score, atol=1e-4)
    np.testing.assert_allclose(made.doc_posterior[0], [p.posterior for p in found.passages], atol=1e-4)
    nll = jax.jit(lambda p, labels: model.nll(p, ids, mask, scores, labels))(params, made.sequences)
    np.testing.assert_allclose(-nll[0], found.score, atol=1e-4)


def test_questions_do_not_depend_on_their_batch(opened, questions, answers, cfg):
    again = opened.answer([q.question for q in questions[3:6]], cfg)  # the rest of the batch is padding
    assert [a.text for a in again] == [a.text for a in answers[3:6]]
    assert [a.retrieved for a in again] == [a.retrieved for a in answers[3:6]]
    assert opened.answer([], cfg) == []
    assert len(opened.programs) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_docs": 41}, "n_docs=41, but the corpus has 40 passages; ask for at most 40"),
        ({"n_docs": -1}, "n_docs=-1 must be at least 1"),
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"n_retrieved": 0}, "n_retrieved=0 must be at least 1"),
    ],
)
def test_ways_of_answering_that_cannot_be(opened, changes, message):
    with pytest.raises(InputError, match=message):
        opened.answer(["who?"], opened.answer_config(**changes))


def test_a_question_must_have_words(opened):
    with pytest.raises(InputError, match="a question is empty"):
        opened.ask(" \n")


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_report_is_what_the_predictions_say(tiny_data, run, questions, answers, reuse, tmp_path, capsys):
    """Questions whose answers and gold passages are chosen so that every figure is neither 0 nor 1."""
    corpus = Corpus.open(tiny_data / "corpus")
    rows = []
    for i, (q, found) in enumerate(zip(questions, answers, strict=True)):
        gold = found.retrieved[0 if i % 4 == 0 else 3 if i % 4 == 1 else 30]
        title = corpus[corpus.row(found.retrieved[i])].title
        rows.append(
            {
                "id": q.id,
                "question": q.question,
                "answers": [found.text if i % 2 and found.text else "no such thing", title],
                "positive_passage_ids": [gold],
                "group": i % 5,
            }
        )
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert tiny.rag_jax("evaluate", run, "--questions", file, "--out", out, "--batch", 8, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    for row, made, found in zip(rows, predictions, answers, strict=True):
        assert {name: made[name] for name in ("id", "question", "answers")} == {
            name: row[name] for name in ("id", "question", "answers")
        }
        assert made["prediction"] == found.text and made["gold"] == row["positive_passage_ids"]
        assert (
            made["gold_documents"] == [made["gold"]] and made["retrieved_documents"] == made["retrieved"]
        )  # none is cut
        assert not made["unanswerable"] and made["target"] is made["label"] is made["relevance"] is None
        assert made["retrieved"] == list(found.retrieved) and len(made["retrieved"]) == 40
        np.testing.assert_allclose([sum(made["prior"]), sum(made["posterior"])], 1, atol=1e-5)
        assert len(made["prior"]) == len(made["posterior"]) == 3 and made["read"] == made["retrieved"][:3]
        assert "".join(made["tokens"]).strip() == made["prediction"] and made["token_posterior"] is None
        texts = [corpus[corpus.row(p)] for p in made["retrieved"]]
        words = [f" {re.sub('[^a-z0-9]+', ' ', t.text.lower())} " for t in texts]  # the title is not searched
        wanted = [f" {a.lower()} " for a in row["answers"] if a]
        assert made["retrieved_has_answer"] == [any(a in text for a in wanted) for text in words]
    matches = [matching.exact_match(p["prediction"], p["answers"]) for p in predictions]
    said = [i % 2 and bool(found.text) for i, found in enumerate(answers)]
    assert matches == said and sum(said) > 3
    for name, value in (
        ("n", 20),
        ("exact_match", np.mean(matches)),
        ("f1", np.mean([matching.f1(p["prediction"], p["answers"]) for p in predictions])),
        ("recall_at_1", 5 / 20),
        ("recall_at_5", 10 / 20),
        ("recall_at_20", 10 / 20),
        ("answer_recall_at_5", np.mean([any(p["retrieved_has_answer"][:5]) for p in predictions])),
        ("answer_recall_at_20", np.mean([any(p["retrieved_has_answer"][:20]) for p in predictions])),
    ):
        assert report[name] == pytest.approx(value), name
    for name in ("exact_match", "f1", "recall_at_5", "mrr_at_10", "ndcg_at_10", "r_precision", "kilt_exact_match"):
        assert report[f"{name}_low"] <= report[name] <= report[f"{name}_high"], name
    assert report["kilt_r_precision"] == report["r_precision"] == 5 / 20
    assert report["kilt_exact_match"] == np.mean([i % 4 == 0 and i % 2 for i in range(20)])
    assert report["judged_by"] == {"passage": 20} and "nothing_found" not in report
    assert report["gold_ids"] == {"named": 20, "missing": 0, "deleted": 0, "first_missing": []}
    assert "recall_at_100" not in report  # there are 40
    curve = report["curves"]["recall"]
    assert curve["gold"]["k"] == list(range(1, 41)) and curve["gold"]["value"][30] == 1
    for k in (1, 5, 20):
        points = [curve["gold"][side][k - 1] for side in ("value", "low", "high")]
        np.testing.assert_allclose(points, [report[f"recall_at_{k}{end}"] for end in ("", "_low", "_high")], atol=1e-6)
        assert curve["answer"]["value"][k - 1] == pytest.approx(report[f"answer_recall_at_{k}"], abs=1e-6)
    calibration = report["curves"]["calibration"]
    assert {name: one["n"] for name, one in calibration.items()} == dict.fromkeys(
        ("prior", "posterior", "answer", "token"), 20
    )
    rights = [p["gold"][0] == p["read"][int(np.argmax(p["posterior"]))] for p in predictions]
    assert sum(b["n"] * b["right"] for b in calibration["posterior"]["bins"]) == pytest.approx(sum(rights))
    assert sum(b["n"] * b["right"] for b in calibration["answer"]["bins"]) == pytest.approx(sum(matches))
    page = (out / "report.html").read_text()
    assert all(json.dumps(row["question"])[1:-1] in page for row in rows)
    again = (out / "report.md").read_text().split("```bash\n")[1].splitlines()[0]
    written = (out / "predictions.jsonl").read_bytes()
    assert tiny.rag_jax(*shlex.split(again)[1:]) == 0 and (out / "predictions.jsonl").read_bytes() == written
    assert report["labels"] == [] and report["match"] == "string" and "accuracy" not in report
    assert report["run"] == str(run) and report["n_docs"] == 3 and report["closed_book"] is False
    assert report["index_step"] == tiny.STEPS and report["corpus_hash"] == corpus.hash
    assert report["variant"] == "sequence" and report["seconds"] >= 0

    words = ["--questions", file, "--out", tmp_path / "few", "--batch", 8]
    assert tiny.rag_jax("evaluate", run, *words, "--where", "group=3", "--limit", 2) == 0
    few = [json.loads(line) for line in (tmp_path / "few/predictions.jsonl").read_text().splitlines()]
    assert few == [predictions[3], predictions[8]]
    assert re.search(r"^exact_match +0\.\d{3}  \(", capsys.readouterr().out, re.M)


def test_metrics_labels_and_unanswerable_questions(run, questions, answers, reuse, tmp_path, capsys):
    """Some questions have no answer, and one is scored by the metric that KILT names."""
    corpus_ids = answers[0].retrieved
    rows = [
        {"id": q.id, "question": q.question, "answers": [found.text or "never"]}
        for q, found in zip(questions, answers, strict=True)
    ]
    rows[0] |= {"positive_passage_ids": ["gone"], "provenance": [["elsewhere"], [corpus_ids[0], corpus_ids[0]]]}
    rows[1] |= {"positive_passage_ids": ["gone"], "relevance": {"gone": 2}, "label": "A"}
    rows[2]["answers"] = rows[3]["answers"] = []
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", run, "--questions", file, "--batch", 8, "--json"]
    assert tiny.rag_jax(*words, "--out", tmp_path / "all", "--labels", "A, B") == 0
    report = json.loads(capsys.readouterr().out)
    made = [json.loads(line) for line in (tmp_path / "all/predictions.jsonl").read_text().splitlines()]
    assert made[0]["gold_documents"] == [["elsewhere"], [corpus_ids[0]]] and made[1]["gold_documents"] == [["gone"]]
    assert (made[1]["relevance"], made[1]["label"]) == ({"gone": 2}, "A")
    assert [row["unanswerable"] for row in made] == [i in (2, 3) for i in range(20)]
    assert report["labels"] == ["A", "B"] and report["accuracy"] == 0 and report["kilt_r_precision"] == 1 / 2
    assert report["exact_match"] == np.mean([bool(a.text) for a in [*answers[:2], *answers[4:]]])
    assert report["gold_ids"] == {"named": 2, "missing": 2, "deleted": 0, "first_missing": ["gone"]}
    assert report["no_answer_recall"] == np.mean([not a.text for a in answers[2:4]])
    assert report["risk_coverage"][-1] == [1, pytest.approx(1 - report["squad2_exact_match"])]
    assert tiny.rag_jax(*words, "--out", tmp_path / "few", "--metrics", "recall,bleu", "--match", "regex") == 0
    captured = capsys.readouterr()
    few = json.loads(captured.out)
    assert few["match"] == "regex" and "recall_at_20" in few and not {"exact_match", "mrr_at_10"} & set(few)
    assert "bleu: left out, it needs long targets" in captured.err
    assert "no metric 'glue'" in refused(capsys, *words, "--out", tmp_path / "none", "--metrics", "glue")
    assert not (tmp_path / "none").exists()
    few_and_all = ["compare", tmp_path / "few", tmp_path / "all"]
    assert "judged otherwise" in refused(capsys, *few_and_all)


def test_retrieval_alone_finds_the_same_and_writes_nothing(tiny_data, run, answers, questions, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    lines = (tiny_data / "world/train.jsonl").read_text().splitlines()[: len(questions)]
    file.write_text("\n".join(lines))
    words = ["--questions", file, "--out", tmp_path, "--retrieval-only", "--batch", 8, "--json"]
    assert tiny.rag_jax("evaluate", run, *words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["retrieval_only"] and "exact_match" not in report and "f1" not in report
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for row, found in zip(rows, answers, strict=True):
        assert row["prediction"] is None and row["retrieved"][:3] == list(found.retrieved[:3])
        np.testing.assert_allclose(row["prior"], [p.prior for p in found.passages], rtol=1e-5)
    hits = [q.positive_passage_ids[0] == row["retrieved"][0] for q, row in zip(questions, rows, strict=True)]
    assert report["recall_at_1"] == np.mean(hits)
    assert "ask for one of them" in refused(capsys, "evaluate", run, *words, "--closed-book")


def test_closed_book_has_no_passages(tiny_data, run, reuse, tmp_path, capsys):
    words = ["--out", tmp_path, "--closed-book", "--limit", 8, "--batch", 8, "--json"]
    assert tiny.rag_jax("evaluate", run, *words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["closed_book"] is True and report["n"] == 8 and "exact_match" in report
    assert not [name for name in report if "recall" in name]
    assert report["questions"] == str(tiny_data / "world/dev.jsonl")  # the default of the configuration
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["retrieved"] == row["prior"] == row["posterior"] == row["retrieved_has_answer"] == []


def test_closed_book_reads_the_question_alone(opened, questions):
    """The generator's input is `<s> // question </s>`."""
    cfg = opened.answer_config(batch=8, closed_book=True)
    found = opened.answer([q.question for q in questions[:8]], cfg)
    corpus, model = opened.loaded.corpus, opened.loaded.rag
    tokenizer = corpus.generator_tokenizer
    tails = join_tail(tokenizer, [q.question for q in questions[:8]])
    ids = np.array([[oracles.pad([tokenizer.bos_id, *tail], 64, tokenizer.pad_id)] for tail in tails])
    generate = jax.jit(lambda p, ids: model.generate(p, ids, ids != 1, np.zeros((8, 1)), 1, cfg.max_length))
    made = generate(opened.params, ids)
    assert [a.text for a in found] == [tokenizer.decode(row).strip() for row in np.asarray(made.sequences)]
    np.testing.assert_allclose([a.score for a in found], made.scores, atol=1e-4)
    assert all(a.passages == a.retrieved == () for a in found)


def test_an_oracle_reads_the_right_passages_first(tiny_data, run, opened, questions, answers, reuse, tmp_path, capsys):
    """Gold passages that were found late, found first, several for a question, and absent from the corpus."""
    corpus = opened.loaded.corpus
    golds = [[found.retrieved[[30, 0, 7, 2][i % 4]]] for i, found in enumerate(answers)]
    for i, found in enumerate(answers):
        golds[i] += [found.retrieved[1]] if i % 4 == 2 else []
    golds[3], golds[7] = [], ["gone"]
    rows = [{"id": q.id, "question": q.question, "answers": ["x"], "positive_passage_ids": gold}
            for q, gold in zip(questions, golds, strict=True)]  # fmt: skip
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", run, "--questions", file, "--out", tmp_path, "--oracle", "--batch", 8, "--json"]
    assert tiny.rag_jax(*words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["oracle"] is True and report["without_gold"] == 2 and report["recall_at_1"] < 0.5
    made = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["retrieved"] for row in made] == [list(found.retrieved) for found in answers]  # search results are kept

    cfg = opened.answer_config(batch=8, oracle=True)
    asked = [dataclasses.replace(q, positive_passage_ids=tuple(g)) for q, g in zip(questions, golds, strict=True)]
    found = opened.answer([q.question for q in asked], cfg, pipeline.right_rows(asked, corpus))
    embeddings = np.asarray(snapshots.open_snapshot(opened.snapshot.directory).embeddings_NE, np.float64)
    tables = batching.encode_questions(
        [q.question for q in asked], corpus.encoder_tokenizer, corpus.generator_tokenizer, 32
    )
    mask = np.arange(32) < tables["question_length"][:, None]
    q_BE = np.asarray(jax.jit(opened.loaded.rag.embed_questions)(opened.params, tables["question_ids"], mask))
    for q, one, before, gold, row in zip(q_BE, found, answers, golds, made, strict=True):
        read = ([p for p in gold if p != "gone"] + [p for p in before.retrieved if p not in gold])[:3]
        assert {p.id for p in one.passages} == set(read) and one.text == row["prediction"]
        scores = embeddings[[corpus.row(p) for p in read]] @ q
        wanted = dict(zip(read, oracles.softmax(scores), strict=True))
        np.testing.assert_allclose([p.prior for p in one.passages], [wanted[p.id] for p in one.passages], atol=1e-5)
    assert [one.text for one, before in zip(found, answers, strict=True) if one.text != before.text]
    for wrong in (["--closed-book"], ["--retrieval-only"]):
        assert "oracle exclude each other" in refused(capsys, *words, *wrong)
    assert "oracle: the search has no scores" in refused(capsys, *words, "--set", "prior=search")
    assert "oracle needs the right passages" in refused(capsys, "ask", "who?", "--run", run, "--set", "oracle=true")


def test_right_passages_come_first():
    gold = np.array([[4, -1], [7, 2], [-1, -1]])
    rows = np.array([[1, 4, 3], [2, 5, 7], [6, 0, 1]])
    assert pipeline.gold_first(gold, rows, 3).tolist() == [[4, 1, 3], [7, 2, 5], [6, 0, 1]]
    assert pipeline.gold_first(gold, rows, 1).tolist() == [[4], [7], [6]]


@pytest.mark.slow
def test_an_oracle_with_the_search_on_the_host(opened, run, questions, answers):
    asked = [
        dataclasses.replace(q, positive_passage_ids=(a.retrieved[9],)) for q, a in zip(questions, answers, strict=True)
    ]
    hosted = Pipeline.from_run(run, search=SearchConfig("hybrid", bm25=Bm25Config(stopwords="none")))
    found = []
    for pipe in (opened, hosted):
        cfg = pipe.answer_config(batch=8, oracle=True, n_docs=1)
        found.append(pipe.answer([q.question for q in asked], cfg, pipeline.right_rows(asked, pipe.loaded.corpus)))
    for one, other, q in zip(*found, asked, strict=True):
        assert [p.id for p in one.passages] == [p.id for p in other.passages] == list(q.positive_passage_ids)
        assert one.text == other.text and one.score == pytest.approx(other.score, abs=1e-4)
    assert [a.retrieved[:3] for a in found[1]] != [a.retrieved[:3] for a in found[0]]


def test_select(questions):
    marked = [
        dataclasses.replace(q, extra={"changed": i % 2 == 0, "n": i, "kind": "true" if i == 3 else "x"})
        for i, q in enumerate(questions)
    ]
    assert evaluation.select(marked, "", 0) == marked
    assert evaluation.select(marked, "", 3) == marked[:3]
    assert evaluation.select(marked, "changed=true", 2) == [marked[0], marked[2]]
    assert evaluation.select(marked, "changed=false", 0) == marked[1::2]
    assert evaluation.select(marked, "n=7", 0) == [marked[7]]
    assert evaluation.select(marked, "kind=true", 0) == [marked[3]]
    for where, limit, message in (
        ("changed", 0, "expected FIELD=VALUE"),
        ("changed=maybe", 0, "no question has this"),
        ("colour=red", 0, "no question has this"),
        ("", -1, "--limit -1 must be at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            evaluation.select(marked, where, limit)


def test_bad_input_of_evaluate_writes_nothing(tiny_data, run, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"id": "1", "question": "who?"\n')
    (tmp_path / "none_gold.jsonl").write_text('{"id": "1", "question": "who?", "answers": ["x"]}\n')
    lines = [
        {"id": str(i), "question": "who?", "answers": ["x"], "positive_passage_ids": [f"wiki:{i}"]} for i in range(30)
    ]
    (tmp_path / "elsewhere.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for words, message in (
        (["--n-docs", 41], "n_docs=41, but the corpus has 40 passages"),
        (["--num-beams", 0], "num_beams=0"),
        (["--set", "start_id=-2"], "start_id=-2 must be an id of the 600 tokens of the generator; -1: the model's"),
        (["--set", "forced_eos_id=600"], "forced_eos_id=600 must be"),
        (["--set", "end_ids=[2, 700]"], "end_ids[1]=700 must be"),
        (["--limit", -2], "--limit -2"),
        (
            ["--limit", 8, "--set", "max_length=5000"],
            "max_length=5000: input of length 5000, but",
        ),
        (["--questions", tmp_path / "none_gold.jsonl", "--oracle"], "no question names a right passage"),
        (["--questions", tmp_path / "elsewhere.jsonl"], "30 of 30 gold ids are not in the corpus"),
        (["--where", "relation=none"], "no question has this"),
        (["--questions", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--questions", tmp_path / "broken.jsonl"], "broken.jsonl:1"),
        (["--index", tmp_path / "none"], "none: no such index directory"),
    ):
        assert message in refused(capsys, "evaluate", run, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_left_out_where_that_is_asked_for(tiny_data, run, reuse, tmp_path, capsys):
    lines = (tiny_data / "world/train.jsonl").read_text().splitlines()[:8]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join([*lines[:3], '{"id": "x"}', *lines[3:]]))
    words = ["evaluate", run, "--questions", file, "--out", tmp_path / "out", "--batch", 8]
    assert "some.jsonl:4: missing field" in refused(capsys, *words)
    assert tiny.rag_jax(*words, "--skip-bad-lines", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n"] == 8 and "skipped" in captured.err and "some.jsonl:4" in captured.err
    assert "--skip-bad-lines" in (tmp_path / "out/report.md").read_text()


# --- hot swap ---------------------------------------------------------------------------------------------------------


def test_hot_swap_reads_the_edited_passages(tiny_data, run, edited_index, reuse, tmp_path, capsys):
    edited = Corpus.open(tiny_data / "edited-corpus")
    words = ["--questions", tiny_data / "edited/train.jsonl", "--where", "changed=true", "--limit", 8, "--batch", 8]
    assert tiny.rag_jax("evaluate", run, "--index", edited_index, "--out", tmp_path, *words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["corpus"] == str(tiny_data / "edited-corpus") and report["corpus_hash"] == edited.hash
    assert report["index"] == str(edited_index) and report["n"] == 8 and report["where"] == "changed=true"
    swapped = Pipeline.from_run(run, edited_index)
    found = swapped.answer(["Who?"], swapped.answer_config(batch=8))[0]
    changed = [p for p in found.passages if p.text != Corpus.open(tiny_data / "corpus")[edited.row(p.id)].text]
    assert changed and all(p.text == edited[edited.row(p.id)].text for p in found.passages)


def test_the_edited_index_is_of_the_edited_passages(opened, run, edited_index):
    own, other = snapshots.open_snapshot(run / "index"), snapshots.open_snapshot(edited_index)
    assert own.manifest.encoder_hash == other.manifest.encoder_hash and other.manifest.step == tiny.STEPS
    assert own.manifest.corpus_hash != other.manifest.corpus_hash
    differs = np.abs(own.embeddings_NE[:] - other.embeddings_NE[:]).max(1)
    assert (differs > 1e-3).mean() > 0.5


def test_a_corpus_tokenised_otherwise_is_refused_with_the_command_that_mends_it(tiny_data, run, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "index"
    passages = tiny_data / "edited/passages.jsonl"
    sizes = ["--train-tokenizer", "--encoder-vocab", 300, "--generator-vocab", 600]
    lengths = ["--encoder-length", 96, "--generator-length", 128]
    assert tiny.rag_jax("corpus", passages, "--out", other, *sizes, *lengths) == 0
    said = refused(capsys, "index", run, "--corpus", other, "--out", out)
    trained = runs.read_identity(run)["encoder_tokenizer"]
    assert Corpus.open(other).encoder_tokenizer.hash[:16] in said and trained[:16] in said
    command = said[said.index("rag-jax corpus INPUT") :].split()
    words = [str({"INPUT": passages, "DIR": tmp_path / "mended"}.get(word, word)) for word in command[1:]]
    assert tiny.rag_jax(*words, *lengths) == 0
    assert tiny.rag_jax("index", run, "--corpus", tmp_path / "mended", "--out", out) == 0
    assert snapshots.open_snapshot(out).manifest.n_passages == tiny.ENTITIES


def altered(index, out, **changes):
    """A copy of an index with some fields of its manifest changed."""
    snapshot = snapshots.open_snapshot(index)
    manifest = dataclasses.replace(snapshot.manifest, **changes)
    snapshots.write(out, manifest, [(np.arange(manifest.n_passages), np.asarray(snapshot.embeddings_NE))])
    return out


def test_an_index_of_another_encoder_or_corpus_is_refused(tiny_data, run, edited_index, tmp_path, capsys):
    words = ["ask", "who?", "--run", run, "--index"]
    other = altered(edited_index, tmp_path / "encoder", encoder_hash="0" * 64)
    said = refused(capsys, *words, other)
    assert "made with an encoder other than the run's" in said and "0000000000000000" in said
    own = snapshots.open_snapshot(edited_index).manifest
    assert own.encoder_hash[:16] in said and "rag-jax index RUN --corpus" in said
    other = altered(edited_index, tmp_path / "corpus", corpus=str(tiny_data / "corpus"))
    said = refused(capsys, *words, other)
    assert own.corpus_hash[:16] in said and Corpus.open(tiny_data / "corpus").hash[:16] in said
    other = altered(edited_index, tmp_path / "gone", corpus=str(tmp_path / "nowhere"))
    assert "nowhere: no such corpus directory" in refused(capsys, *words, other)


def test_damaged_indexes_are_refused(run, tmp_path, capsys):
    mine = copied(run, tmp_path / "run")
    manifest, embeddings = mine / "index/manifest.json", snapshots.open_snapshot(mine / "index").shards[0].path
    whole, text = embeddings.read_bytes(), manifest.read_text()
    for damage, message in (
        (lambda: embeddings.write_bytes(whole[:-4]), f"{len(whole) - 4} bytes, the manifest says {len(whole)}"),
        (lambda: embeddings.unlink(), "None bytes, the manifest says"),
        (lambda: manifest.unlink(), "not a finished index (no manifest.json)"),
        (lambda: manifest.write_text(text[:50]), "unreadable"),
        (lambda: manifest.write_text(text.replace('"step": 110', '"step": 111')), "altered after it was written"),
        (lambda: manifest.write_text(text.replace('"format_version": 3', '"format_version": 4')), "format version 4"),
    ):
        damage()
        said = refused(capsys, "ask", "who?", "--run", mine)
        assert message in said and str(mine / "index") in said
        embeddings.write_bytes(whole)
        manifest.write_text(text)


def test_an_index_is_written_whole_or_not_at_all(run, tmp_path):
    manifest = snapshots.open_snapshot(run / "index").manifest
    blocks, rows = np.zeros((tiny.ENTITIES, manifest.width), np.float32), np.arange(tiny.ENTITIES)
    with pytest.raises(ValueError, match="30 embeddings were written, the manifest says 40"):
        snapshots.write(tmp_path / "out", manifest, [(rows[:30], blocks[:30])])
    blocks[33, 2] = np.nan
    with pytest.raises(InputError, match="passage row 33: its embedding is not finite"):
        snapshots.write(tmp_path / "out", manifest, [(rows[:30], blocks[:30]), (rows[30:], blocks[30:])])
    assert list(tmp_path.iterdir()) == []
    blocks[33, 2] = 0
    snapshots.write(tmp_path / "out", manifest, [(rows, blocks)])
    with pytest.raises(InputError, match="already there; pass --overwrite"):
        snapshots.write(tmp_path / "out", manifest, [(rows, blocks)])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all my work")
    with pytest.raises(InputError, match=r"is not a index|is not an index"):
        snapshots.write(precious, manifest, [(rows, blocks)], overwrite=True)
    assert (precious / "thesis.txt").exists()


# --- opening runs -----------------------------------------------------------------------------------------------------


def test_what_is_no_finished_run_is_refused(tiny_data, run, tmp_path, capsys):
    for open_it in (rag_jax.from_pretrained, rag_jax.Pipeline.from_run):
        for directory in (tmp_path, tiny_data / "corpus", tiny_data / "nowhere"):
            with pytest.raises(InputError, match=r"must be in a run directory|no such directory"):
                open_it(directory)
    mine = copied(run, tmp_path / "run")
    shutil.rmtree(mine / "params")
    for open_it in (rag_jax.from_pretrained, rag_jax.Pipeline.from_run):
        with pytest.raises(InputError, match="finish rag-jax train first"):
            open_it(mine)
    for words in (["evaluate", mine], ["ask", "who?", "--run", mine]):
        assert "finish rag-jax train first" in refused(capsys, *words)
    words = ["index", mine, "--corpus", tiny_data / "corpus", "--out", tmp_path / "out"]
    assert "finish rag-jax train first" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_the_package_is_light_until_asked(run):
    code = (
        "import sys, rag_jax; assert {'from_pretrained', 'Pipeline'} <= set(dir(rag_jax));"
        "assert 'jax' not in sys.modules;"
        "assert not hasattr(rag_jax, 'pipeline_of_dreams'); rag_jax.Pipeline; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert rag_jax.Pipeline is Pipeline and rag_jax.from_pretrained is load.from_pretrained


# --- ask --------------------------------------------------------------------------------------------------------------


def test_ask_prints_answer_and_passages(run, opened, questions, answers, reuse, capsys):
    asked, known = [questions[0].question, questions[1].question], set(opened.programs)
    assert tiny.rag_jax("ask", *asked, "--run", run, "--batch", 8) == 0
    text = capsys.readouterr().out
    assert text == "\n\n".join(ask.render(q, a) for q, a in zip(asked, answers[:2], strict=True)) + "\n"
    for found in answers[:2]:
        assert all(p.id in text and p.title in text and f"{p.prior:5.2f}" in text for p in found.passages)
    assert tiny.rag_jax("ask", *asked, "--run", run, "--batch", 8, "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [a["question"] for a in result["answers"]] == asked
    for found, made in zip(result["answers"], answers[:2], strict=True):
        assert found["text"] == made.text and len(found["passages"]) == 3
        np.testing.assert_allclose(sum(p["prior"] for p in found["passages"]), 1, atol=1e-5)
        np.testing.assert_allclose(sum(p["posterior"] for p in found["passages"]), 1, atol=1e-5)
    assert set(opened.programs) == known


def test_ask_from_python(opened, questions, answers):
    found = opened.ask(questions[0].question)
    assert found.text == answers[0].text and [p.id for p in found.passages] == [p.id for p in answers[0].passages]
    np.testing.assert_allclose(found.score, answers[0].score, atol=1e-4)
    assert {"id", "title", "text", "prior", "posterior"} == {f.name for f in dataclasses.fields(pipeline.ReadPassage)}


def test_bad_questions_and_settings_of_ask(run, capsys):
    for words, message in (
        ([" "], "a question is empty"),
        (["who?", "--n-docs", 41], "n_docs=41, but the corpus has 40 passages"),
        (["who?", "--num-beams", -1], "num_beams=-1 must be at least 1"),
    ):
        assert message in refused(capsys, "ask", *words, "--run", run)


# --- ways of answering ------------------------------------------------------------------------------------------------


def test_the_command_line_says_how_to_answer(tiny_data, run, tmp_path, capsys):
    """A file of settings, overridden by options, overridden by --set; the report contains the result."""
    preset = f"{ROOT}/configs/decoding.py:paper_generation"
    words = ["--decoding", preset, "--n-docs", 3, "--set", "num_beams=2", "--set", 'allowed_answers=["no", "Bela"]']
    assert tiny.rag_jax("evaluate", run, "--out", tmp_path, "--limit", 8, "--batch", 8, *words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_docs"], report["num_beams"], report["mode"]) == (3, 2, "fast")
    assert report["allowed_answers"] == ["no", "Bela"] and report["length_penalty"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows} <= {"no", "Bela"}
    for wrong, message in (
        ("length=3", "unknown key 'length'"),
        ("top_p=2.0", "top_p=2.0 must be"),
        ("candidates=3", "candidates=3"),
        ('allowed_answers=[""]', "has 1 tokens"),
        ("n_docs=0.5", "decoding.n_docs"),
    ):
        assert message in refused(capsys, "ask", "who?", "--run", run, "--set", wrong)


def test_a_run_answers_as_its_configuration_says(run, opened, questions, tmp_path, capsys):
    """It answers within its labels and is scored by them, without options on the command line."""
    mine = copied(run, tmp_path / "run")
    values = json.loads((mine / "config.json").read_text())
    values["answering"] = {"allowed_answers": ["no", "Bela"], "batch": 8, "n_retrieved": 5}
    values["task"] = {"writes": "answer", "match": "mlqa_en"}
    (mine / "config.json").write_text(json.dumps(values))
    (mine / "manifest.json").unlink()  # it has the checksum of the configuration, which changes
    file = tmp_path / "questions.jsonl"
    rows = [{"id": q.id, "question": q.question, "answers": ["Bela" if i % 2 else "no"], "target": "a long answer"}
            for i, q in enumerate(questions[:8])]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tiny.rag_jax("evaluate", mine, "--questions", file, "--out", tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    made = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in made} <= {"no", "Bela"} and {row["target"] for row in made} == {None}
    assert report["accuracy"] == np.mean([row["prediction"] == row["answers"][0] for row in made])
    assert report["labels"] == ["no", "Bela"] and report["match"] == "mlqa_en" and report["batch"] == 8
    assert report["task"]["writes"] == "answer" and len(made[0]["retrieved"]) == 5


def test_allowed_answers_may_stand_in_the_middle_of_a_text(opened):
    """Training writes labels after a space, released checkpoints without one, so both spellings are allowed."""
    generator = opened.loaded.corpus.generator_tokenizer
    found = pipeline.allowed_ids(opened.loaded, [" Bela ", "no"], 12)
    assert [generator.decode(ids) for ids in found] == ["Bela", " Bela", "no", " no"]
    assert found[1] == generator.label(generator.encode_batch([" Bela"])[0], 12)[1:]


def test_bad_words_are_not_said(opened, questions, answers, cfg):
    said = max({found.text for found in answers} - {""}, key=len)
    word = said.split()[0]
    assert any(word in found.text for found in answers)
    again = opened.answer([q.question for q in questions], dataclasses.replace(cfg, bad_words=(word,)))
    assert not any(word in found.text.split() for found in again)


def test_questions_of_like_length_need_no_compilation(opened, questions, cfg):
    """Nor does any number of questions up to a batch; answers do not depend on the other questions of a batch."""
    texts = [q.question for q in questions]
    opened.answer(texts[:8], cfg)
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        together = opened.answer(texts[8:16], cfg)
        some = opened.answer(texts[8:13], cfg)
        assert not compiled
        jax.block_until_ready(jax.jit(lambda x: x + 1.25)(1.0))
        assert compiled  # the listener does notice compilations
    finally:
        jax.monitoring.clear_event_listeners()
    assert [found.text for found in some] == [found.text for found in together[:5]]
    assert [pipeline.bucket(n, 40) for n in (1, 16, 17, 33, 40, 50)] == [16, 16, 32, 40, 40, 40]
    assert [pipeline.bucket(n, 16, 1) for n in (1, 2, 3, 9, 16, 99)] == [1, 2, 4, 16, 16, 16]


def test_the_posterior_of_every_token(opened, questions, cfg, monkeypatch):
    """The posterior of RAG-Token (figure 2): p(z) p(y_t|z,y_<t), normalised, by teacher forcing; tokens as texts."""
    config = dataclasses.replace(opened.loaded.rag.config, variant="token")
    location = dataclasses.replace(opened.location, loaded=dataclasses.replace(opened.loaded, rag=Rag(config)))
    token = dataclasses.replace(opened, programs={}, location=location)
    collect, arrays = pipeline.collect, []
    monkeypatch.setattr(
        pipeline, "collect", lambda corpus, out, *rest: arrays.append(out) or collect(corpus, out, *rest)
    )
    answers = token.answer([q.question for q in questions[:8]], cfg)
    sequence_of = dict(zip(arrays[0].scores.tolist(), arrays[0].sequences, strict=True))
    labels = np.array([sequence_of[found.score] for found in answers])
    corpus, tokenizer = opened.loaded.corpus, opened.loaded.corpus.generator_tokenizer
    sources, length = [], config.source_length
    for q, found in zip(questions, answers, strict=False):
        tail = join_tail(tokenizer, [q.question])[0]
        for passage in found.passages:
            row = corpus.row(passage.id)
            ids = corpus.generator_ids[row][: corpus.generator_length[row]].tolist()
            source = [tokenizer.bos_id, *ids[: length - 1 - len(tail)], *tail]
            sources.append(oracles.pad(source, length, tokenizer.pad_id))
    ids_BKL = np.array(sources).reshape(8, 3, length)
    logits = jax.jit(token.loaded.rag.logits)(opened.params, ids_BKL, ids_BKL != tokenizer.pad_id, labels)
    p_BKTV = oracles.softmax(np.asarray(logits, np.float64))
    steps = []
    for b, found in enumerate(answers):
        prior = np.array([p.prior for p in found.passages])
        said = [t for t, one in enumerate(labels[b][1:]) if tokenizer.decode([one])]
        assert [tokenizer.decode([labels[b][t + 1]]).strip() for t in said] == [text.strip() for text in found.tokens]
        assert "".join(found.tokens).strip() == found.text
        for t, shares in zip(said, found.token_posterior, strict=True):
            joint = prior * p_BKTV[b, :, t, labels[b][t + 1]]
            np.testing.assert_allclose(shares, joint / joint.sum(), atol=1e-4)
            steps.append(np.abs(np.array(shares) - prior).max())
    assert len(steps) > 12 and max(steps) > 1e-2  # answers have tokens, and these change the posterior
    most = max(answers, key=lambda found: len(found.tokens))
    assert (
        ask.render("Who?", most).splitlines()[-len(most.tokens) - 1]
        == "posterior of the passages above, token by token"
    )
