"""ROUGE-L, BLEU and distinct-n: hand-worked cases, other libraries, and independent implementations."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import spoiled

from rag_jax.errors import InputError
from rag_jax.metrics import bootstrap, texts


@pytest.fixture(scope="module")
def answers(shared_data: Callable[[str], Path]) -> tuple[list[str], list[list[str]]]:
    """1,100 spoiled long answers, each with one to three references."""
    targets = [row["target"] for row in spoiled.rows(shared_data("medquad/train.jsonl"), 1100)]
    golds = [[target, *targets[i + 1 : i + 1 + i % 3]] for i, target in enumerate(targets)]
    return spoiled.predictions([[target] for target in targets]), golds


def oracle_rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of runs of a-z and 0-9, by dynamic programming over all prefixes."""
    found, wanted = (re.findall("[a-z0-9]+", one.lower()) for one in (text, reference))
    table = np.zeros((len(found) + 1, len(wanted) + 1), int)
    for i, word in enumerate(found, start=1):
        same = np.array([word == other for other in wanted], bool)
        table[i, 1:] = np.maximum.accumulate(np.maximum(table[i - 1, 1:], table[i - 1, :-1] + same))
    longest = table[-1, -1]
    return 2 * longest / (len(found) + len(wanted)) if longest else 0.0


@pytest.mark.slow  # rouge-score brings nltk, which takes seconds to import
def test_rouge_l_by_hand() -> None:
    pytest.importorskip("rouge_score")
    cases = [
        ("police kill the gunman", ["police killed the gunman"], 3 / 4),
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),  # in order
        ("a b c d", ["x", "a c", "d c b a"], 2 * 1 * (2 / 4) / (1 + 2 / 4)),  # the best reference
        ("Paris, France!", ["paris france"], 1),
        ("", ["paris"], 0),
        ("Париж", ["Париж"], 0),  # no letters of a to z: nothing to count
    ]
    scores = texts.rouge_l([text for text, _, _ in cases], [golds for _, golds, _ in cases])
    np.testing.assert_allclose(scores, [score for *_, score in cases])
    with pytest.raises(ValueError, match="needs a reference"):
        texts.rouge_l(["a"], [[]])


@pytest.mark.slow
def test_rouge_l_of_real_answers(answers: tuple[list[str], list[list[str]]]) -> None:
    pytest.importorskip("rouge_score")
    found = texts.rouge_l(*answers)
    wanted = [max(oracle_rouge_l(text, gold) for gold in golds) for text, golds in zip(*answers, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert len(found) >= 1000 and 0.3 < np.mean(found) < 0.9


def whole_bleu(predictions: list[str], golds: list[list[str]], order: int = 4) -> float:
    """sacrebleu's own score of the collection, with None for a missing second or third reference."""
    import sacrebleu

    columns = [[one[i] if i < len(one) else None for one in golds] for i in range(max(map(len, golds)))]
    return sacrebleu.BLEU(max_ngram_order=order).corpus_score(predictions, columns).score / 100


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    parts = texts.bleu_parts(
        ["the the the cat", "a dog ran by us"], [["the cat sat", "the big cat"], ["a dog ran by me"]]
    )
    np.testing.assert_array_equal(parts[0], [2, 1, 0, 0, 4, 3, 2, 1, 4, 3])  # "the" counts once, the length nearest 4
    np.testing.assert_array_equal(parts[1], [4, 3, 2, 1, 5, 4, 3, 2, 5, 5])
    precisions = [6 / 9, 4 / 7, 2 / 5, 1 / 3]
    assert texts.bleu(parts.sum(0, keepdims=True))[0] == pytest.approx(np.prod(precisions) ** 0.25)
    assert texts.bleu(parts.sum(0, keepdims=True), order=1)[0] == pytest.approx(6 / 9)
    short = texts.bleu_parts(["a dog ran by"], [["a dog ran by us all"]])
    assert texts.bleu(short)[0] == pytest.approx(np.exp(1 - 6 / 4))  # too short, else all right


@pytest.mark.slow
def test_bleu_of_real_answers_and_of_resamples(answers: tuple[list[str], list[list[str]]]) -> None:
    pytest.importorskip("sacrebleu")
    predictions, golds = answers
    parts = texts.bleu_parts(predictions, golds)
    assert len(parts) >= 1000
    for order in (4, 1):
        whole = whole_bleu(predictions, golds, order)
        assert 0.1 < whole < 0.95 and texts.bleu(parts.sum(0, keepdims=True), order)[0] == pytest.approx(
            whole, abs=1e-12
        )
    counts = next(bootstrap.counts(len(parts), resamples=3))
    for row, value in zip(counts.astype(int), texts.bleu(counts @ parts), strict=True):
        drawn = np.repeat(np.arange(len(parts)), row)
        resampled = whole_bleu([predictions[i] for i in drawn], [golds[i] for i in drawn])
        assert value == pytest.approx(resampled, abs=1e-12)


def test_distinct_by_hand() -> None:
    said = ["The cat sat", "the cat ran", "", "dogs"]
    ones = np.ones((1, 4))
    assert texts.Grams(said, 1).distinct(ones)[0] == 5 / 7  # the, cat, sat, ran, dogs
    assert texts.Grams(said, 2).distinct(ones)[0] == 3 / 4  # "the cat" twice
    taken = np.array([[2.0, 0, 0, 0], [1, 1, 5, 0], [0, 0, 4, 0]])
    np.testing.assert_array_equal(texts.Grams(said, 1).distinct(taken), [3 / 6, 4 / 6, np.nan])


@pytest.mark.parametrize("n", [1, 2])
def test_distinct_of_resamples_by_brute_force(n: int) -> None:
    random = np.random.default_rng(n)
    said = [" ".join(random.choice([*"abcdefghijkl"], size=random.integers(0, 7))) for _ in range(60)]
    counts = next(bootstrap.counts(60, seed=n, resamples=20))
    for row, value in zip(counts.astype(int), texts.Grams(said, n).distinct(counts), strict=True):
        lists = [text.split() for text, times in zip(said, row, strict=True) for _ in range(times)]
        grams = [tuple(words[i : i + n]) for words in lists for i in range(len(words) - n + 1)]
        assert value == pytest.approx(len(set(grams)) / len(grams), abs=1e-12)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts.LIBRARIES, "rouge_l", "not_there")
    monkeypatch.setitem(texts.LIBRARIES, "bleu", "not_there_too")
    assert not texts.installed("rouge_l") and texts.installed("exact_match")
    with pytest.raises(InputError, match=r"rouge_l needs not-there: pip install 'rag-jax\[metrics\]'"):
        texts.rouge_l(["a"], [["a"]])
    with pytest.raises(InputError, match="bleu needs not-there-too"):
        texts.bleu_parts(["a"], [["a"]])
