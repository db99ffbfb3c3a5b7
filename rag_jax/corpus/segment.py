"""One part of a corpus on disk: the passages that one build or update wrote. Rows count from its own first one."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.corpus.id_table import hash_ids, matches
from rag_jax.corpus.verified_arrays import Checked, open_npy
from rag_jax.data.readers.formats import Passage
from rag_jax.errors import InputError
from rag_jax.system.block_checksums import Blocks, Entry

TABLES = ("encoder_ids.npy", "encoder_length.npy", "generator_ids.npy", "generator_length.npy")
TEXTS = "passages.jsonl"
AGAIN = "restore the file, or build the corpus again"


class Segment:
    """The files of one segment; each is opened when it is first read.

    first: the row of its first passage in the corpus.
    rows: number of passages.
    entries: entries of the manifest, by file name.
    """

    def __init__(self, directory: Path, first: int, rows: int, entries: Mapping[str, Entry]) -> None:
        self.directory, self.first, self.rows = directory, first, rows
        self._blocks = {name: Blocks(directory / name, entry, AGAIN) for name, entry in entries.items()}

    def passage(self, row: int) -> Passage:
        blocks, data = self._texts
        start, stop = (int(end) for end in self.offsets[row : row + 2])
        if not 0 <= start < stop <= len(data):
            raise InputError(
                f"{self.directory / 'offsets.npy'}: damaged: row {row} is bytes {start} to {stop}; {AGAIN}"
            )
        blocks.verify(data, start, stop)
        try:
            return Passage(**json.loads(data[start:stop].tobytes()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{blocks.path}: damaged: row {row} is no passage ({error}); {AGAIN}") from error

    def hold(self) -> None:
        """Opens the files other than the token tables: offsets, id table, texts."""
        _ = self.offsets, self.id_table, self._texts

    def candidates(self, passage_ids: Sequence[str]) -> list[tuple[int, int]]:
        """(position in `passage_ids`, row) for every row whose id has the same hash; compare the ids themselves."""
        hashes, rows = self.id_table
        places = list(matches(hashes, hash_ids(passage_ids)))
        found = rows[[place for _, place in places]].tolist() if places else []
        if any(row >= self.rows for row in found):
            raise InputError(
                f"{self.directory / 'id_rows.npy'}: damaged: names row {max(found)} of {self.rows}; {AGAIN}"
            )
        return [(position, row) for (position, _), row in zip(places, found, strict=True)]

    def array(self, name: str, dtype: Any, shape: tuple[int, ...] | None = None) -> Checked:
        """A memory-mapped file; InputError where it is unreadable or of another type or shape."""
        return open_npy(self.directory / name, self._known(name), AGAIN, dtype, shape)

    def _known(self, name: str) -> Blocks:
        if name not in self._blocks:
            raise InputError(f"{self.directory / name}: not in the manifest of the corpus; {AGAIN}")
        return self._blocks[name]

    @cached_property
    def offsets(self) -> Checked:
        return self.array("offsets.npy", "<u8", (self.rows + 1,))

    @cached_property
    def id_table(self) -> tuple[np.ndarray, Checked]:
        """(hashes, rows) of the ids, sorted by hash; 8 + 4 bytes a passage.

        The hashes are verified as a whole, because a bisection jumps across the file.
        """
        return self.array("id_hashes.npy", "<u8").whole(), self.array("id_rows.npy", "<u4")

    @cached_property
    def _texts(self) -> tuple[Blocks, np.ndarray]:
        blocks = self._known(TEXTS)
        return blocks, blocks.map()
