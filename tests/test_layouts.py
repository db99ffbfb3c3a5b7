"""Files in the layouts of other systems and data sets: passages and questions read, ids kept, gold passages found."""

import json
from pathlib import Path

import pytest

from rag_jax.corpus.build import build
from rag_jax.corpus.directory import Corpus
from rag_jax.data.readers.formats import read_passages, read_questions
from rag_jax.errors import InputError

OSLO, BERGEN = "Oslo is the capital of Norway.", "Bergen has a fish market."
ASKED = "What is the capital of Norway?"


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def musique(**changes: object) -> dict:
    paragraphs = [
        {"idx": 0, "title": "Bergen", "paragraph_text": BERGEN, "is_supporting": False},
        {"idx": 1, "title": "Oslo", "paragraph_text": OSLO, "is_supporting": True},
    ]
    asked = {"id": "2hop__1_2", "question": ASKED, "paragraphs": paragraphs, "answer": "Oslo", "answerable": True}
    return asked | {"answer_aliases": ["Kristiania"]} | changes


PAIR = [["Bergen", ["Bergen has a ", "fish market."]], ["Oslo", ["Oslo is the capital", " of Norway."]]]
HOTPOT = {"_id": "5a7", "question": ASKED, "answer": "Oslo", "supporting_facts": [["Oslo", 0]], "context": PAIR}
HF_HOTPOT = {
    "id": "5a7",
    "question": ASKED,
    "answer": "Oslo",
    "supporting_facts": {"title": ["Oslo"], "sent_id": [0]},
    "context": {"title": ["Bergen", "Oslo"], "sentences": [["Bergen has a", "fish market."], [OSLO]]},
}
FOUND = {"text": ["Oslo"], "answer_start": [0]}
FLAT = {"id": "s1", "title": "Oslo", "context": OSLO, "question": ASKED, "answers": FOUND}
TREC_DOCS = f"<DOC>\n<DOCNO>o1</DOCNO>\n<TITLE>Oslo</TITLE>\n<TEXT>\n{OSLO}\n</TEXT>\n</DOC>\n"
CLAIM = {
    "claim_id": "7",
    "claim": "Oslo is a capital",
    "claim_label": "SUPPORTS",
    "evidences": [
        {"evidence_label": "SUPPORTS", "article": "Oslo", "evidence": OSLO},
        {"evidence_label": "NOT_ENOUGH_INFO", "article": "Bergen", "evidence": BERGEN},
    ],
}
PUBMED = {
    "QUESTION": ASKED,
    "CONTEXTS": [OSLO],
    "LABELS": ["BACKGROUND"],
    "LONG_ANSWER": "It is Oslo.",
    "final_decision": "yes",
}
TEVATRON = {
    "query_id": "9",
    "query": ASKED,
    "positive_passages": [{"docid": "o", "title": "Oslo", "text": OSLO}],
    "negative_passages": [{"docid": "b", "title": "Bergen", "text": BERGEN}],
}

# layout -> files, those with the passages and the questions, (id, answers) of the question, title of the right passage
LAYOUTS: dict[str, tuple[dict[str, str], str, str, tuple[str, tuple[str, ...]], str | None]] = {
    "atlas, no ids": (
        {
            "p.jsonl": lines({"title": "Oslo", "section": "History", "text": OSLO}, {"title": "B", "text": BERGEN}),
            "q.jsonl": lines({"question": ASKED, "answers": ["Oslo"]}),
        },
        "p.jsonl", "q.jsonl", ("q-1", ("Oslo",)), None,
    ),
    "atlas, ids and query": (
        {
            "p.jsonl": lines({"id": "1", "title": "Oslo", "section": "", "text": OSLO}),
            "q.jsonl": lines({"query": ASKED, "answers": ["Oslo"], "id": "x"}),
        },
        "p.jsonl", "q.jsonl", ("x", ("Oslo",)), None,
    ),
    "flashrag": (
        {
            "p.jsonl": lines({"id": "0", "contents": f'"Oslo"\n{OSLO}'}),
            "q.jsonl": lines({"id": "test_0", "question": ASKED, "golden_answers": ["Oslo"], "metadata": {}}),
        },
        "p.jsonl", "q.jsonl", ("test_0", ("Oslo",)), None,
    ),
    "squad, flattened": (
        {"s.jsonl": lines(FLAT)}, "s.jsonl", "s.jsonl", ("s1", ("Oslo",)), "Oslo",
    ),
    "squad, flattened within data": (
        {"s.json": json.dumps({"version": "v1", "data": [FLAT]})}, "s.json", "s.json", ("s1", ("Oslo",)), "Oslo",
    ),
    "triviaqa": (
        {
            "t.json": json.dumps(
                {
                    "Data": [
                        {
                            "Question": ASKED, "QuestionId": "tc_1", "QuestionSource": "http://x", "SearchResults": [],
                            "Answer": {"Value": "Oslo", "Aliases": ["Kristiania", "Oslo"], "NormalizedValue": "oslo"},
                        }
                    ],
                    "Domain": "Web",
                }
            ),
            "p.jsonl": lines({"id": "1", "title": "Oslo", "text": OSLO}),
        },
        "p.jsonl", "t.json", ("tc_1", ("Oslo", "Kristiania")), None,
    ),
    "triviaqa of hugging face": (
        {
            "t.jsonl": lines(
                {
                    "question": ASKED, "question_id": "tc_1", "entity_pages": {}, "search_results": {},
                    "answer": {"value": "Oslo", "aliases": ["Kristiania"], "normalized_aliases": ["oslo"]},
                }
            ),
            "p.jsonl": lines({"id": "1", "title": "Oslo", "text": OSLO}),
        },
        "p.jsonl", "t.jsonl", ("tc_1", ("Oslo", "Kristiania")), None,
    ),
    "ms marco": (
        {
            "collection.tsv": f'0\t{BERGEN}\n7\tThe "capital: {OSLO}\n',
            "queries.dev.small.tsv": f"11\t{ASKED}\n12\tnot judged\n",
            "qrels.dev.small.tsv": "11\t0\t7\t1\n",
            "queries.train.tsv": "5\tof another split\n",
        },
        "collection.tsv", "queries.dev.small.tsv", ("11", ()), "",
    ),
    "colbert with titles, trec qrels": (
        {
            "collection.tsv": f"0\t{BERGEN}\tBergen\n7\t{OSLO}\tOslo\n",
            "msmarco-queries.tsv": f"11\t{ASKED}\n",
            "2019qrels-pass.txt": "11 Q0 7 2\n11 Q0 0 0\n",
        },
        "collection.tsv", "2019qrels-pass.txt", ("11", ()), "Oslo",
    ),
    "lotte": (
        {
            "collection.tsv": f"0\t{BERGEN}\n7\t{OSLO}\n",
            "qas.search.jsonl": lines({"qid": 3, "query": ASKED, "url": "x", "answer_pids": [7]}),
        },
        "collection.tsv", "qas.search.jsonl", ("3", ()), "",
    ),
    "trec": (
        {
            "docs.trec": TREC_DOCS,
            "topics.x.txt": f"<top>\n<num> Number: 301\n<title> {ASKED}\n<desc> Description:\nlong\n</top>\n",
            "qrels.x.txt": "301 0 o1 1\n",
        },
        "docs.trec", "topics.x.txt", ("301", ()), "Oslo",
    ),
    "hotpotqa": ({"h.json": json.dumps([HOTPOT])}, "h.json", "h.json", ("5a7", ("Oslo",)), "Oslo"),
    "hotpotqa of hugging face": ({"h.jsonl": lines(HF_HOTPOT)}, "h.jsonl", "h.jsonl", ("5a7", ("Oslo",)), "Oslo"),
    "musique": (
        {"m.jsonl": lines(musique())}, "m.jsonl", "m.jsonl", ("2hop__1_2", ("Oslo", "Kristiania")), "Oslo",
    ),
    "claims": ({"c.jsonl": lines(CLAIM)}, "c.jsonl", "c.jsonl", ("7", ("SUPPORTS",)), "Oslo"),
    "pubmedqa": (
        {"p.json": json.dumps({"123": PUBMED, "124": PUBMED}, indent=4)},
        "p.json", "p.json", ("123", ("yes",)), "Background",
    ),
    "flagembedding": (
        {"f.jsonl": lines({"query": ASKED, "pos": [OSLO], "neg": [BERGEN], "pos_scores": [1.0]})},
        "f.jsonl", "f.jsonl", ("f-1", ()), "",
    ),
    "tevatron": ({"t.jsonl": lines(TEVATRON)}, "t.jsonl", "t.jsonl", ("9", ()), "Oslo"),
    "webquestions": (
        {
            "w.json": json.dumps([{"qId": "wqr0", "qText": ASKED, "answers": ["Oslo"]}]),
            "p.jsonl": lines({"id": "1", "title": "Oslo", "text": OSLO}),
        },
        "p.jsonl", "w.json", ("wqr0", ("Oslo",)), None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "p.jsonl").write_text(lines({"id": "1", "title": "Oslo", "text": f"{OSLO} {BERGEN}"}))
    return build([folder / "p.jsonl"], folder / "corpus", train_tokenizer=(300, 300)).directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path: Path, tokenizers: Path, name: str) -> None:
    files, passages, questions, (identity, answers), title = LAYOUTS[name]
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    corpus: Corpus = build([tmp_path / passages], tmp_path / "corpus", tokenizers_from=tokenizers)
    question = read_questions(tmp_path / questions)[0]
    assert (question.id, question.answers) == (identity, answers)
    assert question.question in (ASKED, CLAIM["claim"])
    rows = corpus.rows(question.positive_passage_ids).tolist()
    assert [corpus[row].title for row in rows] == ([] if title is None else [title])
    assert all(OSLO in corpus[row].text for row in rows)
    wrong = corpus.rows(question.hard_negative_passage_ids).tolist()
    assert all(corpus[row].text == BERGEN for row in wrong)


def one(tmp_path: Path, name: str, content: str) -> Path:
    (tmp_path / name).write_text(content)
    return tmp_path / name


def test_the_section_goes_into_the_title_as_in_atlas(tmp_path: Path) -> None:
    rows = [{"title": "Oslo", "section": "History", "text": "a"}, {"title": "Oslo", "section": "", "text": "b"}]
    path = one(tmp_path, "p.jsonl", lines(*rows, {"section": "Alone", "text": "c"}, rows[0]))
    found = list(read_passages([path]))
    assert [passage.title for passage in found] == ["Oslo: History", "Oslo", "Alone"]  # the repeated one once
    again = list(read_passages([one(tmp_path, "other.jsonl", lines(rows[0]))]))
    assert found[0].id == again[0].id and len({passage.id for passage in found}) == 3


def test_fields_of_our_own_that_other_layouts_have(tmp_path: Path) -> None:
    """A field `context` or `contents` beside our own fields does not make the file another layout."""
    asked = {"id": "q", "question": ASKED, "answers": ["Oslo"], "context": OSLO}
    (found,) = read_questions(one(tmp_path, "q.jsonl", lines(asked)))
    assert found.extra == {"context": OSLO} and not found.positive_passage_ids
    (found,) = read_questions(
        one(tmp_path, "h.jsonl", lines({"_id": "q", **{k: asked[k] for k in asked if k != "id"}}))
    )
    assert (found.id, found.answers) == ("q", ("Oslo",))
    (passage,) = read_passages(
        [one(tmp_path, "p.jsonl", lines({"id": "1", "title": "T", "text": "t", "contents": "c"}))]
    )
    assert (passage.title, passage.text) == ("T", "t")


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Oslo"\nIt is a city.\nOf Norway.', "Oslo", "It is a city.\nOf Norway."),
        ('"The "Big" One"\ntext', 'The "Big" One', "text"),
        ("no title\nin two lines", "", "no title\nin two lines"),
        ('"only a quoted line"', "", '"only a quoted line"'),
        ('"quoted" begins it\ntext', "", '"quoted" begins it\ntext'),
    ],
)
def test_contents(tmp_path: Path, contents: str, title: str, text: str) -> None:
    (found,) = read_passages([one(tmp_path, "p.jsonl", lines({"id": "1", "contents": contents}))])
    assert (found.title, found.text) == (title, text)


def test_what_has_no_answer(tmp_path: Path) -> None:
    """SQuAD 2.0, flattened, and the full set of MuSiQue, whose questions occur twice under one id."""
    flat = read_questions(one(tmp_path, "s.jsonl", lines(FLAT | {"answers": {"text": [], "answer_start": []}})))[0]
    assert flat.answers == () and flat.extra["answerable"] is False and not flat.positive_passage_ids
    context = {passage.id for passage in read_passages([tmp_path / "s.jsonl"])}
    assert set(flat.extra["context_passage_ids"]) == context
    both = read_questions(one(tmp_path, "m.jsonl", lines(musique(), musique(answerable=False))))
    assert [question.id for question in both] == ["2hop__1_2", "2hop__1_2-unanswerable"]
    assert both[1].answers == () and not both[1].positive_passage_ids and len(both[1].extra["context_passage_ids"]) == 2
    assert [question.extra["answerable"] for question in both] == [True, False]


@pytest.mark.parametrize(
    ("files", "asked", "message"),
    [
        (
            {"s.json": json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [
                {"id": "q7", "question": "?", "answers": [{"text": "x"}], "is_impossible": True}]}]}]})},
            "s.json", "s.json:1: paragraphs[0]: qas[0]: question 'q7' is_impossible, but has the answer 'x'",
        ),
        (
            {"s.jsonl": lines(FLAT, FLAT | {"id": "s2", "is_impossible": True})},
            "s.jsonl", "s.jsonl:2: question 's2' is_impossible, but has the answer 'Oslo'",
        ),
        ({"queries.dev.tsv": "1\tx\n"}, "queries.dev.tsv", "put their qrels beside them"),
        ({"qrels.dev.tsv": "1\t0\t7\t1\n"}, "qrels.dev.tsv", "judgements without their queries"),
        (
            {"queries.a.tsv": "1\tx\n", "qrels.a.tsv": "1\t0\t7\t1\n1\t0\t7\t2\n"},
            "qrels.a.tsv", "qrels.a.tsv:2: '7' has the grade 2 for query '1', and 1 further up",
        ),
        (
            {"queries.a.tsv": "1\tx\n", "qrels.a.tsv": "1\t0\t7\t1\n9\t0\t7\t1\n"},
            "qrels.a.tsv", "qrels.a.tsv:2: query '9' is not in",
        ),
        ({"queries.a.tsv": "1 x\n", "qrels.a.tsv": "1\t0\t7\t1\n"}, "queries.a.tsv", "queries.a.tsv:1: a query's id"),
        ({"queries.a.tsv": "1\tx\n", "qrels.a.tsv": "1\t7\t1\n"}, "qrels.a.tsv", "qrels.a.tsv:1: query, a column"),
        ({"topics.txt": "<top>\n<num> 1\n", "qrels.txt": "1 0 7 1\n"}, "topics.txt", "topics.txt:1: what begins"),
        ({"h.json": json.dumps([HOTPOT | {"supporting_facts": [["Rome", 0]]}])}, "h.json", "names 'Rome', which no"),
        ({"t.jsonl": lines({"question": "?", "answer": {"text": "x"}})}, "t.jsonl", "t.jsonl:1: field 'answer' is an"),
        ({"p.jsonl": lines({"id": "1", "contents": "x"})}, "p.jsonl", "p.jsonl:1: passages (id, contents), and no"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, files: dict[str, str], asked: str, message: str) -> None:
    for name, content in files.items():
        one(tmp_path, name, content)
    with pytest.raises(InputError) as error:
        read_questions(tmp_path / asked)
    assert message in str(error.value)


def test_questions_are_no_passages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"q\.jsonl:1: questions \(question, answer\), and no passages"):
        list(read_passages([one(tmp_path, "q.jsonl", lines({"question": ASKED, "answer": ["Oslo"]}))]))


def test_collections_say_which_line_is_broken(tmp_path: Path) -> None:
    path = one(tmp_path, "collection.tsv", f"0\t{BERGEN}\n7\n")
    with pytest.raises(InputError, match=r"collection\.tsv:2: an id, a tab and a text"):
        list(read_passages([path]))


def test_every_file_of_the_field_is_read(shared_data) -> None:  # type: ignore[no-untyped-def]
    """Original files have as many questions and gold passages as counted by hand; the file's passages include these."""
    counts = {
        "hotpotqa.distractor_sample.json": (10, 20), "musique.sample.jsonl": (5, 12),
        "pubmedqa.ori_pqal_sample.json": (25, 79), "climate_fever.sample.jsonl": (40, 76),
        "flagembedding.msmarco_sample.jsonl": (10, 10), "squad_v2.haystack_small.json": (626, 293),
    }  # fmt: skip
    for name, (questions, right) in counts.items():
        path = shared_data("raw") / name
        found, ids = read_questions(path), {passage.id for passage in read_passages([path])}
        gold = [one for question in found for one in question.positive_passage_ids]
        assert (len(found), len(gold)) == (questions, right) and set(gold) <= ids
    assert len(read_questions(shared_data("raw") / "trec_topics.cacm.txt")) == 52
    assert len(list(read_passages([shared_data("raw") / "trec_docs.vaswani_first300.trec"]))) == 300
    assert read_questions(shared_data("raw") / "webquestions.devtest.json")[0].id == "wqr000000"
