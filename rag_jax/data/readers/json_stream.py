"""Reads the records of a JSON file: JSON lines, one array, the array `data` of one object (SQuAD; `Data` of TriviaQA),
or one object of records by their ids (PubMedQA).

An array is read a block at a time, so memory grows with its largest record, not with the file.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rag_jax.data.readers.lines import UNREADABLE, json_lines, opened, unreadable, without_bom
from rag_jax.data.readers.rows import OnBad, Row, kind, refuse
from rag_jax.data.readers.sources import InputFile
from rag_jax.errors import InputError

BLOCK = 1 << 18
_MARGIN = 16  # a value cut off by the end of a block fails, or ends, at most this far before it
_SCALAR = rb'("(?:[^"\\]|\\.)*"|[\w.+-]+)'
_ARRAY = re.compile(rb"\s*\[")
_DATA = re.compile(rb'\s*\{\s*(?:"[^"]*"\s*:\s*' + _SCALAR + rb'\s*,\s*)*"[dD]ata"\s*:\s*\[')
_KEYED = re.compile(rb'\s*\{\s*\n\s*"[^"]*"\s*:\s*\{')  # a line end within: no line of JSON lines
_DECODER = json.JSONDecoder()


def records(source: InputFile, report: OnBad | None) -> Iterator[Row]:
    """Every record of the file, with the line on which it begins."""
    path = source.path
    start = head(path)
    held = next((read for sign, read in _HELD if sign.match(start)), None)
    if held is None:
        yield from json_lines(path, report)
        return
    with opened(path) as stream:
        for number, (line, value) in enumerate(held(_Text(path, stream)), start=1):
            if isinstance(value, dict):
                yield Row(line, number, value)
            else:
                refuse(f"{path}:{line}: record {number}: a JSON object is needed, this is {kind(value)}", report)


def head(path: Path) -> bytes:
    """The first 65,536 bytes of a file, unzipped, without BOM."""
    try:
        with opened(path) as stream:
            return without_bom(path, stream.read(1 << 16))
    except UNREADABLE as error:
        raise unreadable(path, 0, error) from error


def first(path: Path) -> Any:
    """The first record; None if there is none or it is broken, which `records` reports with its position."""
    try:
        row = next(records(InputFile(path, path.name, 0), report=lambda message: None), None)
    except InputError:
        return None
    return row.fields if row else None


def in_data(path: Path) -> bool:
    """Whether the records are in the array `data` of one object."""
    return bool(_DATA.match(head(path)))


class _Text:
    """Incremental JSON parser of a file; buffer[at:] is read but not yet parsed, and `line` is the line of `at`."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at, self.line = "", 0, 1

    def array(self) -> Iterator[tuple[int, Any]]:
        """Elements of the array that is the whole file, each with its line."""
        yield from self._elements()
        self._end()

    def keyed(self) -> Iterator[tuple[int, Any]]:
        """Values of the object that is the whole file, each with its line; the key of a value becomes its `id`."""
        for name in self._names():
            self._next()
            line, value = self.line, self._value()
            yield line, {"id": name} | value if isinstance(value, dict) else value
        self._end()

    def data(self) -> Iterator[tuple[int, Any]]:
        """Elements of the array `data` of the object that is the whole file; its other members are skipped."""
        for name in self._names():
            if name in ("data", "Data"):
                yield from self._elements()
            else:
                self._value()
        self._end()

    def _names(self) -> Iterator[str]:
        """The names of an object; the caller must read the value of each before it takes the next."""
        self._take("{", "")
        while True:
            if self._next() not in ('"', ""):
                self._take('"', "where a name begins")
            name = self._value()
            self._take(":", f"after the name {name!r}")
            yield name
            if self._take(",}", f"after {name!r}") == "}":
                return

    def _elements(self) -> Iterator[tuple[int, Any]]:
        self._take("[", "")
        if self._next() == "]":
            self._move(self.at + 1)
            return
        while True:
            self._next()
            yield self.line, self._value()
            if self._take(",]", "after a record") == "]":
                return

    def _value(self) -> Any:
        """One JSON value; reads more of the file until the value is complete."""
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - _MARGIN
                if cut_off and self._more():
                    continue
                raise self._broken(error) from None
            except (RecursionError, ValueError) as error:
                raise InputError(f"{self.path}:{self.line}: broken JSON ({error}); correct it") from None
            # A number at the end of the buffer may have more digits in the next block.
            if isinstance(value, int | float) and end >= len(self.buffer) - _MARGIN and self._more():
                continue
            self._move(end)
            return value

    def _broken(self, error: json.JSONDecodeError) -> InputError:
        line = self.line + self.buffer.count("\n", self.at, error.pos)
        if error.msg.startswith("Unterminated string") or not self.buffer[error.pos :].strip():
            what = f"the file ends within the record that begins at line {self.line}; fetch it again"
            return InputError(f"{self.path}:{line}: {what}")
        return InputError(f"{self.path}:{line}: broken JSON ({error.msg}); correct it")

    def _take(self, wanted: str, where: str) -> str:
        char = self._next()
        if not char:
            raise InputError(f"{self.path}:{self.line}: the file ends too early, {where}; fetch it again")
        if char not in wanted:
            names = " or ".join(map(repr, wanted))
            raise InputError(
                f"{self.path}:{self.line}: broken JSON ({names} is needed {where}, not {char!r}); correct it"
            )
        self._move(self.at + 1)
        return char

    def _end(self) -> None:
        if self._next():
            raise InputError(f"{self.path}:{self.line}: there is more after the end of the JSON value; remove it")

    def _next(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            at = self.at
            while at < len(self.buffer) and self.buffer[at] in " \t\r\n":
                at += 1
            self._move(at)
            if at < len(self.buffer):
                return self.buffer[at]
            if not self._more():
                return ""

    def _move(self, at: int) -> None:
        self.line += self.buffer.count("\n", self.at, at)
        self.at = at

    def _more(self) -> bool:
        """Reads another block; False at the end of the file.

        At least as much as is unparsed, so that the time for a long value, parsed again each time, stays linear.
        """
        here = self.line + self.buffer.count("\n", self.at)
        try:
            raw = self.stream.read(max(BLOCK, len(self.buffer) - self.at))
        except UNREADABLE as error:
            raise unreadable(self.path, here - 1, error) from error
        if b"\0" in raw:
            line = here + raw[: raw.index(b"\0")].count(b"\n")
            raise InputError(f"{self.path}:{line}: NUL byte; the file is damaged or not text")
        try:
            text = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = here + raw[: max(error.start, 0)].count(b"\n")
            byte = error.object[error.start]
            raise InputError(f"{self.path}:{line}: not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8") from None
        if raw:
            self.buffer, self.at = self.buffer[self.at :] + text, 0
        return bool(raw)


_HELD = ((_ARRAY, _Text.array), (_DATA, _Text.data), (_KEYED, _Text.keyed))  # beginning of a file -> its reader
