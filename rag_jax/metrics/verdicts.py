"""Judges a single answer, right or wrong, and its F1, by the same rules as the figures over all answers."""

from rag_jax.metrics import abstention, matching
from rag_jax.metrics.figures import Judging, Row, golds, references


def right(row: Row, setting: Judging) -> bool | None:
    """Whether the prediction is right: an exact match with a short answer, the right label, or rightly "no answer".

    None where that cannot be judged: nothing was written, or a long text was to be written.
    """
    said = row["prediction"]
    if said is None:
        return None
    if row.get("unanswerable"):
        return abstention.says_nothing(said)
    wanted = golds(row, setting)
    if setting.labels and (wanted or row.get("label") is not None):
        gold = wanted[0] if row.get("label") is None else str(row["label"])
        return said.strip().lower() == gold.strip().lower()
    return matching.MATCHERS[setting.match](said, wanted) == 1 if wanted else None


def f1(row: Row, setting: Judging) -> float | None:
    """F1 with the nearest gold answer or reference; None if there is none or gold answers are regular expressions."""
    wanted = golds(row, setting) or references(row)
    return matching.f1(row["prediction"], wanted, setting.match) if wanted and _has_words(row, setting) else None


def _has_words(row: Row, setting: Judging) -> bool:
    return row["prediction"] is not None and setting.match in matching.NORMAL_FORMS
