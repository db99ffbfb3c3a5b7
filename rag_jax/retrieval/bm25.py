"""BM25 over titles and texts (Robertson et al. 1995, with Lucene's idf), in an index of bm25s (Lù 2024).

The score of every word in every passage is computed when the index is built; a question's scores are sums of those.

manifest.json   corpus_hash, settings with the stop words, files with their hashes
index/          as bm25s writes it: the vocabulary, and for each word the rows that have it and its scores there
deleted.npy     int32 rows that are not returned, ascending
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.retrieval import bm25_words, search
from rag_jax.retrieval.search import IndexSource, Queries, SearchResult
from rag_jax.system import files
from rag_jax.system.logs import Progress, info

KIND, VERSION = "bm25", 1
BLOCK = 256  # scores that `_top` reduces to their maximum first


@dataclass(frozen=True)
class Bm25Config:
    """Settings of BM25.

    k1: saturation; the smaller, the sooner further occurrences of a word add nothing. At least 0.
    b: how much the score of long passages is reduced, 0 (not at all) to 1.
    language, stopwords: see `bm25_words.splitter` and `bm25_words.stopwords`.
    """

    k1: float = 0.9
    b: float = 0.4
    language: str = "english"
    stopwords: str = "short"

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise InputError(f"k1 = {self.k1}, b = {self.b}; k1 is from 0 on, b in 0..1")


def passage_texts(corpus: Corpus) -> Iterator[str]:
    """The texts that BM25 indexes, row by row: title and text of a passage."""
    return (f"{passage.title} {passage.text}" for passage in map(corpus.__getitem__, range(len(corpus))))


@dataclass(frozen=True)
class Bm25:
    """A BM25 index, immutable: `without` returns another one over the same arrays.

    index: a bm25s.BM25.
    split: from text to words.
    deleted: int32 rows that are not returned, ascending.
    """

    index: Any
    corpus_hash: str
    config: Bm25Config
    stopwords: tuple[str, ...]
    split: bm25_words.Split
    deleted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @classmethod
    def build(
        cls, texts: Iterable[str], corpus_hash: str, config: Bm25Config | None = None, total: int | None = None
    ) -> Self:
        """Indexes texts in the order of the corpus' rows (`passage_texts`).

        total: number of texts, for the progress bar.
        Takes about 25 bytes of memory a word. InputError where no text has a word.
        """
        config = config or Bm25Config()
        bm25s, stopwords = bm25_words.library(), bm25_words.stopwords(config.language, config.stopwords)
        split = bm25_words.splitter(config.language, stopwords)
        vocabulary: dict[str, int] = {}
        ids_NX: list[list[int]] = []
        with Progress(total, "BM25: words of passages", "passage") as progress:
            for text in texts:
                ids_NX.append([vocabulary.setdefault(word, len(vocabulary)) for word in split(text)])
                progress.update()
        if not vocabulary:
            raise InputError(f"none of the {len(ids_NX)} passages has a word (language {config.language!r})")
        info(f"BM25: scores of {len(vocabulary):,} words")
        index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene")
        index.index((ids_NX, vocabulary), create_empty_token=False, show_progress=False)
        return cls(index, corpus_hash, config, stopwords, split)

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Writes the directory, whole or not at all."""
        with files.new_directory(directory, KIND, overwrite) as temporary:
            self.index.save(temporary / "index", show_progress=False)
            np.save(temporary / "deleted.npy", self.deleted)
            files.write_manifest(temporary, KIND, VERSION, {**self.manifest, "stopwords": list(self.stopwords)})

    @classmethod
    def load(cls, directory: str | Path, corpus_hash: str | None = None) -> Self:
        """Opens a directory, memory-mapped, after verifying its files.

        corpus_hash: the corpus it must be built from; None: any. InputError, with both hashes, for another one.
        """
        directory = Path(directory)
        found = files.read_verified(directory, KIND, VERSION)
        if corpus_hash not in (None, found["corpus_hash"]):
            raise InputError(
                f"{directory}: made of corpus {found['corpus_hash'][:16]}, this one is {str(corpus_hash)[:16]}; "
                "build the BM25 index again"
            )
        with files.described(directory / files.MANIFEST, "build the BM25 index again"):
            config, stopwords = Bm25Config(**found["settings"]), tuple(found["stopwords"])
        try:
            index = bm25_words.library().BM25.load(directory / "index", mmap=True, show_progress=False)
            deleted = np.load(directory / "deleted.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{directory}: unreadable ({error}); build the BM25 index again") from error
        split = bm25_words.splitter(config.language, stopwords)
        return cls(index, found["corpus_hash"], config, stopwords, split, deleted)

    def without(self, rows: Sequence[int] | np.ndarray) -> Self:
        """This index with these rows deleted too. Idf and mean length stay those of all passages of the build."""
        rows = np.asarray(rows, np.int32)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.n_passages:
            raise InputError(f"rows {rows.min()} to {rows.max()} of {self.n_passages} passages cannot be deleted")
        return replace(self, deleted=np.union1d(self.deleted, rows))

    @property
    def n_passages(self) -> int:
        return self.index.scores["num_docs"]

    @property
    def size(self) -> int:
        return self.n_passages - len(self.deleted)

    @property
    def manifest(self) -> Mapping[str, Any]:
        return search.manifest(KIND, IndexSource(self.corpus_hash), asdict(self.config))

    def search(self, queries: Queries, k: int) -> SearchResult:
        """Returns only passages that share a word with the question; none where no word of it is in the vocabulary."""
        texts = search.query_texts(queries, k)

        def one(text: str) -> SearchResult:
            scores_N = self.index.get_scores_from_ids(self._word_ids(text))
            scores_N[self.deleted] = 0
            ids_X = _top(scores_N, k)
            return search.best(ids_X[None], scores_N[ids_X][None], k)

        if not texts:
            return SearchResult(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        with ThreadPoolExecutor(min(os.cpu_count() or 1, len(texts))) as threads:
            found = list(threads.map(one, texts))
        return SearchResult(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def scores(self, texts: Sequence[str], ids_BK: np.ndarray) -> np.ndarray:
        """The scores [B,K] float32 of given rows, deleted or not; 0 for a row without a common word, -inf for id -1."""
        ids_BK = np.asarray(ids_BK)
        if ids_BK.ndim != 2 or len(texts) != len(ids_BK) or ids_BK.max(initial=-1) >= self.n_passages:
            raise InputError(f"{len(texts)} questions, rows {ids_BK.shape} of {self.n_passages} passages: do not fit")
        at = self.index.scores
        scores_BK = np.zeros(ids_BK.shape, np.float32)
        for text, ids_K, scores_K in zip(texts, ids_BK, scores_BK, strict=True):
            for word in self._word_ids(text):  # in the order of `search`: the sums are the same bits
                span = slice(at["indptr"][word], at["indptr"][word + 1])
                rows_X = at["indices"][span]  # ascending
                place_K = np.minimum(np.searchsorted(rows_X, ids_K), len(rows_X) - 1)
                scores_K += np.where(rows_X[place_K] == ids_K, at["data"][span][place_K], np.float32(0))
        return np.where(ids_BK < 0, -np.inf, scores_BK).astype(np.float32)

    def _word_ids(self, text: str) -> list[int]:
        """Ids of the words that are in the vocabulary, in order; a word that occurs twice counts twice."""
        known = self.index.vocab_dict
        return [known[word] for word in self.split(text) if word in known]


def _top(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Rows that include the k best with a score above 0 and all that tie with the last of them."""
    maxima_R = scores_N[: len(scores_N) // BLOCK * BLOCK].reshape(-1, BLOCK).max(1)
    # k blocks have a maximum of at least this, so the k-th best score is no lower: most rows need no ranking.
    least = np.partition(maxima_R, -k)[-k] if k <= len(maxima_R) else 0
    rows_X = np.flatnonzero(scores_N >= least if least > 0 else scores_N)
    if len(rows_X) <= k:
        return rows_X
    scores_X = scores_N[rows_X]
    return rows_X[scores_X >= np.partition(scores_X, -k)[-k]]
