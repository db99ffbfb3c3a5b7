"""One interface to the index of a run, for training and answering, whether it is on the devices or on the host.

`OnDevices`: rows are sharded over the mesh, and the program that reads the passages also searches them. `OnHost`:
ScaNN, BM25 or both search between two programs, and the rows that the next program needs are gathered as small tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.data.batching import ON_HOST
from rag_jax.index import device_index, shards
from rag_jax.index import snapshot as snapshots
from rag_jax.index.device_index import Index
from rag_jax.index.host_index import HostIndex, Searchers, embedded, gather, on_host, places
from rag_jax.index.refresh import Make, on_devices
from rag_jax.index.snapshot import Snapshot
from rag_jax.rag import Params, TokenTables
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieval.search import Queries, SearchResult
from rag_jax.retrieve import Batch, question_program
from rag_jax.runs import directory as runs
from rag_jax.runs.directory import Loaded
from rag_jax.system import sharding

Arrays = dict[str, np.ndarray]


class StepInputs(NamedTuple):
    """Arguments of a program besides its parameters: batch, index rows (or None) and token tables, on the devices."""

    batch: Batch
    table: Index | None
    passages: TokenTables


class Lookup(NamedTuple):
    """A search for this process's part of a batch, made on the host if the program does not search itself.

    n: passages to find per question; 0: no search.
    texts: returns the questions as texts.
    read: (arrays of the batch, result of the search or None) -> corpus rows [b, ...] that the program reads, and arrays
      to add to the batch.
    known: an earlier result to use in place of a search.
    """

    n: int
    texts: Callable[[], list[str]]
    read: Callable[[Arrays, SearchResult | None], tuple[np.ndarray, Arrays]]
    known: SearchResult | None = None


class IndexLocation(Protocol):
    """Interface of an index location: how an index is built, checkpointed, updated, and passed to programs.

    loaded: model and corpus; cfg: how passages are searched.
    table_rows: rows of the tables that programs are compiled for; 0 if these are gathered for each batch.
    """

    @property
    def loaded(self) -> Loaded: ...

    @property
    def cfg(self) -> SearchConfig: ...

    @property
    def table_rows(self) -> int: ...

    def make(self) -> Make:
        """A function that embeds all passages and builds the index."""

    def of_snapshot(self, snapshot: Snapshot, trains: bool = False) -> Any:
        """The index from a snapshot; trains: training starts from it, so its rows count as embedded at step 0."""

    def of_next_snapshot(self, index: Any, old: Snapshot, new: Snapshot) -> Any:
        """The index from the snapshot `new` of this corpus; shares arrays with `index`, from the snapshot `old`."""

    def kept(self, index: Any) -> dict[str, Any]:
        """The arrays of an index that a checkpoint saves."""

    def blank(self, n: int) -> dict[str, Any]:
        """Arrays of zeros with shapes, types and shardings of `kept`, for n passages."""

    def of_kept(
        self, arrays: dict[str, Any], n: int, encoder: Params, step: int, first: Callable[[], Snapshot | None]
    ) -> Any:
        """The index from the arrays of a checkpoint (`kept`) for n passages.

        If the corpus has more rows by now, they are embedded with `encoder` as of `step`, as in `followed`.
        first: returns the snapshot that the run started from, or None.
        """

    def followed(self, index: Any, old: Corpus, encoder: Params, step: int) -> Any:
        """The index after an update of its corpus from `old` to the one here.

        New rows are embedded with `encoder`, the parameters that embed passages as of `step`; others stay as they are.
        """

    def given(self, params: Params, index: Any, batch: Arrays, wanted: Lookup) -> StepInputs:
        """Arguments of a program for a batch; batch: this process's rows; wanted: its search."""

    def sampled(self, index: Any, rows_S: np.ndarray) -> tuple[Index | None, TokenTables, np.ndarray]:
        """Tables that have these corpus rows, and their positions in the tables, int32 [S]."""

    def manifest(self, index: Any) -> dict[str, Any]:
        """Description of the search, for reports."""


def location_of(loaded: Loaded, cfg: SearchConfig, cache: Path | None = None) -> IndexLocation:
    """The location of the index by the kind of search; cache: directory for slow builds on the host, None for none."""
    if cfg.in_graph:
        return OnDevices(loaded, cfg)
    return OnHost(loaded, Searchers(cfg, loaded.corpus, loaded.mesh, cache))


def without_host_arrays(batch: Arrays) -> Arrays:
    return {name: x for name, x in batch.items() if name not in ON_HOST}


@dataclass(frozen=True)
class OnDevices:
    """The index sharded over the mesh and searched in graph, inside the program that reads the passages."""

    loaded: Loaded
    cfg: SearchConfig

    @property
    def passages(self) -> TokenTables:
        assert self.loaded.passages is not None
        return self.loaded.passages

    @property
    def table_rows(self) -> int:
        return self.loaded.n_rows

    def make(self) -> Make:
        loaded = self.loaded
        return on_devices(loaded.rag, loaded.mesh, self.passages, self.cfg.dtype, loaded.live_N)

    def of_snapshot(self, snapshot: Snapshot, trains: bool = False) -> Index:
        index = runs.index_on_device(self.loaded, snapshot, self.cfg.dtype)
        if not trains:
            return index
        drift_E = device_index.no_drift(self.loaded.mesh, index.embeddings_NE.shape[1])
        return index._replace(step_N=jnp.zeros_like(index.step_N), drift_E=drift_E)

    def of_next_snapshot(self, index: Index, old: Snapshot, new: Snapshot) -> Index:
        loaded, dtype, first = self.loaded, str(index.embeddings_NE.dtype), snapshots.shared_rows(old, new)
        if not first or loaded.table_rows() != len(index.step_N):
            return runs.index_on_device(loaded, new, dtype)
        if dtype == "int8" and new.scale_N is not None:
            stored = {"embeddings": new.rows_NE[first:], "scale": new.scale_N[first:]}
        else:
            stored = shards.tensors(np.asarray(new.embeddings_NE[first:], np.float32), dtype)
        step_N = np.full(len(loaded.corpus), new.manifest.step, np.int32)
        return Index(
            sharding.with_rows(index.embeddings_NE, first, stored["embeddings"]),
            sharding.shard_rows(loaded.mesh, step_N, 0, loaded.n_rows),
            None if index.scale_N is None else sharding.with_rows(index.scale_N, first, stored["scale"]),
            runs.live_on_device(loaded),
        )

    def kept(self, index: Index) -> dict[str, Any]:
        found = {name: getattr(index, name) for name in ("embeddings_NE", "step_N", "scale_N", "drift_E")}
        return {name: array for name, array in found.items() if array is not None}

    def blank(self, n: int) -> dict[str, Any]:
        loaded = self.loaded
        width = loaded.rag.config.encoder.output_width
        return self.kept(device_index.blank(loaded.mesh, loaded.table_rows(n), width, self.cfg.dtype))

    def of_kept(
        self, arrays: dict[str, Any], n: int, encoder: Params, step: int, first: Callable[[], Snapshot | None]
    ) -> Index:
        index = Index(**arrays, live_N=runs.live_on_device(self.loaded))
        return self._longer(index, n, encoder, step) if n < len(self.loaded.corpus) else index

    def followed(self, index: Index, old: Corpus, encoder: Params, step: int) -> Index:
        return self._longer(index, len(old), encoder, step)

    def _longer(self, index: Index, n: int, encoder: Params, step: int) -> Index:
        """The index of the corpus' first n rows, extended by its other rows, embedded with `encoder`."""
        loaded = self.loaded
        live_N = runs.live_on_device(loaded)
        assert live_N is not None  # only a live corpus is updated, and its tables have spare rows
        new_ME = embedded(loaded.rag, encoder, loaded.corpus, n)
        return device_index.extended(index, n, new_ME, step, loaded.table_rows(), live_N)

    def given(self, params: Params, index: Index, batch: Arrays, wanted: Lookup) -> StepInputs:
        arrays = without_host_arrays(batch)
        if wanted.known is not None:
            arrays |= {"documents": wanted.known.ids_BK, "scores": wanted.known.scores_BK}
        return StepInputs(sharding.shard_batch(self.loaded.mesh, arrays), index, self.passages)

    def sampled(self, index: Index, rows_S: np.ndarray) -> tuple[Index, TokenTables, np.ndarray]:
        return index, self.passages, rows_S

    def manifest(self, index: Index) -> dict[str, Any]:
        return {"kind": "exact", "dtype": self.cfg.dtype, "recall_target": self.cfg.recall_target}


@dataclass(frozen=True)
class OnHost:
    """The index in memory or in files, searched between programs, by each process for its own part of a batch."""

    loaded: Loaded
    searchers: Searchers

    @property
    def cfg(self) -> SearchConfig:
        return self.searchers.cfg

    @property
    def table_rows(self) -> int:
        return 0

    def make(self) -> Make:
        return on_host(self.loaded.rag, self.searchers)

    def of_snapshot(self, snapshot: Snapshot, trains: bool = False) -> HostIndex:
        manifest, embeddings_NE = snapshot.manifest, snapshot.embeddings_NE
        step = 0 if trains else manifest.step
        searcher = self.searchers.make(embeddings_NE, manifest.encoder_hash, step, keep=not trains)
        step_N = np.full(len(self.loaded.corpus), step, np.int32)
        return HostIndex(embeddings_NE, step_N, searcher, self.loaded.corpus.live_N)

    def of_next_snapshot(self, index: HostIndex, old: Snapshot, new: Snapshot) -> HostIndex:
        return self.of_snapshot(new)

    def kept(self, index: HostIndex) -> dict[str, Any]:
        # always float32, also where the index is that of a snapshot of another type: `blank` has one type
        return {"embeddings_NE": np.asarray(index.embeddings_NE, np.float32), "step_N": index.step_N}

    def blank(self, n: int) -> dict[str, Any]:
        width = self.loaded.rag.config.encoder.output_width
        return {"embeddings_NE": np.zeros((n, width), np.float32), "step_N": np.zeros(n, np.int32)}

    def of_kept(
        self, arrays: dict[str, Any], n: int, encoder: Params, step: int, first: Callable[[], Snapshot | None]
    ) -> HostIndex:
        embeddings_NE, step_N = (np.asarray(arrays[name]) for name in ("embeddings_NE", "step_N"))
        given = None if step_N.any() else first()
        if given is not None and len(given.embeddings_NE) == len(embeddings_NE):
            # all rows are of step 0, hence the snapshot's: search them in its type, as before the checkpoint
            embeddings_NE = given.embeddings_NE
        if n < len(self.loaded.corpus):
            embeddings_NE, step_N = self._longer(embeddings_NE, step_N, encoder, step)
        searcher = self.searchers.make(embeddings_NE, None, int(step_N.max()))
        return HostIndex(embeddings_NE, step_N, searcher, self.loaded.corpus.live_N)

    def followed(self, index: HostIndex, old: Corpus, encoder: Params, step: int) -> HostIndex:
        embeddings_NE, step_N = self._longer(index.embeddings_NE, index.step_N, encoder, step)
        searcher = self.searchers.update(index.searcher, old, embeddings_NE, step)
        return HostIndex(embeddings_NE, step_N, searcher, self.loaded.corpus.live_N)

    def _longer(self, embeddings_NE: Any, step_N: np.ndarray, encoder: Params, step: int) -> tuple[Any, np.ndarray]:
        new_ME = embedded(self.loaded.rag, encoder, self.loaded.corpus, len(step_N))
        steps_M = np.full(len(new_ME), step, np.int32)
        return np.concatenate([np.asarray(embeddings_NE, np.float32), new_ME]), np.concatenate([step_N, steps_M])

    def given(self, params: Params, index: HostIndex, batch: Arrays, wanted: Lookup) -> StepInputs:
        loaded, arrays, found = self.loaded, without_host_arrays(batch), wanted.known
        if wanted.n and found is None:
            questions = sharding.shard_batch(loaded.mesh, arrays)
            q_BE = sharding.fetched(question_program(loaded.rag)(params, questions)).astype(np.float32)
            own = sharding.own_rows(loaded.mesh, len(q_BE))
            found = index.searcher.search(Queries(q_BE[own], wanted.texts()), wanted.n)
        rows, beside = wanted.read(arrays, found)
        tables, passages = gather(loaded.corpus, index, rows.reshape(-1))
        arrays |= {"documents": places(loaded.mesh, rows), **beside}
        return StepInputs(*sharding.shard_batch(loaded.mesh, (arrays, tables, passages)))

    def sampled(self, index: HostIndex, rows_S: np.ndarray) -> tuple[Index | None, TokenTables, np.ndarray]:
        tables, passages = gather(self.loaded.corpus, index, rows_S)
        return tables, passages, np.arange(len(rows_S), dtype=np.int32)

    def manifest(self, index: HostIndex) -> dict[str, Any]:
        return dict(index.searcher.manifest)
