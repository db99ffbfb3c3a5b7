"""Look-up from passage ids to rows without the strings: sorted 8-byte hashes beside row numbers, 12 bytes a passage.

Hashes may collide, so a look-up gives candidates, and the caller compares the id that is stored at the row.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """uint64 hash of each id."""
    digests = b"".join(hashlib.blake2b(i.encode("utf-8"), digest_size=8).digest() for i in ids)
    return np.frombuffer(digests, np.dtype("<u8"))


class IdTable:
    """Table that grows by batches, as sorted runs each more than twice the next (a log-structured merge tree).

    So every entry is merged only a logarithmic number of times, and a look-up searches few runs.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        """Adds one batch; `rows` are uint32."""
        self._runs.append(_sorted([(hashes, rows)]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            last = self._runs.pop()
            self._runs[-1] = _sorted([self._runs[-1], last])

    def candidates(self, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """(position in `hashes`, row) for every row added under one of these hashes."""
        for run_hashes, run_rows in self._runs:
            for position, place in matches(run_hashes, hashes):
                yield position, int(run_rows[place])

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """All (hashes, rows), sorted by hash, then row. The table is empty afterwards."""
        runs, self._runs = self._runs, []
        return _sorted(runs)


def matches(sorted_hashes: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(position in `hashes`, position in `sorted_hashes`) of every equal pair."""
    left = np.searchsorted(sorted_hashes, hashes, side="left")
    right = np.searchsorted(sorted_hashes, hashes, side="right")
    for position in np.flatnonzero(right > left):
        for place in range(left[position], right[position]):
            yield int(position), place


def _sorted(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.concatenate([run[0] for run in runs])
    rows = np.concatenate([run[1] for run in runs])
    order = np.lexsort((rows, hashes))
    return hashes[order], rows[order]
