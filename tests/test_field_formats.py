"""File formats of published data sets: real samples against a plain reader, and corpora built from them."""

import csv
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_jax.data.readers.formats import (
    FORMATS,
    Passage,
    Question,
    detect,
    expand,
    read_located,
    read_passages,
    read_questions,
)
from rag_jax.errors import InputError

Find = Callable[[str], Path]


def content(title: str, text: str) -> str:
    return "text-" + hashlib.sha256(title.encode() + b"\0" + text.encode()).hexdigest()[:16]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def found_as(path: str | Path, kind: str) -> str:
    [source] = expand([path], kind)
    return source.format or detect(source)


def passages(path: str | Path) -> dict[str, Passage]:
    read = list(read_passages([path]))
    assert len({passage.id for passage in read}) == len(read)
    return {passage.id: passage for passage in read}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["squad_v1.xquad.en.json", "squad_v2.haystack_small.json"])
@pytest.mark.parametrize("form", ["as it is", "one line", "one line, zipped"])
def test_squad(shared_data: Find, tmp_path: Path, name: str, form: str) -> None:
    path = shared_data("raw") / name
    whole = json.loads(path.read_text())
    if form != "as it is":
        raw = json.dumps({"version": "2", "data": whole["data"]}).encode()
        path = tmp_path / ("x.json.gz" if "zipped" in form else "x.json")
        path.write_bytes(gzip.compress(raw) if "zipped" in form else raw)
    found = read_questions(path)
    texts = passages(path)
    assert found_as(path, "questions") == found_as(path, "passages") == "squad"
    expected = []
    for article in whole["data"]:
        for paragraph in article["paragraphs"]:
            passage = texts[content(article["title"], paragraph["context"])]
            assert (passage.title, passage.text) == (article["title"], paragraph["context"])
            assert passage.document == article["title"]
            for qa in paragraph["qas"]:
                impossible = qa.get("is_impossible", False)
                answers = [] if impossible else [answer["text"] for answer in qa["answers"]]
                expected.append((qa["id"], qa["question"], set(answers), not impossible, passage.id))
    assert len(texts) == sum(len(article["paragraphs"]) for article in whole["data"])
    assert len(found) == len(expected) == (1190 if "xquad" in name else 626)
    for question, (key, text, answers, answerable, context) in zip(found, expected, strict=True):
        assert (question.id, question.question, set(question.answers)) == (key, text, answers)
        assert question.extra.get("answerable", True) is answerable
        assert question.positive_passage_ids == ((context,) if answerable else ())
        assert answerable or question.extra["context_passage_ids"] == [context]
    assert sum(not question.answers for question in found) == (0 if "xquad" in name else 333)


@pytest.mark.parametrize("form", ["array", "lines"])
def test_dpr_training(shared_data: Find, tmp_path: Path, form: str) -> None:
    path = shared_data("raw") / "dpr_train.haystack_sample.json"
    rows = json.loads(path.read_text())
    if form == "lines":
        path = write(tmp_path / "dpr.json", *rows)
    assert found_as(path, "questions") == found_as(path, "passages") == "dpr"
    texts, contexts = passages(path), {}
    for question, row in zip(read_questions(path), rows, strict=True):
        assert (question.question, list(question.answers)) == (row["question"], row["answers"])
        assert question.extra == {"dataset": "nq_dev_psgs_w100"}
        for side, ours in (
            ("positive_ctxs", question.positive_passage_ids),
            ("hard_negative_ctxs", question.hard_negative_passage_ids),
            ("negative_ctxs", question.negative_passage_ids),
        ):
            assert list(ours) == list(dict.fromkeys(context["passage_id"] for context in row[side]))
            contexts |= {context["passage_id"]: context for context in row[side]}
    assert {key: (p.title, p.text) for key, p in texts.items()} == {
        key: (context["title"], context["text"]) for key, context in contexts.items()
    }
    # The same passages in a psgs_w100 table have the same ids.
    table = passages(shared_data("raw") / "dpr_passages.psgs_w100_layout.tsv")
    assert set(table) <= set(texts) and all(texts[key].title == table[key].title for key in table)


def test_two_dpr_files_share_their_contexts(shared_data: Find) -> None:
    path = shared_data("raw") / "dpr_train.haystack_sample.json"
    once = list(read_passages([path]))
    copy = expand([path])[0]
    twice = list(read_located([copy, copy._replace(input=1)]))
    assert [located.passage for located in twice] == once and {located.source for located in twice} == {0}


def test_psgs_w100(shared_data: Find) -> None:
    path = shared_data("raw") / "dpr_passages.psgs_w100_layout.tsv"
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [(p.id, p.title, p.text) for p in read_passages([path])] == [(r["id"], r["title"], r["text"]) for r in rows]
    assert len(rows) == 250 and found_as(path, "passages") == "psgs_w100"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nq_open.NQ-open.dev.without_heldout.jsonl", 2294),
        ("nq_open.efficientqa.dev.1.1.sample.jsonl", 100),
        ("dpr_qas.curated.test.tsv", 694),  # JSON lines, whatever the name says
    ],
)
def test_nq_open(shared_data: Find, name: str, count: int) -> None:
    path = shared_data("raw") / name
    rows = json_lines(path)
    found = read_questions(path)
    assert [(q.question, list(q.answers)) for q in found] == [(row["question"], row["answer"]) for row in rows]
    assert [q.id for q in found] == [f"{path.stem}-{n}" for n in range(1, count + 1)]
    assert found_as(path, "questions") == "nq_open"


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("name", ["nq-test.csv", "nq-test.tsv", "nq-test.tsv.gz"])
def test_dpr_question_tables(shared_data: Find, tmp_path: Path, header: bool, name: str) -> None:
    """Written like DPR's own scripts do: csv.writer, tabs, answers as a Python list."""
    rows = json_lines(shared_data("raw") / "nq_open.NQ-open.dev.without_heldout.jsonl")
    path = tmp_path / name
    with (gzip.open if name.endswith(".gz") else open)(path, "wt", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerows([["question", "answers"]] if header else [])
        writer.writerows([row["question"], str(row["answer"])] for row in rows)
    found = read_questions(path)
    assert [(q.question, list(q.answers)) for q in found] == [(row["question"], row["answer"]) for row in rows]
    assert found[0].id == f"nq-test-{1 + header}" and found_as(path, "questions") == "dpr_qa"


@pytest.mark.parametrize("form", ["lines", "array"])
def test_fusion_in_decoder(shared_data: Find, tmp_path: Path, form: str) -> None:
    path = shared_data("raw") / "fid.nq_oracle_sample.jsonl"
    rows = json_lines(path)
    if form == "array":
        path = tmp_path / "fid.json"
        path.write_text(json.dumps(rows, indent=2))
    texts = passages(path)
    assert found_as(path, "questions") == found_as(path, "passages") == "fid" and len(rows) == 80
    expected = {content(c["title"], c["text"]): c for row in rows for c in row["ctxs"]}
    assert {key: p.text for key, p in texts.items()} == {key: c["text"] for key, c in expected.items()}
    for question, row in zip(read_questions(path), rows, strict=True):
        assert (question.question, list(question.answers)) == (row["question"], row["answers"])
        assert set(question.positive_passage_ids) == {
            content(c["title"], c["text"]) for c in row["ctxs"] if c["isgold"]
        }
        assert question.extra["retrieved_passage_ids"] == [content(c["title"], c["text"]) for c in row["ctxs"]]


def test_fusion_in_decoder_with_ids_marks_and_target(tmp_path: Path) -> None:
    marks = [
        ("a", {"has_answer": True, "isgold": True}),
        ("b", {"has_answer": True}),
        ("c", {"has_answer": False}),
        ("d", {}),
    ]
    ctxs = [{"id": key, "title": "T", "text": key.upper(), "score": "1.5", **more} for key, more in marks]
    rows = [
        {"id": "q", "question": "Q?", "answers": ["x", "y"], "target": "x", "ctxs": ctxs},
        {"question": "R?", "target": "z", "ctxs": []},
    ]
    first, second = read_questions(write(tmp_path / "f.jsonl", *rows))
    assert (first.id, first.target, first.answers) == ("q", "x", ("x", "y"))
    assert (first.positive_passage_ids, first.hard_negative_passage_ids) == (("a",), ("c",))
    assert first.extra == {"retrieved_passage_ids": ["a", "b", "c", "d"]}
    assert (second.id, second.target, second.answers) == ("f-2", "z", ())


def test_kilt(shared_data: Find) -> None:
    raw = shared_data("raw")
    path, source = (
        raw / "kilt_layout_made_here.nq_sample-dev-kilt.jsonl",
        raw / "kilt_layout_made_here.knowledgesource.jsonl",
    )
    texts = passages(source)
    pages = {row["wikipedia_id"]: row for row in json_lines(source)}
    paragraphs = [(key, n) for key, row in pages.items() for n, text in enumerate(row["text"]) if n and text.strip()]
    assert list(texts) == [f"{key}-{n}" for key, n in paragraphs]
    assert all(texts[f"{key}-{n}"].text == pages[key]["text"][n].strip() for key, n in paragraphs)
    assert all(texts[f"{key}-{n}"].document == key for key, n in paragraphs)
    rows = json_lines(path)
    inside = 0
    for question, row in zip(read_questions(path), rows, strict=True):
        assert (question.id, question.question) == (row["id"], row["input"])
        assert list(question.answers) == list(dict.fromkeys(o["answer"] for o in row["output"] if "answer" in o))
        provenance = [p for output in row["output"] for p in output.get("provenance", [])]
        assert question.extra["wikipedia_ids"] == list(dict.fromkeys(p["wikipedia_id"] for p in provenance))
        for p in provenance:
            if "start_paragraph_id" in p:
                assert f"{p['wikipedia_id']}-{p['start_paragraph_id']}" in question.positive_passage_ids
        assert set(question.positive_passage_ids) <= set(texts)
        inside += any(question.answers[0] in texts[key].text for key in question.positive_passage_ids)
    assert len(rows) == 120 and inside > 110


def test_kilt_ranges_blind_sets_and_marks_of_lists(tmp_path: Path) -> None:
    provenance = [
        {"wikipedia_id": 7, "start_paragraph_id": 0, "end_paragraph_id": 2},
        {"wikipedia_id": "8", "title": "T"},
    ]
    rows = [{"id": 1, "input": "Q?", "output": [{"provenance": provenance}]}, {"id": "b", "input": "R?"}]
    first, second = read_questions(write(tmp_path / "k.jsonl", *rows))
    assert (first.id, first.positive_passage_ids) == ("1", ("7-1", "7-2")) and first.extra == {
        "wikipedia_ids": ["7", "8"],
        "provenance": [["7", "8"]],
    }
    assert (second.answers, second.positive_passage_ids, second.extra) == ((), (), {})
    text = ["T\n", "Body.\n", "Section::::Early life.\n", "BULLET::::- one\n", " \n"]
    page = {"_id": "7", "wikipedia_id": "7", "wikipedia_title": "T", "text": text}
    assert {key: p.text for key, p in passages(write(tmp_path / "p.jsonl", page)).items()} == {
        "7-1": "Body.",
        "7-2": "Early life.",
        "7-3": "one",
    }


@pytest.mark.parametrize(("name", "count"), [("answerable", 50), ("unanswerable", 20)])
def test_kilt_with_its_passages(shared_data: Find, name: str, count: int) -> None:
    path = shared_data("raw") / f"kilt_like.clapnq_dev_{name}_sample.jsonl"
    rows, texts, found = json_lines(path), passages(path), read_questions(path)
    assert len(found) == len(rows) == count
    for question, row in zip(found, rows, strict=True):
        ids = [content(p["title"], p["text"]) for p in row["passages"]]
        assert set(ids) <= set(texts) and question.id == row["id"]
        assert set(question.answers) == {o["answer"] for o in row["output"]} - {""}
        if name == "answerable":
            assert list(question.positive_passage_ids) == ids and "answerable" not in question.extra
        else:
            assert not question.answers and question.extra["answerable"] is False
            assert question.extra["context_passage_ids"] == ids and not question.positive_passage_ids


def test_beir(shared_data: Find, tmp_path: Path) -> None:
    folder = shared_data("raw") / "beir_layout_made_here.cacm_sample"
    texts = passages(folder)
    assert [(p.id, p.title, p.text) for p in texts.values()] == [
        (row["_id"], row["title"], row["text"]) for row in json_lines(folder / "corpus.jsonl")
    ]
    queries = {row["_id"]: row["text"] for row in json_lines(folder / "queries.jsonl")}
    grades: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, passage, score = line.split("\t")
        grades.setdefault(query, {})[passage] = int(score)
    for path in (folder, folder / "qrels" / "test.tsv", f"beir:{folder}"):
        found = read_questions(path)
        assert {q.id: q.question for q in found} == {key: queries[key] for key in grades}
        assert {q.id: q.extra["relevance"] for q in found} == grades
        assert all(set(q.positive_passage_ids) == {p for p, g in grades[q.id].items() if g > 0} for q in found)
        assert all(set(q.positive_passage_ids) <= set(texts) for q in found)
    copy = tmp_path / "beir"
    shutil.copytree(folder, copy)
    (copy / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\ncacm-q1\tCACM-0001\t0\n")
    with pytest.raises(InputError, match=r"qrels/dev\.tsv, qrels/test\.tsv; name the one"):
        read_questions(copy)
    [only] = read_questions(copy / "qrels" / "dev.tsv")
    assert (only.id, only.positive_passage_ids, only.extra["relevance"]) == ("cacm-q1", (), {"CACM-0001": 0})
    with pytest.raises(InputError, match="name the BEIR folder"):
        read_questions(copy / "queries.jsonl")
    (copy / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"without corpus\.jsonl"):
        passages(copy)
    (copy / "queries.jsonl").unlink()
    (copy / "qrels" / "dev.tsv").unlink()
    with pytest.raises(InputError, match=r"without queries\.jsonl"):
        read_questions(copy)


@pytest.mark.parametrize("zipped", [False, True])
def test_source_and_target(shared_data: Find, tmp_path: Path, zipped: bool) -> None:
    rows = json_lines(shared_data("raw") / "nq_open.NQ-open.dev.without_heldout.jsonl")[:300]
    end = ".gz" if zipped else ""
    for name, texts in (("source", [row["question"] for row in rows]), ("target", [row["answer"][0] for row in rows])):
        raw = "\n".join(texts).encode() + b"\n"
        (tmp_path / f"val.{name}{end}").write_bytes(gzip.compress(raw) if zipped else raw)
    for name in ("source", "target"):
        found = read_questions(tmp_path / f"val.{name}{end}")
        assert [(q.question, q.answers) for q in found] == [(row["question"], (row["answer"][0],)) for row in rows]
        assert found[6].id == "val-7"


def test_wikiextractor(shared_data: Find, tmp_path: Path) -> None:
    rows = json_lines(shared_data("nq_gold") / "passages.jsonl")[:60]
    pages = [
        {"id": str(i), "url": f"https://x/?curid={i}", "title": r["title"], "text": r["text"]}
        for i, r in enumerate(rows)
    ]
    for n, name in enumerate(["AA/wiki_00", "AA/wiki_01", "AB/wiki_00"]):
        part = [
            page | ({"text": f"{page['title']}\n\n{page['text']}"} if n else {}) for page in pages[n * 20 : n * 20 + 20]
        ]
        write(tmp_path / "extracted" / name, {"id": f"e{n}", "url": "", "title": "Nothing", "text": ""}, *part)
    for path in (tmp_path / "extracted", str(tmp_path / "extracted" / "A*" / "wiki_*")):
        assert [(p.id, p.title, p.text) for p in read_passages([path])] == [
            (p["id"], p["title"], p["text"]) for p in pages
        ]
    assert [source.name for source in expand([tmp_path / "extracted"])][2] == "extracted/AB/wiki_00"


def test_uniform_hard_negatives(tmp_path: Path) -> None:
    row = {
        "id": "q",
        "question": "Q?",
        "answers": [],
        "hard_negative_passage_ids": ["a"],
        "negative_passage_ids": ["b"],
    }
    [question] = read_questions(write(tmp_path / "q.jsonl", row))
    assert question == Question("q", "Q?", (), hard_negative_passage_ids=("a",), negative_passage_ids=("b",))


def test_a_format_can_be_named(shared_data: Find, tmp_path: Path) -> None:
    rows = [{"question": "Q?", "answers": ["a"], "answer": ["b"]}]
    path = write(tmp_path / "q.jsonl", *rows)
    assert read_questions(f"nq_open:{path}")[0].answers == ("b",)
    with pytest.raises(InputError, match="missing field 'id'"):
        read_questions(f"jsonl:{path}")
    with pytest.raises(InputError, match=r"nosuch:.*no such file"):
        read_questions(f"nosuch:{path}")
    with pytest.raises(InputError, match="psgs_w100 has no questions; formats that have: jsonl, nq_open"):
        read_questions(f"psgs_w100:{path}")
    with pytest.raises(InputError, match="nq_open has no passages; formats that have: jsonl, squad"):
        list(read_passages([f"nq_open:{path}"]))
    colon = write(tmp_path / "dpr:x.jsonl", {"id": "p", "title": "", "text": "t"})
    assert list(passages(colon)) == ["p"]  # a file of that name comes first


def test_content_of_no_known_format_is_said_to_be_so(shared_data: Find, tmp_path: Path) -> None:
    for row in ({"utterance": "Q?", "reply": "A"}, {"prompt": "Q?"}):
        path = write(tmp_path / "sample.jsonl", row)
        for read in (read_questions, lambda path: list(read_passages([path]))):
            with pytest.raises(InputError, match=r"sample\.jsonl:1: (questions|passages) in none of the formats jsonl"):
                read(path)
    with pytest.raises(InputError, match=r"README\.md: text has no questions"):
        read_questions(shared_data("raw") / "README.md")


def test_every_format_says_what_it_is() -> None:
    assert all(format.about and (format.questions or format.passages) for format in FORMATS.values())


def test_a_corpus_of_the_same_files_has_the_right_passages(shared_data: Find, tmp_path: Path) -> None:
    from rag_jax.__main__ import main
    from rag_jax.corpus.directory import Corpus
    from rag_jax.data.examples import wrong_rows
    from rag_jax.data.gold import right_rows

    raw = shared_data("raw")
    paths = [raw / "dpr_train.haystack_sample.json", raw / "fid.nq_oracle_sample.jsonl"]
    out = str(tmp_path / "corpus")
    sizes = ["--train-tokenizer", "--encoder-vocab", "600", "--generator-vocab", "400"]
    assert main(["corpus", str(paths[0]), f"fid:{paths[1]}", "--out", out, "--passage-words", "0", *sizes]) == 0
    corpus = Corpus.open(out)
    assert [(entry["files"], entry["passages"]) for entry in corpus.manifest["inputs"]] == [(1, 751), (1, 80)]
    for path in paths:
        questions = read_questions(path)
        gold = right_rows(questions, corpus)
        for question, rows, hard, other in zip(questions, gold, *wrong_rows(questions, gold, corpus), strict=True):
            assert [corpus[row].id for row in rows] == list(question.positive_passage_ids) != []
            named = [corpus[row].id for row in (*hard, *other)]
            wrong = {*question.hard_negative_passage_ids, *question.negative_passage_ids}
            assert set(named) == wrong - {*question.positive_passage_ids} and len(named) == len(set(named))
    assert main(["corpus", str(paths[0]), "--format", "squad", "--out", out + "2", *sizes]) == 2


def test_evaluate_hands_the_format_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from rag_jax.__main__ import parse

    for options, expected in ((["--format", "nq_open"], Path("nq_open:q.tsv")), ([], Path("q.tsv"))):
        module, args = parse("evaluate", ["run", "--questions", "q.tsv", "--json", *options])
        monkeypatch.setattr(module, "evaluate", lambda run, out, wanted: {"questions": wanted.questions})
        assert module.run(args)["questions"] == expected
    with pytest.raises(SystemExit):
        parse("evaluate", ["run", "--questions", "q.tsv", "--format", "nosuch"])
