"""Bootstrap intervals and significance: deterministic, as wide as theory says, with the coverage they claim."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from rag_jax.metrics import bootstrap


def resample(statistic: bootstrap.Statistic, n: int, seed: int = 0, resamples: int = 2000) -> np.ndarray:
    return bootstrap.resampled({"x": statistic}, n, seed, resamples)["x"]


def test_counts_are_drawn_with_replacement() -> None:
    drawn = np.concatenate(list(bootstrap.counts(50, seed=3, resamples=400)))
    assert drawn.shape == (400, 50) and (drawn.sum(1) == 50).all()
    assert drawn.mean() == 1 and drawn.var() == pytest.approx(1 - 1 / 50, rel=0.05)  # binomial
    assert drawn.mean(0).std() == pytest.approx(math.sqrt(1 / 400), rel=0.3)  # no question is preferred
    with pytest.raises(ValueError, match="nothing to resample"):
        list(bootstrap.counts(0))


def test_parts_hold_a_bounded_number_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(bootstrap.counts(1000, resamples=9)))
    monkeypatch.setattr(bootstrap, "_CELLS", 4999)
    parts = list(bootstrap.counts(1000, resamples=9))
    assert [len(part) for part in parts] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_mean_is_that_of_the_drawn_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=40)
    drawn = np.concatenate(list(bootstrap.counts(40, seed=5, resamples=100)))
    by_hand = [np.repeat(values, row.astype(int)).mean() for row in drawn]
    np.testing.assert_allclose(resample(bootstrap.mean(values), 40, 5, 100), by_hand, rtol=1e-12)
    assert bootstrap.value(bootstrap.mean(values), 40) == pytest.approx(values.mean())


def test_ratio_without_a_bottom_is_no_number() -> None:
    statistic = bootstrap.ratio(np.array([1.0, 3.0]), np.array([0.0, 2.0]))
    assert bootstrap.value(statistic, 2) == 2
    np.testing.assert_array_equal(statistic(np.array([[2.0, 0.0], [0.0, 2.0]])), [np.nan, 1.5])
    assert bootstrap.interval(np.array([np.nan, *np.linspace(0, 1, 41)])) == pytest.approx((0.025, 0.975))


def test_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    low, high = bootstrap.interval(resample(bootstrap.mean(values), 1000, seed=7, resamples=4000))
    standard_error = values.std() / math.sqrt(len(values))
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * standard_error)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    scores = bootstrap.mean(np.random.default_rng(2).random(50))
    np.testing.assert_array_equal(resample(scores, 50, 7), resample(scores, 50, 7))
    assert not np.array_equal(resample(scores, 50, 7), resample(scores, 50, 8))
    assert bootstrap.interval(resample(bootstrap.mean(np.ones(3)), 3)) == (1, 1)


def test_p_value() -> None:
    assert bootstrap.p_value(np.zeros(999)) == 1
    assert bootstrap.p_value(np.ones(999)) == bootstrap.p_value(-np.ones(999)) == 2 / 1000
    assert bootstrap.p_value(np.array([-1.0] * 99 + [1.0] * 900 + [np.nan])) == pytest.approx(2 * 100 / 1000)


def sampled(
    draw: Callable[[np.random.Generator], bootstrap.Statistic], n: int, samples: int = 2000
) -> list[np.ndarray]:
    """Resampled statistics of many samples of n questions, all with the same resamples to save time."""
    random = np.random.default_rng(4)
    return list(bootstrap.resampled({str(i): draw(random) for i in range(samples)}, n, resamples=1000).values())


def exact_match_of_35_percent(random: np.random.Generator) -> bootstrap.Statistic:
    return bootstrap.mean((random.random(200) < 0.35).astype(float))


def f1_of_37_percent(random: np.random.Generator) -> bootstrap.Statistic:
    """F1 scores of questions: half are 0, a quarter 1, the others uniform between."""
    kinds = random.choice(3, size=200, p=[0.5, 0.25, 0.25])
    return bootstrap.mean(np.select([kinds == 0, kinds == 1], [0.0, 1.0], random.random(200)))


def precision_of_70_percent(random: np.random.Generator) -> bootstrap.Statistic:
    """Precision among the answered questions: 60% are answered, and 70% of these rightly."""
    answered, right = random.random(200) < 0.6, random.random(200) < 0.7
    return bootstrap.ratio(answered & right, answered)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "truth"), [(exact_match_of_35_percent, 0.35), (f1_of_37_percent, 0.375), (precision_of_70_percent, 0.7)]
)
def test_intervals_cover_as_often_as_they_say(
    draw: Callable[[np.random.Generator], bootstrap.Statistic], truth: float
) -> None:
    """2,000 samples of 200 questions from a known population: 95% to within 2 points (four standard errors)."""
    intervals = [bootstrap.interval(values) for values in sampled(draw, 200)]
    assert abs(np.mean([low <= truth <= high for low, high in intervals]) - 0.95) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "least", "most"), [(0.4, 0.03, 0.07), (0.6, 0.9, 1.0)])
def test_chance_is_seldom_significant_and_a_difference_is_found(rate: float, least: float, most: float) -> None:
    """Two systems answer 300 questions, half of them alike; if they are equal, p < 0.05 in 5% of 2,000 samples."""

    def difference(random: np.random.Generator) -> bootstrap.Statistic:
        alike, one, other = random.random(300) < 0.5, random.random(300) < 0.4, random.random(300) < rate
        return bootstrap.mean(np.where(alike, 0.0, other.astype(float) - one))

    assert least < np.mean([bootstrap.p_value(values) < 0.05 for values in sampled(difference, 300)]) <= most
