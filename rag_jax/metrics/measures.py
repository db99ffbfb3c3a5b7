"""The metrics as functions from rows of predictions to figures; each has none where no row has what it needs."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np

from rag_jax.metrics import bootstrap, matching, ranking, texts
from rag_jax.metrics.figures import (
    Figure,
    Figures,
    Judging,
    Row,
    depth,
    golds,
    judged,
    mean,
    ranked,
    references,
    written,
)

RECALL_KS = (1, 5, 20, 100)
TOP = 10  # cut-off of MRR and nDCG


def exact_match(rows: Sequence[Row], setting: Judging) -> Figures:
    match = matching.MATCHERS[setting.match]
    pairs = [(row["prediction"], golds(row, setting)) for row in written(rows)]
    return mean("exact_match", [match(text, wanted) for text, wanted in pairs if wanted])


def f1(rows: Sequence[Row], setting: Judging) -> Figures:
    """F1 with short answers, else with long texts, as dialogue is scored; none if answers are regular expressions."""
    if setting.match == "regex":
        return {}
    pairs = [(row["prediction"], golds(row, setting) or references(row)) for row in written(rows)]
    return mean("f1", [matching.f1(text, wanted, setting.match) for text, wanted in pairs if wanted])


def answer_recall(rows: Sequence[Row], setting: Judging) -> Figures:
    looked = [row for row in rows if golds(row, setting) and "retrieved_has_answer" in row]
    flags = [row["retrieved_has_answer"] for row in looked]
    found: Figures = {}
    for k in usable(RECALL_KS, looked):
        found |= mean(f"answer_recall_at_{k}", [ranking.answer_recall(k, one) for one in flags])
    return found


def recall(rows: Sequence[Row], setting: Judging) -> Figures:
    counted = list(filter(judged, rows))
    found: Figures = {}
    for k in usable(RECALL_KS, counted):
        found |= mean(f"recall_at_{k}", _scores(counted, partial(ranking.recall_at, k)))
    return found


def all_gold(rows: Sequence[Row], setting: Judging) -> Figures:
    """Share of questions with all gold passages in the first k, and mean share of gold passages there.

    None where no question has several gold passages.
    """
    counted = list(filter(judged, rows))
    found: Figures = {}
    if all(len(set(row["gold"])) <= 1 for row in counted):
        return {}
    for k in usable(RECALL_KS, counted):
        found |= mean(f"all_gold_at_{k}", _scores(counted, partial(ranking.all_found, k)))
        found |= mean(f"gold_share_at_{k}", _scores(counted, partial(ranking.share_found, k)))
    return found


def mrr(rows: Sequence[Row], setting: Judging) -> Figures:
    counted = list(filter(judged, rows))
    scores = _scores(counted, partial(ranking.reciprocal_rank, TOP))
    return mean(f"mrr_at_{TOP}", scores) if usable((TOP,), counted) else {}


def ndcg(rows: Sequence[Row], setting: Judging) -> Figures:
    """nDCG at TOP, with the grades of the question file where it has some; other gold passages have grade 1."""
    counted = list(filter(judged, rows))
    if not usable((TOP,), counted):
        return {}
    graded = [(ranked(row), dict.fromkeys(row["gold"], 1) | (row.get("relevance") or {})) for row in counted]
    return mean(f"ndcg_at_{TOP}", [ranking.ndcg(TOP, *pair) if max(pair[1].values()) > 0 else 0.0 for pair in graded])


def r_precision(rows: Sequence[Row], setting: Judging) -> Figures:
    counted = list(filter(judged, rows))
    deepest = max((len(set(row["gold"])) for row in counted), default=0)
    return mean("r_precision", _scores(counted, ranking.r_precision)) if usable((max(deepest, 1),), counted) else {}


def kilt(rows: Sequence[Row], setting: Judging) -> Figures:
    """KILT (Petroni et al. 2021): R-precision of pages, and scores of answers that count only where it is 1."""
    looked = [row for row in rows if depth(row) and "retrieved_documents" in row]
    paged = [row for row in looked if any(row.get("gold_documents") or ())]
    precise = [ranking.page_r_precision(row["retrieved_documents"], _sets(row)) for row in paged]
    found = mean("kilt_r_precision", precise)
    scored = [
        (float(precision == 1), row["prediction"], golds(row, setting))
        for row, precision in zip(paged, precise, strict=True)
        if row["prediction"] is not None and golds(row, setting)
    ]
    if setting.match == "regex" or not scored:
        return found
    same = [right * (text.strip() in [gold.strip() for gold in wanted]) for right, text, wanted in scored]
    exact = [right * matching.exact_match(text, wanted, setting.match) for right, text, wanted in scored]
    words = [right * matching.f1(text, wanted, setting.match) for right, text, wanted in scored]
    return found | mean("kilt_accuracy", same) | mean("kilt_exact_match", exact) | mean("kilt_f1", words)


def rouge_l(rows: Sequence[Row], setting: Judging) -> Figures:
    long = _long(rows)
    return mean("rouge_l", list(texts.rouge_l(*long))) if long[0] else {}


def bleu(rows: Sequence[Row], setting: Judging) -> Figures:
    """BLEU of the whole collection, with n-grams up to 4, and with single words."""
    long = _long(rows)
    if not long[0]:
        return {}
    parts_NX = texts.bleu_parts(*long)
    return {
        "bleu": Figure(lambda counts_RN: texts.bleu(counts_RN @ parts_NX), len(parts_NX)),
        "bleu_1": Figure(lambda counts_RN: texts.bleu(counts_RN @ parts_NX, order=1), len(parts_NX)),
    }


def distinct(rows: Sequence[Row], setting: Judging) -> Figures:
    said = [row["prediction"] for row in written(rows)]
    if not said:
        return {}
    return {f"distinct_{n}": Figure(texts.Grams(said, n).distinct, len(said), shrinks=True) for n in (1, 2)}


def accuracy(rows: Sequence[Row], setting: Judging) -> Figures:
    gold_N, said_N = _classes(rows, setting)
    return mean("accuracy", list((gold_N == said_N).astype(float)))


def macro_f1(rows: Sequence[Row], setting: Judging) -> Figures:
    """Macro F1: the mean F1 over the labels that some question has."""
    gold_N, said_N = _classes(rows, setting)
    classes_C = np.unique(gold_N[gold_N >= 0])
    if not len(classes_C):
        return {}
    gold_NC, said_NC = (labels_N[:, None] == classes_C for labels_N in (gold_N, said_N))

    def statistic(counts_RN: np.ndarray) -> np.ndarray:
        both_RC, either_RC = counts_RN @ (gold_NC & said_NC), counts_RN @ (gold_NC.astype(float) + said_NC)
        f1_RC = bootstrap.divided(2 * both_RC, either_RC)  # NaN for a label that does not occur in a resample
        return bootstrap.divided(np.nansum(f1_RC, 1), (either_RC > 0).sum(1))

    return {"macro_f1": Figure(statistic, len(gold_N))}


def _scores(rows: Sequence[Row], score: Callable[[Sequence[str], Collection[str]], float]) -> list[float]:
    """The score of each ranking; 0 where passages were judged, but none is relevant."""
    return [score(ranked(row), row["gold"]) if row["gold"] else 0.0 for row in rows]


def _sets(row: Row) -> list[set[str]]:
    return [set(pages) for pages in row["gold_documents"] if pages]


def _long(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    pairs = [(row["prediction"], references(row)) for row in written(rows)]
    return [text for text, wanted in pairs if wanted], [wanted for _, wanted in pairs if wanted]


def _classes(rows: Sequence[Row], setting: Judging) -> tuple[np.ndarray, np.ndarray]:
    """(gold_N, said_N) as numbers of labels; -1 for a prediction that is no label, -2 for a gold answer that is not."""
    number = {label.strip().lower(): i for i, label in enumerate(setting.labels)}
    gold_N, said_N = [], []
    for row in written(rows) if number else ():
        answers = golds(row, setting)
        gold = answers[0] if row.get("label") is None and answers else row.get("label")
        if gold is not None:
            gold_N.append(number.get(str(gold).strip().lower(), -2))
            said_N.append(number.get(row["prediction"].strip().lower(), -1))
    return np.array(gold_N, int), np.array(said_N, int)


def usable(ks: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """The k up to the number of passages asked for; a search that found fewer has returned all that it can."""
    most = max(map(depth, rows), default=0)
    return [k for k in ks if k <= most]
