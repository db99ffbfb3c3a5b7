"""Calibration of probabilities: reliability diagrams and the expected calibration error (Guo et al. 2017).

Passages: the prior p(z|x), or posterior p(z|x,y), of the best passage read, against whether it is gold, or has the
answer where no gold passage is known. Answers: p(y|x), and its geometric mean over the tokens, the end token included,
against whether the answer is right.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rag_jax.metrics import verdicts
from rag_jax.metrics.figures import Judging, Row, golds, judged, unit

BINS = 10
Z = 1.959964  # normal quantile of a 95% interval


def calibration(rows: Sequence[Row], setting: Judging) -> dict[str, dict[str, Any]]:
    """`reliability` of "prior" and "posterior" of the best passage, of "answer" (p(y|x)) and "token" (its geometric
    mean); those without data are left out.
    """
    pairs: dict[str, list[tuple[float, bool]]] = {"prior": [], "posterior": [], "answer": [], "token": []}
    for row in rows:
        right = _right_passages(row, setting)
        if right is not None:
            for name in ("prior",) if row["prediction"] is None else ("prior", "posterior"):
                best = int(np.argmax(row[name]))
                pairs[name].append((row[name][best], right[best]))
        verdict = verdicts.right(row, setting)
        if verdict is not None:
            pairs["answer"].append((math.exp(row["score"]), verdict))
            pairs["token"].append((math.exp(row["score"] / (len(row["tokens"]) + 1)), verdict))
    arrays = {name: np.array(found, np.float64).T for name, found in pairs.items() if found}
    return {name: reliability(confidence_N, right_N) for name, (confidence_N, right_N) in arrays.items()}


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """{"n", "error", "bins": [{"n", "confidence", "right", "low", "high"}]}, for the bins that are not empty.

    error: the expected calibration error: |share right - mean confidence| of the bins, weighted by their sizes.
    bins: of equal width; confidence: mean; right: share; low, high: Wilson's 95% interval of that share.
    """
    bin_N = np.minimum((np.asarray(confidence_N, np.float64) * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for number in np.unique(bin_N):
        here = bin_N == number
        n, confidence, right = int(here.sum()), float(confidence_N[here].mean()), float(right_N[here].mean())
        low, high = wilson(right, n)
        found.append({"n": n, "confidence": confidence, "right": right, "low": low, "high": high})
        error += n / len(bin_N) * abs(right - confidence)
    return {"n": len(bin_N), "error": error, "bins": found}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927), 95%, of a share among n."""
    middle, spread = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - spread) / (1 + Z**2 / n)), min(1.0, (middle + spread) / (1 + Z**2 / n))


def _right_passages(row: Row, setting: Judging) -> list[bool] | None:
    """For each passage read, whether it is gold or, where none is known, has the answer; None if neither is known."""
    read = row["read"]
    if not read or not (judged(row) or golds(row, setting)):
        return None
    if judged(row):
        return [unit(row, one) in row["gold"] for one in read]
    has = dict(zip(row["retrieved"], row["retrieved_has_answer"], strict=True))
    return [has.get(one, False) for one in read]
