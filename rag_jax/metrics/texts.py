"""Scores long texts: ROUGE-L (rouge-score) and BLEU (sacrebleu) with references, and their variety (distinct-n).

BLEU of a collection follows from sums of counts per text, so each text has a row of counts, and a resample of the texts
is a sum of rows.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rag_jax.errors import InputError
from rag_jax.metrics import bootstrap, matching

LIBRARIES = {"rouge_l": "rouge_score", "bleu": "sacrebleu"}  # the library of each metric that needs one
ORDER = 4  # BLEU's longest n-grams


def installed(metric: str) -> bool:
    """Whether the library that a metric needs is installed."""
    return metric not in LIBRARIES or importlib.util.find_spec(LIBRARIES[metric]) is not None


def check_installed(metric: str) -> None:
    """Raises InputError where the library that a metric needs is missing."""
    if not installed(metric):
        name = LIBRARIES[metric].replace("_", "-")
        raise InputError(f"{metric} needs {name}: pip install 'rag-jax[metrics]'")


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L's F measure [N] of each text with its nearest reference, by rouge-score without stemming.

    Words are runs of a-z and 0-9, so it is meaningless for texts in other scripts.
    """
    check_installed("rouge_l")
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return np.array([scorer.score_multi(golds, text)["rougeL"].fmeasure for text, golds in _pairs(texts, references)])


def bleu_parts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts of each text that BLEU sums, [N, 10]: matching n-grams (n = 1 to 4), all n-grams, length of the text and
    of its nearest reference.
    """
    check_installed("bleu")
    bleu = importlib.import_module("sacrebleu").BLEU(effective_order=True)  # or it warns of single sentences
    found = (bleu.sentence_score(text, golds) for text, golds in _pairs(texts, references))
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], np.float64)


def bleu(parts_RX: np.ndarray, order: int = ORDER) -> np.ndarray:
    """sacrebleu's BLEU [R] of R collections, 0 to 1, from the sums of their `bleu_parts`. order=1: BLEU-1."""
    compute = importlib.import_module("sacrebleu").BLEU.compute_bleu
    scores = []
    for parts in parts_RX.astype(np.int64).tolist():
        found, there = parts[:order], parts[ORDER : ORDER + order]
        scores.append(compute(found, there, *parts[2 * ORDER :], smooth_method="exp", max_ngram_order=order).score)
    return np.array(scores) / 100


class Grams:
    """The n-grams of a collection of texts and the texts they occur in, for distinct-n of its resamples.

    n: 1 for unigrams, 2 for bigrams. Words are those of `matching.tokens`.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        numbers: dict[Any, int] = {}
        pairs: set[tuple[int, int]] = set()
        self._count_N = np.zeros(len(texts))
        for row, text in enumerate(texts):
            words = matching.tokens(text)
            grams: list[Any] = words if n == 1 else list(pairwise(words))
            self._count_N[row] = len(grams)
            pairs.update((numbers.setdefault(gram, len(numbers)), row) for gram in grams)
        gram_X, row_X = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
        texts_G = np.bincount(gram_X, minlength=len(numbers))
        alone_X = texts_G[gram_X] == 1  # most occur in one text only: a count per text suffices for those
        self._alone_N = np.bincount(row_X[alone_X], minlength=len(texts)).astype(np.float64)
        self._row_X = row_X[~alone_X]
        self._start_G = np.flatnonzero(np.diff(gram_X[~alone_X], prepend=-1))

    def distinct(self, counts_RN: np.ndarray) -> np.ndarray:
        """distinct-n (Li et al. 2016) of R resamples: the number of different n-grams over that of all n-grams, [R]."""
        taken_RN = counts_RN > 0
        different_R = taken_RN @ self._alone_N
        if len(self._start_G):
            different_R += np.logical_or.reduceat(taken_RN[:, self._row_X], self._start_G, axis=1).sum(1)
        return bootstrap.divided(different_R, counts_RN @ self._count_N)


def _pairs(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    if not all(references):
        raise ValueError("every text needs a reference; leave out those that have none")
    return [(text, list(golds)) for text, golds in zip(texts, references, strict=True)]
