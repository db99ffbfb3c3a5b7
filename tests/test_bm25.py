"""BM25 against its formula evaluated word by word, and the index on disk."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.retrieval import bm25_words
from rag_jax.retrieval.bm25 import Bm25, Bm25Config, passage_texts
from rag_jax.retrieval.search import Queries

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")

CORPUS, OTHER = "a" * 64, "b" * 64
PLAIN = Bm25Config(language="none")


def formula(texts: list[str], query: str, k1: float, b: float) -> np.ndarray:
    """Scores in float64: sum over the question's words of idf * tf / (tf + k1 (1 - b + b |d| / mean |d|))."""
    documents = [Counter(text.split()) for text in texts]
    mean = sum(sum(document.values()) for document in documents) / len(documents)
    scores = np.zeros(len(texts))
    for word in query.split():
        df = sum(word in document for document in documents)
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for row, document in enumerate(documents):
            if word in document:
                length = sum(document.values()) / mean
                scores[row] += idf * document[word] / (document[word] + k1 * (1 - b + b * length))
    return scores


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Short texts of few different words, so that many scores are equal; one text is empty."""
    rng = np.random.default_rng(seed)
    known = [f"w{i}" for i in range(30)]
    texts = [" ".join(rng.choice(known, rng.integers(1, 12), p=np.arange(30, 0, -1) / 465)) for _ in range(n)]
    texts[n // 2] = ""
    return texts


TEXTS = random_texts(200)
QUESTIONS = [*random_texts(20, 1)[:10], "w3 w3 w29", "w0", "unknown w5 words", "none of these", ""]


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (2.0, 0.0)])
@pytest.mark.parametrize("gone", [(), (0, 3, 5, 199, *range(20, 90))])
def test_equals_the_formula(k1: float, b: float, gone: tuple[int, ...]) -> None:
    index = Bm25.build(TEXTS, CORPUS, Bm25Config(k1, b, "none")).without(gone)
    assert index.size == 200 - len(gone)
    for k in (1, 7, 200, 230):
        found = index.search(Queries(texts=QUESTIONS), k)
        assert found.ids_BK.shape == found.scores_BK.shape == (len(QUESTIONS), k)
        assert found.ids_BK.dtype == np.int32 and found.scores_BK.dtype == np.float32
        for question, ids, scores in zip(QUESTIONS, *found, strict=True):
            expected = formula(TEXTS, question, k1, b)
            expected[list(gone)] = 0
            count = min(k, int((expected > 0).sum()))  # a passage without a common word is not found
            assert (ids[count:] == -1).all() and np.isneginf(scores[count:]).all() and (ids[:count] >= 0).all()
            np.testing.assert_allclose(scores[:count], np.sort(expected)[::-1][:count], rtol=1e-5)
            np.testing.assert_allclose(scores[:count], expected[ids[:count]], rtol=1e-5)
            # best first, equal scores by row; float32 may split what the formula makes equal, so by its own scores
            order = np.lexsort((ids[:count], -scores[:count]))
            np.testing.assert_array_equal(order, np.arange(count))


def test_ties_go_to_the_lower_row() -> None:
    texts = ["b b", *["a x", "y a"] * 50, "b"]
    found = Bm25.build(texts, CORPUS, PLAIN).search(Queries(texts=["a", "b"]), 7)
    np.testing.assert_array_equal(found.ids_BK, [[1, 2, 3, 4, 5, 6, 7], [0, 101, -1, -1, -1, -1, -1]])


@pytest.mark.parametrize("k", [1, 3, 5, 8, 60])
def test_many_rows(k: int) -> None:
    # thousands of rows, so that most blocks of scores are passed over; ties within and across blocks
    rng = np.random.default_rng(k)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 300, 4)) for _ in range(3001)]
    queries = [f"w{i} w{j}" for i, j in rng.integers(0, 310, (25, 2))]
    index = Bm25.build(texts, CORPUS, PLAIN).without(range(1000, 1300))
    ids, scores = index.search(Queries(texts=queries), k)
    every = index.scores(queries, np.tile(np.arange(3001), (25, 1)))
    every[:, 1000:1300] = 0
    expected = np.argsort(-every, axis=1, kind="stable")[:, :k]
    expected_scores = np.take_along_axis(every, expected, 1)
    np.testing.assert_array_equal(ids, np.where(expected_scores > 0, expected, -1))
    np.testing.assert_array_equal(scores, np.where(expected_scores > 0, expected_scores, -np.inf))


def test_scores_of_given_rows() -> None:
    index = Bm25.build(TEXTS, CORPUS, PLAIN)
    rows = np.random.default_rng(0).integers(-1, 200, (len(QUESTIONS), 40)).astype(np.int32)
    expected = np.stack([formula(TEXTS, question, 0.9, 0.4) for question in QUESTIONS])
    expected = np.where(rows < 0, -np.inf, np.take_along_axis(expected, np.maximum(rows, 0), 1))
    np.testing.assert_allclose(index.scores(QUESTIONS, rows), expected, rtol=1e-5)
    found = index.search(Queries(texts=QUESTIONS), 60)
    np.testing.assert_array_equal(index.scores(QUESTIONS, found.ids_BK), found.scores_BK)
    np.testing.assert_array_equal(index.without(range(100)).scores(QUESTIONS, found.ids_BK), found.scores_BK)


def test_english() -> None:
    index = Bm25.build(["The runner was running", "Nothing of the kind", "They ran"], CORPUS)
    assert index.split("The runners, RUNNING!") == ["runner", "run"]
    found = index.search(Queries(texts=["What is the run?", "the"]), 3)
    np.testing.assert_array_equal(found.ids_BK, [[0, -1, -1], [-1, -1, -1]])  # "the" is a stop word, "what" is not
    assert "what" in Bm25.build(["a what"], CORPUS).index.vocab_dict
    with pytest.raises(InputError, match="none of the 1 passages has a word"):
        Bm25.build(["a what"], CORPUS, Bm25Config(stopwords="long"))


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("chinese", "东京2020年Olympics!", ["东", "京", "东京", "2020", "年", "olympics"]),
        ("chinese", "北京大学", ["北", "京", "大", "学", "北京", "京大", "大学"]),
        ("russian", "Книги и книга", ["книг", "книг"]),
        ("arabic", "الكتاب كتابها", ["كتاب", "كتاب"]),
        ("german", "Die Häuser", ["haus"]),
        ("none", "The Houses, the_2nd", ["the", "houses", "the_2nd"]),
    ],
)
def test_languages(language: str, text: str, expected: list[str]) -> None:
    assert bm25_words.splitter(language, bm25_words.stopwords(language, "short"))(text) == expected


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="language 'klingon'; it knows chinese, none, arabic"):
        Bm25.build(TEXTS, CORPUS, Bm25Config(language="klingon"))
    with pytest.raises(InputError, match="stop words 'some'"):
        Bm25.build(TEXTS, CORPUS, Bm25Config(stopwords="some"))
    with pytest.raises(InputError, match=r"b = 1\.5"):
        Bm25Config(b=1.5)
    index = Bm25.build(TEXTS, CORPUS, PLAIN)
    with pytest.raises(InputError, match="rows 5 to 200 of 200 passages"):
        index.without([5, 200])
    with pytest.raises(InputError, match="texts"):
        index.search(Queries(np.zeros((1, 2), np.float32)), 1)
    with pytest.raises(InputError, match="do not fit"):
        index.scores(["w1"], np.array([[200]]))


@pytest.mark.parametrize("missing", ["bm25s", "Stemmer"])
def test_without_the_libraries(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"pip install 'rag-jax\[bm25\]'"):
        Bm25.build(TEXTS, CORPUS)


def test_saved_and_loaded(tmp_path: Path) -> None:
    index = Bm25.build(TEXTS, CORPUS, PLAIN).without([4, 2])
    index.save(tmp_path / "bm25")
    loaded = Bm25.load(tmp_path / "bm25", CORPUS)
    assert loaded.manifest == index.manifest and loaded.size == 198 and loaded.stopwords == index.stopwords
    assert json.dumps(loaded.manifest)
    assert isinstance(loaded.index.scores["data"], np.memmap)
    for mine, other in zip(*(x.search(Queries(texts=QUESTIONS), 20) for x in (index, loaded)), strict=True):
        np.testing.assert_array_equal(mine, other)
    with pytest.raises(InputError, match=r"corpus a{16}, this one is b{16}"):
        Bm25.load(tmp_path / "bm25", OTHER)
    with pytest.raises(InputError, match="already there"):
        index.save(tmp_path / "bm25")
    loaded.without([6]).save(tmp_path / "bm25", overwrite=True)  # it replaces the files that are mapped
    assert Bm25.load(tmp_path / "bm25").deleted.tolist() == [2, 4, 6]
    with pytest.raises(InputError, match="no such bm25"):
        Bm25.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["index/data.csc.index.npy", "index/vocab.index.json", "deleted.npy", "manifest.json"])
def test_a_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    Bm25.build(TEXTS, CORPUS, PLAIN).without([4, 2]).save(tmp_path / "bm25")
    content = bytearray((tmp_path / "bm25" / name).read_bytes())
    content[len(content) * 3 // 4] ^= 1
    (tmp_path / "bm25" / name).write_bytes(content)
    with pytest.raises(InputError, match=r"not what the manifest says|unreadable|altered|the manifest says"):
        Bm25.load(tmp_path / "bm25")


def test_stop_words_are_those_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bm25.build(["the house", "a home"], CORPUS).save(tmp_path / "bm25")
    monkeypatch.setattr(bm25_words, "stopwords", lambda language, size: ("house",))  # as if bm25s had changed its list
    assert Bm25.load(tmp_path / "bm25").split("the house") == ["hous"]


def test_a_corpus(tiny_data: Path) -> None:
    corpus = Corpus.open(tiny_data / "corpus")
    texts = list(passage_texts(corpus))
    assert len(texts) == len(corpus) and texts[3] == f"{corpus[3].title} {corpus[3].text}"
    index = Bm25.build(passage_texts(corpus), corpus.hash, total=len(corpus))
    titles = [corpus[row].title for row in range(len(corpus))]
    found = index.search(Queries(texts=titles), 1).ids_BK[:, 0]
    assert np.mean(found == np.arange(len(corpus))) > 0.9
