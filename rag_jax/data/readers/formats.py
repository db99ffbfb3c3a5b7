"""Readers: passages and questions in the formats of the field; every error names file and line."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rag_jax.data.readers import (
    beir,
    claims,
    dpr,
    json_stream,
    kilt,
    lines,
    multihop,
    pubmedqa,
    qrels,
    simple_rows,
    squad,
    tfds_source,
)  # fmt: skip
from rag_jax.data.readers.rows import BadLine, Fields, OnBad, Passage, Question, Row, refuse
from rag_jax.data.readers.sources import InputFile, Kind, files_of, stem, suffix
from rag_jax.errors import InputError
from rag_jax.system import files, logs

__all__ = [
    "FORMATS",
    "Format",
    "InputFile",
    "Located",
    "Passage",
    "Question",
    "detect",
    "digest",
    "expand",
    "iterate_questions",
    "named",
    "read_located",
    "read_passages",
    "read_questions",
]


class Format(NamedTuple):
    """How a format is read.

    about: a few words for messages.
    rows: from a file to its records.
    questions, passages: from the fields of a record, and an id made of its position, to what it holds; None: the format
        has none of these.
    repeats: the same passage may occur many times in a file, and is read once.
    """

    about: str
    rows: Callable[[InputFile, OnBad | None], Iterator[Row]]
    questions: Callable[[Fields, str], Iterable[Question | BadLine]] | None = None
    passages: Callable[[Fields, str], Iterable[Passage | BadLine]] | None = None
    repeats: bool = False


FORMATS = {
    "jsonl": Format("our own JSON lines", json_stream.records, simple_rows.question, simple_rows.passage),
    "nq_open": Format(
        "question, answers under many names (NQ-open, Atlas, FlashRAG, TriviaQA, WebQuestions)",
        json_stream.records,
        simple_rows.asked,
    ),
    "squad": Format("SQuAD 1.1, 2.0", json_stream.records, squad.questions, squad.passages, repeats=True),
    "squad_flat": Format(
        "SQuAD, a question a record", json_stream.records, squad.flat_question, squad.flat_passages, repeats=True
    ),
    "hotpotqa": Format(
        "HotpotQA, 2WikiMultihopQA", json_stream.records, multihop.hotpot, multihop.hotpot_passages, repeats=True
    ),
    "musique": Format("MuSiQue", json_stream.records, multihop.musique, multihop.musique_passages, repeats=True),
    "claims": Format("FEVER, CLIMATE-FEVER", json_stream.records, claims.question, claims.passages, repeats=True),
    "pubmedqa": Format("PubMedQA", json_stream.records, pubmedqa.question, pubmedqa.passages, repeats=True),
    "dpr": Format("DPR training", json_stream.records, dpr.training, dpr.training_passages, repeats=True),
    "dpr_qa": Format("DPR questions, tab-separated", lines.question_table, dpr.numbered),
    "pairs": Format(
        "query, pos, neg of FlagEmbedding", json_stream.records, dpr.pairs, dpr.pairs_passages, repeats=True
    ),
    "fid": Format("Fusion-in-Decoder", json_stream.records, dpr.fusion, dpr.fusion_passages, repeats=True),
    "kilt": Format("KILT tasks", json_stream.records, kilt.question, kilt.passages, repeats=True),
    "kilt_pages": Format("KILT knowledge source", json_stream.records, passages=kilt.page),
    "beir": Format("BEIR folder", beir.rows, beir.question, beir.passage),
    "qrels": Format("queries beside qrels of MS MARCO, ColBERT, TREC", qrels.queries, qrels.question),
    "lotte": Format("query, answer_pids of ColBERT's LoTTE", json_stream.records, qrels.lotte),
    "msmarco": Format("id, text, no header, tab-separated", qrels.collection, passages=qrels.passage),
    "trec": Format("TREC's <DOC> documents", qrels.documents, passages=qrels.passage),
    "hf_rag": Format("NAME.source, NAME.target", lines.pairs, simple_rows.numbered),
    "psgs_w100": Format("id, text, title, tab-separated", lines.passage_table, passages=simple_rows.passage),
    "atlas": Format("Atlas' title, section, text", json_stream.records, passages=simple_rows.atlas_passage),
    "no_ids": Format("the same without ids", json_stream.records, passages=simple_rows.atlas_passage, repeats=True),
    "contents": Format(
        "id, contents of FlashRAG, Pyserini", json_stream.records, passages=simple_rows.contents_passage
    ),
    "wikipedia": Format("wikiextractor's JSON lines", json_stream.records, passages=simple_rows.wikipedia),
    "text": Format(".txt and .md files", lines.whole_text, passages=simple_rows.passage),
    "tfds": Format("TensorFlow Datasets", tfds_source.rows, tfds_source.question, tfds_source.passage, repeats=True),
}

# What tells JSON formats apart: the first line whose fields the first record has.
SIGNS: dict[Kind, list[tuple[str, set[str]]]] = {
    "passages": [
        ("kilt_pages", {"wikipedia_id", "text"}),
        ("squad", {"paragraphs", "title"}),
        ("musique", {"paragraphs", "question"}),
        ("squad", {"paragraphs"}),
        ("dpr", {"positive_ctxs"}),
        ("dpr", {"positive_passages"}),
        ("fid", {"ctxs"}),
        ("kilt", {"input", "passages"}),
        ("hotpotqa", {"context", "question", "supporting_facts"}),
        ("hotpotqa", {"context", "question", "_id"}),
        ("squad_flat", {"context", "question"}),
        ("pairs", {"query", "pos"}),
        ("claims", {"claim", "evidences"}),
        ("pubmedqa", {"QUESTION", "CONTEXTS"}),
        ("wikipedia", {"id", "url", "title", "text"}),
        ("atlas", {"id", "section", "text"}),
        ("beir", {"_id", "text"}),
        ("jsonl", {"id", "text"}),
        ("atlas", {"docid", "text"}),
        ("no_ids", {"title", "text"}),
        ("no_ids", {"section", "text"}),
        ("contents", {"contents"}),
    ],
    "questions": [
        ("kilt", {"input"}),
        ("squad", {"paragraphs", "title"}),
        ("musique", {"paragraphs", "question"}),
        ("squad", {"paragraphs"}),
        ("dpr", {"positive_ctxs"}),
        ("dpr", {"positive_passages"}),
        ("fid", {"ctxs"}),
        ("hotpotqa", {"context", "question", "supporting_facts"}),
        ("hotpotqa", {"context", "question", "_id"}),
        ("squad_flat", {"context", "question"}),
        ("pairs", {"query", "pos"}),
        ("lotte", {"query", "answer_pids"}),
        ("claims", {"claim"}),
        ("pubmedqa", {"QUESTION", "CONTEXTS"}),
        ("jsonl", {"id", "question", "answers"}),
        ("jsonl", {"_id", "question", "answers"}),
        *(("nq_open", {asked, answer}) for asked in simple_rows.QUESTIONS for answer in simple_rows.ANSWERS),
        ("beir", {"_id", "text"}),
    ],
}


# What some fields must be besides: our own questions may have a `context` of their own.
SHAPES: dict[str, Callable[[Fields], bool]] = {
    "squad_flat": lambda record: isinstance(record["context"], str) and not _texts(record.get("answers")),
    "hotpotqa": lambda record: isinstance(record["context"], list | dict),
}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


ASKED = {*simple_rows.QUESTIONS, "QUESTION", "input", "claim"}  # fields that hold a question


class Located(NamedTuple):
    """A passage and where it was read: `source` indexes the sources, `line` is 1-based."""

    passage: Passage
    source: int
    line: int


def read_passages(
    paths: Sequence[str | Path], *, skip_bad_lines: bool = False, on_bad: OnBad | None = None
) -> Iterator[Passage]:
    """Passages of all inputs in order. on_bad: called with a message for each skipped line; None: prints on stderr."""
    for located in read_located(expand(paths), skip_bad_lines=skip_bad_lines, on_bad=on_bad):
        yield located.passage


def read_located(
    sources: Sequence[InputFile], *, skip_bad_lines: bool = False, on_bad: OnBad | None = None
) -> Iterator[Located]:
    """Passages of sources (see `expand`) in order, with file and line. InputError for a file without passages.

    Memory does not grow with the input, except for formats that repeat passages: about 60 bytes per distinct passage.
    """
    report = (on_bad or logs.info) if skip_bad_lines else None
    seen: set[int] = set()
    for index, source in enumerate(sources):
        name, format = _format(source)
        found = False
        for line, passage in _items(source, format, report):
            found = True
            if format.repeats:
                known = hash((passage.id, passage.title, passage.text))
                if known in seen:
                    continue
                seen.add(known)
            yield Located(passage, index, line)
        if not found and name != "text":
            raise InputError(f"{source.path}:1: no passages in this file; remove it from the inputs or fill it")


def read_questions(path: str | Path, *, skip_bad_lines: bool = False) -> list[Question]:
    """All questions of an input; see `iterate_questions`."""
    return list(iterate_questions(path, skip_bad_lines=skip_bad_lines))


def iterate_questions(path: str | Path, *, skip_bad_lines: bool = False) -> Iterator[Question]:
    """The questions of an input in order. InputError for a repeated id; with `skip_bad_lines` the first one stays."""
    report = logs.info if skip_bad_lines else None
    sources = expand([path], "questions")
    seen: dict[str, int] = {}  # id -> line and source in one number, to save memory: there may be millions
    for number, source in enumerate(sources):
        for line, question in _items(source, _format(source)[1], report):
            if question.id in seen:
                at, first = divmod(seen[question.id], len(sources))
                known = f"first at {sources[first].path}:{at}"
                refuse(f"{source.path}:{line}: duplicate id {question.id!r}, {known}", report)
                continue
            seen[question.id] = line * len(sources) + number
            yield question
    if not seen:
        raise InputError(f"{path}:1: no questions in this file")


def expand(paths: Sequence[str | Path], kind: Kind = "passages") -> list[InputFile]:
    """Files behind the inputs: a file, a glob, a folder, or a part set by its name or any of its parts.

    `NAME:` before a path names its format, a key of FORMATS; without it the content tells.
    """
    sources: dict[str, InputFile] = {}
    inputs = 0
    for given in map(str, paths):
        known = len(sources)
        name, colon, rest = given.partition(":")
        named = name if colon and name in FORMATS and not Path(given).exists() else ""
        if named == "tfds":
            sources.setdefault(given, InputFile(Path(given), tfds_source.title(given), inputs, kind, named))
        else:
            path = Path(rest if named else given)
            for file, format, beside in files_of(path, kind):
                inside = file.resolve().relative_to(path.resolve().parent) if path.is_dir() else Path(file.name)
                source = InputFile(file, inside.as_posix(), inputs, kind, named or format, beside)
                sources.setdefault(str(file.resolve()), source)
        inputs += len(sources) > known  # the parts of a set, each named, are one input
    if not sources:
        raise InputError("no input files given")
    return list(sources.values())


def named(paths: Sequence[str | Path], format: str) -> list[str]:
    """The inputs with the name of their format before them, where there is one."""
    return [f"{format}:{path}" if format else str(path) for path in paths]


def detect(source: InputFile) -> str:
    """The format of a file, by its first record, and by its name where that does not tell."""
    path = source.path
    if suffix(path) in (".txt", ".md"):
        return "text"
    start = json_stream.head(path).lstrip()
    if start.startswith((b"{", b"[")):
        return _of_json(source)
    header = start.split(b"\n", 1)[0].lower()
    if source.kind == "passages" and header.strip() == b"<doc>":
        return "trec"
    if source.kind == "passages" and re.match(rb"\S*\d\S*\t[^\t]+(\t[^\t]*)?$", header.rstrip(b"\r")):
        return "msmarco"
    if header.startswith(b"id\t") or (suffix(path) == ".tsv" and source.kind == "passages"):
        return "psgs_w100"
    if source.kind == "questions" and re.match(rb"[^\s\[]+\t(?!\s*\"?\[|answers?\s*$)", header):
        return "qrels"  # a name without a space, and no list behind it
    if source.kind == "questions" and (b"\t" in header or suffix(path) in (".tsv", ".csv")):
        return "dpr_qa"
    if suffix(path) in (".jsonl", ".ndjson", ".json"):
        return "jsonl"  # empty, or broken in its first line: reading says which
    raise InputError(
        f"{path}: does not look like any of {_able(source.kind)}; write FORMAT: before its name, or rename it"
    )


def _of_json(source: InputFile) -> str:
    record = json_stream.first(source.path) or {}
    if source.kind == "passages" and ASKED & set(record) and "text" not in record and not _sign("passages", record):
        raise InputError(f"{source.path}:1: questions ({', '.join(record)}), and no passages with them")
    if source.kind == "questions" and not ({"_id", *ASKED} & set(record)) and {"text", "contents"} & set(record):
        raise InputError(f"{source.path}:1: passages ({', '.join(record)}), and no questions")
    name = _sign(source.kind, record) or ("squad" if json_stream.in_data(source.path) else "jsonl")
    if name == "jsonl" and record and not {"id", "text", "question"} & set(record):
        fields = ", ".join(record)
        raise InputError(f"{source.path}:1: {source.kind} in none of the formats {_able(source.kind)}; it has {fields}")
    return name


def _sign(kind: Kind, record: Fields) -> str | None:
    fits = (name for name, fields in SIGNS[kind] if fields <= set(record))
    return next((name for name in fits if SHAPES.get(name, bool)(record)), None)


def digest(source: InputFile) -> str:
    """SHA-256 of the content of a source."""
    return tfds_source.digest(source) if source.format == "tfds" else files.file_sha256(source.path)


def _format(source: InputFile) -> tuple[str, Format]:
    name = source.format or detect(source)
    format = FORMATS[name]
    if getattr(format, source.kind) is None:
        raise InputError(f"{source.path}: {name} has no {source.kind}; formats that have: {_able(source.kind)}")
    return name, format


def _able(kind: Kind) -> str:
    return ", ".join(name for name, format in FORMATS.items() if getattr(format, kind) is not None)


def _items(source: InputFile, format: Format, report: OnBad | None) -> Iterator[tuple[int, Any]]:
    """(line, passage or question) for everything in a source; bad records are refused or reported."""
    parse = getattr(format, source.kind)
    name = stem(source.name)
    for row in format.rows(source, report):
        try:
            for item in parse(row.fields, f"{name}-{row.number}"):
                if isinstance(item, BadLine):
                    refuse(f"{source.path}:{row.line}: {item}", report)
                else:
                    yield row.line, item
        except BadLine as bad:
            refuse(f"{source.path}:{row.line}: {bad}", report)
