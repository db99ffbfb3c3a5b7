"""Arrays in files, each block of which is checked against its checksum when it is first read."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.corpus.stacked_arrays import StoredRows
from rag_jax.errors import InputError
from rag_jax.system.block_checksums import SIZE, Blocks


class Checked(StoredRows):
    """An array in a memory-mapped file (see `StoredRows`), checked by blocks; slices are views of the map.

    data: the whole file as bytes.
    offset: where the array starts in it, in bytes.
    """

    def __init__(self, blocks: Blocks, data: np.ndarray, offset: int, dtype: Any, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._blocks, self._data, self._offset = blocks, data, offset
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize
        stop = offset + shape[0] * self._row_bytes
        if stop > len(data):
            raise InputError(
                f"{blocks.path}: {len(data)} bytes, an array of {shape} {self.dtype} ends at {stop}; {blocks.mend}"
            )
        self._array = data[offset:stop].view(self.dtype).reshape(shape)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        if stop > start:
            at = self._offset + np.array([start, stop], np.int64) * self._row_bytes
            self._blocks.verify(self._data, int(at[0]), int(at[1]))
        return self._array[start:stop]

    def _take(self, rows_X: np.ndarray) -> np.ndarray:
        self._blocks.verify_at(self._data, self._offset + rows_X * self._row_bytes, self._row_bytes)
        return self._array[rows_X]

    def whole(self) -> np.ndarray:
        """The whole array, checked, as a memory map, for a search that jumps across it."""
        return self._slice(0, len(self))


def open_npy(
    path: Path, entry: Mapping[str, Any] | Blocks, mend: str, dtype: Any, shape: tuple[int, ...] | None = None
) -> Checked:
    """Opens a .npy file; InputError where it is unreadable or of another type or shape.

    entry: its entry of the manifest, with checksums.
    mend: what the user can do about damage, for the message.
    shape: the shape it must have; None: any of one dimension.
    """
    blocks = entry if isinstance(entry, Blocks) else Blocks(path, entry, mend)
    data = blocks.map()
    blocks.verify(data, 0, min(SIZE, len(data)))
    head = io.BytesIO(data[:SIZE].tobytes())
    try:
        version = np.lib.format.read_magic(head)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        found, fortran, kind = reader(head)
        if fortran:
            raise ValueError("columns before rows")
    except (ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: not an array file ({error}); {mend}") from error
    wanted = np.dtype(dtype)
    if kind != wanted or (found != shape if shape is not None else len(found) != 1):
        raise InputError(f"{path}: {kind} of shape {found}, the manifest says {wanted} of {shape or 'any'}; {mend}")
    return Checked(blocks, data, head.tell(), wanted, found)
