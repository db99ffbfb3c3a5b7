"""Checksums of a file by blocks of 64 KiB, each verified when it is first read.

A manifest holds, beside the sha256 of a whole file, the XXH3 (64 bits) of each of its blocks. XXH3 runs at over 10 GB/s
on one core, five times as fast as zlib's CRC-32, so it does not slow a first pass over the rows, and it misses one
damaged block in 2^64. It does not protect against intended changes; the sha256 does. A block is 64 KiB because a single
random read has to verify a whole block, and the system reads about as much ahead for it anyway.
"""

import base64
import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from rag_jax.errors import InputError

SIZE = 1 << 16
AT_ONCE = 64  # blocks a thread verifies in one task
FIELD, DTYPE = "xxh3", "<u8"  # key of a file's entry in a manifest: base64 of its block sums, and their type

Entry = dict[str, Any]  # {"bytes", "sha256", "xxh3"} of a file


def of_file(path: Path) -> Entry:
    """The manifest entry of a file: size, sha256 and block sums, from one pass over it."""
    digest, sums, size = hashlib.sha256(), [], 0
    with path.open("rb") as stream:
        while part := stream.read(SIZE * AT_ONCE):
            digest.update(part)
            view = memoryview(part)
            sums += [xxh3_64_intdigest(view[at : at + SIZE]) for at in range(0, len(part), SIZE)]
            size += len(part)
    return {
        "bytes": size,
        "sha256": digest.hexdigest(),
        FIELD: base64.b64encode(np.array(sums, DTYPE).tobytes()).decode(),
    }


class Blocks:
    """The block sums of one file and which of its blocks have been verified; safe to use from several threads.

    entry: the file's entry in a manifest. Without block sums (an older format) nothing is verified.
    mend: what to do about a damaged file; ends the message of the InputError.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], mend: str) -> None:
        self.path, self.mend, self.size = path, mend, int(entry["bytes"])
        self.wanted: np.ndarray | None = None
        if FIELD in entry:
            self.wanted = np.frombuffer(base64.b64decode(entry[FIELD]), DTYPE)
            if len(self.wanted) != -(-self.size // SIZE):
                raise InputError(f"{path}: {len(self.wanted)} block sums for {self.size} bytes in the manifest; {mend}")
            # One byte a block, so no lock is needed: two threads that verify one block at once write the same value.
            self.good = np.zeros(len(self.wanted), bool)

    def map(self) -> np.ndarray:
        """The bytes of the file as a memory-mapped uint8 array, not verified; InputError if its size is wrong."""
        try:
            found = os.stat(self.path).st_size
            if found != self.size:
                raise InputError(f"{self.path}: {found} bytes, the manifest says {self.size}; {self.mend}")
            return np.memmap(self.path, np.uint8, "r") if self.size else np.empty(0, np.uint8)
        except OSError as error:
            raise InputError(f"{self.path}: unreadable ({error}); {self.mend}") from error

    def verify(self, data: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Verifies the blocks with bytes start ... stop - 1 of `data`, the whole file; InputError for a damaged one."""
        if self.wanted is None:
            return
        first, last = start // SIZE, -(-(self.size if stop is None else stop) // SIZE)
        if not self.good[first:last].all():
            self._verify(data, first + np.flatnonzero(~self.good[first:last]))

    def verify_at(self, data: np.ndarray, starts_X: np.ndarray, width: int) -> None:
        """Verifies the blocks with the `width` bytes of `data` that begin at each of the X starts."""
        if self.wanted is None or not len(starts_X) or not width:
            return
        # `width` bytes touch at most `spans` blocks; a start that touches fewer repeats its last block
        first_X, spans = starts_X // SIZE, (width - 1) // SIZE + 2
        numbers = np.minimum(first_X[:, None] + np.arange(spans), ((starts_X + width - 1) // SIZE)[:, None]).reshape(-1)
        if not self.good[numbers].all():
            self._verify(data, np.unique(numbers[~self.good[numbers]]))

    def _verify(self, data: np.ndarray, numbers: np.ndarray) -> None:
        parts = [numbers[at : at + AT_ONCE] for at in range(0, len(numbers), AT_ONCE)]
        run = map if len(parts) == 1 else _threads().map
        for done in run(self._one, [data] * len(parts), parts):
            self.good[done] = True

    def _one(self, data: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        assert self.wanted is not None
        view, wanted = data.data, self.wanted[numbers].tolist()
        for number, sum_of in zip(numbers.tolist(), wanted, strict=True):
            at = number * SIZE
            if xxh3_64_intdigest(view[at : at + SIZE]) != sum_of:
                end = min(at + SIZE, self.size)
                raise InputError(
                    f"{self.path}: damaged: bytes {at:,} to {end - 1:,} are not what the manifest says; {self.mend}"
                )
        return numbers


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "verify")


def whole(path: Path, entry: Mapping[str, Any], mend: str) -> np.ndarray:
    """The memory-mapped bytes of a file, all of them verified: by block sums or, without those, by its sha256."""
    known = Blocks(path, entry, mend)
    data = known.map()
    known.verify(data)
    if known.wanted is None and hashlib.sha256(data.data).hexdigest() != entry["sha256"]:
        raise InputError(f"{path}: damaged: its content is not what the manifest says; {mend}")
    return data
