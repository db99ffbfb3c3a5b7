"""Abstention: the risk-coverage curve and its area by hand and by brute force, and which rows count as no answer."""

import itertools

import numpy as np
import pytest

from rag_jax.metrics import abstention, bootstrap
from rag_jax.metrics.figures import Judging


@pytest.mark.parametrize(
    ("prediction", "nothing"),
    [
        ("", True),
        (" .\n", True),
        ("the", True),
        ("Unanswerable.", True),
        ("No answer", True),
        ("no", False),
        ("42", False),
    ],
)
def test_what_says_that_there_is_no_answer(prediction: str, nothing: bool) -> None:
    assert abstention.says_nothing(prediction) is nothing


def test_curve_by_hand() -> None:
    confidence, wrong = (
        np.array([-3.0, -1.0, -4.0, -2.0]),
        np.array([1, 0, 0, 1]),
    )  # in order: right, wrong, wrong, right
    assert abstention.curve(confidence, wrong, points=4) == [
        (0.25, 0),
        (0.5, 1 / 2),
        (0.75, pytest.approx(2 / 3)),
        (1, 0.5),
    ]
    assert abstention.curve(np.zeros(4), wrong, points=2) == [(0.5, 0.5), (1, 0.5)]  # all scores are equal


def area(confidence: np.ndarray, wrong: np.ndarray) -> float:
    return bootstrap.value(abstention.area(confidence, wrong), len(wrong))


def test_area_by_hand() -> None:
    wrong = np.array([0, 1, 1, 0])
    assert area(np.array([4.0, 3, 2, 1]), wrong) == pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 4) / 4)
    assert area(np.array([4.0, 1, 2, 3]), wrong) < area(np.array([1.0, 4, 3, 2]), wrong)  # a good and a bad order
    assert area(np.zeros(4), wrong) == pytest.approx(0.5)


def test_area_of_equal_confidences_is_the_mean_over_their_orders() -> None:
    confidence, wrong = np.array([2.0, 1, 1, 1, 0, 0]), np.array([1, 0, 1, 1, 0, 1])
    orders = [
        [0, *middle, *last] for middle in itertools.permutations([1, 2, 3]) for last in itertools.permutations([4, 5])
    ]
    areas = [np.mean([wrong[order][:k].mean() for k in range(1, 7)]) for order in orders]
    assert area(confidence, wrong) == pytest.approx(np.mean(areas))


def test_area_of_resamples_is_that_of_the_repeated_answers() -> None:
    random = np.random.default_rng(0)
    confidence, wrong = random.choice(8, size=30).astype(float), random.random(30) < 0.4
    counts = next(bootstrap.counts(30, resamples=25))
    by_hand = [area(np.repeat(confidence, row), np.repeat(wrong, row)) for row in counts.astype(int)]
    np.testing.assert_allclose(abstention.area(confidence, wrong)(counts), by_hand, rtol=1e-12)


def row(prediction: str | None, answers: list[str], score: float = 0.0) -> dict:
    return {"prediction": prediction, "answers": answers, "score": score, "unanswerable": not answers}


def test_figures_by_hand() -> None:
    rows = [
        row("Paris", ["paris"], -1),
        row("", ["London"], -2),  # an answer held back
        row("a big dog", ["dog"], -3),
        row("no answer", [], -4),
        row("Rome", [], -5),  # an answer to a question that has none
        row("Oslo", [], -6),
        row(None, ["not asked"]),
    ]
    figures = abstention.no_answer(rows, Judging())
    assert {name: bootstrap.value(one.statistic, one.n) for name, one in figures.items()} == {
        "no_answer_precision": 1 / 2,
        "no_answer_recall": pytest.approx(1 / 3),
        "no_answer_f1": pytest.approx(2 / 5),
        "squad2_exact_match": pytest.approx(2 / 6),
        "squad2_f1": pytest.approx((1 + 0 + 2 / 3 + 1) / 6),
        "risk_coverage_area": pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 4 + 3 / 5 + 4 / 6) / 6),
    }
    assert abstention.risk_coverage(rows, Judging())[-1] == (1, pytest.approx(4 / 6))
    assert abstention.no_answer(rows[:3], Judging()) == {}  # every question has an answer
    long = row("a dog", [], -7) | {"target": "a big dog", "unanswerable": False}
    figures = abstention.no_answer([*rows, long], Judging())  # no exact match of long texts, and so no area
    assert {name: bootstrap.value(one.statistic, one.n) for name, one in figures.items()} == {
        "no_answer_precision": 1 / 2,
        "no_answer_recall": pytest.approx(1 / 3),
        "no_answer_f1": pytest.approx(2 / 5),
        "squad2_f1": pytest.approx((1 + 0 + 2 / 3 + 1 + 2 / 3) / 7),
    }
