"""Curves of recall@k over k, with intervals."""

from collections.abc import Sequence

import numpy as np

from rag_jax.metrics import bootstrap
from rag_jax.metrics.figures import Judging, Row, depth, golds, judged, ranked

DENSE = 100  # every k up to this is a point of the curve; beyond, each is a twentieth larger than the one before

Curve = dict[str, list[float]]


def recall_curves(rows: Sequence[Row], setting: Judging, seed: int = 0) -> dict[str, Curve]:
    """The curves "gold" (`measures.recall`) and "answer" (`measures.answer_recall`), those that some row has.

    Each is {"k", "value", "low", "high"}, lists of one length.
    """
    counted, answered = list(filter(judged, rows)), [row for row in rows if golds(row, setting)]
    gold = [[one in set(row["gold"]) for one in ranked(row)] for row in counted]
    answer = [row["retrieved_has_answer"] for row in answered]
    found = {"gold": (counted, gold), "answer": (answered, answer)}
    deepest = {name: max(map(depth, some), default=0) for name, (some, _) in found.items()}
    return {name: hits_curve(flags, deepest[name], seed) for name, (_, flags) in found.items() if deepest[name]}


def hits_curve(flags: Sequence[Sequence[bool]], deepest: int, seed: int = 0) -> Curve:
    """The share of rows with a hit among their first k, for k up to `deepest`, with 95% percentile bootstrap intervals.

    flags: for each row, whether its first, second, ... retrieved passage is a hit.
    """
    first_N = np.array([next((i for i, hit in enumerate(row) if hit), deepest) for row in flags])
    ks = numbers(deepest)
    hits_NK = (first_N[:, None] < np.array(ks)).astype(np.float64)
    draws_RK = bootstrap.resampled({"": lambda counts_RN: counts_RN @ hits_NK / len(hits_NK)}, len(hits_NK), seed)[""]
    low_K, high_K = np.quantile(draws_RK, [0.025, 0.975], axis=0)
    columns = {"value": hits_NK.mean(0), "low": low_K, "high": high_K}
    return {"k": [float(k) for k in ks], **{name: [round(float(x), 6) for x in one] for name, one in columns.items()}}


def numbers(deepest: int) -> list[int]:
    """The k of a curve: 1, 2, ..., DENSE, then further and further apart; the last one is `deepest`."""
    ks = list(range(1, min(deepest, DENSE) + 1))
    while ks[-1] < deepest:
        ks.append(min(deepest, ks[-1] * 21 // 20))
    return ks
