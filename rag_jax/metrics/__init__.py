"""Scores predictions with the figures of the field, each with a bootstrap interval; by default those that fit the data.

All are shares of 1. METRICS lists the metrics; `figures` describes the rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rag_jax.errors import InputError
from rag_jax.metrics import abstention, bootstrap, measures, texts
from rag_jax.metrics.figures import Figures, Judging, Row, references
from rag_jax.metrics.measures import RECALL_KS, TOP

__all__ = [
    "METRICS",
    "OF_ANSWERS",
    "OF_GOLD",
    "RECALL_KS",
    "Judging",
    "Metric",
    "check_names",
    "figures_of",
    "missing",
    "resampled",
    "summarize",
]


class Metric(NamedTuple):
    """A metric.

    needs: what the data must have, in words, for messages.
    measure: from rows of predictions to figures; none where the data lack what it needs.
    """

    needs: str
    measure: Callable[[Sequence[Row], Judging], Figures]


METRICS: dict[str, Metric] = {
    "exact_match": Metric("short answers", measures.exact_match),
    "f1": Metric("answers that are texts", measures.f1),
    "accuracy": Metric("labels (--labels, or allowed_answers)", measures.accuracy),
    "macro_f1": Metric("labels (--labels, or allowed_answers)", measures.macro_f1),
    "rouge_l": Metric("long targets", measures.rouge_l),
    "bleu": Metric("long targets", measures.bleu),
    "distinct": Metric("predictions with words", measures.distinct),
    "no_answer": Metric("questions without an answer", abstention.no_answer),
    "recall": Metric("gold passages", measures.recall),
    "all_gold": Metric("questions with several gold passages", measures.all_gold),
    "mrr": Metric(f"gold passages and {TOP} retrieved", measures.mrr),
    "ndcg": Metric(f"gold passages and {TOP} retrieved", measures.ndcg),
    "r_precision": Metric("gold passages and as many retrieved", measures.r_precision),
    "answer_recall": Metric("short answers and retrieved passages", measures.answer_recall),
    "kilt": Metric("gold passages", measures.kilt),
}
LONG = ("rouge_l", "bleu", "distinct")
OF_GOLD = ("recall", "all_gold", "mrr", "ndcg", "r_precision", "kilt")  # metrics that need gold passages
OF_ANSWERS = ("accuracy", "exact_match", "f1", "rouge_l", "bleu")  # figures; the first that has a value is the main one
_JUDGED = Judging()


def summarize(
    rows: Sequence[Row],
    setting: Judging = _JUDGED,
    names: Sequence[str] = (),
    intervals: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """{"n": number of rows, FIGURE: value, ...}; figures without a value are left out.

    names: metrics to use; (): those of `by_default`.
    intervals: also FIGURE_low and FIGURE_high, a 95% interval.
    seed: of the resamples.
    InputError for no rows, an unknown metric or a missing library.
    """
    if not rows:
        raise InputError("no predictions to summarize; is the question file empty?")
    found = figures_of(rows, setting, names)
    summary: dict[str, float] = {"n": len(rows)}
    draws = resampled(found, seed) if intervals else {}
    for name, figure in found.items():
        summary[name] = value = bootstrap.value(figure.statistic, figure.n)
        if intervals:
            summary[f"{name}_low"], summary[f"{name}_high"] = figure.interval(draws[name], value)
    return summary


def figures_of(rows: Sequence[Row], setting: Judging, names: Sequence[str] = ()) -> Figures:
    """The figures with a value of the metrics in `names`, or of those of `by_default`."""
    check_names(names)
    found: Figures = {}
    for name in names or by_default(rows, setting):
        found |= METRICS[name].measure(rows, setting)
    return {name: one for name, one in found.items() if np.isfinite(bootstrap.value(one.statistic, one.n))}


def resampled(found: Figures, seed: int = 0) -> dict[str, np.ndarray]:
    """Values [R] of every figure in R resamples; figures over the same number of questions share their resamples."""
    draws: dict[str, np.ndarray] = {}
    for n in dict.fromkeys(figure.n for figure in found.values()):
        draws |= bootstrap.resampled({name: one.statistic for name, one in found.items() if one.n == n}, n, seed)
    return draws


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for an unknown metric, and for one whose library is not installed."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"no metric {name!r}; there are: {', '.join(METRICS)}")
        texts.check_installed(name)


def by_default(rows: Sequence[Row], setting: Judging) -> list[str]:
    """The metrics used when none is named: all, but those of long texts only if such texts were to be written.

    Metrics without their library are left out. Others have no figure where the rows lack what they need.
    """
    long = not setting.labels and any(map(references, rows))
    return [name for name in METRICS if (long or name not in LONG) and texts.installed(name)]


def missing(rows: Sequence[Row], setting: Judging, names: Sequence[str], found: dict[str, float]) -> list[str]:
    """Messages for metrics without a figure in the summary `found`.

    Of the metrics in `names`: all of them; by default: those whose library is not installed.
    """
    if not names and not setting.labels and any(map(references, rows)):
        lacking = ", ".join(name for name in LONG if not texts.installed(name))
        return [f"{lacking}: left out; pip install 'rag-jax[metrics]'"] if lacking else []
    without = [name for name in names if not METRICS[name].measure(rows, setting).keys() & found.keys()]
    return [f"{name}: left out, it needs {METRICS[name].needs}" for name in without]
