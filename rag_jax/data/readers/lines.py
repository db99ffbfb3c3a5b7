"""Readers of line-based files, zipped or not: JSON lines, tables, pairs of files, whole texts."""

import ast
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from rag_jax.data.readers.rows import BadLine, Fields, OnBad, Row, kind, refuse
from rag_jax.data.readers.sources import InputFile, suffix
from rag_jax.errors import InputError

_BOM = b"\xef\xbb\xbf"


def opened(path: Path) -> BinaryIO:
    """Opens a file as bytes, unzipped if its first bytes are those of gzip, whatever its name."""
    with open(path, "rb") as head:
        zipped = head.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else open(path, "rb")  # type: ignore[return-value]


def without_bom(path: Path, start: bytes) -> bytes:
    """The first bytes of a file without UTF-8's byte order mark; InputError for UTF-16's."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}:1: UTF-16 text; convert the file to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return start.removeprefix(_BOM)


UNREADABLE = (EOFError, OSError, zlib.error)  # errors that reading an opened file may raise


def unreadable(path: Path, line: int, error: Exception) -> InputError:
    """The InputError for one of UNREADABLE that occurred after `line` lines."""
    if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error):
        return InputError(f"{path}:{line + 1}: broken or truncated gzip ({error}); fetch the file again")
    return InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def lines(path: Path, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Raw lines with 1-based numbers, without BOM and line ends. blank: also give blank lines."""
    number = 0
    try:
        with opened(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.rstrip(b"\r\n")
                if number == 1:
                    line = without_bom(path, line)
                if blank or (line and not line.isspace()):
                    yield number, line
    except UNREADABLE as error:
        raise unreadable(path, number, error) from error


def decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise BadLine("NUL byte; the file is damaged or not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise BadLine(f"not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}); convert the file to UTF-8") from None


def json_lines(path: Path, report: OnBad | None) -> Iterator[Row]:
    """A JSON object a line."""
    for number, raw in lines(path):
        try:
            fields = json_object(decode(raw))
        except BadLine as bad:
            refuse(f"{path}:{number}: {bad}", report)
            continue
        yield Row(number, number, fields)


def json_object(line: str) -> Fields:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine(f"broken JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BadLine(f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadLine(f"a JSON object is needed, this is {kind(row)}")
    return row


def cells(line: str) -> list[str]:
    """The columns of a tab-separated line with csv quoting (doubled quotes).

    Each line is parsed alone, strictly: a quote that is never closed must not swallow the following rows.
    """
    limit = csv.field_size_limit(max(len(line), 1))  # the library's own, 131,072 characters, is less than a long text
    try:
        return next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error as error:
        raise BadLine(f"broken TSV quoting ({error})") from None
    finally:
        csv.field_size_limit(limit)


def table(path: Path, needed: tuple[str, ...], report: OnBad | None) -> Iterator[Row]:
    """Rows of a tab-separated file; its header line must name at least the columns `needed`."""
    columns: list[str] | None = None
    for number, raw in lines(path):
        try:
            values = cells(decode(raw))
            if columns is None:
                columns = [name.strip().lower() for name in values]
                if not set(needed) <= set(columns):
                    names = f"{', '.join(needed[:-1])} and {needed[-1]}"
                    raise InputError(f"{path}:{number}: the header must name {names}, it is {values}")
                continue
            if len(values) != len(columns):
                raise BadLine(f"{len(columns)} columns are needed, this line has {len(values)}")
        except BadLine as bad:
            if columns is None:
                raise InputError(f"{path}:{number}: {bad}") from None
            refuse(f"{path}:{number}: {bad}", report)
            continue
        yield Row(number, number, dict(zip(columns, values, strict=True)))


def passage_table(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """psgs_w100.tsv: columns id, text and title."""
    return table(source.path, ("id", "text", "title"), report)


def question_table(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """DPR's question files: question, tab, list of answers in Python's notation; with or without a header."""
    for number, raw in lines(source.path):
        try:
            values = cells(decode(raw))
            if number == 1 and [value.strip().lower() for value in values] in (
                ["question", f"answer{s}"] for s in ("", "s")
            ):
                continue
            if len(values) != 2:
                raise BadLine(
                    f"a question, a tab and a list of answers are needed, this line has {len(values)} columns"
                )
            fields = {"question": values[0], "answers": _python_list(values[1])}
        except BadLine as bad:
            refuse(f"{source.path}:{number}: {bad}", report)
            continue
        yield Row(number, number, fields)


def _python_list(text: str) -> list[object]:
    try:
        values = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, list):
        raise BadLine(f"the second column must be a list, as ['one', 'two'], it is {text[:40]!r}")
    return values


def pairs(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """NAME.source and NAME.target of Hugging Face's RAG: one question per line, its answer in the other file."""
    if source.beside is None:
        raise InputError(f"{source.path}: a pair of files NAME.source and NAME.target is needed")
    short = object()
    both = zip_longest(_to_last(source.path), _to_last(source.beside), fillvalue=(0, short))
    for number, ((_, question), (_, answer)) in enumerate(both, start=1):
        for raw, path, other in ((question, source.path, source.beside), (answer, source.beside, source.path)):
            if raw is short:
                raise InputError(
                    f"{path}:{number}: the file ends, but {other.name} has a line {number}; they must pair"
                )
        path = source.path
        try:
            fields = {"question": decode(question)}  # type: ignore[arg-type]
            path = source.beside
            text = decode(answer)  # type: ignore[arg-type]
            if not text.strip():
                raise BadLine("empty line; every question needs its answer")
        except BadLine as bad:
            refuse(f"{path}:{number}: {bad}", report)
            continue
        yield Row(number, number, fields | {"answers": [text.strip()]})


def _to_last(path: Path) -> Iterator[tuple[int, bytes]]:
    """All lines up to the last that is not blank, including blank ones."""
    waiting = []
    for number, line in lines(path, blank=True):
        waiting.append((number, line))
        if line.strip():
            yield from waiting
            waiting.clear()


def whole_text(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """A .txt or .md file as one passage; its title is a leading markdown heading, else the file's stem."""
    path = source.path
    place = f"{path}:1"
    found: list[str] = []
    try:
        for number, raw in lines(path, blank=True):
            place = f"{path}:{number}"
            found.append(decode(raw))
        title = path.name.removesuffix(".gz").rpartition(".")[0]
        first = next((i for i, line in enumerate(found) if line.strip()), 0)
        if suffix(path) == ".md" and found and (heading := re.match(r"#{1,6}\s+(.*?)[\s#]*$", found[first])):
            title, found = heading[1], found[first + 1 :]
        text = "\n".join(line if line.strip() else "" for line in found).strip()
        if not text:
            raise BadLine("empty text")
    except BadLine as bad:
        refuse(f"{place}: {bad}", report)
        return
    yield Row(1, 1, {"id": source.name, "title": title, "text": text})
