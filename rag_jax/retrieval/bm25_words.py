"""The words that BM25 counts in a text: lower-case stems, no stop words; for Chinese, characters and their pairs."""

import logging
import re
from collections.abc import Callable
from typing import Any

from rag_jax.errors import InputError

WORD = re.compile(r"\w+")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+")

Split = Callable[[str], list[str]]


def stopwords(language: str, size: str) -> tuple[str, ...]:
    """The stop words that bm25s lists for a language; () where it lists none.

    size: "short" (English: Lucene's 33), "long" (English: NLTK's) or "none"; other languages have one list.
    """
    if size not in ("short", "long", "none"):
        raise InputError(f"stop words {size!r}; there are: short, long, none")
    if size == "none" or language in ("chinese", "none"):
        return ()
    names = {"short": "EN", "long": "EN_PLUS"}
    name = names[size] if language == "english" else language.upper()
    return tuple(getattr(library().stopwords, f"STOPWORDS_{name}", ()))


def splitter(language: str, stopwords: tuple[str, ...]) -> Split:
    """A function from text to words; language: one of Snowball's, "chinese" or "none" (no stemming).

    InputError for another language, and where PyStemmer is not installed.
    """
    if language == "chinese":
        return _chinese
    return _Stems(_stemmer(language), frozenset(stopwords))


class _Stems:
    """Splits a text into stems; keeps the stem of every word it has seen, "" for a stop word."""

    def __init__(self, stem: Callable[[str], str], stopwords: frozenset[str]) -> None:
        self._stem, self._stopwords = stem, stopwords
        self._known: dict[str, str] = {}

    def __call__(self, text: str) -> list[str]:
        known, found = self._known, []
        for word in WORD.findall(text.lower()):
            stem = known.get(word)
            if stem is None:
                stem = known[word] = "" if word in self._stopwords else self._stem(word)
            if stem:
                found.append(stem)
        return found


def _chinese(text: str) -> list[str]:
    """Words of other scripts whole; each run of Chinese characters as its characters, then its pairs of neighbours."""
    found = []
    for word in WORD.findall(text.lower()):
        start = 0
        for run in HAN.finditer(word):
            found += [word[start : run.start()]] if run.start() > start else []
            characters = run.group()
            found += [*characters, *(characters[i : i + 2] for i in range(len(characters) - 1))]
            start = run.end()
        found += [word[start:]] if start < len(word) else []
    return found


def _stemmer(language: str) -> Callable[[str], str]:
    if language == "none":
        return str
    try:
        import Stemmer
    except ImportError as error:
        raise InputError(f"BM25 needs PyStemmer ({error}): pip install 'rag-jax[bm25]'") from error
    if language not in Stemmer.algorithms():
        known = ", ".join(["chinese", "none", *Stemmer.algorithms()])
        raise InputError(f"BM25 does not know the language {language!r}; it knows {known}")
    return Stemmer.Stemmer(language).stemWord


def library() -> Any:
    """bm25s, imported when asked for: importing it starts JAX's backend. InputError where it is not installed."""
    try:
        import bm25s
    except ImportError as error:
        raise InputError(f"BM25 needs bm25s ({error}): pip install 'rag-jax[bm25]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for its debug lines to be shown
    return bm25s
