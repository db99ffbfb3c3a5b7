"""Several data sets as one, in fixed shares: which of them comes when."""

from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

_SCALE = 2**40


class Shares(grain.transforms.DatasetSelectionMap):
    """Which data set element k of a mixture is of, and which of its elements.

    After any number of elements a set has had less than one element more than its share of them, and less than n - 1
    fewer, with n sets: the first takes its share rounded up, the second its share of the rest, and so on. The rest
    after i sets, rounded down i times, is then less than i too small, and the next set takes its share of that.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(map(Fraction, weights))
        self._parts = [max(1, round(Fraction(weight) / total * _SCALE)) for weight in weights]

    def __len__(self) -> int:
        return np.iinfo(np.int64).max

    def __getitem__(self, k: int) -> tuple[int, int]:
        left = sum(self._parts)
        before, after = int(k), int(k) + 1  # elements of the sets that are left, without and with this one
        for number, part in enumerate(self._parts):
            rest_before, rest_after = before * (left - part) // left, after * (left - part) // left
            if before - rest_before != after - rest_after:
                return number, before - rest_before
            left, before, after = left - part, rest_before, rest_after
        raise AssertionError("the last set takes what the others leave")


def mixed(sets: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """Endless data sets in these shares, each in its own order and at its own pace."""
    if len(sets) == 1:
        return sets[0]
    return grain.MapDataset.select_from_datasets(sets, Shares(weights))
