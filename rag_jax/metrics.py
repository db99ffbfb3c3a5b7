"""Scores of answers (SQuAD exact match and F1) and of retrieval (recall of gold passages, DPR's answer recall)."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import regex

from rag_jax.errors import InputError

RECALL_KS = (1, 5, 20, 100)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)

# DPR's `[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]`, but that a letter of a script written without spaces is a token of its own.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKENS = regex.compile(
    rf"[{_SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]+|[^\p{{Z}}\p{{C}}]", regex.VERSION1
)


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 where the prediction equals any gold answer in normal form, else 0.0. ValueError without gold answers."""
    return _best(lambda gold: float(normalize_answer(prediction) == normalize_answer(gold)), golds)


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The best F1 over the gold answers, on bags of words split at spaces. ValueError without gold answers."""
    return _best(lambda gold: _f1_of_words(normalize_answer(prediction).split(), normalize_answer(gold).split()), golds)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the tokens of any answer stand in a row in the text, as DPR counts it (NFD, lower case).

    DPR takes a whole Chinese, Japanese or Thai phrase for one token, so that hardly any answer is found; here each of
    their letters is one. All other text gives exactly DPR's result. An answer with no tokens is nowhere.
    """
    joined = _join_tokens(text)
    return any(len(wanted) > 1 and wanted in joined for wanted in map(_join_tokens, answers))


def recall_at(k: int, retrieved_ids: Sequence[str], gold_ids: Collection[str]) -> float:
    """1.0 where any gold passage is among the first k retrieved, else 0.0. ValueError without gold passages."""
    if not gold_ids:
        raise ValueError("recall_at: no gold passages; leave such questions out of the mean")
    return float(not set(gold_ids).isdisjoint(retrieved_ids[:k]))


def answer_recall(k: int, retrieved_has_answer: Sequence[bool]) -> float:
    """1.0 where any of the first k retrieved passages has the answer (`has_answer` of each), else 0.0."""
    return float(any(retrieved_has_answer[:k]))


def bootstrap_ci(values: Sequence[float], seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """The 95% percentile interval of the mean, by resampling the values with replacement. ValueError if empty."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"bootstrap_ci: a non-empty row of values wanted, got shape {sample.shape}")
    random = np.random.default_rng(seed)
    means = [sample[random.integers(len(sample), size=len(sample))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarize(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, float]:
    """The means over prediction rows {"prediction", "answers", "retrieved", "gold", "retrieved_has_answer"}.

    n; exact_match with its 95% interval exact_match_low, exact_match_high, and f1 over the rows with answers whose
    prediction is not None (retrieval alone); recall_at_k over the rows with gold passages; answer_recall_at_k over the
    rows with answers. Only those k of RECALL_KS that some row retrieved: where one has fewer, a search such as BM25
    found no more. A figure that no row can give is left out.
    """
    if not rows:
        raise InputError("no predictions to summarize; is the question file empty?")
    summary: dict[str, float] = {"n": len(rows)}
    answered = [row for row in rows if row.get("answers")]
    written = [row for row in answered if row["prediction"] is not None]
    if written:
        matches = [exact_match(row["prediction"], row["answers"]) for row in written]
        low, high = bootstrap_ci(matches, seed)
        summary |= {"exact_match": _mean(matches), "exact_match_low": low, "exact_match_high": high}
        summary["f1"] = _mean([f1(row["prediction"], row["answers"]) for row in written])
    with_gold = [row for row in rows if row.get("gold")]
    with_flags = [row for row in answered if row.get("retrieved_has_answer") is not None]
    for k in _usable_ks(with_gold, "retrieved"):
        summary[f"recall_at_{k}"] = _mean([recall_at(k, row["retrieved"], row["gold"]) for row in with_gold])
    for k in _usable_ks(with_flags, "retrieved_has_answer"):
        flags = [answer_recall(k, row["retrieved_has_answer"]) for row in with_flags]
        summary[f"answer_recall_at_{k}"] = _mean(flags)
    return summary


def _best(score: Callable[[str], float], golds: Sequence[str]) -> float:
    if isinstance(golds, str) or not golds:
        raise ValueError(f"a non-empty list of gold answers wanted, got {golds!r}")
    return max(score(gold) for gold in golds)


def _f1_of_words(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:  # as SQuAD 2: both empty is right, so that F1 is never below exact match
        return float(prediction == gold)
    common = (Counter(prediction) & Counter(gold)).total()
    return 2 * common / (len(prediction) + len(gold))


def _join_tokens(text: str) -> str:
    # A newline, which no token contains, stands between and around the tokens: tokens in a row are then a substring.
    tokens = _TOKENS.findall(unicodedata.normalize("NFD", text))
    return "\n" + "".join(token.lower() + "\n" for token in tokens)


def _usable_ks(rows: Sequence[Mapping[str, Any]], column: str) -> list[int]:
    most = max((len(row.get(column) or ()) for row in rows), default=0)
    return [k for k in RECALL_KS if k <= most]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
