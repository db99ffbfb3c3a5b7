"""Mixes several data sets into one in fixed shares, deterministically."""

from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

_SCALE = 2**40


class Shares(grain.transforms.DatasetSelectionMap):
    """Maps element k of a mixture to (number of the data set, element of that set).

    Of any number of first elements, each of n sets gets less than one more than its share and less than n - 1 fewer.
    Why: the first set takes its share rounded up, the second its share of the rest, and so on. The rest after i sets
    was rounded down i times, so it is too small by less than i, and the next set takes its share of that.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(map(Fraction, weights))
        self._parts = [max(1, round(Fraction(weight) / total * _SCALE)) for weight in weights]

    def __len__(self) -> int:
        return np.iinfo(np.int64).max

    def __getitem__(self, k: int) -> tuple[int, int]:
        left = sum(self._parts)
        # How many of the elements before k, and up to k, go to the sets not yet looked at. The set where these counts
        # take one element more apart is the one that element k is from.
        before, after = int(k), int(k) + 1
        for number, part in enumerate(self._parts):
            rest_before, rest_after = before * (left - part) // left, after * (left - part) // left
            if before - rest_before != after - rest_after:
                return number, before - rest_before
            left, before, after = left - part, rest_before, rest_after
        raise AssertionError("the last set takes what the others leave")


def mixed(sets: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """One endless data set from several endless ones, in these shares; each keeps its own order."""
    if len(sets) == 1:
        return sets[0]
    return grain.MapDataset.select_from_datasets(sets, Shares(weights))
