"""Pass 1 of a build: appends passages to disk, with offsets, the row of every id, and the input line of each."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rag_jax.corpus.id_table import IdTable, hash_ids
from rag_jax.data.readers.formats import InputFile, Located, Passage

_LINE_BITS = 40  # a place is source << 40 | line


class Column:
    """A one-dimensional .npy file that is appended to and can be read while it grows."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._file = path.open("w+b")
        self._dtype, self._count = np.dtype(dtype), 0
        self._header()
        self._start = self._file.tell()

    def extend(self, values: Iterable[int]) -> None:
        array = np.fromiter(values, self._dtype)
        self._file.seek(0, os.SEEK_END)
        self._file.write(array.tobytes())
        self._count += len(array)

    def __getitem__(self, index: int) -> int:
        self._file.seek(self._start + index * self._dtype.itemsize)
        return int(np.frombuffer(self._file.read(self._dtype.itemsize), self._dtype)[0])

    def close(self) -> None:
        self._file.seek(0)
        self._header()  # again, now with the final count
        if self._file.tell() != self._start:  # NumPy pads the header so that the count can grow
            raise AssertionError("the .npy header changed its size")
        self._file.close()

    def _header(self) -> None:
        fields = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, fields)


class PassageStore:
    """Writes passages.jsonl, offsets.npy and the id table of a directory.

    The input line of every passage is in places.npy, for messages on repeated ids; it is removed at the end.
    """

    def __init__(self, directory: Path, sources: Sequence[InputFile]) -> None:
        self.directory, self.sources = directory, sources
        self.texts = (directory / "passages.jsonl").open("w+b")
        self.offsets = Column(directory / "offsets.npy", "<u8")
        self.places = Column(directory / "places.npy", "<u8")
        self.ids = IdTable()
        self.offsets.extend([0])
        self.count, self.end = 0, 0
        self.per_input = [0] * (sources[-1].input + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.texts.close()
        self.offsets.close()
        self.places.close()
        (self.directory / "places.npy").unlink()
        if kind is None:
            hashes, rows = self.ids.merged()
            np.save(self.directory / "id_hashes.npy", hashes)
            np.save(self.directory / "id_rows.npy", rows)

    def duplicates(self, batch: Sequence[Located]) -> dict[int, str]:
        """Positions in the batch whose id is taken -> "file:line" of its first use.

        The id of a document that was cut is taken as well as those of its pieces.
        """
        found: dict[int, str] = {}
        ids = [located.passage.id for located in batch]
        for position, row in self.ids.candidates(hash_ids(ids)):
            if self._is(row, ids[position]):
                found[position] = self._place(self.places[row])
        first: dict[str, int] = {}
        for position, passage_id in enumerate(ids):
            if first.setdefault(passage_id, position) != position:
                found.setdefault(position, self._place(_place(batch[first[passage_id]])))
        return found

    def add(self, batch: Sequence[Located], pieces: Sequence[Sequence[Passage]]) -> None:
        """Writes the pieces of each passage.

        The id of a passage that was cut leads to its first and its last piece. The last is needed because the next
        passage may have an id that looks like a further piece.
        """
        rows: list[int] = []
        ids: list[str] = []
        lines: list[bytes] = []
        places: list[int] = []
        for located, cuts in zip(batch, pieces, strict=True):
            if len(cuts) > 1:
                first = self.count + len(lines)
                ids += [located.passage.id] * 2
                rows += [first, first + len(cuts) - 1]
            for piece in cuts:
                ids.append(piece.id)
                rows.append(self.count + len(lines))
                lines.append(_line(piece))
                places.append(_place(located))
            self.per_input[self.sources[located.source].input] += len(cuts)
        self.texts.seek(0, os.SEEK_END)
        self.texts.write(b"".join(lines))
        ends = self.end + np.cumsum([len(line) for line in lines], dtype=np.int64)
        self.offsets.extend(ends.tolist())
        self.places.extend(places)
        self.ids.add(hash_ids(ids), np.array(rows, np.uint32))
        self.count, self.end = self.count + len(lines), int(ends[-1])

    def _is(self, row: int, passage_id: str) -> bool:
        self.texts.seek(self.offsets[row])
        stored = json.loads(self.texts.readline())["id"]
        return stored in (passage_id, f"{passage_id}-0")

    def _place(self, place: int) -> str:
        return f"{self.sources[place >> _LINE_BITS].path}:{place & ((1 << _LINE_BITS) - 1)}"


def _place(located: Located) -> int:
    return located.source << _LINE_BITS | located.line


def _line(passage: Passage) -> bytes:
    row = {"id": passage.id, "title": passage.title, "text": passage.text, "document": passage.document}
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
