"""What metrics read and give: rows of predictions, how they are judged, and figures with their intervals.

A row is what `predictions.rows` makes of a question and predictions.jsonl keeps:

id, question; prediction (None: retrieval alone), score log p(y|x), tokens; answers, target, label; unanswerable
retrieved: ids of passages, best first; retrieved_has_answer; depth: how many passages were looked for, 0 for none
gold: ids of passages, or of documents where `level` is "document"; relevance {id: grade} or None, likewise
documents: where the level is "document", {passage id: document id} of passages that are only a part of one
read, prior, posterior: ids and probabilities of the passages read, best prior first; token_posterior: RAG-Token's, a
list like them for each of the tokens, else None
gold_documents, one list for each way to answer; retrieved_documents, each once
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
class Setting:
    """How predictions are judged. labels: the only right answers there can be, for classification. match: of
    `matching.MATCHERS`: gold answers are texts, compared by SQuAD's rule ("string") or MLQA's in a language
    ("mlqa_zh"), or, as CuratedTREC's, regular expressions ("regex").
    """

    labels: tuple[str, ...] = ()
    match: str = "string"

    def __post_init__(self) -> None:
        if self.match not in matching.FINDERS:
            raise InputError(f"match {self.match!r}; there are: {', '.join(matching.FINDERS)}")


class Figure(NamedTuple):
    """A statistic over n questions. shrinks: resamples, which repeat questions, are all smaller than the whole, so that
    only their spread is used.
    """

    statistic: Statistic
    n: int
    shrinks: bool = False

    def around(self, values_R: np.ndarray, value: float) -> np.ndarray:
        """Values in resamples, or differences of such, beside the value of the questions as they are."""
        return values_R - np.nanmean(values_R) + value if self.shrinks else values_R

    def interval(self, values_R: np.ndarray, value: float) -> tuple[float, float]:
        """The 95% interval."""
        return bootstrap.interval(self.around(values_R, value))


Figures = dict[str, Figure]


def references(row: Row) -> list[str]:
    """The long texts that a prediction may be: the target, and the answers where the target is one of them."""
    target, answers = row.get("target"), row.get("answers") or []
    return list(answers) if target in answers else [target] if target else []


def golds(row: Row, setting: Setting) -> list[str]:
    """The short answers, or labels, that a prediction may be; none where a long text was to be written."""
    return list(row.get("answers") or []) if setting.labels or not row.get("target") else []


def written(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["prediction"] is not None]


def judged(row: Row) -> bool:
    """Whether the row's ranking can be judged; nothing that was judged need be relevant, as pytrec_eval has it."""
    return bool(row.get("gold") or row.get("relevance"))


def unit(row: Row, passage_id: str) -> str:
    """The id that is compared with gold ids: the passage's own, or that of its document."""
    return (row.get("documents") or {}).get(passage_id, passage_id)


def ranked(row: Row) -> list[str]:
    """The ranking that gold is looked for in: passages, or documents, each at the place of its first passage."""
    return list(dict.fromkeys(unit(row, one) for one in row["retrieved"]))


def depth(row: Row) -> int:
    """How many passages were looked for; fewer may have been found. (Older predictions do not say.)"""
    return row.get("depth", len(row["retrieved"]))


def mean(name: str, values: Sequence[float]) -> Figures:
    return {name: Figure(bootstrap.mean(np.array(values)), len(values))} if values else {}
