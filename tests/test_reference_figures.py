"""Figures of whole evaluations against references: pytrec_eval, and BEIR's and KILT's definitions implemented here.

They are computed on real samples (where these are present) and on synthetic ones. The search is BM25; there is no
generator.
"""

import itertools
import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax import metrics
from rag_jax.corpus import build as corpora
from rag_jax.corpus.directory import Corpus
from rag_jax.data.readers.formats import Question, read_passages, read_questions
from rag_jax.errors import InputError
from rag_jax.evaluation import predictions
from rag_jax.inference.pipeline import Answer

Run = dict[str, list[str]]  # what was found for each question, best first


def build(source: Path, out: Path, words: int = 100) -> Corpus:
    corpora.build(
        [source], out, train_tokenizer=(400, 400), encoder_length=16, generator_length=16, passage_words=words
    )
    return Corpus.open(out)


def answers(found: Sequence[Sequence[str]]) -> list[Answer]:
    return [Answer("", 0.0, (), tuple(names)) for names in found]


def searched(corpus: Corpus, questions: Sequence[Question], depth: int = 100) -> list[Answer]:
    bm25 = pytest.importorskip("rag_jax.retrieval.bm25")
    pytest.importorskip("bm25s")
    from rag_jax.retrieval.search import Queries

    index = bm25.Bm25.build(bm25.passage_texts(corpus), corpus.hash)
    rows = index.search(Queries(None, [q.question for q in questions]), min(depth, len(corpus))).ids_BK
    return answers([[corpus[int(row)].id for row in some if row >= 0] for some in rows])


def trec_eval(run: Run, qrels: dict[str, dict[str, int]]) -> dict[str, float]:
    """pytrec_eval's figures under our names, as means over the questions that were judged."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    scored = {q: {one: float(len(names) - i) for i, one in enumerate(names)} for q, names in run.items()}
    measures = {"ndcg_cut.10", "recall.1,5,20", "success.1,5,20", "Rprec"}
    each = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(scored)
    top = {q: dict(itertools.islice(names.items(), 10)) for q, names in scored.items()}
    best = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
    names = {"ndcg_cut_10": "ndcg_at_10", "Rprec": "r_precision"}
    names |= {f"success_{k}": f"recall_at_{k}" for k in (1, 5, 20)}
    names |= {f"recall_{k}": f"gold_share_at_{k}" for k in (1, 5, 20)}
    found = {ours: float(np.mean([one[theirs] for one in each.values()])) for theirs, ours in names.items()}
    return found | {"mrr_at_10": float(np.mean([one["recip_rank"] for one in best.values()]))}


def assert_as(summary: dict[str, float], reference: dict[str, float]) -> None:
    for name, value in reference.items():
        if name in summary or not name.startswith("gold_share"):  # of those with one gold passage it is the recall
            assert summary[name] == pytest.approx(value, abs=1e-9), name


def by_document(names: Collection[str], questions: Sequence[Question], found: Sequence[Answer]) -> Run:
    """Rankings of document ids from those of passages; a document that was cut ranks at its first passage."""
    return {
        q.id: list(dict.fromkeys(one if one in names else one.rpartition("-")[0] for one in answer.retrieved))
        for q, answer in zip(questions, found, strict=True)
    }


def ids_of(source: Path) -> set[str]:
    return {passage.id for passage in read_passages([source])}


def figures(corpus: Corpus, questions: Sequence[Question], found: Sequence[Answer], depth: int = 100) -> Any:
    rows = predictions.rows(questions, found, corpus, min(depth, corpus.n_live), retrieval_only=True)
    return metrics.summarize(rows), rows


# --- real samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "level", "recall", "ndcg"), [(100, "document", 1.0, 0.869), (0, "passage", 0.9966, 0.862)]
)
def test_squad(
    shared_data: Callable[[str], Path], tmp_path: Path, words: int, level: str, recall: float, ndcg: float
) -> None:
    """Paragraphs of over 200 words are cut by default, while questions name the paragraph."""
    path = shared_data("raw/squad_v2.haystack_small.json")
    corpus = build(path, tmp_path / "corpus", words)
    questions = [q for q in read_questions(path) if q.positive_passage_ids]
    found = searched(corpus, questions)
    summary, rows = figures(corpus, questions, found)
    assert {row["level"] for row in rows} == {level}
    run = by_document(ids_of(path), questions, found)
    assert_as(summary, trec_eval(run, {q.id: dict.fromkeys(q.positive_passage_ids, 1) for q in questions}))
    assert summary["recall_at_20"] == pytest.approx(recall, abs=1e-3)
    assert summary["ndcg_at_10"] == pytest.approx(ndcg, abs=1e-3)


@pytest.mark.parametrize(("words", "ndcg"), [(100, 0.4547), pytest.param(0, 0.470, marks=pytest.mark.slow)])
def test_cacm(shared_data: Callable[[str], Path], tmp_path: Path, words: int, ndcg: float) -> None:
    folder = shared_data("ir_cacm")
    corpus, questions = (
        build(folder / "passages.jsonl", tmp_path / "corpus", words),
        read_questions(folder / "dev.jsonl"),
    )
    found = searched(corpus, questions)
    summary, _ = figures(corpus, questions, found)
    qrels = {q.id: {one: int(grade) for one, grade in q.extra["relevance"].items()} for q in questions}
    assert_as(summary, trec_eval(by_document(ids_of(folder / "passages.jsonl"), questions, found), qrels))
    assert summary["ndcg_at_10"] == pytest.approx(ndcg, abs=5e-4)


def test_beir(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("raw/beir_layout_made_here.cacm_sample")
    corpus, questions = build(folder, tmp_path / "corpus"), read_questions(folder)
    found = searched(corpus, questions)
    lines = [line.split("\t") for line in (folder / "qrels/test.tsv").read_text().splitlines()[1:]]
    qrels: dict[str, dict[str, int]] = {}
    for query, passage, grade in lines:
        qrels.setdefault(query, {})[passage] = int(grade)
    assert_as(figures(corpus, questions, found)[0], trec_eval(by_document(ids_of(folder), questions, found), qrels))


def kilt_r_precision(pages: Sequence[str], item: dict[str, Any]) -> float:
    """R-precision as in kilt/eval_retrieval.py with rank_keys wikipedia_id.

    For each output with R distinct pages, the share of these among the first R pages found; the best output counts.
    """
    best = 0.0
    for output in item["output"]:
        gold: list[str] = []
        for one in output.get("provenance", []):
            if "wikipedia_id" in one and str(one["wikipedia_id"]).strip() not in gold:
                gold.append(str(one["wikipedia_id"]).strip())
        once: list[str] = []
        for page in pages:
            if page not in once:
                once.append(page)
        hits = sum(page in gold for page in once[: len(gold)])
        best = max(best, hits / len(gold) if gold else 0.0)
    return best


def test_kilt(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    raw = shared_data("raw")
    corpus = build(raw / "kilt_layout_made_here.knowledgesource.jsonl", tmp_path / "corpus")
    path = raw / "kilt_layout_made_here.nq_sample-dev-kilt.jsonl"
    questions, items = read_questions(path), list(map(json.loads, path.read_text().splitlines()))
    found = searched(corpus, questions)
    pages = [[corpus[corpus.row(name)].document for name in one.retrieved] for one in found]
    wanted = [kilt_r_precision(*pair) for pair in zip(pages, items, strict=True)]
    assert (
        figures(corpus, questions, found)[0]["kilt_r_precision"] == pytest.approx(np.mean(wanted))
        and 0.5 < np.mean(wanted) < 1
    )


# --- made ones --------------------------------------------------------------------------------------------------------

WORDS = ["river", "stone", "lamp", "market", "garden", "winter", "captain", "silver", "bridge", "engine", "poet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty documents "0" to "39", every third cut in three; pages "P0" to "P9" of four documents each."""
    out, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    sentence = lambda: " ".join(rng.choices(WORDS, k=9)) + " end."  # noqa: E731
    rows = [{"id": str(i), "title": "Zorblax" if i == 1 else "", "document": f"P{i // 4}",
             "text": " ".join(sentence() for _ in range(30 if i % 3 == 0 else 2))} for i in range(40)]  # fmt: skip
    (out / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build(out / "p.jsonl", out / "corpus")


def names_of(corpus: Corpus) -> list[str]:
    return [corpus[row].id for row in range(len(corpus))]


@st.composite
def judged(draw: st.DrawFn) -> tuple[list[str], dict[str, int]]:
    """(rows in the order of a ranking, at most 30 of 66 and perhaps none; grades of documents)"""
    ranking = draw(st.lists(st.integers(0, 65), max_size=30, unique=True))
    documents = st.sampled_from([str(i) for i in range(40)] + ["gone"])
    return ranking, draw(st.dictionaries(documents, st.integers(-1, 3), min_size=1, max_size=6))


@settings(max_examples=15)
@given(cases=st.lists(judged(), min_size=1, max_size=6), own=st.booleans())
def test_any_judgements_as_beir_and_trec_eval_have_them(made: Corpus, cases: list[Any], own: bool) -> None:
    """Grades from -1 on, questions with no relevant one, unknown ids, questions that are corpus documents."""
    names = names_of(made)
    questions, found, qrels = [], [], {}
    for i, (ranking, grades) in enumerate(cases):
        name = str(3 * i if own else 1000 + i)  # a document that was cut, or none
        right = tuple(one for one, grade in grades.items() if grade > 0)
        extra = {"relevance": grades, "excluded_passage_ids": [name]}
        questions.append(Question(name, "?", (), right, extra=extra))
        found.append([names[at % len(names)] for at in ranking])
        qrels[name] = grades
    run = by_document([str(i) for i in range(40)], questions, answers(found))
    for name, ranking in run.items():  # BEIR: ignore_identical_ids
        run[name] = [one for one in ranking if one != name]
    summary, _ = figures(made, questions, answers(found))
    assert_as(summary, trec_eval(run, qrels))


@settings(max_examples=15)
@given(data=st.data())
def test_any_ways_as_kilt_has_them(made: Corpus, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Outputs of pages with and without paragraphs, placeholders of -1, repeated pages, no provenance at all."""
    page = st.sampled_from([f"P{i}" for i in range(10)] + ["elsewhere", 7])
    nowhere = [{}, {"start_paragraph_id": -1, "end_paragraph_id": -1}, {"start_paragraph_id": None}]
    paragraph = st.sampled_from(
        [*nowhere, {"start_paragraph_id": 1}, {"start_paragraph_id": "2", "end_paragraph_id": 3}]
    )
    provenance = st.builds(lambda page, part: {"wikipedia_id": page, **part}, page, paragraph)
    output = st.fixed_dictionaries({"answer": st.just("x")}, optional={"provenance": st.lists(provenance, max_size=3)})
    items = [{"id": i, "input": "?", "output": data.draw(st.lists(output, min_size=1, max_size=3))} for i in range(4)]
    file = tmp_path_factory.mktemp("kilt") / "q.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    questions, names = read_questions(f"kilt:{file}"), names_of(made)
    rankings = [data.draw(st.lists(st.integers(0, len(names) - 1), max_size=12, unique=True)) for _ in items]
    found = answers([[names[at] for at in ranking] for ranking in rankings])
    pages = [[made[at].document for at in ranking] for ranking in rankings]
    wanted = [kilt_r_precision(*pair) for pair in zip(pages, items, strict=True) if any(map(_pages, pair[1]["output"]))]
    summary, rows = figures(made, questions, found)
    assert summary.get("kilt_r_precision") == (pytest.approx(np.mean(wanted)) if wanted else None)
    for row, item, ranking in zip(rows, items, pages, strict=True):
        if not row["gold"] or row["level"] != "document" or any(_paragraphs(item)):
            continue
        assert set(row["gold"]) == {str(one) for output in item["output"] for one in _pages(output)}
        assert metrics.figures.ranked(row) == list(dict.fromkeys(ranking))


def _pages(output: dict[str, Any]) -> list[Any]:
    return [one["wikipedia_id"] for one in output.get("provenance", [])]


def _paragraphs(item: dict[str, Any]) -> list[bool]:
    parts = [one.get("start_paragraph_id") for output in item["output"] for one in output.get("provenance", [])]
    return [part not in (None, -1) for part in parts]


def test_a_title_is_no_answer_found(made: Corpus) -> None:
    """DPR looks for answers in the text alone, not in the title."""
    assert made[made.row("1")].title == "Zorblax"
    questions = [Question("q", "?", ("Zorblax", " ")), Question("r", "?", (" ",)), Question("s", "?", ("river", ""))]
    summary, rows = figures(made, questions, answers([["1"], ["1"], ["1", "2"]]))
    assert rows[0]["retrieved_has_answer"] == [False] and rows[2]["retrieved_has_answer"][0]
    assert [row["answers"] for row in rows] == [["Zorblax"], [], ["river"]] and rows[1]["unanswerable"]
    assert summary["answer_recall_at_1"] == 0.5


def test_blank_answers_are_nothing_to_say(made: Corpus) -> None:
    """Blank answers do not count, as in training: an empty prediction is not right."""
    rows = predictions.rows([Question("q", "?", ("", " ", "yes"))], answers([[]]), made, 0)
    assert metrics.summarize(rows)["exact_match"] == 0


def test_one_more_is_looked_for_where_the_question_itself_is_left_out(made: Corpus) -> None:
    from rag_jax.inference.config import AnswerConfig

    own, other = (Question(name, "?", (), extra={"excluded_passage_ids": [name]}) for name in ("1", "1000"))
    cut = Question("3", "?", (), extra={"excluded_passage_ids": ["3"]})
    for asked, deeper in (([other], 10), ([other, own], 11), ([own, cut], 13)):
        assert predictions.deeper(AnswerConfig(n_retrieved=10), asked, made).n_retrieved == deeper


@pytest.mark.parametrize(("lines", "message"), [
    (["q\td\t1", "q\te\t1", "q\td\t2"], r"test\.tsv:4: question 'q' with passage 'd' has the grade 2, above it has 1"),
    (["q\td\t1", "q\td\t0"], r"test\.tsv:3: question 'q' with passage 'd' has the grade 0, above it has 1"),
    (["q\td\t1", "q\td\t1"], ""),
])  # fmt: skip
def test_a_pair_with_two_grades(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "who?"}\n')
    (tmp_path / "qrels/test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    if message:
        with pytest.raises(InputError, match=message):
            read_questions(tmp_path)
        first = read_questions(tmp_path, skip_bad_lines=True)[0]
        assert first.extra["relevance"]["d"] == 1
    else:
        assert read_questions(tmp_path)[0].positive_passage_ids == ("d",)
