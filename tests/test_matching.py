"""Answers compared with gold answers: hand-worked cases and an independent implementation."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import regex
import spoiled
from hypothesis import given
from hypothesis import strategies as st

from rag_jax.errors import InputError
from rag_jax.metrics import matching

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
        ("theatre and another", "theatre and another"),  # articles are removed only as whole words
        ("well-known", "wellknown"),
        ("the-a", "thea"),  # punctuation is removed first, as in SQuAD's script
        ("«Война и мир»", "«война и мир»"),  # only ASCII punctuation is removed
        ("北京。", "北京。"),
        ("a", ""),
        ("a\u0301 the", "\u0301"),  # a combining mark ends a word for Python's re, as in SQuAD's script
    ],
)
def test_normal_form(text: str, normal_form: str) -> None:
    assert matching.normalize_answer(text) == normal_form


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
    assert matching.exact_match(prediction, golds) == match
    assert matching.f1(prediction, golds) == pytest.approx(f1, abs=1e-12)


WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat", "dog.", "x-y", "xy", "12", "été"]), max_size=6).map(
    " ".join
)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_scores_equal_the_restatement(prediction: str, golds: list[str]) -> None:
    forms = [oracle_normal_form(gold) for gold in golds]
    assert matching.exact_match(prediction, golds) == float(oracle_normal_form(prediction) in forms)
    best = max(oracle_f1(prediction, gold) for gold in golds)
    assert matching.f1(prediction, golds) == pytest.approx(best, abs=1e-12)
    assert matching.f1(prediction, golds) >= matching.exact_match(prediction, golds)


def oracle_mlqa_words(text: str, language: str) -> list[str]:
    """MLQA's rules letter by letter, for languages whose articles are whole words, or that have none."""
    articles = {"en": ("a", "an", "the")}
    words: list[str] = []
    in_word = False
    for letter in text.lower():
        if unicodedata.category(letter)[0] == "P" or letter in ASCII_PUNCTUATION:
            continue
        alone = language == "zh" and "\u4e00" <= letter <= "\u9fa5"
        if letter.isspace() or alone:
            words += [letter] if alone else []
            in_word = False
        elif in_word:
            words[-1] += letter
        else:
            words.append(letter)
            in_word = True
    return [word for word in words if word not in articles.get(language, ())]


@pytest.mark.parametrize(
    ("language", "prediction", "gold", "match", "f1"),
    [
        ("zh", "在 1998 年。", "在1998年", 1.0, 1.0),  # characters, digits and other words between them
        ("zh", "十倍的食物", "十倍于自身体重的食物", 0.0, 2 * 5 / 15),
        ("zh", "《丹佛野马》队", "丹佛野马", 0.0, 2 * 4 / 9),
        ("zh", "NFL 联盟", "nfl联盟", 1.0, 1.0),
        ("ar", "في القاهرة", "في قاهرة", 1.0, 1.0),  # the article is removed wherever it occurs
        ("ar", "القاهرة،", "القاهرة", 1.0, 1.0),
        ("de", "der Fluss", "Fluss", 1.0, 1.0),
        ("es", "La ciudad de Lima", "ciudad", 0.0, 2 / 4),
        ("vi", "của Huế", "huế", 1.0, 1.0),
        ("hi", "भारत।", "भारत", 1.0, 1.0),
        ("en", "the “Broncos”", "Broncos", 1.0, 1.0),  # quotation marks, too
    ],
)
def test_mlqas_rules(language: str, prediction: str, gold: str, match: float, f1: float) -> None:
    rule = f"mlqa_{language}"
    assert matching.exact_match(prediction, [gold], rule) == matching.MATCHERS[rule](prediction, [gold]) == match
    assert matching.f1(prediction, ["other", gold], rule) == pytest.approx(f1, abs=1e-12)
    assert matching.FINDERS[rule]("在1998年", ["1998"])


@pytest.mark.parametrize("name", ["zh", "en"])
def test_mlqas_rules_of_real_answers(shared_data: Callable[[str], Path], name: str) -> None:
    """Answers truncated, doubled or with other punctuation; SQuAD's F1 of Chinese answers is 0 or 1."""
    golds = [row["answers"] for row in spoiled.rows(shared_data(f"xquad_{name}/train.jsonl"), 900)]
    said = [text[: 1 + i % len(text)] + "。!"[i % 2] + text[: i % 3] for i, (text, *_) in enumerate(golds)]
    for text, wanted in zip(said, golds, strict=True):
        found, gold = oracle_mlqa_words(text, name), oracle_mlqa_words(wanted[0], name)
        assert matching.exact_match(text, wanted, f"mlqa_{name}") == float(found == gold)
        common = (Counter(found) & Counter(gold)).total()
        oracle = 2 * common / (len(found) + len(gold)) if found or gold else 1.0
        assert matching.f1(text, wanted, f"mlqa_{name}") == pytest.approx(oracle, abs=1e-12)
    if name == "zh":
        both = [[matching.f1(*pair, rule) for pair in zip(said, golds, strict=True)] for rule in ("string", "mlqa_zh")]
        assert np.mean(both[0]) < 0.2 < 0.5 < np.mean(both[1])


@pytest.mark.parametrize("golds", [[], "Paris"])
def test_gold_answers_must_be_a_list(golds: list[str]) -> None:
    for score in (matching.exact_match, matching.f1):
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
    assert matching.has_answer(text, [answer]) is found
    assert matching.has_answer(text, ["not there at all", answer]) is found
    assert matching.has_answer(text, []) is False


SPACED = st.text(st.sampled_from("abBcé\u0301İßΣ1½ .,-$\n\u00a0\u200bД\u0438\u0306مم\u064e한"), max_size=12)


@given(SPACED, st.lists(SPACED, max_size=3))
def test_has_answer_equals_brute_force(text: str, answers: list[str]) -> None:
    assert matching.has_answer(text, answers) == oracle_has_answer(text, answers)


@given(SPACED, st.integers(0, 12), st.integers(0, 12))
def test_a_run_of_tokens_is_found(text: str, start: int, length: int) -> None:
    run = oracle_tokens(text)[start : start + length]
    assert matching.has_answer(text, [" ".join(run)]) == bool(run)


@pytest.mark.parametrize(
    ("name", "least"), [("xquad_en", 0.99), ("xquad_zh", 1.0), ("xquad_ar", 0.97), ("xquad_ru", 0.99)]
)
def test_answers_are_found_in_their_gold_passages(shared_data: Callable[[str], Path], name: str, least: float) -> None:
    folder = shared_data(name)
    passages = {row["id"]: row["text"] for row in map(json.loads, (folder / "passages.jsonl").open(encoding="utf-8"))}
    questions = [json.loads(line) for line in (folder / "train.jsonl").open(encoding="utf-8")]
    texts = [" ".join(passages[i] for i in question["positive_passage_ids"]) for question in questions]
    found = [matching.has_answer(text, question["answers"]) for text, question in zip(texts, questions, strict=True)]
    assert np.mean(found) >= least
    moved = [
        matching.has_answer(text, question["answers"]) for text, question in zip(texts[450:], questions, strict=False)
    ]
    assert np.mean(moved) < 0.2  # other articles' passages do not have them


@pytest.mark.parametrize(("name", "n"), [("squad/train", 1500), ("xquad_ru/train", 900), ("xquad_ar/train", 900)])
def test_scores_of_real_answers_equal_the_restatement(shared_data: Callable[[str], Path], name: str, n: int) -> None:
    golds = [row["answers"] for row in spoiled.rows(shared_data(f"{name}.jsonl"), n)]
    matches, overlaps = [], []
    for text, wanted in zip(spoiled.predictions(golds), golds, strict=True):
        matches.append(matching.exact_match(text, wanted))
        overlaps.append(matching.f1(text, wanted))
        assert matches[-1] == float(oracle_normal_form(text) in [oracle_normal_form(gold) for gold in wanted])
        assert overlaps[-1] == pytest.approx(max(oracle_f1(text, gold) for gold in wanted), abs=1e-12)
    assert len(golds) == n and 0.2 < np.mean(matches) < np.mean(overlaps) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nq_gold", "xquad_ru", "xquad_ar"])
def test_has_answer_of_real_passages_equals_dpr(shared_data: Callable[[str], Path], name: str) -> None:
    """Each question with its own passage and with another one's."""
    folder = shared_data(name)
    texts = {row["id"]: row["text"] for row in spoiled.rows(folder / "passages.jsonl", 20_000)}
    questions = [row for row in spoiled.rows(folder / "train.jsonl", 600) if row["positive_passage_ids"]]
    found = []
    for i, row in enumerate(questions):
        for other in (row, questions[i - 7]):
            text = texts[other["positive_passage_ids"][0]]
            found.append(matching.has_answer(text, row["answers"]))
            assert found[-1] == oracle_has_answer(text, row["answers"])
    assert len(found) > 1000 and 0.4 < np.mean(found) < 0.8


@pytest.mark.parametrize(
    ("text", "pattern", "found", "fits"),
    [
        ("Mount McKinley is 20,320 feet high", r"20\s?,?\s?320\s?-?\s?f(ee|oo)t", True, False),
        ("20,320 Feet", r"20\s?,?\s?320\s?-?\s?f(ee|oo)t", True, True),  # case does not count
        ("about 1969", r"^\d{4}$", False, False),
        ("year:\n1969", r"^\d{4}$", True, False),  # ^ and $ at every line, and `match` at the text's beginning alone
        ("Cafe\u0301", "caf\u00e9", True, True),  # both decomposed
        ("Sweden", "Swedish|Norw", False, False),
        ("anything", "", True, True),
    ],
)
def test_patterns(text: str, pattern: str, found: bool, fits: bool) -> None:
    assert matching.has_pattern(text, [pattern]) is found
    assert matching.has_pattern(text, ["zzz", pattern]) is found and matching.has_pattern(text, []) is False
    assert matching.pattern_match(text, ["zzz", pattern]) == float(fits)


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(InputError, match=r"answer '\(\?' is not a regular expression .*--match string"):
        matching.has_pattern("text", ["(?"])


@pytest.mark.slow
def test_patterns_of_curated_trec_equal_another_engine(shared_data: Callable[[str], Path]) -> None:
    lines = shared_data("raw/dpr_qas.curated.test.tsv").read_text(encoding="utf-8").splitlines()
    patterns = [json.loads(line)["answer"] for line in lines]
    texts = [row["text"] for row in spoiled.rows(shared_data("nq_gold/passages.jsonl"), 1500)]
    flags = regex.IGNORECASE | regex.MULTILINE
    found = 0
    for i, text in enumerate(texts):
        for wanted in patterns[i % 5 :: 40]:
            right = any(regex.search(unicodedata.normalize("NFD", one), unicodedata.normalize("NFD", text), flags)
                        for one in wanted)  # fmt: skip
            assert matching.has_pattern(text, wanted) == right
            found += right
    assert found > 20
