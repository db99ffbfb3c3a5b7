"""The index of a stage of training: made anew when the schedule says so, given to each step, kept in checkpoints.

`OnDevice`: the step searches it in graph. `OnHost`: ScaNN, BM25 or both search between steps; the passages found are
gathered on the host and go into the same step as small tables of their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.data.batching import ON_HOST
from rag_jax.index import refresh
from rag_jax.index.device_index import Index
from rag_jax.index.host_index import HostIndex, gather, places
from rag_jax.index.refresh import Refresher
from rag_jax.rag import Params, Passages
from rag_jax.retrieval.search import Queries
from rag_jax.retrieve import Batch, question_program
from rag_jax.system import sharding
from rag_jax.training.stage import Setting
from rag_jax.training.train_step import make_drift


class Fed(NamedTuple):
    """What a step is called with besides its state and key."""

    batch: Batch
    table: Index | None
    passages: Passages


class Feed(Protocol):
    """Where the two ways differ."""

    def feed(self, params: Params, batch: dict[str, np.ndarray], index: Any) -> Fed: ...

    def rows(self, index: Any, rows_S: np.ndarray) -> tuple[Index | None, Passages, np.ndarray]:
        """Tables that hold these rows of the corpus, and their places there."""


class OnDevice:
    """The tables are on the devices, and the step finds its passages in them."""

    def __init__(self, setting: Setting, passages: Passages) -> None:
        self.setting, self.passages = setting, passages

    def feed(self, params: Params, batch: dict[str, np.ndarray], index: Index) -> Fed:
        arrays = {name: x for name, x in batch.items() if name not in ON_HOST}
        return Fed(sharding.shard_batch(self.setting.mesh, arrays), index, self.passages)

    def rows(self, index: Index, rows_S: np.ndarray) -> tuple[Index, Passages, np.ndarray]:
        return index, self.passages, rows_S


class OnHost:
    """Passages are found and gathered here; `texts` gives the questions that `source` of a batch counts. Each process
    does so for its own part of the batch.
    """

    def __init__(self, setting: Setting, corpus: Corpus, texts: Callable[[np.ndarray], list[str]]) -> None:
        self.setting, self.corpus, self.texts = setting, corpus, texts

    def feed(self, params: Params, batch: dict[str, np.ndarray], index: HostIndex) -> Fed:
        stage, mesh = self.setting.stage, self.setting.mesh
        arrays = {name: x for name, x in batch.items() if name not in ON_HOST}
        found_BK = None
        if stage.objective.searches:
            on_device = sharding.shard_batch(mesh, arrays)
            q_BE = sharding.fetched(question_program(self.setting.rag)(params, on_device)).astype(np.float32)
            queries = Queries(q_BE[sharding.own_rows(mesh, len(q_BE))], self.texts(batch["source"]))
            found_BK = index.searcher.search(queries, stage.objective.n_found).ids_BK  # -1 where it found fewer
        rows = stage.objective.rows_on_host(arrays, found_BK, mesh)
        tables, passages = gather(self.corpus, index, rows.reshape(-1))
        arrays |= {"documents": places(mesh, rows), "document_rows": rows.astype(np.int32)}
        return Fed(*sharding.shard_batch(mesh, (arrays, tables, passages)))

    def rows(self, index: HostIndex, rows_S: np.ndarray) -> tuple[Index | None, Passages, np.ndarray]:
        tables, passages = gather(self.corpus, index, rows_S)
        return tables, passages, np.arange(len(rows_S), dtype=np.int32)


def kept_fields(index: Index | HostIndex) -> dict[str, Any]:
    """The arrays of an index that a checkpoint keeps; rows on the host, of whatever type, in float32."""
    if isinstance(index, HostIndex):
        return {"embeddings_NE": np.asarray(index.embeddings_NE, np.float32), "step_N": index.step_N}
    names = ("embeddings_NE", "step_N", "scale_N", "drift_E")
    found = {name: getattr(index, name) for name in names}
    return {name: array for name, array in found.items() if array is not None}


class Upkeep:
    """Before each step: is the index made anew? After it: what a checkpoint keeps of it."""

    def __init__(
        self, setting: Setting, feed: Feed, refresher: Refresher, seed: int, sample: int, index: Any = None
    ) -> None:
        self.setting, self.way, self.refresher, self.index = setting, feed, refresher, index
        self.when = setting.when
        self.seed, self.sample = seed, sample
        self._drift = make_drift(setting) if setting.stage.objective.searches else None

    def move(self, setting: Setting, feed: Feed, refresher: Refresher, index: Any) -> None:
        """Goes on with another version of the corpus, whose index this is; a build under way begins again, with the
        encoder that it was begun with.
        """
        if self._drift is not None and setting != self.setting:
            self._drift = make_drift(setting)
        pending = self.refresher.pending
        self.refresher.drop()
        self.setting, self.way, self.refresher, self.index = setting, feed, refresher, index
        if pending is not None:
            refresher.resume(pending[1], pending[0])

    def before(self, params: Params, into: int, step: int, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """Brings the index to where step `into` of the stage wants it; returns what was measured on the way."""
        stage, when = self.setting.stage, self.when
        measured: dict[str, float] = {}
        if not stage.objective.searches:
            return measured
        if into == 0:
            if self.index is None:
                self.index = self.refresher.full(params, step)
            return measured
        if when.kind == "background":
            if when.begun(into) is not None and self.refresher.pending is not None:
                self.index = self.refresher.take()
            if when.due(into):
                self.refresher.begin(params, step)
        anew = when.kind == "synchronous" and when.due(into)
        check = when.kind == "when" and when.due(into)
        if check or (stage.drift_every and into % stage.drift_every == 0):
            measured["index_overlap"] = self.overlap(params, step, batch)
            anew |= check and measured["index_overlap"] < when.overlap
        if anew:
            self.index = self.refresher.full(params, step, self.index)
        return measured

    def after(self, index: Index | None) -> None:
        """Takes the index that a step gave back."""
        if index is not None:
            self.index = index

    def age(self, step: int) -> dict[str, float]:
        """Steps since the encoder of the index' rows, on average over all rows, where the stage searches."""
        if not self.setting.stage.objective.searches:
            return {}
        step_N, live_N = self.index.step_N, self.index.live_N
        mean = step_N[: self.setting.n_passages].mean() if live_N is None else step_N.mean(where=live_N)
        return {"index_age": step - float(mean)}

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps: the index, and the encoder of a build that is under way."""
        kept: dict[str, Any] = {"index": kept_fields(self.index)} if self.setting.stage.objective.searches else {}
        return kept | ({"pending": self.refresher.pending[1]} if self.refresher.pending else {})

    def position(self) -> dict[str, Any]:
        """The step of that build, for the JSON part of the checkpoint."""
        return {"pending_step": self.refresher.pending[0]} if self.refresher.pending else {}

    def overlap(self, params: Params, step: int, batch: dict[str, np.ndarray]) -> float:
        """Recall@k of the stale index against a fresh one, on a sample of passages and this batch's questions."""
        live_N = self.index.live_N
        usable = None if live_N is None else np.flatnonzero(np.asarray(live_N)).astype(np.int32)
        # on the host the index has the rows of the corpus alone, on the devices maybe some to fill up the tables
        n = min(self.setting.n_passages, len(self.index.step_N)) if usable is None else len(usable)
        rows = refresh.sample((self.seed, step), n, self.sample)
        rows = rows if usable is None else usable[rows]
        index, passages, at = self.way.rows(self.index, rows)
        questions = {name: batch[name] for name in ("question_ids", "question_length")}
        assert self._drift is not None
        on_device = sharding.shard_batch(self.setting.mesh, questions)
        return float(self._drift(params, on_device, index, passages, at))

    def feed(self, params: Params, batch: dict[str, np.ndarray]) -> Fed:
        return self.way.feed(params, batch, self.index)
