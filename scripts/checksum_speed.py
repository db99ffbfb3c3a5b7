"""Measures the cost of block checksums in a first pass over rows.

    python scripts/checksum_speed.py --out DIR --gigabytes 1

Writes a table of that size in DIR (float32 rows of 768 numbers, like an index) and reads it with and without checksums,
for several block sizes: all rows in order into memory; the same, and searched for 64 questions; and single rows at
random positions, each in a block of its own; with the file in the page cache and without. Prints a table of wall-clock
and processor seconds (of all threads, so that other programs on the machine count less); each is the best of --repeats.
"""

import argparse
import base64
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from rag_jax.corpus import verified_arrays
from rag_jax.corpus.verified_arrays import Checked
from rag_jax.system import block_checksums
from rag_jax.system.block_checksums import Blocks

WIDTH = 768
PART = 1 << 14  # rows copied at a time, as when they go to a device
RANDOM = 400  # rows
SIZES = (1 << 14, 1 << 16, 1 << 18, 1 << 20)


def write(path: Path, rows: int) -> None:
    """Writes random float32 rows."""
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for first in range(0, rows, PART):
            rng.standard_normal((min(PART, rows - first), WIDTH), np.float32).tofile(stream)
        os.fsync(stream.fileno())


def entry_of(path: Path) -> block_checksums.Entry:
    """The size and block sums of a file, for the block size `block_checksums.SIZE`."""
    sums = []
    with path.open("rb") as stream:
        while part := stream.read(block_checksums.SIZE):
            sums.append(xxh3_64_intdigest(part))
    return {
        "bytes": path.stat().st_size,
        block_checksums.FIELD: base64.b64encode(np.array(sums, block_checksums.DTYPE)).decode(),
    }


def forget(path: Path) -> None:
    """Drops the file from the page cache."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_order(table: Checked) -> None:
    for first in range(0, len(table), PART):
        np.array(table[first : first + PART])


def searched(table: Checked) -> None:
    q_BE = np.ones((64, WIDTH), np.float32)
    for first in range(0, len(table), PART):
        np.argpartition(q_BE @ table[first : first + PART].T, -5, axis=1)


def at_random(table: Checked) -> None:
    apart = len(table) // RANDOM
    for row in np.random.default_rng(1).permutation(RANDOM) * apart:
        np.array(table[int(row)])


def seconds(
    path: Path, rows: int, entry: block_checksums.Entry, read: Callable[[Checked], None], cold: bool, repeats: int
) -> np.ndarray:
    """Wall-clock and processor seconds of a first pass, with nothing verified before."""
    found = []
    for _ in range(repeats):
        if cold:
            forget(path)
        else:
            path.read_bytes()
        known = Blocks(path, entry, "")
        table = Checked(known, known.map(), 0, np.float32, (rows, WIDTH))
        begun = time.perf_counter(), time.process_time()
        read(table)
        found.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return np.min(found, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, path = int(args.gigabytes * 1e9) // (4 * WIDTH), args.out / "rows"
    write(path, rows)
    print(f"{path.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} cores")
    print("| pass | page cache | block | s without | s with | processor s without | processor s with | more |")
    print("|---|---|---|---|---|---|---|---|")
    passes = {"in order": in_order, "in order, searched": searched, f"{RANDOM} rows at random": at_random}
    for name, read in passes.items():
        for cold in (False, True):
            plain = seconds(path, rows, {"bytes": path.stat().st_size}, read, cold, args.repeats)
            for size in SIZES:
                block_checksums.SIZE = verified_arrays.SIZE = size
                block_checksums.AT_ONCE = max(1, (1 << 22) // size)
                found = seconds(path, rows, entry_of(path), read, cold, args.repeats)
                cells = [f"{value:.4f}" for pair in zip(plain, found, strict=True) for value in pair]
                more = f"{found[1] - plain[1]:.3f} s, {100 * (found[1] / plain[1] - 1):+.0f}%"
                cached = "cold" if cold else "warm"
                print(f"| {name} | {cached} | {size >> 10} KiB | {' | '.join(cells)} | {more} |", flush=True)
    path.unlink()


if __name__ == "__main__":
    main()
