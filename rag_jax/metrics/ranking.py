"""Scores the ranking of one question: recall, reciprocal rank, nDCG, R-precision of passages and pages.

retrieved: ids, best first, each once. gold: ids of the right passages; ValueError if there are none.
"""

import math
from collections.abc import Collection, Mapping, Sequence


def recall_at(k: int, retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1.0 if any gold passage is among the first k retrieved, else 0.0."""
    _check(gold)
    return float(not set(gold).isdisjoint(retrieved[:k]))


def all_found(k: int, retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1.0 if all gold passages are among the first k retrieved, as multi-hop questions need, else 0.0."""
    _check(gold)
    return float(set(gold).issubset(retrieved[:k]))


def share_found(k: int, retrieved: Sequence[str], gold: Collection[str]) -> float:
    """The share of the gold passages that are among the first k retrieved: trec_eval's recall at k."""
    _check(gold)
    return len(set(gold).intersection(retrieved[:k])) / len(set(gold))


def answer_recall(k: int, retrieved_has_answer: Sequence[bool]) -> float:
    """1.0 if any of the first k retrieved passages has the answer (`matching.has_answer` of each), else 0.0."""
    return float(any(retrieved_has_answer[:k]))


def reciprocal_rank(k: int, retrieved: Sequence[str], gold: Collection[str]) -> float:
    """1 / rank of the first gold passage; 0.0 if none is among the first k. Its mean is MRR@k."""
    _check(gold)
    wanted = set(gold)
    return next((1 / rank for rank, one in enumerate(retrieved[:k], start=1) if one in wanted), 0.0)


def ndcg(k: int, retrieved: Sequence[str], grades: Mapping[str, float]) -> float:
    """nDCG@k as in trec_eval: gain = grade, discount log2(1 + rank), divided by that of the best possible order.

    grades: of the judged passages; one with grade 0 or less is not relevant.
    """
    gains = {one: grade for one, grade in grades.items() if grade > 0}
    _check(gains)
    best = sorted(gains.values(), reverse=True)[:k]
    return _discounted([gains.get(one, 0.0) for one in retrieved[:k]]) / _discounted(best)


def r_precision(retrieved: Sequence[str], gold: Collection[str]) -> float:
    """The share of gold passages among the first R retrieved, where R is the number of gold passages."""
    _check(gold)
    wanted = set(gold)
    return len(wanted.intersection(retrieved[: len(wanted)])) / len(wanted)


def page_r_precision(pages: Sequence[str], golds: Sequence[Collection[str]]) -> float:
    """KILT's R-precision of pages, each ranked by its first passage; the best over the sets of gold pages.

    pages: the page of every retrieved passage, best first.
    golds: sets of pages, each of which suffices to answer.
    """
    _check(golds)
    once = list(dict.fromkeys(pages))
    return max(r_precision(once, gold) for gold in golds)


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(1 + rank) for rank, gain in enumerate(gains, start=1))


def _check(gold: Collection[object]) -> None:
    if not gold:
        raise ValueError("no gold passages; leave such questions out of the mean")
