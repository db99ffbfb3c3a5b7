"""Ranking metrics: hand-worked cases, trec_eval, and an independent implementation of KILT's rules."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import spoiled

from rag_jax.metrics import ranking


def test_recall() -> None:
    retrieved = ["d", "b", "a", "c"]
    assert [ranking.recall_at(k, retrieved, ["a", "x"]) for k in (1, 2, 3, 4, 9)] == [0, 0, 1, 1, 1]
    assert ranking.recall_at(4, retrieved, {"x"}) == 0
    assert [ranking.answer_recall(k, [False, True, False]) for k in (1, 2, 3)] == [0, 1, 1]
    assert ranking.answer_recall(5, []) == 0


def test_all_of_several() -> None:
    retrieved = ["d", "b", "a", "c"]
    assert [ranking.all_found(k, retrieved, ["a", "b"]) for k in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert [ranking.share_found(k, retrieved, ["a", "b"]) for k in (1, 2, 3)] == [0, 1 / 2, 1]
    assert ranking.all_found(9, retrieved, ["a", "x"]) == 0 and ranking.share_found(9, retrieved, ["a", "x"]) == 1 / 2
    assert ranking.share_found(4, retrieved, ["a", "a"]) == 1


def test_without_gold_passages_there_is_no_score() -> None:
    for score in (
        lambda: ranking.recall_at(1, ["a"], []),
        lambda: ranking.all_found(1, ["a"], []),
        lambda: ranking.share_found(1, ["a"], []),
        lambda: ranking.reciprocal_rank(1, ["a"], []),
        lambda: ranking.ndcg(1, ["a"], {"a": 0}),
        lambda: ranking.r_precision(["a"], []),
        lambda: ranking.page_r_precision(["a"], []),
        lambda: ranking.page_r_precision(["a"], [[]]),
    ):
        with pytest.raises(ValueError, match="no gold"):
            score()


def test_reciprocal_rank() -> None:
    retrieved = ["d", "b", "a", "c"]
    assert [ranking.reciprocal_rank(10, retrieved, [gold]) for gold in "dbacx"] == [1, 1 / 2, 1 / 3, 1 / 4, 0]
    assert ranking.reciprocal_rank(2, retrieved, ["a"]) == 0
    assert ranking.reciprocal_rank(4, retrieved, ["c", "b"]) == 1 / 2


def test_ndcg() -> None:
    grades = {"a": 3, "b": 1, "c": 0}
    best = 3 + 1 / math.log2(3)
    assert ranking.ndcg(10, ["a", "b"], grades) == pytest.approx(1)
    assert ranking.ndcg(10, ["x", "b", "a"], grades) == pytest.approx((1 / math.log2(3) + 3 / 2) / best)
    assert ranking.ndcg(1, ["b", "a"], grades) == pytest.approx(1 / 3)  # one place: the best is 3
    assert ranking.ndcg(10, ["c", "x"], grades) == ranking.ndcg(10, [], grades) == 0


def test_r_precision() -> None:
    assert ranking.r_precision(["a", "x", "b"], ["a", "b"]) == 1 / 2  # the third is too late
    assert ranking.r_precision(["b", "a"], ["a", "b", "b"]) == 1
    assert ranking.r_precision([], ["a"]) == 0


def test_pages_count_once_and_the_best_way_counts() -> None:
    pages = ["P", "P", "Q", "R"]
    assert ranking.page_r_precision(pages, [["P", "Q"]]) == 1
    assert ranking.page_r_precision(pages, [["Q"]]) == 0
    assert ranking.page_r_precision(pages, [["Q"], ["P", "R"]]) == 1 / 2
    assert ranking.page_r_precision(pages, [["Q"], ["P"]]) == 1


def kilt_r_precision(guessed: list[str], golds: list[list[str]]) -> float:
    """The best over the outputs: distinct page ids of the guess among its first R that are right, divided by R."""
    once: list[str] = []
    for page in guessed:
        if page not in once:
            once.append(page)
    scores = []
    for gold in golds:
        wanted = sorted(set(gold))
        hits = sum(1 for page in once[: len(wanted)] if page in wanted)
        scores.append(hits / len(wanted))
    return max(scores)


def rankings(folder: Path, n: int) -> list[tuple[list[str], dict[str, int]]]:
    """(retrieved, grades) of real questions: gold passages among others, in a random order of this seed."""
    questions = [row for row in spoiled.rows(folder / "train.jsonl", n) if row["positive_passage_ids"]]
    made = []
    for i, row in enumerate(questions):
        draw = random.Random(i)
        gold = row["positive_passage_ids"] + row.get("also_relevant_passage_ids", [])
        others = {p for j in range(1, 7) for p in questions[(i + j) % len(questions)]["positive_passage_ids"]}
        retrieved = sorted({*gold[: draw.randrange(len(gold) + 1)], *others - set(gold)})
        draw.shuffle(retrieved)
        made.append(
            (retrieved[: draw.randrange(1, len(retrieved) + 1)], {one: draw.choice((1, 1, 2, 3)) for one in gold})
        )
    return made


@pytest.mark.parametrize("name", ["climate_fever", "nq_gold"])
def test_equal_to_trec_eval(shared_data: Callable[[str], Path], name: str) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    cases = {str(i): case for i, case in enumerate(rankings(shared_data(name), 1100 if name == "nq_gold" else 1024))}
    judged = {i: grades for i, (_, grades) in cases.items()}

    def scored(k: int, *measures: str) -> dict[str, dict[str, float]]:
        run = {i: {one: -float(rank) for rank, one in enumerate(found[:k])} for i, (found, _) in cases.items()}
        return pytrec_eval.RelevanceEvaluator(judged, set(measures)).evaluate(run)

    whole, top = scored(1000, "ndcg_cut.10", "Rprec", "success.1,5,10", "recall.1,5,10"), scored(10, "recip_rank")
    for i, (found, grades) in cases.items():
        assert ranking.ndcg(10, found, grades) == pytest.approx(whole[i]["ndcg_cut_10"], abs=1e-9)
        assert ranking.r_precision(found, list(grades)) == pytest.approx(whole[i]["Rprec"], abs=1e-9)
        assert ranking.reciprocal_rank(10, found, list(grades)) == pytest.approx(top[i]["recip_rank"], abs=1e-9)
        for k in (1, 5, 10):
            assert ranking.recall_at(k, found, list(grades)) == whole[i][f"success_{k}"]
            assert ranking.share_found(k, found, list(grades)) == pytest.approx(whole[i][f"recall_{k}"], abs=1e-9)
            assert ranking.all_found(k, found, list(grades)) == float(whole[i][f"recall_{k}"] == 1)
    if name == "nq_gold":
        assert len(cases) > 1000
    assert 0.1 < sum(x["ndcg_cut_10"] for x in whole.values()) / len(cases) < 0.9


def test_equal_to_kilts_rules(shared_data: Callable[[str], Path]) -> None:
    """The page of a passage is its id without the last number."""
    cases = rankings(shared_data("medquad"), 1100)
    scores = []
    for i, (found, grades) in enumerate(cases):
        pages = [one.rpartition("-")[0] for one in found]
        gold = [one.rpartition("-")[0] for one in grades]
        golds = [gold, pages[2:4] or gold] if i % 3 else [gold]
        scores.append(ranking.page_r_precision(pages, golds))
        assert scores[-1] == kilt_r_precision(pages, golds)
    assert len(scores) > 1000 and 0.02 < sum(scores) / len(scores) < 0.9
