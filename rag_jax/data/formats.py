"""Readers: passages (JSONL, psgs_w100 TSV, folders of text) and questions (JSONL); every error names file and line."""

import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rag_jax import logs
from rag_jax.errors import InputError

OnBad = Callable[[str], None]
T = TypeVar("T")

_PART = re.compile(r"^(?P<stem>.*)-(?P<index>\d+)-of-(?P<count>\d+)(?P<ext>\..*)?$")
_TEXT_SUFFIXES = (".txt", ".md")
_TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Passage:
    """One retrievable text; `document` names the document it was cut from (its own id if it was not cut)."""

    id: str
    title: str
    text: str
    document: str


@dataclass(frozen=True)
class Question:
    """One row of a question file; `extra` keeps the fields this class does not name.

    also_relevant_passage_ids: further right passages, found counts as right and they are no negatives.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_passage_ids: tuple[str, ...] = ()
    target: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    also_relevant_passage_ids: tuple[str, ...] = ()

    @property
    def right_passage_ids(self) -> tuple[str, ...]:
        """All right passages, the positive ones first."""
        return self.positive_passage_ids + self.also_relevant_passage_ids


class Source(NamedTuple):
    """A file to read. `name` does not depend on the machine; files of one part set or folder share an `input`."""

    path: Path
    name: str
    input: int


class Located(NamedTuple):
    """A passage and where it stood: `source` indexes the sources read, `line` is 1-based."""

    passage: Passage
    source: int
    line: int


class _BadLine(ValueError):
    """What is wrong with one line; becomes an InputError with its place, or is counted and skipped."""


def read_passages(
    paths: Sequence[str | Path], *, skip_bad_lines: bool = False, on_bad: OnBad | None = None
) -> Iterator[Passage]:
    """Passages of all inputs in order. `on_bad` hears of each skipped line (default: a line on stderr)."""
    for located in read_located(expand(paths), skip_bad_lines=skip_bad_lines, on_bad=on_bad):
        yield located.passage


def read_located(
    sources: Sequence[Source], *, skip_bad_lines: bool = False, on_bad: OnBad | None = None
) -> Iterator[Located]:
    """Like `read_passages`, over sources from `expand`, each passage with its place. A file without any raises."""
    report = (on_bad or logs.info) if skip_bad_lines else None
    for index, source in enumerate(sources):
        path, line = source.path, 0
        if _suffix(path) in _TEXT_SUFFIXES:
            rows = _text_file(source, report)
        elif _is_tsv(path):
            rows = _tsv(path, report)
        else:
            rows = _jsonl(path, _passage, report)
        for line, passage in rows:
            yield Located(passage, index, line)
        if not line and _suffix(path) not in _TEXT_SUFFIXES:
            raise InputError(f"{path}:1: no passages in this file; remove it from the inputs or fill it")


def read_questions(path: str | Path, *, skip_bad_lines: bool = False) -> list[Question]:
    """All questions of a JSONL file (or of a part set). Ids are unique; with `skip_bad_lines` the first one stays."""
    report = logs.info if skip_bad_lines else None
    seen: dict[str, str] = {}
    questions = []
    for source in expand([path]):
        for line, question in _jsonl(source.path, _question, report):
            place = f"{source.path}:{line}"
            if question.id in seen:
                _bad(f"{place}: duplicate id {question.id!r}, first at {seen[question.id]}", report)
                continue
            seen[question.id] = place
            questions.append(question)
    if not questions:
        raise InputError(f"{path}:1: no questions in this file")
    return questions


def expand(paths: Sequence[str | Path]) -> list[Source]:
    """Files behind the inputs: a file, a glob, a folder of .txt/.md, or a part set by its name or any of its parts."""
    sources: dict[str, Source] = {}
    inputs = 0
    for path in map(Path, paths):
        known = len(sources)
        for file in _expand_one(path):
            inside = file.resolve().relative_to(path.resolve().parent) if path.is_dir() else Path(file.name)
            sources.setdefault(os.path.realpath(file), Source(file, inside.as_posix(), inputs))
        inputs += len(sources) > known  # the parts of a set, each named, are one input
    if not sources:
        raise InputError("no input files given")
    return list(sources.values())


def _expand_one(path: Path) -> list[Path]:
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return _part_set(path) if _PART.match(path.name) else [path]
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path)))
        if not matches:
            raise InputError(f"{path}: no file matches this pattern")
        return [file for match in matches for file in _expand_one(Path(match))]
    stem, dot, suffix = path.name.partition(".")
    patterns = (f"{path.name}-*-of-*", f"{stem}-*-of-*{dot}{suffix}", f"{stem}-*-of-*{dot}{suffix}.gz")
    for pattern in patterns:
        escaped = "*".join(glob.escape(piece) for piece in pattern.split("*"))
        parts = [part for part in sorted(path.parent.glob(escaped)) if _PART.match(part.name)]
        if parts:
            return _part_set(parts[0])
    if _PART.match(path.name):
        return _part_set(path)
    raise InputError(f"{path}: no such file or folder, and no parts {stem}-00000-of-0000N of it")


def _part_set(path: Path) -> list[Path]:
    """All parts of the set that `path` belongs to, in order; a missing one raises."""
    match = _PART.match(path.name)
    assert match is not None
    count, ext = match["count"], match["ext"] or ""
    width = len(match["index"])
    parts = [path.with_name(f"{match['stem']}-{i:0{width}d}-of-{count}{ext}") for i in range(int(count))]
    missing = [part.name for part in parts if not part.exists()]
    if missing or int(match["index"]) >= int(count):
        names = ", ".join(missing[:3]) or f"a part numbered below {count}"
        raise InputError(f"{path}: the set has {int(count)} parts and misses {names}; fetch the missing parts")
    others = [p.name for p in path.parent.glob(f"{glob.escape(match['stem'])}-*-of-*{glob.escape(ext)}")]
    other = [n for n in others if (m := _PART.match(n)) and m["stem"] == match["stem"] and m["count"] != count]
    if other:
        raise InputError(f"{path}: parts of two sets lie together ({other[0]} too); remove the one not meant")
    return parts


def _folder(path: Path) -> list[Path]:
    files, tables = [], []
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if _suffix(file) in _TEXT_SUFFIXES and not name.startswith("."):
                files.append(file)
            elif _suffix(file) in _TABLE_SUFFIXES:
                tables.append(file)
    if tables:
        raise InputError(f"{path}: holds {tables[0].name}; a folder is read as .txt/.md files: name data files singly")
    if not files:
        raise InputError(f"{path}: no .txt or .md file in this folder")
    return files


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _is_tsv(path: Path) -> bool:
    """By name; a name that does not tell (part-00000-of-00002) is decided by its first bytes."""
    name = path.name
    match = _PART.match(name)
    suffix = _suffix(Path(match["stem"] + (match["ext"] or ""))) if match else _suffix(path)
    if suffix in _TABLE_SUFFIXES:
        return suffix == ".tsv"
    for _, raw in _lines(path):
        if raw.lstrip().startswith(b"{"):
            return False
        if raw.lower().startswith(b"id\t"):
            return True
        break
    raise InputError(f"{path}: neither .jsonl, .tsv (also .gz), .txt nor .md, and does not look like one; rename it")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Raw lines with 1-based numbers, without BOM and line end; blank lines are left out."""
    number = 0
    try:
        with open(path, "rb") as head:
            zipped = head.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.rstrip(b"\r\n")
                if number == 1:
                    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        raise InputError(f"{path}:1: UTF-16 text; convert the file to UTF-8 (iconv -f UTF-16 -t UTF-8)")
                    line = line.removeprefix(_BOM)
                if line and not line.isspace():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: broken or truncated gzip ({error}); fetch the file again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise _BadLine("NUL byte; the file is damaged or not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise _BadLine(
            f"not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}); convert the file to UTF-8"
        ) from None


def _bad(message: str, report: OnBad | None) -> None:
    if report is None:
        raise InputError(f"{message}; correct it or pass --skip-bad-lines")
    report(f"skipped {message}")


def _jsonl(path: Path, parse: Callable[[dict[str, Any]], T], report: OnBad | None) -> Iterator[tuple[int, T]]:
    for number, raw in _lines(path):
        try:
            parsed = parse(_object(_decode(raw)))
        except _BadLine as bad:
            _bad(f"{path}:{number}: {bad}", report)
            continue
        yield number, parsed


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadLine(f"broken JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise _BadLine(f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise _BadLine(f"a JSON object is needed, this is {_kind(row)}")
    return row


def _tsv(path: Path, report: OnBad | None) -> Iterator[tuple[int, Passage]]:
    """psgs_w100: a header line, then id, text, title; csv quoting with doubled quotes, one row a line."""
    columns: list[str] | None = None
    for number, raw in _lines(path):
        try:
            try:
                # A quote that is never closed must not swallow the following rows: each line is parsed alone, strictly.
                fields = next(csv.reader([_decode(raw)], delimiter="\t", strict=True))
            except csv.Error as error:
                raise _BadLine(f"broken TSV quoting ({error})") from None
            if columns is None:
                columns = [name.strip().lower() for name in fields]
                if not {"id", "text", "title"} <= set(columns):
                    raise InputError(f"{path}:{number}: the header must name id, text and title, it is {fields}")
                continue
            if len(fields) != len(columns):
                raise _BadLine(f"{len(columns)} columns are needed, this line has {len(fields)}")
            passage = _passage(dict(zip(columns, fields, strict=True)))
        except _BadLine as bad:
            if columns is None:
                raise InputError(f"{path}:{number}: {bad}") from None
            _bad(f"{path}:{number}: {bad}", report)
            continue
        yield number, passage


def _text_file(source: Source, report: OnBad | None) -> Iterator[tuple[int, Passage]]:
    """A whole .txt or .md file as one passage; its title is a leading markdown heading, else the file's stem."""
    path = source.path
    place = f"{path}:1"
    lines: list[str] = []
    try:
        for number, raw in _lines(path):
            place = f"{path}:{number}"
            # Blank lines are left out by `_lines`; a paragraph end is where numbers jump.
            lines += [""] * (number - len(lines) - 1) + [_decode(raw)]
        title = path.name.removesuffix(".gz").rpartition(".")[0]
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        if _suffix(path) == ".md" and lines and (heading := re.match(r"#{1,6}\s+(.*?)[\s#]*$", lines[first])):
            title, lines = heading[1], lines[first + 1 :]
        text = "\n".join(lines).strip()
        if not text:
            raise _BadLine("empty text")
    except _BadLine as bad:
        _bad(f"{place}: {bad}", report)
        return
    yield 1, Passage(source.name, title, text, source.name)


def _passage(row: dict[str, Any]) -> Passage:
    identity = _identity(row)
    title, text = _string(row, "title", empty=True), _string(row, "text")
    document = row.get("document", row.get("doc_id"))
    if document is None or document == "":
        return Passage(identity, title, text, identity)
    if isinstance(document, bool) or not isinstance(document, str | int):
        raise _BadLine(f"the document id must be a string, it is {_kind(document)}")
    return Passage(identity, title, text, str(document))


def _question(row: dict[str, Any]) -> Question:
    target = None if row.get("target") is None else _string(row, "target")
    lists = ("positive_passage_ids", "also_relevant_passage_ids")
    named = {"id", "_id", "question", "answers", "target", *lists}
    return Question(
        id=_identity(row),
        question=_string(row, "question"),
        answers=_strings(row, "answers"),
        **{name: _strings(row, name) for name in lists if name in row},
        target=target,
        extra={name: value for name, value in row.items() if name not in named},
    )


def _identity(row: dict[str, Any]) -> str:
    """The id as a string; whole numbers are taken too, and BEIR's name `_id`."""
    name = "id" if "id" in row or "_id" not in row else "_id"
    if isinstance(row.get(name), int) and not isinstance(row[name], bool):
        return str(row[name])
    return _string(row, name)


def _string(row: dict[str, Any], name: str, empty: bool = False) -> str:
    if name not in row:
        raise _BadLine(f"missing field {name!r}")
    value = row[name]
    if not isinstance(value, str):
        raise _BadLine(f"field {name!r} must be a string, it is {_kind(value)}")
    if not empty and not value.strip():
        raise _BadLine(f"empty {name}")
    return _checked(value, name)


def _strings(row: dict[str, Any], name: str) -> tuple[str, ...]:
    if name not in row:
        raise _BadLine(f"missing field {name!r} (a list of strings)")
    values = row[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _BadLine(f"field {name!r} must be a list of strings, it is {_kind(values)}")
    return tuple(_checked(value, name) for value in values)


def _checked(value: str, name: str) -> str:
    """JSON escapes can smuggle in what UTF-8 cannot hold and what no text contains."""
    if "\0" in value:
        raise _BadLine(f"NUL character in {name}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise _BadLine(f"half a surrogate pair in {name}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list):
        other = next((item for item in value if not isinstance(item, str)), "")
        return f"a list with {_kind(other)} in it"
    return names.get(type(value), "a number")
