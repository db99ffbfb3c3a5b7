"""A run of training between its steps: what stays the same over all stages, how each begins, and its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.index import device_index
from rag_jax.index import snapshot as snapshots
from rag_jax.index.device_index import Index
from rag_jax.index.host_index import HostIndex, Searchers, on_host
from rag_jax.index.refresh import Refresher, on_devices
from rag_jax.inference.pipeline import AnswerConfig, AnswerFn
from rag_jax.losses import RETRIEVER_LOSSES, RetrieverLoss
from rag_jax.models.init_lexical import inverse_document_frequency, lexical_start
from rag_jax.runs import checkpoint, live_corpus
from rag_jax.runs import directory as runs
from rag_jax.runs.lock import Lock
from rag_jax.system import logs, sharding
from rag_jax.system.logs import MetricWriter
from rag_jax.system.preemption import Preemption
from rag_jax.training import diverged, setup
from rag_jax.training.config import TrainConfig
from rag_jax.training.data import Data
from rag_jax.training.profile import Profile
from rag_jax.training.stage_index import Feed, OnDevice, OnHost, Upkeep, kept_fields
from rag_jax.training.train_step import Setting, TrainState, first_state


@dataclass(frozen=True)
class Moment:
    """Where training is at a log line, for hooks. step: updates so far; metrics: the row that is about to be
    written.
    """

    step: int
    stage: str
    metrics: dict[str, Any]
    params: Any
    loaded: runs.Loaded
    index: Index | HostIndex | None


Hook = Callable[[Moment], Mapping[str, float] | None]


class Session(NamedTuple):
    """What stays the same over all stages of a run."""

    cfg: TrainConfig
    directory: Path
    data: Data
    loaded: runs.Loaded
    searchers: Searchers
    refresher: Refresher
    keeper: checkpoint.Checkpoints
    writer: MetricWriter | None  # in the first process, from the first step on
    preemption: Preemption
    batches: list[grain.MapDataset]
    dev: list[formats.Question]
    answering: AnswerConfig
    program: AnswerFn
    versions: live_corpus.Versions | None
    lock: Lock | None = None  # of the run directory, in the first process
    index_hash: str = ""  # of the index that the run began with, "" where it made its own
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES
    hooks: Sequence[Hook] = ()
    profile: Profile | None = None

    def upkeep(self, number: int, index: Any) -> Upkeep:
        """What stage `number` does about its index."""
        cfg, losses = self.cfg, self.retriever_losses
        return upkeep_of(cfg, self.loaded, self.data, self.refresher, number, index, losses)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """A row of metrics."""
        self.check_lock()
        if self.writer is not None:
            self.writer.write(step, row)

    def check_lock(self) -> None:
        """InputError where another process trains here by now."""
        if self.lock is not None:
            self.lock.check()


def init_params(loaded: runs.Loaded, seed: int, init_from: str) -> Any:
    """New parameters, made sharded; or those of another run."""
    if init_from:
        return runs.read_params(Path(init_from), loaded.rag, loaded.mesh)
    params = sharding.init(loaded.mesh, loaded.rag.init, jax.random.key(seed))
    encoder = loaded.rag.config.encoder
    if encoder.init == "lexical":
        corpus = loaded.corpus
        weight_V = inverse_document_frequency(corpus.encoder_ids, corpus.encoder_length, encoder.vocab_size)
        for side in {"question_encoder", "context_encoder"} & set(params):
            places = jax.tree.map(lambda x: x.sharding, params[side])
            params[side] = jax.device_put(lexical_start(params[side], weight_V), places)
    return params


def make_refresher(cfg: TrainConfig, loaded: runs.Loaded, searchers: Searchers) -> Refresher:
    """What makes the run's index anew."""
    if loaded.passages is None:
        make = on_host(loaded.rag, searchers)
    else:
        make = on_devices(loaded.rag, loaded.mesh, loaded.passages, cfg.search.dtype, loaded.live_N)
    return Refresher(make, loaded.mesh, loaded.rag.config.passage_side)


def upkeep_of(
    cfg: TrainConfig,
    loaded: runs.Loaded,
    data: Data,
    refresher: Refresher,
    number: int,
    index: Any,
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES,
) -> Upkeep:
    """What stage `number` does about its index, which is `index` so far."""
    setting, way = way_of(cfg, loaded, data, number, retriever_losses)
    return Upkeep(setting, way, refresher, cfg.seed, cfg.drift_sample, index)


def way_of(
    cfg: TrainConfig,
    loaded: runs.Loaded,
    data: Data,
    number: int,
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES,
) -> tuple[Setting, Feed]:
    """What the step of stage `number` closes over, and how it is fed."""
    stage, found = cfg.stages[number], data.examples
    setting = Setting(
        rag=loaded.rag,
        stage=stage,
        mesh=loaded.mesh,
        n_passages=loaded.n_rows,
        prefix_ids=loaded.corpus.generator_tokenizer.prefix_ids,
        search=cfg.search,
        epoch=setup.epoch(stage, cfg, data),
        retriever_losses=retriever_losses,
    )
    if loaded.passages is not None:
        return setting, OnDevice(setting, loaded.passages)
    return setting, OnHost(setting, loaded.corpus, found.texts)


def save(
    session: Session, state: TrainState, upkeep: Upkeep, seconds: float, measured: dict[str, float] | None = None
) -> None:
    """A checkpoint of the step that the state has come to; measured: what an evaluation there found. InputError where
    the parameters are not finite.
    """
    step, keeper = int(state.step), session.keeper
    session.check_lock()
    diverged.check_params(session.cfg, state.params, step, stage_of(session.cfg, step), keeper.newest)
    arrays = {"state": state._asdict(), **upkeep.arrays()}
    index = {"index_hash": session.index_hash} if session.index_hash else {}
    version = {"corpus": live_corpus.position(session.data.corpus)} if session.versions else {}
    position = {"seconds": seconds, **upkeep.position(), **index, **version}
    keeper.save(step, arrays, position, measured)


class Restored(NamedTuple):
    """What a checkpoint holds: state and index of `step`, and the training seconds up to there."""

    step: int
    state: TrainState
    upkeep: Upkeep
    seconds: float


def resume(session: Session) -> Restored | None:
    """The last whole checkpoint, None where there are no checkpoints at all. Those after it are set aside, and a line
    says why; InputError where none is whole.
    """
    keeper, damaged = session.keeper, {}
    for step in keeper.steps():
        try:
            restored = restore(session, step)
        except checkpoint.Damaged as error:
            damaged[step] = f"checkpoint {keeper.directory / str(step)} is not whole: {error}"
            continue
        for number, words in damaged.items():
            logs.info(f"warning: {words}; it is now {keeper.set_aside(number).name}, and an older one is taken")
        logs.info(f"{session.directory}: going on from step {step}")
        return restored
    if damaged:
        raise InputError(
            f"{'; '.join(damaged.values())}; no other is there: put one back, or remove them to begin from the start"
        )
    return None


def stage_of(cfg: TrainConfig, step: int) -> int:
    """The stage in which the run came to `step` steps."""
    end = 0
    for number, stage in enumerate(cfg.stages):
        end += stage.steps
        if step <= end:
            return number
    raise InputError(f"a checkpoint of step {step}, and all stages together have {end}; name another --run directory")


def restore(session: Session, step: int) -> Restored:
    """A checkpoint; Damaged where it is not whole."""
    loaded, refresher, number = session.loaded, session.refresher, stage_of(session.cfg, step)
    stage, position = session.cfg.stages[number], session.keeper.position(step)
    places = runs.param_places(loaded.rag, loaded.mesh)
    like = {"state": first_state(loaded.rag, stage, loaded.mesh, places, 0)._asdict()}
    corpus = session.data.corpus
    n = position.get("corpus", live_corpus.position(corpus))["n_passages"]  # fewer than now where that version is gone
    if stage.objective.searches:
        like["index"] = kept_fields(blank_index(session, n))
    if "pending_step" in position:
        like["pending"] = refresher.encoder_places(places)
    arrays = session.keeper.restore(step, like)
    index = None
    if stage.objective.searches:
        encoder = refresher.encoder(arrays["state"]["params"]) if n < len(corpus) else {}
        index = whole_index(session, arrays["index"], n, encoder, step)
    if "pending_step" in position:
        refresher.resume(arrays["pending"], position["pending_step"])
    return Restored(step, TrainState(**arrays["state"]), session.upkeep(number, index), position["seconds"])


def begun_with(session: Session, done: int) -> str:
    """The hash of the index that the configuration names, "" where it names none; a checkpoint has it, too."""
    if not session.cfg.index:
        return ""
    return session.keeper.position(done)["index_hash"] if done else snapshots.open_snapshot(session.cfg.index).hash


def blank_index(session: Session, n: int) -> Index:
    """An index of zeros, in the shapes and places of one that the run makes of n passages."""
    loaded = session.loaded
    width = loaded.rag.config.encoder.output_width
    if loaded.passages is None:
        arrays: Any = np.zeros((n, width), np.float32), np.zeros(n, np.int32)
        return Index(*arrays)
    return device_index.blank(loaded.mesh, loaded.table_rows(n), width, session.cfg.search.dtype)


def whole_index(session: Session, arrays: dict[str, Any], n: int, encoder: Any, step: int) -> Index | HostIndex:
    """The index whose arrays a checkpoint kept for n passages; rows that came since are embedded as in `follow`."""
    loaded, searchers = session.loaded, session.searchers
    if loaded.passages is not None:
        index = Index(**arrays, live_N=runs.live_on_device(loaded))
        return live_corpus.longer_index(index, loaded, n, encoder, step) if n < len(loaded.corpus) else index
    embeddings_NE, step_N = (np.asarray(arrays[name]) for name in ("embeddings_NE", "step_N"))
    if begun_with(session, step) and not step_N.any():
        given = snapshots.open_snapshot(session.cfg.index)
        if given.hash == begun_with(session, step) and len(given.embeddings_NE) == len(embeddings_NE):
            embeddings_NE = given.embeddings_NE  # in the type that it was searched in so far
    if n < len(loaded.corpus):
        embeddings_NE, step_N = live_corpus.longer_rows(embeddings_NE, step_N, loaded, encoder, step)
    searcher = searchers.make(embeddings_NE, None, int(step_N.max()))
    return HostIndex(embeddings_NE, step_N, searcher, loaded.corpus.live_N)


def given_index(session: Session, params: Any) -> Index | HostIndex:
    """The index that the configuration names; InputError where it is of another corpus or encoder."""
    loaded = session.loaded
    snapshot = snapshots.open_snapshot(session.cfg.index)
    runs.check_snapshot(loaded, params, snapshot)
    if loaded.passages is None:
        step_N, encoder_hash = np.zeros(len(loaded.corpus), np.int32), snapshot.manifest.encoder_hash
        searcher = session.searchers.make(snapshot.embeddings_NE, encoder_hash, 0)
        return HostIndex(snapshot.embeddings_NE, step_N, searcher, loaded.corpus.live_N)
    index = runs.index_on_device(loaded, snapshot, session.cfg.search.dtype)
    drift_E = device_index.no_drift(loaded.mesh, index.embeddings_NE.shape[1])
    return index._replace(step_N=jnp.zeros_like(index.step_N), drift_E=drift_E)
