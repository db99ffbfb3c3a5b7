"""Whether one answer is right, and how nearly, by the rules of the figures over all of them."""

from rag_jax.metrics import abstention, matching
from rag_jax.metrics.figures import Row, Setting, golds, references


def right(row: Row, setting: Setting) -> bool | None:
    """Exact match with a short answer, the right label, or "no answer" said where there is none.

    None where that cannot be said: nothing was written, or a long text was wanted.
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


def f1(row: Row, setting: Setting) -> float | None:
    """F1 with the nearest of the texts wanted; None where there is none, or it is an expression."""
    wanted = golds(row, setting) or references(row)
    return matching.f1(row["prediction"], wanted, setting.match) if wanted and _has_words(row, setting) else None


def _has_words(row: Row, setting: Setting) -> bool:
    return row["prediction"] is not None and setting.match in matching.NORMAL_FORMS
