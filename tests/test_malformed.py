"""Malformed input files: each variant is read right, or refused with file and line, as the table says."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_jax.data.readers.formats import read_passages, read_questions
from rag_jax.errors import InputError

Files = dict[str, bytes]
LONG = "word " * 40_000  # 200,000 characters
MIXED = "سؤال: מה זה? 👩‍👩‍👧 \u202bx\u202c naïve \ufeff e\u0301"


def j(value: object, **options: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, **options).encode()


def rows(*values: object, end: bytes = b"\n") -> bytes:
    return b"".join(j(value) + end for value in values)


def squad(*qas: object, context: object = "Oslo is in Norway.", **article: object) -> bytes:
    return j(
        {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": list(qas)}]} | article]},
        indent=1,
    )


QA = {"id": "q1", "question": "Where?", "answers": [{"text": "Norway", "answer_start": 11}], "is_impossible": False}
NQ = {"question": "where?", "answer": ["Oslo"]}
OWN = {"id": "q1", "question": "Where?", "answers": ["Oslo"]}
CTX = {"title": "T", "text": "Oslo.", "passage_id": "7"}
DPR = {"question": "where?", "answers": ["Oslo"], "positive_ctxs": [CTX], "negative_ctxs": [], "hard_negative_ctxs": []}
FID = {"id": "1", "question": "where?", "answers": ["Oslo"], "ctxs": [{"id": "7", "title": "T", "text": "Oslo."}]}
KILT = {
    "id": "1",
    "input": "where?",
    "output": [{"answer": "Oslo", "provenance": [{"wikipedia_id": "3", "start_paragraph_id": 1}]}],
}
PAGE = {"wikipedia_id": "3", "wikipedia_title": "T", "text": ["T\n", "Oslo.\n"]}
OWNP = {"id": "p1", "title": "T", "text": "Oslo."}
WIKI = {"id": "3", "url": "https://x", "title": "T", "text": "Oslo."}
TSV = b"id\ttext\ttitle\n"
QRELS = b"query-id\tcorpus-id\tscore\nq1\tp1\t1\n"
BEIR = {
    "b/queries.jsonl": rows({"_id": "q1", "text": "where?"}),
    "b/corpus.jsonl": rows({"_id": "p1", "title": "", "text": "x"}),
}


def bad(where: str, message: str) -> tuple[str, str]:
    """Expected refusal: FILE:LINE (or FILE alone where it has no lines), and words of the message."""
    return where, message


def one(name: str, content: bytes, more: Files | None = None) -> tuple[str, Files]:
    return name, {name: content} | (more or {})


# what it is -> (the input and all files, what comes of it)
QUESTIONS: dict[str, tuple[tuple[str, Files], object]] = {
    "jsonl, BOM": (one("q.jsonl", b"\xef\xbb\xbf" + rows(OWN)), ["Where?"]),
    "jsonl, CRLF": (one("q.jsonl", rows(OWN, end=b"\r\n")), ["Where?"]),
    "jsonl, no last line end": (one("q.jsonl", rows(OWN)[:-1]), ["Where?"]),
    "jsonl, right-to-left, emoji, joiners": (one("q.jsonl", rows(OWN | {"question": MIXED})), [MIXED]),
    "jsonl, U+2028, U+2029, U+0085 in strings": (
        one("q.jsonl", rows(OWN | {"question": "a\u2028b\u2029c\x85d"})),
        ["a\u2028b\u2029c\x85d"],
    ),
    "jsonl, escaped emoji": (one("q.jsonl", b'{"id": "q", "question": "\\ud83d\\ude00", "answers": []}\n'), ["😀"]),
    "jsonl, half an emoji": (
        one("q.jsonl", b'{"id": "q", "question": "\\ud83d", "answers": []}\n'),
        bad("q.jsonl:1", "half a surrogate pair"),
    ),
    "jsonl, duplicate id": (one("q.jsonl", rows(OWN, OWN)), bad("q.jsonl:2", "duplicate id 'q1', first at")),
    "jsonl, duplicate id in another part": (
        one("q-00000-of-00002.jsonl", rows(OWN), {"q-00001-of-00002.jsonl": rows(OWN)}),
        bad("q-00001-of-00002.jsonl:1", "duplicate id"),
    ),
    "jsonl, a part is missing": (
        one("q-00000-of-00002.jsonl", rows(OWN)),
        bad("q-00000-of-00002.jsonl", "misses q-00001-of-00002.jsonl"),
    ),
    "jsonl, UTF-16": (one("q.jsonl", rows(OWN).decode().encode("utf-16")), bad("q.jsonl:1", "UTF-16")),
    "jsonl, Latin-1": (
        one("q.jsonl", rows(OWN, OWN | {"id": "é"}).decode().encode("latin-1")),
        bad("q.jsonl:2", "not UTF-8"),
    ),
    "jsonl, cut off": (one("q.jsonl", rows(OWN, OWN)[:-9]), bad("q.jsonl:2", "broken JSON")),
    "jsonl, an array within lines": (one("q.jsonl", rows(OWN, [OWN])), bad("q.jsonl:2", "a JSON object is needed")),
    "jsonl as one array": (one("q.json", j([OWN, OWN | {"id": "q2"}], indent=2)), ["Where?", "Where?"]),
    "empty file": (one("q.jsonl", b""), bad("q.jsonl:1", "no questions")),
    "empty file, zipped": (one("q.jsonl.gz", gzip.compress(b"")), bad("q.jsonl.gz:1", "no questions")),
    "only white space": (one("q.json", b" \n\n"), bad("q.json:1", "no questions")),
    "an array of nothing": (one("q.json", b"[]"), bad("q.json:1", "no questions")),
    "truncated gzip": (
        one("q.jsonl.gz", gzip.compress(rows(*(OWN | {"id": str(i)} for i in range(9999))))[:-30]),
        bad("q.jsonl.gz:9", "truncated gzip"),
    ),
    "gzip without its name": (one("q.jsonl", gzip.compress(rows(OWN))), ["Where?"]),
    "nq_open, single answer as a string": (one("q.jsonl", rows(NQ | {"answer": "Oslo"})), ["where?"]),
    "nq_open, answer null": (
        one("q.jsonl", rows(NQ, NQ | {"answer": None})),
        bad("q.jsonl:2", "'answer' must be a list of strings, it is null"),
    ),
    "nq_open, NUL byte": (
        one("q.jsonl", rows(NQ, NQ).replace(b'where?", "answer": ["Oslo"]}\n', b'wh\0"}\n')),
        bad("q.jsonl:1", "NUL byte"),
    ),
    "squad, title missing": (one("s.json", j({"data": [{"paragraphs": [{"context": "c", "qas": [QA]}]}]})), ["Where?"]),
    "squad, impossible without answers": (
        one("s.json", squad(QA | {"is_impossible": True, "answers": []})),
        ["Where?"],
    ),
    "squad, no qas": (
        one("s.json", j({"data": [{"title": "T", "paragraphs": [{"context": "c"}]}]}, indent=1)),
        bad("s.json:3", "paragraphs[0]: missing field 'qas'"),
    ),
    "squad, context missing": (
        one("s.json", j({"data": [{"title": "T", "paragraphs": [{"qas": [QA]}]}]})),
        bad("s.json:1", "paragraphs[0]: missing field 'context'"),
    ),
    "squad, answer without text": (
        one("s.json", squad(QA, QA | {"id": "2", "answers": [{"answer_start": 1}]})),
        bad("s.json:4", "paragraphs[0]: qas[1]: answers[0]: missing field 'text'"),
    ),
    "squad, id missing": (
        one("s.json", squad({k: v for k, v in QA.items() if k != "id"})),
        bad("s.json:4", "qas[0]: missing field 'id'"),
    ),
    "squad, is_impossible is a word": (
        one("s.json", squad(QA | {"is_impossible": "no"})),
        bad("s.json:4", "'is_impossible' must be true or false"),
    ),
    "squad, duplicate id": (one("s.json", squad(QA, QA)), bad("s.json:4", "duplicate id 'q1'")),
    "squad, cut off": (one("s.json", squad(QA)[:-20]), bad("s.json:", "ends")),
    "squad, BOM and CRLF": (one("s.json", b"\xef\xbb\xbf" + squad(QA).replace(b"\n", b"\r\n")), ["Where?"]),
    "squad, broken UTF-8": (one("s.json", squad(QA).replace(b"Norway.", b"Norw\xff")), bad("s.json:8", "not UTF-8")),
    "squad, data is an object": (one("s.json", b'{"data": {}}'), bad("s.json:1", "in none of the formats")),
    "dpr, context without text": (
        one("d.json", j([DPR, DPR | {"negative_ctxs": [{"title": "T"}]}])),
        bad("d.json:1", "negative_ctxs[0]: missing field 'text'"),
    ),
    "dpr, contexts no list": (
        one("d.json", b"[\n" + j(DPR | {"positive_ctxs": CTX}) + b"]"),
        bad("d.json:2", "'positive_ctxs' is an object; it must be a list"),
    ),
    "dpr, negatives missing, title null": (
        one("d.json", j([{"question": "where?", "answers": ["a"], "positive_ctxs": [CTX | {"title": None}]}])),
        ["where?"],
    ),
    "dpr, psg_id a number, as in TriviaQA": (
        one("d.json", j([DPR | {"positive_ctxs": [{"title": "", "text": "t", "psg_id": 7}]}])),
        ["where?"],
    ),
    "dpr, cut off": (one("d.json", j([DPR, DPR])[:-30]), bad("d.json:1", "ends within the record")),
    "dpr table, quotes": (one("d.csv", b'"say ""hi""?"\t"[""it\'s"", \'b\']"\n'), ['say "hi"?']),
    "dpr table, a list that is none": (
        one("d.tsv", b"where?\t['Oslo']\nwho?\tOslo\n"),
        bad("d.tsv:2", "the second column must be a list"),
    ),
    "dpr table, code in it": (
        one("d.tsv", b"where?\t['a']\nwho?\t[__import__('os').getcwd()]\n"),
        bad("d.tsv:2", "the second column must be a list"),
    ),
    "dpr table, numbers in the list": (
        one("d.tsv", b"when?\t[1999]\n"),
        bad("d.tsv:1", "'answers' must be a list of strings"),
    ),
    "dpr table, three columns": (one("d.tsv", b"where?\t['a']\twhat\n"), bad("d.tsv:1", "this line has 3 columns")),
    "dpr table, quote never closed": (
        one("d.tsv", b"where?\t['a']\n\"who?\t['b']\nwhen?\t['c']\n"),
        bad("d.tsv:2", "broken TSV quoting"),
    ),
    "dpr table, 20,000 brackets": (
        one("d.tsv", b"where?\t" + b"[" * 20_000 + b"\n"),
        bad("d.tsv:1", "the second column must be a list"),
    ),
    "fid, ctxs null": (
        one("f.jsonl", rows(FID, FID | {"id": "2", "ctxs": None})),
        bad("f.jsonl:2", "'ctxs' is null; it must be a list"),
    ),
    "fid, has_answer a word": (
        one("f.jsonl", rows(FID | {"ctxs": [{"id": "7", "text": "x", "has_answer": "yes"}]})),
        bad("f.jsonl:1", "ctxs[0]: field 'has_answer' must be true or false"),
    ),
    "fid, neither answers nor target": (
        one("f.jsonl", rows({"id": "1", "question": "where?", "ctxs": []})),
        bad("f.jsonl:1", "missing field 'answers'"),
    ),
    "kilt, provenance of a word": (
        one("k.jsonl", rows(KILT, KILT | {"output": [{"provenance": ["x"]}]})),
        bad("k.jsonl:2", "output[0]: provenance[0]: an object is needed"),
    ),
    "kilt, paragraphs backwards": (
        one(
            "k.jsonl",
            rows(
                KILT
                | {"output": [{"provenance": [{"wikipedia_id": "3", "start_paragraph_id": 4, "end_paragraph_id": 2}]}]}
            ),
        ),
        bad("k.jsonl:1", "there are no paragraphs 4 to 2"),
    ),
    "kilt, no page": (
        one("k.jsonl", rows(KILT | {"output": [{"provenance": [{"title": "T"}]}]})),
        bad("k.jsonl:1", "missing field 'wikipedia_id'"),
    ),
    "kilt, empty answer": (one("k.jsonl", rows(KILT | {"output": [{"answer": ""}]})), ["where?"]),
    "beir, qrels without header": (
        ("b", BEIR | {"b/qrels/test.tsv": b"q1\tp1\t1\n"}),
        bad("b/qrels/test.tsv:1", "the header must name query-id, corpus-id and score"),
    ),
    "beir, score is no number": (
        ("b", BEIR | {"b/qrels/test.tsv": QRELS + b"q1\tp2\tyes\n"}),
        bad("b/qrels/test.tsv:3", "'yes' is no whole number"),
    ),
    "beir, question that is not there": (
        ("b", BEIR | {"b/qrels/test.tsv": QRELS + b"q9\tp1\t1\n"}),
        bad("b/qrels/test.tsv:3", "question 'q9' is not in"),
    ),
    "beir, two columns": (
        ("b", BEIR | {"b/qrels/test.tsv": QRELS + b"q9\tp1\n"}),
        bad("b/qrels/test.tsv:3", "3 columns are needed, this line has 2"),
    ),
    "beir, CRLF": (("b", BEIR | {"b/qrels/test.tsv": QRELS.replace(b"\n", b"\r\n")}), ["where?"]),
    "pair, U+2028 is no line end": (
        one("x.source", "a\u2028b\nc\n".encode(), {"x.target": b"1\n2\n"}),
        ["a\u2028b", "c"],
    ),
    "pair, blank lines at the end": (one("x.source", b"a\nb\n\n\n", {"x.target": b"1\n2"}), ["a", "b"]),
    "pair, one is shorter": (
        one("x.source", b"a\nb\nc\n", {"x.target": b"1\n2\n"}),
        bad("x.target:3", "the file ends, but x.source has a line 3"),
    ),
    "pair, blank question": (
        one("x.source", b"a\n\nc\n", {"x.target": b"1\n2\n3\n"}),
        bad("x.source:2", "empty question"),
    ),
    "pair, blank answer": (one("x.source", b"a\nb\nc\n", {"x.target": b"1\n\n3\n"}), bad("x.target:2", "empty line")),
    "pair, target missing": (one("x.source", b"a\n"), bad("x.source", "x.target is missing beside it")),
}

PASSAGES: dict[str, tuple[tuple[str, Files], object]] = {
    "jsonl, 200,000 characters": (one("p.jsonl", rows(OWNP | {"text": LONG})), [LONG]),
    "jsonl, right-to-left, emoji, joiners": (one("p.jsonl", rows(OWNP | {"text": MIXED})), [MIXED]),
    "jsonl, U+2028, U+2029, U+0085 in strings": (
        one("p.jsonl", rows(OWNP | {"text": "a\u2028b\u2029c\x85d"})),
        ["a\u2028b\u2029c\x85d"],
    ),
    "jsonl, only white space as text": (
        one("p.jsonl", rows(OWNP, OWNP | {"text": " \u2028"})),
        bad("p.jsonl:2", "empty text"),
    ),
    "table, 200,000 characters": (one("p.tsv", TSV + b"1\t" + LONG.encode() + b"\tT\n"), [LONG]),
    "table, 200,000 characters in quotes": (one("p.tsv", TSV + b'1\t"' + LONG.encode() + b'"\tT\n'), [LONG]),
    "table, BOM, CRLF": (one("p.tsv", b"\xef\xbb\xbf" + TSV.replace(b"\n", b"\r\n") + b"1\tx\tT\r\n"), ["x"]),
    "table, U+2028, U+0085": (one("p.tsv", TSV + "1\ta\u2028b\x85c\tT\n".encode()), ["a\u2028b\x85c"]),
    "table, NUL byte": (one("p.tsv", TSV + b"1\tx\tT\n2\ta\0b\tT\n"), bad("p.tsv:3", "NUL byte")),
    "table, a quote never closed": (one("p.tsv", TSV + b'1\t"x\tT\n2\ty\tT\n'), bad("p.tsv:2", "broken TSV quoting")),
    "table, a column too few": (one("p.tsv", TSV + b"1\tx\n"), bad("p.tsv:2", "3 columns are needed, this line has 2")),
    "table, truncated gzip": (
        one("p.tsv.gz", gzip.compress(TSV + b"1\tx\tT\n" * 9999)[:-9]),
        bad("p.tsv.gz:", "truncated gzip"),
    ),
    "table, header in another order": (one("p.tsv", b"title\tid\ttext\nT\t1\tx\n"), ["x"]),
    "squad, the same paragraph twice": (
        one(
            "s.json",
            j({"data": [{"title": "T", "paragraphs": [{"context": "c"}, {"context": "c"}, {"context": "d"}]}]}),
        ),
        ["c", "d"],
    ),
    "squad, 200,000 characters": (one("s.json", squad(QA, context=LONG)), [LONG]),
    "squad, paragraphs missing": (
        one("s.json", j({"data": [{"title": "T"}]})),
        bad("s.json:1", "missing field 'paragraphs'"),
    ),
    "dpr, one id with two texts": (
        one("d.json", j([DPR, DPR | {"negative_ctxs": [CTX | {"text": "Rome."}]}])),
        ["Oslo.", "Rome."],
    ),
    "dpr, NUL in a text": (
        one("d.json", j([DPR]).replace(b"Oslo.", b"Os\\u0000lo.")),
        bad("d.json:1", "positive_ctxs[0]: NUL character in text"),
    ),
    "fid, empty text": (
        one("f.jsonl", rows(FID, FID | {"ctxs": [{"id": "8", "title": "T", "text": ""}]})),
        bad("f.jsonl:2", "ctxs[0]: empty text"),
    ),
    "kilt pages, text a string": (
        one("k.jsonl", rows(PAGE, PAGE | {"text": "Oslo."})),
        bad("k.jsonl:2", "'text' must be a list of paragraphs, it is a string"),
    ),
    "kilt pages, only a title": (one("k.jsonl", rows(PAGE, PAGE | {"wikipedia_id": "4", "text": ["T"]})), ["Oslo."]),
    "wikipedia, pages without text": (one("wiki_00", rows(WIKI | {"text": ""}, WIKI)), ["Oslo."]),
    "wikipedia, broken line": (one("wiki_00", rows(WIKI) + b"{\n"), bad("wiki_00:2", "broken JSON")),
    "beir, title missing, text empty": (
        one("b/corpus.jsonl", rows({"_id": "1", "text": "x"}, {"_id": "2", "title": "T", "text": ""})),
        ["x", "T"],
    ),
    "beir, neither": (
        one("b/corpus.jsonl", rows({"_id": "1", "text": "x"}, {"_id": "2", "text": ""})),
        bad("b/corpus.jsonl:2", "empty text"),
    ),
    "text, Latin-1": (one("t.txt", "eins\nzwölf\n".encode("latin-1")), bad("t.txt:2", "not UTF-8")),
    "text, old Mac line ends": (one("t.txt", b"one\rtwo\r"), ["one\rtwo"]),
    "a picture": (one("t.png", b"\x89PNG\r\n\x1a\n\0\0"), bad("t.png", "rename it")),
}


def laid(folder: Path, case: tuple[str, Files]) -> Path:
    name, contents = case
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder / name


def judge(folder: Path, case: tuple[tuple[str, Files], object], read: Callable[[Path], list[str]]) -> None:
    given, expected = case
    path = laid(folder, given)
    if isinstance(expected, list):
        assert read(path) == expected
        return
    assert isinstance(expected, tuple)
    where, message = expected
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{folder}/{where}") and message in str(error.value)


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(tmp_path: Path, name: str) -> None:
    judge(tmp_path, QUESTIONS[name], lambda path: [question.question for question in read_questions(path)])


@pytest.mark.parametrize("name", PASSAGES)
def test_passages(tmp_path: Path, name: str) -> None:
    judge(tmp_path, PASSAGES[name], lambda path: [passage.text for passage in read_passages([path])])


def test_there_are_enough_of_them() -> None:
    assert len(QUESTIONS) + len(PASSAGES) >= 90


@pytest.mark.parametrize(
    ("name", "content", "good"),
    [
        ("s.json", squad(QA, QA | {"id": "q2", "answers": 3}, QA | {"id": "q3"}), ["q1", "q3"]),
        ("d.json", j([DPR | {"id": "a"}, 7, DPR | {"id": "b", "positive_ctxs": 1}, DPR | {"id": "c"}]), ["a", "c"]),
        ("q.tsv", b"a\t['x']\nb\tx\nc\t['z']\n", ["q-1", "q-3"]),
        ("k.jsonl", rows(KILT, KILT | {"id": "2", "output": 0}, KILT | {"id": "3"}), ["1", "3"]),
    ],
)
def test_only_the_bad_record_is_skipped(tmp_path: Path, name: str, content: bytes, good: list[str]) -> None:
    path = laid(tmp_path, one(name, content))
    assert [question.id for question in read_questions(path, skip_bad_lines=True)] == good


def test_bad_contexts_are_skipped_alone(tmp_path: Path) -> None:
    content = j([DPR | {"negative_ctxs": [{"text": 1}, CTX | {"passage_id": "8"}]}])
    path = laid(tmp_path, one("d.json", content))
    heard: list[str] = []
    assert [p.id for p in read_passages([path], skip_bad_lines=True, on_bad=heard.append)] == ["7", "8"]
    assert len(heard) == 1 and "d.json:1: negative_ctxs[0]: field 'text' must be a string" in heard[0]
