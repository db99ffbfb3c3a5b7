"""Figures of abstaining: saying that there is no answer, and the risk-coverage curve (El-Yaniv and Wiener 2010).

With the answers sorted by confidence, the risk at coverage c is the share of wrong answers among the first share c of
them. Answers of equal confidence have no order: any part of such a group is taken to be wrong at the group's rate.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from rag_jax.metrics import bootstrap, matching
from rag_jax.metrics.bootstrap import Statistic
from rag_jax.metrics.figures import Figure, Figures, Judging, Row, golds, references, written

NO_ANSWER = ("", "no answer", "unanswerable")  # predictions, in normal form, that say that there is no answer


def says_nothing(prediction: str) -> bool:
    """Whether a prediction says that there is no answer."""
    return matching.normalize_answer(prediction) in NO_ANSWER


def no_answer(rows: Sequence[Row], setting: Judging) -> Figures:
    """Precision, recall and F1 of saying that there is no answer, and SQuAD 2's F1 over all questions.

    Where all answers are short, also SQuAD 2's exact match, and the area under the risk-coverage curve, in which an
    answer is right by that exact match.
    """
    judged = [row for row in written(rows) if row.get("unanswerable") or _wanted(row, setting)]
    if not any(row.get("unanswerable") for row in judged):
        return {}
    none_N = np.array([bool(row.get("unanswerable")) for row in judged])
    said_N = np.array([says_nothing(row["prediction"]) for row in judged])
    statistics = {
        "no_answer_precision": bootstrap.ratio(none_N & said_N, said_N),
        "no_answer_recall": bootstrap.ratio(none_N & said_N, none_N),
        "no_answer_f1": bootstrap.ratio(2.0 * (none_N & said_N), none_N.astype(float) + said_N),
    }
    if setting.match != "regex":
        score = functools.partial(matching.f1, match=setting.match)
        statistics["squad2_f1"] = bootstrap.mean(_scores(score, judged, setting))
    if all(row.get("unanswerable") or golds(row, setting) for row in judged):
        confidence_N, right_N = _answers(judged, setting)
        statistics["squad2_exact_match"] = bootstrap.mean(right_N)
        statistics["risk_coverage_area"] = area(confidence_N, 1 - right_N)
    return {name: Figure(statistic, len(judged)) for name, statistic in statistics.items()}


def risk_coverage(rows: Sequence[Row], setting: Judging) -> list[tuple[float, float]]:
    """The curve whose area `no_answer` gives: (coverage, risk), in order of the answers' log p(y|x)."""
    judged = [row for row in written(rows) if row.get("unanswerable") or golds(row, setting)]
    confidence_N, right_N = _answers(judged, setting)
    return curve(confidence_N, 1 - right_N)


def _answers(judged: Sequence[Row], setting: Judging) -> tuple[np.ndarray, np.ndarray]:
    """(log p(y|x) [N], exact match [N])."""
    score_N = np.array([row["score"] for row in judged], np.float64)
    return score_N, _scores(matching.MATCHERS[setting.match], judged, setting)


def _scores(score: Callable[[str, Sequence[str]], float], judged: Sequence[Row], setting: Judging) -> np.ndarray:
    """Scores [N]: 1 where the model rightly says that there is no answer, 0 where only one of prediction and gold says
    so, else the score of the answer.
    """
    found = []
    for row in judged:
        said, none = says_nothing(row["prediction"]), bool(row.get("unanswerable"))
        found.append(float(said and none) if said or none else score(row["prediction"], _wanted(row, setting)))
    return np.array(found)


def _wanted(row: Row, setting: Judging) -> list[str]:
    return golds(row, setting) or references(row)


def curve(confidence_N: np.ndarray, wrong_N: np.ndarray, points: int = 20) -> list[tuple[float, float]]:
    """The risk-coverage curve: (coverage, risk) at `points` equal steps of coverage, the last one 1."""
    order_N, start_G = _groups(confidence_N)
    ends = np.append(start_G[1:], len(order_N))
    errors = np.add.reduceat(np.asarray(wrong_N, np.float64)[order_N], start_G).cumsum()
    coverage = np.arange(1, points + 1) / points
    taken = coverage * len(order_N)
    risk = np.interp(taken, np.append(0, ends), np.append(0.0, errors)) / taken
    return [(float(c), float(r)) for c, r in zip(coverage, risk, strict=True)]


def area(confidence_N: np.ndarray, wrong_N: np.ndarray) -> Statistic:
    """The area under the risk-coverage curve: the mean risk of the first 1, 2, ..., n answers."""
    order_N, start_G = _groups(confidence_N)
    wrong_N = np.asarray(wrong_N, np.float64)[order_N]
    # harmonic[k] = 1 + 1/2 + ... + 1/k gives the sum of the risks within a group of equal confidence in closed form. A
    # group of m answers with e errors, after k answers with E errors, adds the sum over j = 1..m of
    # (E + e j / m) / (k + j).
    harmonic = np.append(0.0, (1 / np.arange(1, len(order_N) + 1)).cumsum())

    def statistic(counts_RN: np.ndarray) -> np.ndarray:
        ordered_RN = counts_RN[:, order_N]
        m_RG = np.add.reduceat(ordered_RN, start_G, axis=1)
        e_RG = np.add.reduceat(ordered_RN * wrong_N, start_G, axis=1)
        k_RG, errors_RG = m_RG.cumsum(1) - m_RG, e_RG.cumsum(1) - e_RG
        rise_RG = harmonic[(k_RG + m_RG).astype(np.int64)] - harmonic[k_RG.astype(np.int64)]
        rate_RG = e_RG / np.maximum(m_RG, 1)
        return (errors_RG * rise_RG + rate_RG * (m_RG - k_RG * rise_RG)).sum(1) / counts_RN.sum(1)

    return statistic


def _groups(confidence_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order_N, most confident answer first; start_G, the positions in it where groups of equal confidence begin)."""
    confidence_N = np.asarray(confidence_N, np.float64)
    order_N = np.argsort(-confidence_N, kind="stable")
    return order_N, np.flatnonzero(np.diff(confidence_N[order_N], prepend=np.inf))
