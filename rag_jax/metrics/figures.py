"""Input and output of metrics: rows of predictions, how they are judged, and figures with their intervals.

A row is made by `predictions.rows` and is a line of predictions.jsonl. Its keys:

id, question            of the question
prediction              the answer; None: retrieval alone
score, tokens           log p(y|x) and the tokens of the answer
answers, target, label  of the question
unanswerable            whether the question is known to have no answer
retrieved               ids of passages, best first
retrieved_has_answer    for each of them, whether its text has an answer
depth                   passages that were asked for; 0: none
level                   "passage" or "document": the unit by which the ranking is judged; None: it is not judged
gold, relevance         ids of right passages or documents (by level), and {id: grade} of these or None
documents               {passage id: document id} of passages that are only a part of one, at level "document"
read, prior, posterior  ids and probabilities of the passages read, best prior first
token_posterior         RAG-Token: for each token the posterior of the passages read; else None
gold_documents          documents, a list for each way to answer
retrieved_documents     documents of the retrieved passages, each once
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rag_jax.errors import InputError
from rag_jax.metrics import bootstrap, matching
from rag_jax.metrics.bootstrap import Statistic

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Judging:
    """How predictions are judged.

    labels: the possible labels, for classification; (): free answers.
    match: a key of `matching.MATCHERS`. Gold answers are texts, compared by SQuAD's rule ("string") or by MLQA's for a
        language ("mlqa_zh"), or regular expressions, as CuratedTREC's ("regex").
    """

    labels: tuple[str, ...] = ()
    match: str = "string"

    def __post_init__(self) -> None:
        if self.match not in matching.FINDERS:
            raise InputError(f"match {self.match!r}; there are: {', '.join(matching.FINDERS)}")


class Figure(NamedTuple):
    """A statistic over n questions.

    shrinks: resamples, because they repeat questions, have systematically smaller values than the whole, so that only
        their spread is used.
    """

    statistic: Statistic
    n: int
    shrinks: bool = False

    def around(self, values_R: np.ndarray, value: float) -> np.ndarray:
        """Values in resamples, or differences of such; with `shrinks` moved so that their mean is `value`."""
        return values_R - np.nanmean(values_R) + value if self.shrinks else values_R

    def interval(self, values_R: np.ndarray, value: float) -> tuple[float, float]:
        """The 95% interval of `value` from its values in resamples."""
        return bootstrap.interval(self.around(values_R, value))


Figures = dict[str, Figure]


def references(row: Row) -> list[str]:
    """Long texts that a prediction is compared with: the target, or all answers where the target is one of them."""
    target, answers = row.get("target"), row.get("answers") or []
    return list(answers) if target in answers else [target] if target else []


def golds(row: Row, setting: Judging) -> list[str]:
    """Short answers, or labels, that a prediction is compared with; none where a long text was to be written."""
    return list(row.get("answers") or []) if setting.labels or not row.get("target") else []


def written(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["prediction"] is not None]


def judged(row: Row) -> bool:
    """Whether the ranking of a row can be judged; as in pytrec_eval, also where no judged passage is relevant."""
    return bool(row.get("gold") or row.get("relevance"))


def unit(row: Row, passage_id: str) -> str:
    """The id of a passage that is compared with gold ids: its own, or that of its document."""
    return (row.get("documents") or {}).get(passage_id, passage_id)


def ranked(row: Row) -> list[str]:
    """The ranking that is judged: passages, or documents, each at the rank of its first passage."""
    return list(dict.fromkeys(unit(row, one) for one in row["retrieved"]))


def depth(row: Row) -> int:
    """Number of passages that were asked for; fewer may have been found. (Older predictions do not have it.)"""
    return row.get("depth", len(row["retrieved"]))


def mean(name: str, values: Sequence[float]) -> Figures:
    return {name: Figure(bootstrap.mean(np.array(values)), len(values))} if values else {}
