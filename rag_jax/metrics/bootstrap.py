"""Confidence intervals and significance by resampling the questions (percentile bootstrap, Efron and Tibshirani 1993).

A statistic is a function from counts_RN, how often each of N questions was drawn in each of R resamples, to values [R].
Counts that are all 1 give its value for the questions as they are. The same seed and N draw the same resamples, so that
two runs with the same questions are compared question by question.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]

RESAMPLES = 2000
_CELLS = 1 << 22  # elements of counts_RN held at a time


def counts(n: int, seed: int = 0, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """counts_RN of the resamples, in blocks of rows that fit in memory."""
    if n < 1:
        raise ValueError("nothing to resample")
    random = np.random.default_rng(seed)
    size = max(1, _CELLS // n)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn_RN = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn_RN.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def mean(values_N: np.ndarray) -> Statistic:
    """The statistic that is the mean of one value per question."""
    return ratio(values_N, np.ones(len(values_N)))


def ratio(top_N: np.ndarray, bottom_N: np.ndarray) -> Statistic:
    """The statistic that is the sum of one value over the sum of another; NaN where that is 0."""
    both_N2 = np.stack([np.asarray(top_N, np.float64), np.asarray(bottom_N, np.float64)], axis=1)

    def statistic(counts_RN: np.ndarray) -> np.ndarray:
        top_R, bottom_R = (counts_RN @ both_N2).T
        return divided(top_R, bottom_R)

    return statistic


def divided(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def value(statistic: Statistic, n: int) -> float:
    """The value of a statistic for the n questions as they are."""
    return float(statistic(np.ones((1, n)))[0])


def resampled(
    statistics: Mapping[str, Statistic], n: int, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Values [R] of statistics over the same n questions; all see the same resamples."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for counts_RN in counts(n, seed, resamples):
        for name, statistic in statistics.items():
            parts[name].append(statistic(counts_RN))
    return {name: np.concatenate(found) for name, found in parts.items()}


def interval(values_R: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval (low, high); resamples without a value (NaN) are ignored."""
    low, high = np.nanquantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences_R: np.ndarray) -> float:
    """Two-sided p value: twice the share of resamples at or beyond zero. At least 2 / (R + 1), at most 1."""
    known_R = differences_R[~np.isnan(differences_R)]
    fewer = min(int((known_R <= 0).sum()), int((known_R >= 0).sum()))
    return min(1.0, 2 * (1 + fewer) / (len(known_R) + 1))
