"""State that all stages of a training run share, and its checkpoints: saved, restored, resumed from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax

from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.index import snapshot as snapshots
from rag_jax.index.refresh import Refresher
from rag_jax.inference.pipeline import AnswerConfig, AnswerFn
from rag_jax.losses import RETRIEVER_LOSSES, RetrieverLoss
from rag_jax.models.init_lexical import inverse_document_frequency, lexical_start
from rag_jax.runs import checkpoint, live_corpus
from rag_jax.runs import directory as runs
from rag_jax.runs.index_location import IndexLocation
from rag_jax.runs.lock import Lock
from rag_jax.system import logs, sharding
from rag_jax.system.logs import MetricWriter
from rag_jax.system.preemption import Preemption
from rag_jax.training import diverged, setup
from rag_jax.training.config import TrainConfig
from rag_jax.training.data import Data
from rag_jax.training.profile import Profile
from rag_jax.training.stage_index import Upkeep
from rag_jax.training.train_step import StepSetting, TrainState, first_state


@dataclass(frozen=True)
class Moment:
    """State of training at a log line, the argument of hooks.

    step: updates of the run so far.
    stage: its name.
    metrics: the row that is about to be written.
    params, index: present parameters and index; a stage without search may have index None. Use them only inside the
      hook: the next step takes their memory.
    loaded: model and corpus.
    """

    step: int
    stage: str
    metrics: dict[str, Any]
    params: Any
    loaded: runs.Loaded
    index: Any


Hook = Callable[[Moment], Mapping[str, float] | None]


class Session(NamedTuple):
    """Everything that the stages of a run share; replaced as a whole when a live corpus changes."""

    cfg: TrainConfig
    directory: Path
    data: Data
    location: IndexLocation
    refresher: Refresher
    keeper: checkpoint.Checkpoints
    writer: MetricWriter | None  # of metrics; only the first process has one, from the first step on
    preemption: Preemption
    batches: list[grain.MapDataset]
    dev: list[formats.Question]
    answering: AnswerConfig
    program: AnswerFn
    versions: live_corpus.Versions | None
    lock: Lock | None = None  # of the run directory; only the first process has it
    index_hash: str = ""  # of the index that cfg.index names, "" for none
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES
    hooks: Sequence[Hook] = ()
    profile: Profile | None = None

    @property
    def loaded(self) -> runs.Loaded:
        """The model and the corpus."""
        return self.location.loaded

    def upkeep(self, number: int, index: Any) -> Upkeep:
        """The upkeep of the index of stage `number`; index: the present one, None to embed the corpus."""
        cfg, losses = self.cfg, self.retriever_losses
        return upkeep_of(cfg, self.location, self.data, self.refresher, number, index, losses)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Writes a row of metrics, in the first process; InputError as `check_lock`."""
        self.check_lock()
        if self.writer is not None:
            self.writer.write(step, row)

    def check_lock(self) -> None:
        """InputError where another process has taken the lock of the run directory, see runs/lock.py."""
        if self.lock is not None:
            self.lock.check()


def init_params(loaded: runs.Loaded, seed: int, init_from: str) -> Any:
    """Initial parameters on the mesh: random ones, or those of the run directory `init_from`."""
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


def make_refresher(location: IndexLocation) -> Refresher:
    """The Refresher that rebuilds the index of a run."""
    return Refresher(location.make(), location.loaded.mesh, location.loaded.rag.config.passage_side)


def upkeep_of(
    cfg: TrainConfig,
    location: IndexLocation,
    data: Data,
    refresher: Refresher,
    number: int,
    index: Any,
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES,
) -> Upkeep:
    """The upkeep of the index of stage `number`; index: the present one, None to embed the corpus."""
    setting = setting_of(cfg, location.loaded, data, number, retriever_losses)
    return Upkeep(setting, location, data.examples.texts, refresher, cfg.seed, cfg.drift_sample, index)


def setting_of(
    cfg: TrainConfig,
    loaded: runs.Loaded,
    data: Data,
    number: int,
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES,
) -> StepSetting:
    """Static arguments of the step of stage `number`."""
    stage = cfg.stages[number]
    return StepSetting(
        rag=loaded.rag,
        stage=stage,
        mesh=loaded.mesh,
        n_passages=loaded.n_rows,
        prefix_ids=loaded.corpus.generator_tokenizer.prefix_ids,
        search=cfg.search,
        epoch=setup.epoch(stage, cfg, data),
        retriever_losses=retriever_losses,
    )


def save(
    session: Session, state: TrainState, upkeep: Upkeep, seconds: float, measured: dict[str, float] | None = None
) -> None:
    """Saves a checkpoint of the present step; InputError where the parameters are not finite.

    seconds: training time of the run so far; measured: metrics of an evaluation at this step, None for none.
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
    """A restored checkpoint: state and index after `step` updates, and the training time up to there in seconds."""

    step: int
    state: TrainState
    upkeep: Upkeep
    seconds: float


def resume(session: Session) -> Restored | None:
    """Restores the newest undamaged checkpoint; None where there are no checkpoints at all.

    Damaged ones after it are renamed, with a warning in the log; InputError where all are damaged.
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
    """Number of the stage that made update `step` of the run, counted from 1; InputError past the last stage."""
    end = 0
    for number, stage in enumerate(cfg.stages):
        end += stage.steps
        if step <= end:
            return number
    raise InputError(f"a checkpoint of step {step}, and all stages together have {end}; name another --run directory")


def restore(session: Session, step: int) -> Restored:
    """Restores one checkpoint; Damaged where its files are incomplete or altered."""
    location, refresher, number = session.location, session.refresher, stage_of(session.cfg, step)
    stage, position = session.cfg.stages[number], session.keeper.position(step)
    rag, mesh = location.loaded.rag, location.loaded.mesh
    places = runs.param_places(rag, mesh)
    like = {"state": first_state(rag, stage, mesh, places, 0)._asdict()}
    corpus = session.data.corpus
    n = position.get("corpus", live_corpus.position(corpus))["n_passages"]  # fewer than now if that version is gone
    if stage.objective.searches:
        like["index"] = location.blank(n)
    if "pending_step" in position:
        like["pending"] = refresher.encoder_places(places)
    arrays = session.keeper.restore(step, like)
    index = None
    if stage.objective.searches:
        encoder = refresher.encoder(arrays["state"]["params"]) if n < len(corpus) else {}
        index = location.of_kept(arrays["index"], n, encoder, step, lambda: first_snapshot(session, step))
    if "pending_step" in position:
        refresher.resume(arrays["pending"], position["pending_step"])
    return Restored(step, TrainState(**arrays["state"]), session.upkeep(number, index), position["seconds"])


def begun_with(session: Session, done: int) -> str:
    """Hash of the index that the run started from, "" where the configuration names none.

    done: the step of a checkpoint, which has kept the hash; 0: the run has only begun.
    """
    if not session.cfg.index:
        return ""
    return session.keeper.position(done)["index_hash"] if done else snapshots.open_snapshot(session.cfg.index).hash


def first_snapshot(session: Session, done: int) -> snapshots.Snapshot | None:
    """The index that the configuration names; None where it names none, or that is not the one the run started from."""
    wanted = begun_with(session, done)
    found = snapshots.open_snapshot(session.cfg.index) if wanted else None
    return found if found is not None and found.hash == wanted else None


def given_index(session: Session, params: Any) -> Any:
    """Loads the index that the configuration names; InputError where it is of another corpus or encoder."""
    snapshot = snapshots.open_snapshot(session.cfg.index)
    runs.check_snapshot(session.loaded, params, snapshot)
    return session.location.of_snapshot(snapshot, trains=True)
