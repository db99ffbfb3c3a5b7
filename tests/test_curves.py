"""Recall at every k, reliability, and the verdict on single answers, each against counting by hand."""

import math

import numpy as np
import pytest

from rag_jax import metrics
from rag_jax.metrics import calibration, curves, verdicts
from rag_jax.metrics.figures import Judging

SETTING = Judging()


def row(**values):
    usual = {
        "prediction": "x", "score": -1.0, "tokens": ["x"], "answers": ["x"], "target": None, "label": None,
        "unanswerable": False, "gold": ["a"], "retrieved": ["a", "b"], "retrieved_has_answer": [False, True],
        "read": ["a", "b"], "prior": [0.6, 0.4], "posterior": [0.3, 0.7],
    }  # fmt: skip
    return usual | values


def random_rows(n, deepest):
    random = np.random.default_rng(0)
    names = [f"p{i}" for i in range(deepest)]
    rows = []
    for _ in range(n):
        gold = [str(one) for one in random.choice(names, 2)] if random.random() < 0.8 else []
        has = (random.random(deepest) < 0.1).tolist()
        retrieved = [str(one) for one in random.permutation(names)]
        rows.append(row(gold=gold, retrieved=retrieved, retrieved_has_answer=has, read=[], prior=[], posterior=[]))
    return rows


def test_recall_of_every_k_and_its_interval_are_those_of_the_figures():
    rows = random_rows(60, 30)
    found = curves.recall_curves(rows, SETTING)
    assert found["gold"]["k"] == found["answer"]["k"] == list(range(1, 31))
    with_gold = [r for r in rows if r["gold"]]
    for i, k in enumerate(range(1, 31)):
        hits = [bool(set(r["gold"]) & set(r["retrieved"][:k])) for r in with_gold]
        assert found["gold"]["value"][i] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
        hits = [True in r["retrieved_has_answer"][:k] for r in rows]
        assert found["answer"]["value"][i] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    figures = metrics.summarize(rows, SETTING, ["recall", "answer_recall"], intervals=True)
    for kind, name in (("gold", "recall"), ("answer", "answer_recall")):
        for k in (1, 5, 20):
            point = [found[kind][side][k - 1] for side in ("value", "low", "high")]
            assert point == pytest.approx([figures[f"{name}_at_{k}{end}"] for end in ("", "_low", "_high")], abs=1e-6)


def test_curves_leave_out_what_is_not_there():
    assert curves.recall_curves([row(gold=[], answers=[], target="long")], SETTING) == {}
    assert curves.recall_curves([row(retrieved=[], retrieved_has_answer=[])], SETTING) == {}
    fewer = [row(), row(retrieved=["b"], retrieved_has_answer=[True])]  # BM25 found no more
    assert curves.recall_curves(fewer, SETTING)["gold"]["value"] == [0.5, 0.5]
    ks = curves.numbers(1000)
    assert ks[:100] == list(range(1, 101)) and ks[-1] == 1000 and ks == sorted(set(ks)) and len(ks) < 200


def test_reliability_by_hand():
    confidence, right = [0.05, 0.05, 0.92, 0.95, 1.0, 0.55], [False, True, True, False, True, True]
    found = calibration.reliability(np.array(confidence), np.array(right))
    assert found["n"] == 6 and [b["n"] for b in found["bins"]] == [2, 1, 3]
    assert [b["right"] for b in found["bins"]] == pytest.approx([1 / 2, 1, 2 / 3])
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([0.05, 0.55, 2.87 / 3])
    assert found["error"] == pytest.approx((2 * 0.45 + 1 * 0.45 + 3 * abs(2 / 3 - 2.87 / 3)) / 6)
    for one in found["bins"]:  # Wilson's bounds are where the share is 1.96 standard errors away
        for bound in (one["low"], one["high"]):
            if 0 < bound < 1:
                z = abs(one["right"] - bound) / math.sqrt(bound * (1 - bound) / one["n"])
                assert z == pytest.approx(1.959964)
    assert found["bins"][1]["high"] == 1


def test_perfect_probabilities_have_no_error_and_overconfident_ones_have():
    random = np.random.default_rng(0)
    share = random.random(200_000)
    right = random.random(200_000) < share
    assert calibration.reliability(share, right)["error"] < 0.01
    assert calibration.reliability(share**0.25, right)["error"] == pytest.approx(np.mean(share**0.25) - 0.5, abs=0.01)


def test_which_passage_and_which_answer_is_right():
    rows = [
        row(),  # best by prior is gold, best by posterior is not
        row(gold=[], posterior=[0.1, 0.9]),  # without gold passages: b has the answer
        row(gold=[], answers=[], target="long"),  # nothing can be said
        row(prediction="y", score=-2.0, tokens=["y", "z"], read=[], prior=[], posterior=[], gold=[]),  # closed book
    ]
    found = calibration.calibration(rows, SETTING)
    assert [(b["n"], b["confidence"], b["right"]) for b in found["prior"]["bins"]] == [(2, 0.6, 0.5)]
    assert [(b["confidence"], b["right"]) for b in found["posterior"]["bins"]] == [(0.7, 0.0), (0.9, 1.0)]
    assert found["answer"]["n"] == 3 and found["token"]["n"] == 3
    assert [b["confidence"] for b in found["answer"]["bins"]] == pytest.approx([math.exp(-2), math.exp(-1)])
    assert [b["confidence"] for b in found["token"]["bins"]] == pytest.approx([math.exp(-2 / 3), math.exp(-1 / 2)])
    alone = calibration.calibration([row(prediction=None)], SETTING)
    assert set(alone) == {"prior"}


@pytest.mark.parametrize(
    ("values", "setting", "right", "f1"),
    [
        ({"prediction": "The X!"}, SETTING, True, 1.0),
        ({"prediction": "y"}, SETTING, False, 0.0),
        ({"prediction": "a b", "answers": ["b c", "d"]}, SETTING, False, 2 / 3),
        ({"prediction": "", "answers": [], "unanswerable": True}, SETTING, True, None),
        ({"prediction": "x", "answers": [], "unanswerable": True}, SETTING, False, None),
        ({"prediction": "long text", "answers": [], "target": "a long word"}, SETTING, None, 0.5),
        ({"prediction": " Yes", "answers": ["no"], "label": "yes"}, Judging(("yes", "no")), True, 0.0),
        ({"prediction": "yes", "answers": ["no"]}, Judging(("yes", "no")), False, 0.0),
        ({"prediction": "12 May", "answers": [r"\d+ may"]}, Judging(match="regex"), True, None),
        ({"prediction": None}, SETTING, None, None),
    ],
)
def test_verdicts(values, setting, right, f1):
    one = row(**values)
    assert verdicts.right(one, setting) is right
    assert verdicts.f1(one, setting) == (None if f1 is None else pytest.approx(f1))


def test_verdicts_add_up_to_the_figures():
    rows = [row(prediction=text) for text in ("x", "X.", "y", "x y")]
    figures = metrics.summarize(rows, SETTING, ["exact_match", "f1"])
    assert figures["exact_match"] == np.mean([verdicts.right(one, SETTING) for one in rows])
    assert figures["f1"] == pytest.approx(np.mean([verdicts.f1(one, SETTING) for one in rows]))
