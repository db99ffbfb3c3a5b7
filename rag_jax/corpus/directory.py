"""The corpus directory: passages in a random-access store, and the token table for encoder and generator.

manifest.json          counts, inputs and tokenizers with their hashes, lengths, segments; written last
passages.jsonl         {"id", "title", "text", "document"} a line; offsets.npy uint64 [N+1]
encoder_ids.npy        [N, Le] [CLS] title [SEP] text [SEP], padded; encoder_length.npy [N]
generator_ids.npy      [N, Lg] `title / text` without specials, padded; generator_length.npy [N]
id_hashes.npy, id_rows.npy   row of an id; tokenizers/encoder, tokenizers/generator
segments/0001/         the same files for the passages of an update; deleted.npy int64, deleted rows

An update writes a new directory, which shares the files of the one before. Rows keep their numbers.
"""

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from rag_jax.corpus.segment import AGAIN, Segment
from rag_jax.corpus.stacked_arrays import ArrayFile, stack
from rag_jax.corpus.verified_arrays import open_npy
from rag_jax.data import tokenizers
from rag_jax.data.readers.formats import Passage
from rag_jax.data.tokenizers import Tokenizer, Wrapping
from rag_jax.errors import InputError
from rag_jax.system import files
from rag_jax.system.block_checksums import Entry

KIND, VERSION, OLDEST = "corpus", 3, 2  # version 2 has no checksums by block
DELETED = "deleted.npy"


class Corpus:
    """An opened corpus directory: a sequence of passages, read from disk when they are asked for.

    len, rows and iteration include deleted passages, so that row i of the embeddings stays the passage at row i;
    `live_N` marks them, and no id leads to one.

    hash: of the corpus as it is now.
    chain: (hash, number of rows) of the corpus as it was built, and after each update.
    segments: the parts with passages: one of the build, one of each update.
    encoder_ids, generator_ids: token tables [N, L], padded; encoder_length, generator_length: uint16 [N].
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.hash: str = manifest["hash"]
        ends = np.cumsum([entry["n_passages"] for entry in manifest["segments"]]).tolist()
        self.chain = [(entry["hash"], end) for entry, end in zip(manifest["segments"], ends, strict=True)]
        self.segments = [
            Segment(directory / entry["directory"], end - entry["n_passages"], entry["n_passages"], self._files(entry))
            for entry, end in zip(manifest["segments"], ends, strict=True)
            if entry["n_passages"]
        ]
        # array-like, see stacked_arrays.StoredRows
        self.encoder_ids = self._table("encoder_ids.npy", manifest["dtype"]["encoder"], manifest["lengths"]["encoder"])
        self.encoder_length = self._table("encoder_length.npy", "<u2")
        self.generator_ids = self._table(
            "generator_ids.npy", manifest["dtype"]["generator"], manifest["lengths"]["generator"]
        )
        self.generator_length = self._table("generator_length.npy", "<u2")

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Opens a finished corpus. InputError for anything else, and later, where something is read, for damage."""
        directory = Path(directory)
        manifest = files.read_manifest(directory, KIND, VERSION, OLDEST)
        with files.described(directory / files.MANIFEST, AGAIN):
            whole = cls(directory, manifest)
            n, ends = manifest["n_passages"], [0, *(end for _, end in whole.chain)]
            if not isinstance(whole.hash, str) or type(n) is not int or n != ends[-1] or not ends == sorted(ends):
                raise ValueError(f"hash {whole.hash!r}, {n!r} passages in segments up to {ends}")
            _ = manifest["tokenizers"]["encoder"]["hash"], manifest["tokenizers"]["generator"]["hash"]
            return whole

    def __len__(self) -> int:
        return self.manifest["n_passages"]

    def __getitem__(self, row: int) -> Passage:
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        segment = self.segments[bisect_right(self.segments, row, key=lambda segment: segment.first) - 1]
        return segment.passage(row - segment.first)

    @cached_property
    def live_N(self) -> np.ndarray | None:
        """bool [N], False for rows that were deleted or replaced; None where none was."""
        if not self.manifest["n_deleted"]:
            return None
        live_N = np.ones(len(self), bool)
        path = self.directory / DELETED
        rows = open_npy(path, self.manifest["files"].get(DELETED, {}), AGAIN, "<i8").whole()
        if len(rows) != self.manifest["n_deleted"] or rows.min() < 0 or rows.max() >= len(self):
            raise InputError(f"{path}: damaged: not {self.manifest['n_deleted']} rows of {len(self)}; {AGAIN}")
        live_N[rows] = False
        return live_N

    @property
    def n_live(self) -> int:
        """Number of passages that are not deleted."""
        return len(self) - self.manifest["n_deleted"]

    @property
    def n_cut(self) -> int:
        """Number of documents that were cut into passages at build."""
        return self.manifest["n_cut"]

    def shared_rows(self, other: "Corpus") -> int:
        """Number of rows, from the first, that both corpora have in common: those of the same build and updates."""
        known = set(other.chain)
        return max((rows for digest, rows in self.chain if (digest, rows) in known), default=0)

    def is_update_of(self, corpus_hash: str, rows: int) -> bool:
        """Whether this is the corpus with that hash and number of rows, or one that updates made from it."""
        return (corpus_hash, rows) in self.chain

    def hold(self) -> None:
        """Opens every file now, so that the corpus stays readable when another directory takes over its name."""
        first_S = np.array([segment.first for segment in self.segments], np.int64)
        for table in (self.encoder_ids, self.encoder_length, self.generator_ids, self.generator_length):
            table[first_S]
        for segment in self.segments:
            segment.hold()
        _ = self.live_N, self.encoder_tokenizer, self.generator_tokenizer

    def row(self, passage_id: str) -> int:
        """Row of a passage id; InputError if there is none."""
        return int(self.rows([passage_id])[0])

    def rows(self, passage_ids: Sequence[str], missing: int | None = None) -> np.ndarray:
        """Rows, int64 [n], of passage ids; an unknown one gives `missing`, or raises InputError where that is None."""
        rows = np.full(len(passage_ids), -1, np.int64)
        for position, row in self._candidates(passage_ids):
            if self._live(row) and self[row].id == passage_ids[position]:
                rows[position] = row
        unknown = np.flatnonzero(rows < 0)
        if len(unknown) and missing is None:
            passage_id = passage_ids[unknown[0]]
            cut = self.pieces(passage_id)
            why = f"was cut into {len(cut)} passages ({self[cut[0]].id} ...)" if cut else "is not in this corpus"
            raise InputError(f"{self.directory}: passage {passage_id!r} {why}")
        if missing is not None:
            rows[unknown] = missing
        return rows

    def pieces(self, passage_id: str) -> list[int]:
        """Rows of a passage, or of all pieces of a document that was cut at build; empty if the id is unknown."""
        rows = [row for _, row in self._candidates([passage_id])]
        for row in rows:
            whole = range(row, row + 1) if self[row].id == passage_id else self._cut(passage_id, row, rows)
            if live := [piece for piece in whole if self._live(piece)]:
                return live
        return []

    def cut_from(self, row: int) -> str | None:
        """The id of the document that the passage at this row was cut from at build; None if it was not cut.

        An id such as d1-0 alone does not tell: a file may have passages with such ids.
        """
        document, dash, number = self[row].id.rpartition("-")
        if not self.n_cut or not dash or not number.isdecimal():
            return None
        rows = [first for _, first in self._candidates([document])]
        return document if any(row in self._cut(document, first, rows) for first in rows) else None

    def deleted(self, passage_id: str) -> bool:
        """Whether a passage, or a document, of this id was deleted and not added again."""
        names = (passage_id, f"{passage_id}-0")
        was = any(self[row].id in names for _, row in self._candidates([passage_id]))
        return was and not self.pieces(passage_id)

    @cached_property
    def encoder_tokenizer(self) -> Tokenizer:
        return self._tokenizer("encoder")

    @cached_property
    def generator_tokenizer(self) -> Tokenizer:
        return self._tokenizer("generator")

    def _cut(self, document: str, first: int, found: Sequence[int]) -> range:
        """The rows that a document was cut into, if its first piece is at row `first`; else an empty range.

        found: all rows under the hash of its id.
        """
        if self[first].id != f"{document}-0":
            return range(0)
        last = max((row for row in found if row > first and self[row].id == f"{document}-{row - first}"), default=None)
        # A corpus of an older build has no entry for the last piece: follow the ids, which count up, while the document
        # stays the same.
        if last is None:
            last = first
            while last + 1 < len(self) and self[last + 1].id == f"{document}-{last + 1 - first}":
                if self[last + 1].document != self[first].document:
                    break
                last += 1
            return range(first, last + 1) if last > first else range(0)
        return range(first, last + 1)

    def with_labels(self, wrapping: Wrapping) -> Self:
        """A copy of this corpus whose generator tokenizer wraps labels this way; open files are shared."""
        other = copy.copy(self)
        other.__dict__["generator_tokenizer"] = replace(self.generator_tokenizer, wrapping=wrapping)
        return other

    def _live(self, row: int) -> bool:
        return self.live_N is None or bool(self.live_N[row])

    def _candidates(self, passage_ids: Sequence[str]) -> list[tuple[int, int]]:
        return [
            (position, segment.first + row)
            for segment in self.segments
            for position, row in segment.candidates(passage_ids)
        ]

    def _files(self, segment: dict[str, Any]) -> dict[str, Entry]:
        """Manifest entries of the files of a segment, by file name without the segment's directory."""
        prefix = f"{segment['directory']}/" if segment["directory"] else ""
        known = self.manifest["files"].items()
        return {name.removeprefix(prefix): entry for name, entry in known if name.startswith(prefix)}

    def _tokenizer(self, role: str) -> Tokenizer:
        tokenizer = tokenizers.load(self.directory / "tokenizers" / role)
        expected = self.manifest["tokenizers"][role]["hash"]
        if tokenizer.hash != expected:
            raise InputError(
                f"{self.directory}: the {role} tokenizer has hash {tokenizer.hash[:12]}, "
                f"the manifest says {expected[:12]}; build the corpus again"
            )
        return tokenizer

    def _table(self, name: str, dtype: str, *columns: int) -> Any:
        kind = np.dtype(dtype).newbyteorder("<")
        parts = [ArrayFile(s.rows, partial(s.array, name, kind, (s.rows, *columns))) for s in self.segments]
        return stack(parts, kind, columns)
