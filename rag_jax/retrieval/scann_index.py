"""Approximate search with ScaNN (Guo et al. 2020; SOAR, Sun et al. 2023): a tree, short codes, the best rescored.

ScaNN's own index is never changed: rows added later are kept beside it and searched exactly, deleted rows are removed
from its results. (ScaNN can insert and delete, but with SOAR the heap is corrupted after some of each.) Two builds from
the same rows differ, on one thread too: a run that is to resume with the same results must save its index.

manifest.json        source (hashes of corpus and encoder, step), settings, files with their hashes
scann/               what ScaNN writes
rows.npy             int32 [N] corpus row of every point in ScaNN's index, ascending
gone.npy             int32, ascending: rows that ScaNN must not return, deleted or changed since it was built
new_rows.npy, new_embeddings.npy   rows added or changed since, ascending, and their float32 embeddings
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from rag_jax.errors import InputError
from rag_jax.retrieval import search
from rag_jax.retrieval.search import IndexSource, Queries, SearchResult
from rag_jax.system import files
from rag_jax.system.logs import info

KIND, VERSION = "ann", 1
LEAST = 16  # short codes have 16 values; fewer rows cannot train them
BLOCK = 65536  # rows checked at once for NaN and infinity


@dataclass(frozen=True)
class AnnConfig:
    """Settings of ScaNN.

    leaves: leaves of the tree; 0: twice the square root of the number of rows.
    leaves_to_search: leaves that a search scores; 0: a twentieth of them, at least 10.
    reorder: best rows of those leaves that are rescored; 0: 4 k, at least 100.
    reorder_dtype: type of the rows they are rescored with: "float32", "bfloat16" or "int8".
    exact_below: fewer rows than this are searched exactly, without a tree, unless `leaves` is given.
    soar_lambda: weight of SOAR's term for the second leaf of a row.
    anisotropic_threshold: threshold of the anisotropic quantisation of the short codes.
    threads: threads for building; 0: all.
    """

    leaves: int = 0
    leaves_to_search: int = 0
    reorder: int = 0
    reorder_dtype: str = "bfloat16"
    exact_below: int = 20_000
    soar_lambda: float = 1.5
    anisotropic_threshold: float = 0.2
    threads: int = 0

    def __post_init__(self) -> None:
        if self.reorder_dtype not in ("float32", "bfloat16", "int8"):
            raise InputError(f"reorder_dtype {self.reorder_dtype!r}; there are float32, bfloat16, int8")
        if min(self.leaves, self.leaves_to_search, self.reorder, self.exact_below, self.threads) < 0:
            raise InputError(f"{self}: numbers are 0 or more")

    def resolved(self, n: int) -> Self:
        """These settings with the leaves for n rows filled in; leaves = 0 then means no tree.

        InputError where there are fewer rows than leaves.
        """
        leaves = self.leaves or (0 if n < max(self.exact_below, LEAST) else round(2 * math.sqrt(n)))
        if leaves > n or (leaves and n < LEAST):
            raise InputError(f"{n} passages are too few for {leaves} leaves; leave `leaves` at 0 for exact search")
        searched = min(self.leaves_to_search or max(leaves // 20, 10), leaves)
        return replace(self, leaves=leaves, leaves_to_search=searched)


@dataclass(frozen=True)
class Scann:
    """A ScaNN index, immutable: `upsert` and `delete` return another one over the same arrays.

    index: ScaNN's searcher.
    rows_N: int32 corpus row of every point in it, ascending.
    width: E of the embeddings.
    gone: int32 rows that ScaNN must not return, deleted or changed since it was built, ascending.
    new_rows, new_embeddings: int32 rows added or changed since, ascending, and their float32 embeddings [M,E].
    """

    index: Any
    rows_N: np.ndarray
    width: int
    source: IndexSource
    config: AnnConfig
    gone: np.ndarray
    new_rows: np.ndarray
    new_embeddings: np.ndarray

    @property
    def size(self) -> int:
        return len(self.rows_N) - len(self.gone) + len(self.new_rows)

    @property
    def stale(self) -> float:
        """Share of the rows added, changed or deleted since ScaNN's index was built; rebuild it from 0.1 on."""
        return len(np.union1d(self.gone, self.new_rows)) / max(self.size, 1)

    @property
    def manifest(self) -> Mapping[str, Any]:
        changed = {"n_indexed": len(self.rows_N), "n_gone": len(self.gone), "n_new": len(self.new_rows)}
        return search.manifest(KIND, self.source, {**asdict(self.config), **changed})

    def search(self, queries: Queries, k: int) -> SearchResult:
        """Scores are those of `reorder_dtype`. May return fewer than k: it sees no more than `leaves_to_search` leaves.

        Equal scores are in order of their ids, but which of them are rescored at all is up to ScaNN.
        """
        queries_BE = search.query_embeddings(queries, self.width, k)
        if not len(queries_BE):
            return SearchResult(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        ids_BX, scores_BX = self._indexed(queries_BE, k)
        if len(self.new_rows):
            scores_BM = queries_BE @ self.new_embeddings.T
            at_BX = np.argpartition(-scores_BM, min(k, scores_BM.shape[1]) - 1)[:, :k]
            ids_BX = np.concatenate([ids_BX, self.new_rows[at_BX]], 1)
            scores_BX = np.concatenate([scores_BX, np.take_along_axis(scores_BM, at_BX, 1)], 1)
        return search.best(ids_BX, scores_BX, k)

    def _indexed(self, queries_BE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B,X] and scores [B,X] of the valid rows that ScaNN rescored; the id of the others is -1.

        All of them, not just k, so that `search` can order equal scores. As many valid rows are rescored as if the
        deleted ones had never been there.
        """
        most = len(self.rows_N)
        wanted = min(max(self.config.reorder or max(4 * k, 100), k), most)
        n = min(wanted + min(len(self.gone), wanted), most)
        while True:  # ask for more until enough of the rows are valid
            leaves = self.config.leaves_to_search or None
            ids_BX, scores_BX = self.index.search_batched_parallel(queries_BE, n, n, leaves)
            found_BX = np.isfinite(scores_BX)  # what ScaNN could not fill has id 0 and score NaN
            ids_BX = np.where(found_BX, self.rows_N[ids_BX], -1)
            live_BX = found_BX & ~np.isin(ids_BX, self.gone)
            enough_B = (live_BX.sum(1) >= wanted) | ~found_BX.all(1)  # or there is no more in these leaves
            if n == most or enough_B.all():
                return np.where(live_BX, ids_BX, -1), scores_BX
            n = min(2 * n, most)

    def upsert(self, rows: Sequence[int] | np.ndarray, embeddings_ME: np.ndarray) -> Self:
        """This index with these rows added, or replaced if it has them. InputError for embeddings that do not fit."""
        rows = _rows(rows, len(embeddings_ME))
        embeddings_ME = np.ascontiguousarray(embeddings_ME, np.float32)
        if embeddings_ME.ndim != 2 or embeddings_ME.shape[1] != self.width:
            raise InputError(f"embeddings {embeddings_ME.shape} must be [{len(rows)},{self.width}]")
        _check_finite(embeddings_ME, rows)
        kept = ~np.isin(self.new_rows, rows)
        new_rows = np.concatenate([self.new_rows[kept], rows])
        order = np.argsort(new_rows)
        embeddings = np.concatenate([self.new_embeddings[kept], embeddings_ME])[order]
        gone = np.union1d(self.gone, np.intersect1d(self.rows_N, rows)).astype(np.int32)
        return replace(self, gone=gone, new_rows=new_rows[order], new_embeddings=embeddings)

    def delete(self, rows: Sequence[int] | np.ndarray) -> Self:
        """This index without these rows. InputError for a row that it does not have."""
        rows = _rows(rows)
        known = np.union1d(np.setdiff1d(self.rows_N, self.gone), self.new_rows)
        unknown = np.setdiff1d(rows, known)
        if len(unknown):
            raise InputError(f"row {unknown[0]} is not in the index of {self.size} passages, or was deleted before")
        kept = ~np.isin(self.new_rows, rows)
        gone = np.union1d(self.gone, np.intersect1d(self.rows_N, rows)).astype(np.int32)
        return replace(self, gone=gone, new_rows=self.new_rows[kept], new_embeddings=self.new_embeddings[kept])

    def tune(self, queries_BE: np.ndarray, truth_BK: np.ndarray, recall: float = 0.95) -> Self:
        """This index with the smallest `leaves_to_search`, then the smallest `reorder`, that reach a recall.

        truth_BK: the rows that exact search (`search.Exact`) returns for these questions.
        recall: share of them to be found. Where searching all leaves does not reach it, all are searched, and a line on
            stderr says so.
        """
        k = truth_BK.shape[1]
        if not self.config.leaves:
            return self  # exact

        def reaches(leaves: int, reorder: int) -> bool:
            return recall_at(self._with(leaves, reorder).search(Queries(queries_BE), k).ids_BK, truth_BK) >= recall

        most = min(20 * k, len(self.rows_N))
        leaves = _least(1, self.config.leaves, lambda x: reaches(x, most))
        tuned = self._with(leaves, _least(min(k, most), most, lambda x: reaches(leaves, x)))
        found = recall_at(tuned.search(Queries(queries_BE), k).ids_BK, truth_BK)
        if found < recall:
            info(f"ScaNN: recall@{k} is {found:.3f}, not {recall:.3f}; another reorder_dtype may give more")
        return tuned

    def _with(self, leaves_to_search: int, reorder: int) -> Self:
        return replace(self, config=replace(self.config, leaves_to_search=leaves_to_search, reorder=reorder))

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Writes the directory, whole or not at all."""
        arrays = {"rows": self.rows_N, "gone": self.gone, "new_rows": self.new_rows}
        with files.new_directory(directory, KIND, overwrite) as temporary:
            (temporary / "scann").mkdir()
            self.index.serialize(str(temporary / "scann"), relative_path=True)
            for name, array in {**arrays, "new_embeddings": self.new_embeddings}.items():
                np.save(temporary / f"{name}.npy", array)
            fields = {**self.source._asdict(), "settings": asdict(self.config), "width": self.width}
            files.write_manifest(temporary, KIND, VERSION, fields)

    @classmethod
    def load(cls, directory: str | Path, source: IndexSource | None = None) -> Self:
        """Opens a directory after verifying its files. InputError, with both hashes, if built from another source."""
        directory = Path(directory)
        found = files.read_verified(directory, KIND, VERSION)
        with files.described(directory / files.MANIFEST, "build it again"):
            made_of = IndexSource(**{name: found[name] for name in IndexSource._fields})
            width, settings = found["width"], AnnConfig(**found["settings"])
        for name in IndexSource._fields:
            have, want = (getattr(x, name) for x in (made_of, source or made_of))
            if have != want:
                raise InputError(
                    f"{directory}: its {name} is {str(have)[:16]}, here it is {str(want)[:16]}; build it again"
                )
        try:
            arrays = [
                np.load(directory / f"{name}.npy", allow_pickle=False)
                for name in ("rows", "gone", "new_rows", "new_embeddings")
            ]
            if (directory / "scann" / "scann_docids.pkl").exists():  # ScaNN would unpickle it; none is written here
                raise ValueError("scann/scann_docids.pkl does not belong there")
            index = _library().scann_ops_pybind.load_searcher(str(directory / "scann"), assets_backcompat_shim=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{directory}: unreadable ({error}); build it again") from error
        return cls(index, arrays[0], width, made_of, settings, *arrays[1:])


def build(
    embeddings_NE: np.ndarray,
    source: IndexSource,
    config: AnnConfig | None = None,
    rows_N: Sequence[int] | np.ndarray | None = None,
) -> Scann:
    """Builds a ScaNN index.

    embeddings_NE: an array or a memory map; converted to float32.
    rows_N: their rows in the corpus; None: 0 to N - 1.
    InputError for a row that is not finite (ScaNN would abort the process), for too few rows, and without ScaNN.
    """
    if embeddings_NE.ndim != 2 or not len(embeddings_NE):
        raise InputError(f"embeddings {embeddings_NE.shape} must be [N,E] with at least one row")
    rows_N = _rows(np.arange(len(embeddings_NE)) if rows_N is None else rows_N, len(embeddings_NE))
    config = (config or AnnConfig()).resolved(len(rows_N))
    scann = _library()
    order = np.argsort(rows_N)
    if (order[1:] < order[:-1]).any():
        rows_N, embeddings_NE = rows_N[order], embeddings_NE[order]
    _check_finite(embeddings_NE, rows_N)
    embeddings_NE = np.ascontiguousarray(embeddings_NE, np.float32)
    builder = scann.scann_ops_pybind.builder(embeddings_NE, 10, "dot_product").set_n_training_threads(config.threads)
    if config.leaves:
        builder = builder.tree(
            config.leaves, config.leaves_to_search, soar_lambda=config.soar_lambda, overretrieve_factor=2.0
        ).score_ah(2, anisotropic_quantization_threshold=config.anisotropic_threshold)
        builder = builder.reorder(100, quantize=scann.ReorderType[config.reorder_dtype.upper()])
    else:
        builder = builder.score_brute_force()
    width, none = embeddings_NE.shape[1], np.zeros(0, np.int32)
    return Scann(builder.build(), rows_N, width, source, config, none, none, np.zeros((0, width), np.float32))


def _library() -> Any:
    try:
        import scann
    except ImportError as error:
        raise InputError(
            f"ScaNN cannot be imported ({error}): pip install 'rag-jax[scann]'; it exists for Linux and Python up to "
            "3.13, elsewhere search exactly (search kind `exact`)"
        ) from error
    return scann


def _rows(rows: Sequence[int] | np.ndarray, n: int | None = None) -> np.ndarray:
    rows = np.asarray(rows, np.int32)
    if rows.ndim != 1 or (n is not None and len(rows) != n):
        raise InputError(f"rows {rows.shape} for {n} embeddings; there must be one for each")
    if len(np.unique(rows)) != len(rows) or rows.min(initial=0) < 0:
        raise InputError("rows must be 0 or more, each given once")
    return rows


def _check_finite(embeddings_NE: np.ndarray, rows_N: np.ndarray) -> None:
    for start in range(0, len(rows_N), BLOCK):
        finite_X = np.isfinite(np.asarray(embeddings_NE[start : start + BLOCK], np.float32)).all(1)
        if not finite_X.all():
            row = rows_N[start + int(np.argmin(finite_X))]
            raise InputError(f"passage row {row}: its embedding is not finite; the encoder has diverged")


def recall_at(ids_BK: np.ndarray, truth_BK: np.ndarray) -> float:
    """Share of the rows in truth_BK, those of -1 aside, that are among the question's ids_BK."""
    wanted_BK = truth_BK >= 0
    found_BK = (truth_BK[:, :, None] == ids_BK[:, None, :]).any(2) & wanted_BK
    return float(found_BK.sum() / max(wanted_BK.sum(), 1))


def _least(low: int, high: int, enough: Any) -> int:
    """The smallest number in low..high that is enough, by bisection: whatever is above it is too. high if none is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
