"""Figures of prediction rows: which ones there are, over which rows, and their intervals."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import spoiled

from rag_jax import metrics
from rag_jax.errors import InputError
from rag_jax.metrics import Judging, texts


def row(prediction: str, answers: list[str], gold: list[str], flags: list[bool]) -> dict:
    retrieved = [f"p{i}" for i in range(len(flags))]
    return {
        "prediction": prediction,
        "answers": answers,
        "retrieved": retrieved,
        "gold": gold,
        "retrieved_has_answer": flags,
    }


def test_summary_by_hand() -> None:
    rows = [
        row("Paris", ["paris"], ["p0"], [True, False, False, False, False]),
        row("big dog", ["dog"], ["p4"], [False, False, True, False, False]),
        row("no", ["yes"], [], [False] * 5),  # no gold passage: not in recall
        row("x", [], ["p9"], [False] * 5),  # no short answer: not in exact match
    ]
    summary = metrics.summarize(rows)
    assert summary == {
        "n": 4,
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((1 + 2 / 3) / 3),
        "recall_at_1": pytest.approx(1 / 3),
        "recall_at_5": pytest.approx(2 / 3),
        "r_precision": pytest.approx(1 / 3),
        "answer_recall_at_1": pytest.approx(1 / 3),
        "answer_recall_at_5": pytest.approx(2 / 3),
    }


def test_summary_takes_the_ks_that_were_retrieved() -> None:
    """A row with fewer passages than others, such as BM25 gives, has found no more: it counts for every k."""
    rows = [
        row("a", ["b"], ["p4"], [False] * 4 + [True]),
        row("a", ["b"], ["p9"], [False]),
        row("a", ["b"], ["p0"], []),
    ]
    found = {key: value for key, value in metrics.summarize(rows).items() if "recall" in key}
    third = pytest.approx(1 / 3)
    assert found == {"recall_at_1": 0, "recall_at_5": third, "answer_recall_at_1": 0, "answer_recall_at_5": third}
    closed_book = metrics.summarize([{"prediction": "a", "answers": ["a"], "retrieved": [], "gold": ["p0"]}])
    assert closed_book == {"n": 1, "exact_match": 1, "f1": 1}
    with pytest.raises(InputError, match="no predictions"):
        metrics.summarize([])


def answered(prediction: str | None, answers: list[str], **more: object) -> dict:
    return {"prediction": prediction, "answers": answers, "score": -1.0, "retrieved": [], "gold": [], **more}


def test_intervals_stand_beside_the_values() -> None:
    rows = [row("yes" if i % 3 else "no", ["yes"], ["p0"], [True] * 20) for i in range(90)]
    summary = metrics.summarize(rows, intervals=True)
    names = {name for name in summary if name != "n" and not name.endswith(("_low", "_high"))}
    assert {*names, "n", *(f"{name}_{end}" for name in names for end in ("low", "high"))} == set(summary)
    for name in names:
        assert summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"]
    error = 1.96 * np.sqrt(2 / 9 / 90)
    assert summary["exact_match_high"] - summary["exact_match_low"] == pytest.approx(2 * error, rel=0.15)
    assert summary == metrics.summarize(rows, intervals=True)


def test_a_long_target_is_not_scored_as_a_short_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "installed", lambda name: name not in texts.LIBRARIES)
    target = "the long answer of many words"
    rows = [answered("many words", ["yes"], target=target), answered("the long answer", [target, "b"], target=target)]
    summary = metrics.summarize(rows)
    assert set(summary) == {"n", "f1", "distinct_1", "distinct_2"}  # no exact match
    assert summary["f1"] == pytest.approx((2 * 2 / 7 + 2 * 2 / 7) / 2)  # compared with the target, not with "yes"
    assert metrics.missing(rows, Judging(), (), summary) == ["rouge_l, bleu: left out; pip install 'rag-jax[metrics]'"]
    labelled = metrics.summarize(rows[:1], Judging(("yes", "no")))
    assert labelled["exact_match"] == labelled["accuracy"] == 0 and "distinct_1" not in labelled


def test_metrics_that_are_named() -> None:
    rows = [row("big dog", ["dog"], ["p4"], [False] * 5)]
    assert metrics.summarize(rows, names=("f1", "recall")) == {
        "n": 1,
        "f1": pytest.approx(2 / 3),
        "recall_at_1": 0,
        "recall_at_5": 1,
    }
    assert metrics.missing(rows, Judging(), ("f1", "mrr"), metrics.summarize(rows, names=("f1", "mrr"))) == [
        "mrr: left out, it needs gold passages and 10 retrieved"
    ]
    with pytest.raises(InputError, match="no metric 'meteor'; there are: exact_match, f1,"):
        metrics.summarize(rows, names=("meteor",))
    with pytest.raises(InputError, match="match 'fuzzy'; there are: string, regex"):
        Judging(match="fuzzy")  # type: ignore[arg-type]


def test_patterns_as_answers() -> None:
    rows = [answered("In 1969", ["19\\d\\d"]), answered("1969, in July", ["19\\d\\d"])]
    assert metrics.summarize(rows, Judging(match="regex")) == {"n": 2, "exact_match": 1 / 2}


def test_rankings_by_grade_and_depth() -> None:
    retrieved = [f"p{i}" for i in range(10)]
    ranked = {"prediction": None, "answers": [], "retrieved": retrieved}
    rows = [
        {**ranked, "gold": ["p1"], "relevance": {"p1": 2, "p5": 0}},
        {**ranked, "gold": ["p0", "x"], "relevance": None},
    ]
    summary = metrics.summarize(rows)
    assert summary["mrr_at_10"] == pytest.approx((1 / 2 + 1) / 2) and summary["r_precision"] == (0 + 1 / 2) / 2
    assert summary["ndcg_at_10"] == pytest.approx((1 / np.log2(3) + 1 / (1 + 1 / np.log2(3))) / 2)
    assert not {"exact_match", "kilt_r_precision", "recall_at_20"} & set(summary)
    few = [{**one, "retrieved": retrieved[:1]} for one in rows]
    assert set(metrics.summarize(few)) == {"n", "recall_at_1", "all_gold_at_1", "gold_share_at_1"}  # too few retrieved


def test_several_gold_passages() -> None:
    retrieved = [f"p{i}" for i in range(5)]
    rows = [{"prediction": None, "answers": [], "retrieved": retrieved, "gold": gold}
            for gold in (["p0"], ["p0", "p3"], ["p1", "p2", "x"], [])]  # fmt: skip
    summary = metrics.summarize(rows, names=("recall", "all_gold"))
    assert (summary["recall_at_1"], summary["all_gold_at_1"]) == (2 / 3, 1 / 3)
    assert (summary["recall_at_5"], summary["all_gold_at_5"]) == (1, 2 / 3)
    assert summary["gold_share_at_1"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert summary["gold_share_at_5"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert not [name for name in metrics.summarize(rows[:1]) if "all_gold" in name]  # none needs several


def test_the_rule_of_a_language_is_that_of_all_figures() -> None:
    right = {"gold": ["a"], "gold_documents": [["a"]], "retrieved": ["a"], "retrieved_documents": ["a"]}
    rows = [answered("十倍的食物。", ["十倍食物"], **right), answered("不", [], unanswerable=True)]
    names = ("exact_match", "f1", "kilt", "no_answer")
    summary = metrics.summarize(rows, Judging(match="mlqa_zh"), names)
    assert summary["f1"] == summary["kilt_f1"] == pytest.approx(2 * 4 / 9)
    assert summary["squad2_f1"] == pytest.approx(4 / 9) and summary["exact_match"] == 0
    assert metrics.summarize(rows, names=names)["f1"] == 0  # one word for SQuAD


def test_kilt_counts_answers_only_with_the_right_pages() -> None:
    right = {"gold": ["a-0"], "gold_documents": [["a"]], "retrieved": ["a-1"], "retrieved_documents": ["a"]}
    wrong = right | {"retrieved_documents": ["b", "a"]}
    rows = [
        answered("The Cat", ["cat"], **right),
        answered(" cat ", ["cat"], **right),
        answered("a big cat", ["cat"], **right),
        answered("cat", ["cat"], **wrong),
        answered("cat", ["cat"], **right | {"gold_documents": [[], ["x"], ["a"]]}),  # the best of the outputs
        answered("cat", ["cat"], **right | {"gold_documents": [[]]}),  # no page is known
    ]
    summary = metrics.summarize(rows, names=("kilt", "exact_match"))
    assert summary == {
        "n": 6,
        "exact_match": 5 / 6,
        "kilt_r_precision": 4 / 5,
        "kilt_accuracy": 2 / 5,  # equal letter by letter
        "kilt_exact_match": 3 / 5,
        "kilt_f1": pytest.approx((1 + 1 + 2 / 3 + 1) / 5),
    }


def oracle_macro_f1(golds: list[str], said: list[str]) -> float:
    scores = []
    for label in sorted(set(golds)):
        right = sum(g == s == label for g, s in zip(golds, said, strict=True))
        precision = right / Counter(said)[label] if label in said else 0.0
        recall = right / Counter(golds)[label]
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


def test_labels_by_hand() -> None:
    rows = [
        answered("yes", ["Yes"]),
        answered(" YES ", ["no"]),
        answered("perhaps", ["yes"], label="no"),  # the label comes first
        answered("no", ["no"], target="a long text"),
        answered(None, ["yes"]),
    ]
    summary = metrics.summarize(rows, Judging(("yes", "no", "maybe")), ("accuracy", "macro_f1"))
    assert summary == {"n": 5, "accuracy": 2 / 4, "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2)}
    assert metrics.summarize(rows, names=("accuracy", "macro_f1")) == {"n": 5}  # which labels there are is not known


def test_labels_of_real_claims(shared_data: Callable[[str], Path]) -> None:
    labels = ["SUPPORTS", "REFUTES", "NOT_ENOUGH_INFO", "DISPUTED"]
    golds = [one["label"] for one in spoiled.rows(shared_data("climate_fever/train.jsonl"), 1024)]
    said = [labels[(7 * i) % 4] if i % 5 < 3 else gold if i % 4 else "NONE" for i, gold in enumerate(golds)]
    rows = [answered(text, [gold], label=gold) for text, gold in zip(said, golds, strict=True)]
    summary = metrics.summarize(rows, Judging(tuple(labels)), ("accuracy", "macro_f1"), intervals=True)
    right = np.mean([a == b for a, b in zip(golds, said, strict=True)])
    assert len(rows) > 1000 and summary["accuracy"] == pytest.approx(right)
    assert summary["macro_f1"] == pytest.approx(oracle_macro_f1(golds, said), abs=1e-12)
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(200):
        drawn = draw.integers(len(golds), size=len(golds))
        resampled.append(oracle_macro_f1([golds[i] for i in drawn], [said[i] for i in drawn]))
    width = summary["macro_f1_high"] - summary["macro_f1_low"]
    assert width == pytest.approx(2 * 1.96 * np.std(resampled), rel=0.2)


def test_unanswerable_questions_ask_for_abstention() -> None:
    rows = [answered("cat", ["cat"]), answered("", [], unanswerable=True), answered("dog", [], unanswerable=True)]
    summary = metrics.summarize(rows)
    assert summary["exact_match"] == 1  # of those with an answer
    assert summary["no_answer_precision"] == 1 and summary["no_answer_recall"] == 1 / 2
    assert summary["squad2_exact_match"] == pytest.approx(2 / 3)
    silent = metrics.summarize([rows[0], rows[2]], names=("no_answer",))
    assert "no_answer_precision" not in silent and silent["no_answer_recall"] == 0  # nothing was held back


@pytest.mark.slow
def test_the_interval_of_distinct_covers_what_as_many_other_answers_give() -> None:
    """A resample repeats answers, and so has fewer different words than any other 100 answers."""
    random = np.random.default_rng(3)
    share = 1 / np.arange(1, 2001)
    words = np.array([f"w{i}" for i in range(2000)])

    def draw() -> list[dict]:
        return [answered(" ".join(random.choice(words, size=8, p=share / share.sum())), []) for _ in range(100)]

    found = [metrics.summarize(draw(), names=("distinct",), intervals=True) for _ in range(200)]
    for name in ("distinct_1", "distinct_2"):
        truth = np.mean([one[name] for one in found])
        assert np.mean([one[f"{name}_low"] <= truth <= one[f"{name}_high"] for one in found]) >= 0.9
