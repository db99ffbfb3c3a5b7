"""Rows of different lengths without padding: one flat array, and the position where each row begins in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """N rows of different lengths; row i is values[start_N1[i] : start_N1[i + 1]]. Both may be memory maps."""

    values: np.ndarray
    start_N1: np.ndarray

    def __len__(self) -> int:
        return len(self.start_N1) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.start_N1[row] : self.start_N1[row + 1]]

    def lengths(self, rows: Any = slice(None)) -> np.ndarray:
        """The length of each of these rows, int32."""
        return (self.start_N1[1:][rows] - self.start_N1[:-1][rows]).astype(np.int32)

    def padded(self, rows_n: np.ndarray, width: int, fill: int) -> np.ndarray:
        """These rows as int32 [n, width], cut or padded with `fill`."""
        place_W = np.arange(width)
        out_nW = np.full((len(rows_n), width), fill, np.int32)
        filled_nW = place_W < self.lengths(rows_n)[:, None]
        out_nW[filled_nW] = self.values[(self.start_N1[rows_n][:, None] + place_W)[filled_nW]]
        return out_nW


def joined(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, one after another."""
    lengths_N = np.concatenate([part.lengths() for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), starts(lengths_N))


def starts(lengths_N: np.ndarray) -> np.ndarray:
    """Start of each row of these lengths, and the end of the last, int64 [N + 1]."""
    return np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])


class Growing:
    """Collects rows a few at a time into a `Ragged`."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._values: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        """Appends rows of numbers, or of bytes."""
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        if rows and isinstance(rows[0], bytes):
            self._values.append(np.frombuffer(b"".join(rows), self.dtype))  # type: ignore[arg-type]
        else:
            self._values.append(np.fromiter(chain.from_iterable(rows), self.dtype, int(lengths.sum())))
        self._lengths.append(lengths)

    def whole(self) -> Ragged:
        """All rows so far; it is empty afterwards."""
        values, lengths = self._values, self._lengths
        self._values, self._lengths = [], []
        whole = np.concatenate([np.zeros(0, self.dtype), *values])
        return Ragged(whole, starts(np.concatenate([np.zeros(0, np.int32), *lengths])))
