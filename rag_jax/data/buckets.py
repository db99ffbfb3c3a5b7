"""Groups examples by length, so that batches are no wider than needed and have few different shapes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """Units (see batching.EpochUnits) whose questions and targets fit the same widths.

    question, target: widths of the batch, in tokens.
    units: their numbers, ascending.
    """

    question: int
    target: int
    units: np.ndarray


def grouped(
    lengths_U2: np.ndarray, questions: Sequence[int], targets: Sequence[int], longest: tuple[int, int], least: int
) -> list[Bucket]:
    """Puts every unit into the narrowest bucket that it fits; returns the buckets from narrow to wide.

    lengths_U2: tokens of the question and the target of each unit.
    questions, targets: widths of the narrower buckets, ascending.
    longest: widths (question, target) of the widest bucket.
    least: units that a bucket needs, one batch. The units of a smaller one move to a wider bucket; where there is no
        wider one, it gets the longest units of others.
    """
    sides = [np.asarray([*widths, last]) for widths, last in zip((questions, targets), longest, strict=True)]
    widths_U2 = np.stack([side[np.searchsorted(side, lengths_U2[:, i])] for i, side in enumerate(sides)], axis=1)
    groups: dict[tuple[int, int], np.ndarray] = {}
    for q, t in sorted({(int(q), int(t)) for q, t in widths_U2}, key=_area):
        groups[q, t] = np.flatnonzero((widths_U2 == (q, t)).all(1))
    for small in list(groups):
        wider = [widths for widths in groups if widths != small and widths[0] >= small[0] and widths[1] >= small[1]]
        if len(groups[small]) < least and wider:
            groups[wider[0]] = np.concatenate([groups[wider[0]], groups.pop(small)])
    _fill_up(groups, lengths_U2.sum(1), least)
    return [Bucket(*widths, np.sort(groups[widths])) for widths in sorted(groups, key=_area)]


def _area(widths: tuple[int, int]) -> tuple[int, int]:
    return widths[0] * widths[1], widths[0]


def _fill_up(groups: dict[tuple[int, int], np.ndarray], length_U: np.ndarray, least: int) -> None:
    """Merges the groups with fewer than `least` units, and adds the longest units of the largest groups if need be."""
    small = [widths for widths, units in groups.items() if len(units) < least]
    if not small:
        return
    corner = (max(q for q, _ in small), max(t for _, t in small))
    units = np.concatenate([groups.pop(widths) for widths in small])
    while len(units) < least and groups:
        donor = max(groups, key=lambda widths: len(groups[widths]))
        given, missing = groups.pop(donor), least - len(units)
        if len(given) - missing >= least:
            given = given[np.argsort(length_U[given], kind="stable")]
            groups[donor], given = given[:-missing], given[-missing:]
        corner = (max(corner[0], donor[0]), max(corner[1], donor[1]))
        units = np.concatenate([units, given])
    groups[corner] = units
