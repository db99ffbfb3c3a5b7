"""Arrays in several files as one array, stacked along the rows: sliced and indexed by rows, never read as a whole."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

OPEN = 256  # parts kept open at a time: a memory map holds a file descriptor, and there may be thousands of parts


class ArrayFile(NamedTuple):
    """One file of a stacked array.

    rows: number of rows in it.
    open: returns them as an array or array-like, usually a memory map.
    """

    rows: int
    open: Callable[[], Any]


class StoredRows:
    """Base class of read-only array-likes on disk: shape, dtype, len, iteration, and `a[rows]` or `a[rows, columns]`.

    rows: a number, a slice, or an array of numbers or booleans. A subclass defines `shape`, `dtype` and `_take`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        rows, *rest = key if isinstance(key, tuple) else (key,)
        n = len(self)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(n)
            if step == 1:
                found = self._slice(start, max(start, stop))
            else:
                found = self._take(np.arange(start, stop, step))
            return found[(slice(None), *rest)] if rest else found
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (n,):
                raise IndexError(f"a mask of shape {index.shape} over {n} rows")
            index = np.flatnonzero(index)
        elif index.size and not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"rows are numbers, a slice or a mask, not {index.dtype}")
        flat = index.astype(np.int64).reshape(-1)
        flat = np.where(flat < 0, flat + n, flat)
        if flat.size and not (flat.min() >= 0 and flat.max() < n):
            raise IndexError(f"row {int(index.reshape(-1)[(flat < 0) | (flat >= n)][0])} of {n} rows")
        found = self._take(flat).reshape((*index.shape, *self.shape[1:]))
        return found[(*(slice(None),) * index.ndim, *rest)]

    def astype(self, dtype: Any) -> np.ndarray:
        """The whole array in memory, as this type."""
        return self.__array__(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows in files are copied when they become one array")
        return np.array(self._slice(0, len(self)), dtype or self.dtype)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        return self._take(np.arange(start, stop))

    def _take(self, rows_X: np.ndarray) -> np.ndarray:
        """A copy of these rows, which are in range."""
        raise NotImplementedError


class Stacked(StoredRows):
    """Array-like of several parts, stacked along the rows; all have the same dtype and columns.

    columns: shape of one row.
    """

    def __init__(self, parts: Sequence[ArrayFile], dtype: Any, columns: tuple[int, ...] = ()) -> None:
        self._parts = [part for part in parts if part.rows]
        self._first = np.cumsum([0, *(part.rows for part in self._parts)])
        self._open: OrderedDict[int, Any] = OrderedDict()
        self.shape, self.dtype = (int(self._first[-1]), *columns), np.dtype(dtype)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._first, start, "right")) - 1
        pieces = []
        for i in range(first, len(self._parts)):
            begin = int(self._first[i])
            if begin >= stop:
                break
            pieces.append(self._part(i)[max(start - begin, 0) : stop - begin])
        if not pieces:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, rows_X: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows_X), *self.shape[1:]), self.dtype)
        owner_X = np.searchsorted(self._first, rows_X, "right") - 1
        for i in np.unique(owner_X):
            here_X = np.flatnonzero(owner_X == i)
            out[here_X] = self._part(int(i))[rows_X[here_X] - self._first[i]]
        return out

    def _part(self, i: int) -> Any:
        if i not in self._open:
            self._open[i] = self._parts[i].open()
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(i)
        return self._open[i]


class Scaled(StoredRows):
    """Array-like of int8 rows times their scales, float32 [N,E]."""

    def __init__(self, rows_NE: StoredRows, scale_N: StoredRows) -> None:
        self._rows, self._scale = rows_NE, scale_N
        self.shape, self.dtype = rows_NE.shape, np.dtype(np.float32)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        return self._rows[start:stop].astype(np.float32) * self._scale[start:stop, None]

    def _take(self, rows_X: np.ndarray) -> np.ndarray:
        return self._rows[rows_X].astype(np.float32) * self._scale[rows_X][:, None]


def stack(parts: Sequence[ArrayFile], dtype: Any, columns: tuple[int, ...] = ()) -> Any:
    """The parts as one array-like; a single part is opened as it is."""
    return parts[0].open() if len(parts) == 1 else Stacked(parts, dtype, columns)
