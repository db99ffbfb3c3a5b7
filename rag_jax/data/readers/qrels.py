"""Queries with judgements in a second file (MS MARCO's and ColBERT's tables, TREC's topics) and their collections.

collection.tsv   passage id, text, perhaps title; no header
queries.X.tsv    query id, text
qrels.X.tsv      query id, an unused column, passage id, grade; TREC's qrels.X.txt has spaces between them
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rag_jax.data.readers.lines import decode, lines
from rag_jax.data.readers.rows import (
    BadLine,
    Fields,
    OnBad,
    Passage,
    Question,
    Row,
    kind,
    refuse,
    rest,
    string,
)
from rag_jax.data.readers.simple_rows import numbered
from rag_jax.data.readers.sources import InputFile
from rag_jax.errors import InputError

Grades = dict[str, int]
_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"<(?:DOCNO|num)>\s*(?:Number:)?\s*([^<\s]+)", re.IGNORECASE)
_TITLE = re.compile(r"<title>\s*(?:Topic:)?\s*([^<]+)", re.IGNORECASE)


def collection(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """Rows of a collection of passages; quotation marks are part of the text."""
    for number, raw in lines(source.path):
        try:
            columns = decode(raw).split("\t")
            if len(columns) not in (2, 3):
                raise BadLine(f"an id, a tab and a text, perhaps a title, are needed; there are {len(columns)} columns")
        except BadLine as bad:
            refuse(f"{source.path}:{number}: {bad}", report)
            continue
        yield Row(number, number, dict(zip(("id", "text", "title"), columns, strict=False)))


def passage(fields: Fields, own_id: str) -> list[Passage]:
    """{"id", "text"}, perhaps "title"."""
    name, title = string(fields, "id").strip(), string({"title": ""} | fields, "title", empty=True)
    text = string(fields, "text", empty=bool(title.strip()))
    return [Passage(name, title, text if text.strip() else title, name)]


def queries(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """The queries that have judgements, with a field `relevance`: grades by passage id."""
    if source.beside is None:
        raise InputError(
            f"{source.path}: queries without judgements; put their qrels beside them and call the two alike, as "
            "queries.dev.tsv and qrels.dev.tsv"
        )
    grades, first = _grades(source.beside, report)
    with_tags = next((raw.lstrip()[:1] == b"<" for _, raw in lines(source.path)), False)
    for line, name, text in _topics(source.path) if with_tags else _table(source.path, report):
        relevance = grades.pop(name, None)
        if relevance is not None:
            yield Row(line, line, {"id": name, "question": text, "relevance": relevance})
    for name in grades:
        refuse(f"{source.beside}:{first[name]}: query {name!r} is not in {source.path}", report)


def question(fields: Fields, own_id: str) -> list[Question]:
    """The question of a query; passages with a grade above 0 are right."""
    right = tuple(name for name, grade in fields["relevance"].items() if grade > 0)
    return [Question(fields["id"], string(fields, "question"), (), right, extra=rest(fields, "id", "question"))]


def lotte(fields: Fields, own_id: str) -> list[Question]:
    """{"qid", "query", "answer_pids": [ids of right passages]}."""
    found = fields.get("answer_pids")
    if not isinstance(found, list) or not all(type(one) in (int, str) for one in found):
        raise BadLine(f"field 'answer_pids' must be a list of ids, it is {kind(found)}")
    made = {"question": string(fields, "query"), "answers": [], "positive_passage_ids": list(map(str, found))}
    return numbered(rest(fields, "query", "answer_pids") | made, own_id)


def _table(path: Path, report: OnBad | None) -> Iterator[tuple[int, str, str]]:
    for number, raw in lines(path):
        try:
            name, tab, text = decode(raw).partition("\t")
            if not tab or not name.strip() or not text.strip():
                raise BadLine("a query's id, a tab and its text are needed")
        except BadLine as bad:
            refuse(f"{path}:{number}: {bad}", report)
            continue
        yield number, name.strip(), text.strip()


def _grades(path: Path, report: OnBad | None) -> tuple[dict[str, Grades], dict[str, int]]:
    """Grades of every query, and the line of its first grade."""
    grades: dict[str, Grades] = {}
    first: dict[str, int] = {}
    for number, raw in lines(path):
        try:
            columns = decode(raw).split()
            if len(columns) != 4:
                raise BadLine(f"query, a column without use, passage and grade are needed, there are {len(columns)}")
            query, _, passage, grade = columns
            if not re.fullmatch(r"-?\d+", grade):
                raise BadLine(f"the grade {grade!r} is no whole number")
            known = grades.get(query, {}).get(passage, int(grade))
            if known != int(grade):
                raise BadLine(f"{passage!r} has the grade {grade} for query {query!r}, and {known} further up")
        except BadLine as bad:
            refuse(f"{path}:{number}: {bad}", report)
            continue
        first.setdefault(query, number)
        grades.setdefault(query, {})[passage] = int(grade)
    return grades, first


def _elements(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every element <DOC>...</DOC> or <top>...</top>."""
    start, inside = 0, list[str]()
    for number, raw in lines(path, blank=True):
        try:
            text = decode(raw)
        except BadLine as bad:
            raise InputError(f"{path}:{number}: {bad}") from None
        word = text.strip().lower()
        if word in ("<doc>", "<top>"):
            if start:
                raise InputError(f"{path}:{number}: {text.strip()} within the one of line {start}; close that")
            start, inside = number, []
        elif word in ("</doc>", "</top>"):
            yield start, "\n".join(inside)
            start = 0
        elif start:
            inside.append(text)
    if start:
        raise InputError(f"{path}:{start}: what begins here has no end; fetch the file again")


def _topics(path: Path) -> Iterator[tuple[int, str, str]]:
    """TREC's <top> with <num> and <title>, or <DOC> with <DOCNO> and a text."""
    for line, text in _elements(path):
        name, title = _NUMBER.search(text), _TITLE.search(text)
        asked = title[1] if title else _TAG.sub(" ", text[name.end() :]) if name else ""
        if name is None or not asked.strip():
            raise InputError(f"{path}:{line}: a topic needs a number (<num>, <DOCNO>) and a text")
        yield line, name[1], " ".join(asked.split())


def documents(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """TREC's documents: <DOC> with <DOCNO>, perhaps <TITLE>, and a text."""
    for line, text in _elements(source.path):
        name, title = _NUMBER.search(text), _TITLE.search(text)
        if name is None:
            refuse(f"{source.path}:{line}: a document without <DOCNO>", report)
            continue
        rest_of = (text[: name.start()] + text[name.end() :]).replace(title[0] if title else "\0", "")
        body = " ".join(_TAG.sub(" ", rest_of).split())
        yield Row(line, line, {"id": name[1], "text": body, "title": " ".join(title[1].split()) if title else ""})
