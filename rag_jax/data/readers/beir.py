"""BEIR folders: corpus.jsonl, queries.jsonl, and in qrels/ the passages relevant to each question of a split."""

from collections.abc import Iterator

from rag_jax.data.readers import simple_rows
from rag_jax.data.readers.json_stream import records
from rag_jax.data.readers.lines import table
from rag_jax.data.readers.rows import Fields, OnBad, Passage, Question, Row, identity, optional, refuse, rest, string
from rag_jax.data.readers.sources import InputFile
from rag_jax.errors import InputError

Grades = dict[str, int]
_COLUMNS = ("query-id", "corpus-id", "score")


def rows(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """Records of passages; or of the queries that the qrels name, with a field `relevance`: grades by passage id."""
    if source.kind == "passages":
        yield from records(source, report)
        return
    if source.beside is None:
        raise InputError(f"{source.path}: queries alone; name the BEIR folder, or one of the files in its qrels/")
    grades, first = _qrels(source, report)
    for row in records(source, report):
        relevance = grades.pop(str(row.fields.get("_id")), None)
        if relevance is not None:
            yield row._replace(fields=row.fields | {"relevance": relevance})
    for query in grades:
        refuse(f"{source.beside}:{first[query]}: question {query!r} is not in {source.path}", report)


def _qrels(source: InputFile, report: OnBad | None) -> tuple[dict[str, Grades], dict[str, int]]:
    """Grades of every question, and the line of its first grade."""
    assert source.beside is not None
    grades: dict[str, Grades] = {}
    first: dict[str, int] = {}
    for row in table(source.beside, _COLUMNS, report):
        query, passage, score = (row.fields[name].strip() for name in _COLUMNS)
        try:
            grade = int(score)
        except ValueError:
            refuse(f"{source.beside}:{row.line}: the score {score!r} is no whole number", report)
            continue
        first.setdefault(query, row.line)
        known = grades.setdefault(query, {}).setdefault(passage, grade)
        if known != grade:
            pair = f"question {query!r} with passage {passage!r}"
            refuse(f"{source.beside}:{row.line}: {pair} has the grade {grade}, above it has {known}", report)
    return grades, first


def question(fields: Fields, own_id: str) -> list[Question]:
    """{"_id", "text"}: passages with a grade above 0 are right.

    A passage with the id of the question is the question itself; BEIR removes it from the results
    (`ignore_identical_ids`), and so `excluded_passage_ids` has it.
    """
    relevance: Grades = fields["relevance"]
    right = tuple(passage for passage, grade in relevance.items() if grade > 0)
    name = identity(fields, "_id", "id")
    extra = rest(fields, "_id", "text") | {"excluded_passage_ids": [name]}
    return [Question(name, string(fields, "text"), (), right, extra=extra)]


def passage(fields: Fields, own_id: str = "") -> list[Passage]:
    """BEIR's {"_id", "title", "text"}: the title may be missing; the text may be empty if there is a title."""
    title = optional(fields, "title")
    text = optional(fields, "text") or title
    return simple_rows.passage({**rest(fields, "metadata"), "title": title, "text": text})
