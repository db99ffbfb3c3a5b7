"""Examples of like length together: batches as wide as they need to be, in a few shapes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """Units (see pipeline.Units) whose questions and targets fit these widths, in tokens."""

    question: int
    target: int
    units: np.ndarray


def grouped(
    lengths_U2: np.ndarray, questions: Sequence[int], targets: Sequence[int], longest: tuple[int, int], least: int
) -> list[Bucket]:
    """Every unit in the narrowest bucket that it fits, from narrow to wide.

    lengths_U2: of question and target; questions, targets: widths of buckets, ascending, beside `longest`. A bucket of
    fewer than `least` units is put together with the next one (the last one with that before it), as wide as both need.
    """
    sides = [np.asarray([*widths, last]) for widths, last in zip((questions, targets), longest, strict=True)]
    place_U2 = np.stack([np.searchsorted(side, lengths_U2[:, i]) for i, side in enumerate(sides)], axis=1)
    kept: list[Bucket] = []
    carried: Bucket | None = None
    for q, t in sorted({(int(q), int(t)) for q, t in place_U2}):
        units = np.flatnonzero((place_U2 == (q, t)).all(1))
        bucket = together(carried, Bucket(int(sides[0][q]), int(sides[1][t]), units))
        carried = bucket if len(bucket.units) < least else None
        kept += [] if carried else [bucket]
    if carried:
        kept[-1:] = [together(kept[-1] if kept else None, carried)]
    return kept


def together(a: Bucket | None, b: Bucket) -> Bucket:
    """Both in one, units in their order."""
    if a is None:
        return b
    return Bucket(max(a.question, b.question), max(a.target, b.target), np.sort(np.concatenate([a.units, b.units])))
