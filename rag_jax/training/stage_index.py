"""The index of a training stage: refreshed by its schedule, passed to each step, kept in checkpoints."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rag_jax.index import refresh
from rag_jax.index.device_index import Index
from rag_jax.index.refresh import Refresher
from rag_jax.rag import Params
from rag_jax.retrieval.search import SearchResult
from rag_jax.runs.index_location import Arrays, IndexLocation, Lookup, StepInputs
from rag_jax.system import sharding
from rag_jax.training.stage import StepSetting
from rag_jax.training.train_step import make_drift

Texts = Callable[[np.ndarray], list[str]]  # numbers of questions (`source` of a batch) -> their texts


def feed(
    setting: StepSetting, location: IndexLocation, texts: Texts, params: Params, batch: Arrays, index: Any
) -> StepInputs:
    """Arguments of a step besides its state and key: the batch on the devices, index rows and token tables."""
    objective = setting.stage.objective

    def read(arrays: Arrays, found: SearchResult | None) -> tuple[np.ndarray, Arrays]:
        rows = objective.rows_on_host(arrays, None if found is None else found.ids_BK, setting.mesh)
        return rows, {"document_rows": rows.astype(np.int32)}

    n = objective.n_found if objective.searches else 0
    return location.given(params, index, batch, Lookup(n, lambda: texts(batch["source"]), read))


class Upkeep:
    """Keeps the index of one stage: rebuilds it before a step where the schedule says so, and has it for checkpoints.

    seed, sample: of the passages on which the overlap with fresh embeddings is measured, and how many they are.
    index: the index at the start; None to embed the corpus before the first step.
    """

    def __init__(
        self,
        setting: StepSetting,
        location: IndexLocation,
        texts: Texts,
        refresher: Refresher,
        seed: int,
        sample: int,
        index: Any = None,
    ) -> None:
        self.setting, self.location, self.texts, self.refresher, self.index = setting, location, texts, refresher, index
        self.when = setting.when
        self.seed, self.sample = seed, sample
        self._drift = make_drift(setting) if setting.stage.objective.searches else None

    def move(
        self, setting: StepSetting, location: IndexLocation, texts: Texts, refresher: Refresher, index: Any
    ) -> None:
        """Continues with another version of the corpus, of which `index` is the index.

        A background build is started again on the new version, with the encoder and step that it was begun with.
        """
        if self._drift is not None and setting != self.setting:
            self._drift = make_drift(setting)
        pending = self.refresher.pending
        self.refresher.drop()
        self.setting, self.location, self.texts, self.refresher, self.index = setting, location, texts, refresher, index
        if pending is not None:
            refresher.resume(pending[1], pending[0])

    def before(self, params: Params, into: int, step: int, batch: Arrays) -> dict[str, float]:
        """Refreshes the index before step `into` of the stage, if it is due; returns metrics measured on the way."""
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
        """Takes over the index that a step returned; None: the step does not change it."""
        if index is not None:
            self.index = index

    def age(self, step: int) -> dict[str, float]:
        """Metric index_age: mean updates since valid rows (not deleted) were embedded; {} in a stage without search."""
        if not self.setting.stage.objective.searches:
            return {}
        step_N, live_N = self.index.step_N, self.index.live_N
        mean = step_N[: self.setting.n_passages].mean() if live_N is None else step_N.mean(where=live_N)
        return {"index_age": step - float(mean)}

    def arrays(self) -> dict[str, Any]:
        """Arrays for a checkpoint: the index, and the encoder of an unfinished background build."""
        searches = self.setting.stage.objective.searches
        kept: dict[str, Any] = {"index": self.location.kept(self.index)} if searches else {}
        return kept | ({"pending": self.refresher.pending[1]} if self.refresher.pending else {})

    def position(self) -> dict[str, Any]:
        """The step of an unfinished background build, for the JSON part of the checkpoint."""
        return {"pending_step": self.refresher.pending[0]} if self.refresher.pending else {}

    def overlap(self, params: Params, step: int, batch: Arrays) -> float:
        """Recall@k of the present index against fresh embeddings, on sampled passages and this batch's questions."""
        live_N = self.index.live_N
        usable = None if live_N is None else np.flatnonzero(np.asarray(live_N)).astype(np.int32)
        # on the host the index has exactly the rows of the corpus, on the devices perhaps padding rows after them
        n = min(self.setting.n_passages, len(self.index.step_N)) if usable is None else len(usable)
        rows = refresh.sample((self.seed, step), n, self.sample)
        rows = rows if usable is None else usable[rows]
        index, passages, at = self.location.sampled(self.index, rows)
        questions = {name: batch[name] for name in ("question_ids", "question_length")}
        assert self._drift is not None
        on_device = sharding.shard_batch(self.setting.mesh, questions)
        return float(self._drift(params, on_device, index, passages, at))

    def feed(self, params: Params, batch: Arrays) -> StepInputs:
        """Arguments of the step besides its state and key, see the function `feed`."""
        return feed(self.setting, self.location, self.texts, params, batch, self.index)
