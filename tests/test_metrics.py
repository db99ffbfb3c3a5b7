"""Scores against hand-worked cases and an independent restatement."""

import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_jax import metrics
from rag_jax.errors import InputError

ASCII_PUNCTUATION = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""


def oracle_normal_form(text: str) -> str:
    kept = "".join(letter for letter in text.lower() if letter not in ASCII_PUNCTUATION)
    return " ".join(word for word in re.split(r"\s+", kept) if word and word not in ("a", "an", "the"))


def oracle_f1(prediction: str, gold: str) -> float:
    found, wanted = oracle_normal_form(prediction).split(), oracle_normal_form(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    left, common = list(wanted), 0
    for word in found:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def oracle_tokens(text: str) -> list[str]:
    """DPR's tokens, letter by letter from the Unicode categories, for text in scripts with spaces."""
    tokens: list[str] = []
    in_word = False
    for letter in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(letter)[0]
        if kind in "LNM":
            if in_word:
                tokens[-1] += letter
            else:
                tokens.append(letter)
        elif kind not in "ZC":
            tokens.append(letter)
        in_word = kind in "LNM"
    return [token.lower() for token in tokens]


def oracle_has_answer(text: str, answers: list[str]) -> bool:
    words = oracle_tokens(text)
    for answer in map(oracle_tokens, answers):
        if answer and any(words[i : i + len(answer)] == answer for i in range(len(words))):
            return True
    return False


@pytest.mark.parametrize(
    ("text", "normal_form"),
    [
        ("The Beatles", "beatles"),
        ("  An  apple,\ta day! ", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre and another", "theatre and another"),  # articles only as whole words
        ("well-known", "wellknown"),
        ("the-a", "thea"),  # punctuation goes first, as in SQuAD's script
        ("«Война и мир»", "«война и мир»"),  # only ASCII punctuation goes
        ("北京。", "北京。"),
        ("a", ""),
        ("a\u0301 the", "\u0301"),  # a combining mark ends a word for Python's re, as in SQuAD's script
    ],
)
def test_normal_form(text: str, normal_form: str) -> None:
    assert metrics.normalize_answer(text) == normal_form


@pytest.mark.parametrize(
    ("prediction", "golds", "match", "f1"),
    [
        ("The Eiffel Tower", ["eiffel tower"], 1.0, 1.0),
        ("Paris", ["London", "paris."], 1.0, 1.0),
        ("Barack Hussein Obama", ["Barack Obama"], 0.0, 0.8),  # precision 2/3, recall 1
        ("cat cat dog", ["cat dog dog"], 0.0, 2 / 3),  # each word as often as in both
        ("in 1969", ["1968", "July 20 1969"], 0.0, 0.4),  # precision 1/2, recall 1/3
        ("blue", ["red"], 0.0, 0.0),
        ("", ["red"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # both empty
        ("Москва", ["москва"], 1.0, 1.0),
        ("القاهرة", ["القاهرة"], 1.0, 1.0),
        ("十倍于自身体重的食物", ["十倍于自身体重的食物"], 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(prediction: str, golds: list[str], match: float, f1: float) -> None:
    assert metrics.exact_match(prediction, golds) == match
    assert metrics.f1(prediction, golds) == pytest.approx(f1, abs=1e-12)


WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat", "dog.", "x-y", "xy", "12", "été"]), max_size=6).map(
    " ".join
)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_scores_equal_the_restatement(prediction: str, golds: list[str]) -> None:
    forms = [oracle_normal_form(gold) for gold in golds]
    assert metrics.exact_match(prediction, golds) == float(oracle_normal_form(prediction) in forms)
    best = max(oracle_f1(prediction, gold) for gold in golds)
    assert metrics.f1(prediction, golds) == pytest.approx(best, abs=1e-12)
    assert metrics.f1(prediction, golds) >= metrics.exact_match(prediction, golds)


@pytest.mark.parametrize("golds", [[], "Paris"])
def test_gold_answers_must_be_a_list(golds: list[str]) -> None:
    for score in (metrics.exact_match, metrics.f1):
        with pytest.raises(ValueError, match="gold answers"):
            score("Paris", golds)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("She was born in New York City.", "new york", True),
        ("She was born in New Yorkshire.", "new york", False),  # whole tokens
        ("new amsterdam york", "new york", False),  # in a row
        ("York, New", "New York", False),  # in order
        ("It cost $3.50 then", "3.50", True),
        ("It cost $350 then", "3.50", False),
        ("a well - known man", "well-known", True),  # punctuation is a token, spaces are nothing
        ("a well known man", "well-known", False),
        ("São Paulo", "sa\u0303o paulo", True),  # composed equals decomposed
        ("Sao Paulo", "São Paulo", False),
        ("ΟΔΥΣΣΕΎΣ", "οδυσσεύς", True),  # the final sigma
        ("anything", "", False),
        ("anything", " \n", False),
        ("", "a", False),
        ("Он родился в Москве, столице", "в москве", True),
        ("عاصمة مصر هي القاهرة.", "القاهرة", True),
        ("黑豹队的防守只丢了 308分，排名第六", "308", True),
        ("在美国依然允许体罚", "美国", True),
        ("在美国依然允许体罚", "国美", False),
        ("エッフェル塔がパリにある", "パリ", True),
        ("かがみ", "か\u3099み", True),
        ("がみ", "か", False),  # the voicing mark belongs to its letter
    ],
)
def test_has_answer(text: str, answer: str, found: bool) -> None:
    assert metrics.has_answer(text, [answer]) is found
    assert metrics.has_answer(text, ["not there at all", answer]) is found
    assert metrics.has_answer(text, []) is False


SPACED = st.text(st.sampled_from("abBcé\u0301İßΣ1½ .,-$\n\u00a0\u200bД\u0438\u0306مم\u064e한"), max_size=12)


@given(SPACED, st.lists(SPACED, max_size=3))
def test_has_answer_equals_brute_force(text: str, answers: list[str]) -> None:
    assert metrics.has_answer(text, answers) == oracle_has_answer(text, answers)


@given(SPACED, st.integers(0, 12), st.integers(0, 12))
def test_a_run_of_tokens_is_found(text: str, start: int, length: int) -> None:
    run = oracle_tokens(text)[start : start + length]
    assert metrics.has_answer(text, [" ".join(run)]) == bool(run)


@pytest.mark.parametrize(
    ("name", "least"), [("xquad_en", 0.99), ("xquad_zh", 1.0), ("xquad_ar", 0.97), ("xquad_ru", 0.99)]
)
def test_answers_are_found_in_their_gold_passages(shared_data: Callable[[str], Path], name: str, least: float) -> None:
    folder = shared_data(name)
    passages = {row["id"]: row["text"] for row in map(json.loads, (folder / "passages.jsonl").open(encoding="utf-8"))}
    questions = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
    texts = [" ".join(passages[i] for i in question["positive_passage_ids"]) for question in questions]
    found = [metrics.has_answer(text, question["answers"]) for text, question in zip(texts, questions, strict=True)]
    assert np.mean(found) >= least
    moved = [
        metrics.has_answer(text, question["answers"]) for text, question in zip(texts[450:], questions, strict=False)
    ]
    assert np.mean(moved) < 0.2  # other articles' passages do not have them


def test_recall() -> None:
    retrieved = ["d", "b", "a", "c"]
    assert [metrics.recall_at(k, retrieved, ["a", "x"]) for k in (1, 2, 3, 4, 9)] == [0, 0, 1, 1, 1]
    assert metrics.recall_at(4, retrieved, {"x"}) == 0
    with pytest.raises(ValueError, match="no gold"):
        metrics.recall_at(1, retrieved, [])
    assert [metrics.answer_recall(k, [False, True, False]) for k in (1, 2, 3)] == [0, 1, 1]
    assert metrics.answer_recall(5, []) == 0


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=1000)
    low, high = metrics.bootstrap_ci(values, seed=7, resamples=4000)
    standard_error = values.std() / math.sqrt(len(values))
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * standard_error)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    scores = np.random.default_rng(2).random(50)
    assert metrics.bootstrap_ci(scores, 7) == metrics.bootstrap_ci(scores, 7) != metrics.bootstrap_ci(scores, 8)
    assert metrics.bootstrap_ci([1, 1, 1]) == (1, 1)
    with pytest.raises(ValueError, match="non-empty"):
        metrics.bootstrap_ci([])


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
    low, high = summary.pop("exact_match_low"), summary.pop("exact_match_high")
    assert 0 <= low < 1 / 3 < high <= 1
    assert summary == {
        "n": 4,
        "exact_match": pytest.approx(1 / 3),
        "f1": pytest.approx((1 + 2 / 3) / 3),
        "recall_at_1": pytest.approx(1 / 3),
        "recall_at_5": pytest.approx(2 / 3),
        "answer_recall_at_1": pytest.approx(1 / 3),
        "answer_recall_at_5": pytest.approx(2 / 3),
    }


def test_summary_takes_the_ks_that_were_retrieved() -> None:
    """A row with fewer passages than others, as of BM25, has found no more: it counts for every k."""
    rows = [
        row("a", ["b"], ["p4"], [False] * 4 + [True]),
        row("a", ["b"], ["p9"], [False]),
        row("a", ["b"], ["p0"], []),
    ]
    found = {key: value for key, value in metrics.summarize(rows).items() if "recall" in key}
    third = pytest.approx(1 / 3)
    assert found == {"recall_at_1": 0, "recall_at_5": third, "answer_recall_at_1": 0, "answer_recall_at_5": third}
    closed_book = metrics.summarize([{"prediction": "a", "answers": ["a"], "retrieved": [], "gold": ["p0"]}])
    assert closed_book == {"n": 1, "exact_match": 1, "exact_match_low": 1, "exact_match_high": 1, "f1": 1}
    with pytest.raises(InputError, match="no predictions"):
        metrics.summarize([])
