"""One part of a corpus on disk: what a build or an update wrote. Rows are counted from its own first one."""

import json
import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from rag_jax.data.formats import Passage
from rag_jax.errors import InputError
from rag_jax.retrieval.ids import hash_ids, matches

TABLES = ("encoder_ids.npy", "encoder_length.npy", "generator_ids.npy", "generator_length.npy")


class Segment:
    """The files of one directory; each is opened when something is asked of it."""

    def __init__(self, directory: Path, first: int, rows: int) -> None:
        self.directory, self.first, self.rows = directory, first, rows

    def passage(self, row: int) -> Passage:
        return Passage(**json.loads(self._texts[int(self._offsets[row]) : int(self._offsets[row + 1])]))

    def hold(self) -> None:
        """Opens what is not a table."""
        _ = self._offsets, self._id_table, self._texts

    def candidates(self, passage_ids: Sequence[str]) -> list[tuple[int, int]]:
        """(position in `passage_ids`, row) for every row whose id may be that one."""
        hashes, rows = self._id_table
        return [(position, int(rows[place])) for position, place in matches(hashes, hash_ids(passage_ids))]

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A memory-mapped file; InputError where it is unreadable or of another shape."""
        path = self.directory / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: unreadable ({error}); build the corpus again") from error
        if shape is not None and array.shape != shape:
            raise InputError(f"{path}: shape {array.shape}, the manifest says {shape}; build the corpus again")
        return array

    @cached_property
    def _offsets(self) -> np.ndarray:
        return self.array("offsets.npy", (self.rows + 1,))

    @cached_property
    def _id_table(self) -> tuple[np.ndarray, np.ndarray]:
        return self.array("id_hashes.npy"), self.array("id_rows.npy")

    @cached_property
    def _texts(self) -> mmap.mmap:
        with (self.directory / "passages.jsonl").open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
