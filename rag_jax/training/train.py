"""The training loop: all stages of a configuration one after another, killable at any moment.

    config, corpus, questions -> for each stage: optimiser, index, batches, one jitted step -> params/, index/

The same command started again resumes from the last checkpoint and ends with bit-identical parameters. It runs as one
or several processes; each feeds its own rows of every batch, and the first one writes.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rag_jax import metrics
from rag_jax.data import batching, tasks
from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.evaluation import evaluate
from rag_jax.index import snapshot as snapshots
from rag_jax.inference import config as answer_config
from rag_jax.inference.pipeline import make_answer
from rag_jax.losses import RETRIEVER_LOSSES, RetrieverLoss
from rag_jax.runs import checkpoint, live_corpus, lock
from rag_jax.runs import directory as runs
from rag_jax.runs.index_location import location_of
from rag_jax.system import distributed, logs, sharding
from rag_jax.system.logs import MetricWriter, Progress
from rag_jax.system.preemption import Preempted, Preemption
from rag_jax.training import diverged, setup
from rag_jax.training import session as sessions
from rag_jax.training.config import StageConfig, TrainConfig
from rag_jax.training.data import Data
from rag_jax.training.profile import Profile
from rag_jax.training.session import Hook, Moment, Session, make_refresher, setting_of
from rag_jax.training.stage_index import Upkeep
from rag_jax.training.train_step import TrainState, first_state, jit_step

# Figures of an evaluation that are shown beside `best_metric`, as far as it has them.
HEADLINES = (*metrics.OF_ANSWERS, "all_gold_at_5", "recall_at_1", "recall_at_5")
SHOWN = 4
# Metrics of a step that are NaN where no gold passage is known, or where the search found nothing.
MAY_BE_ABSENT = ("recall", "prior_entropy", "unique_documents", "posterior_prior_gap", "row_age", "score_gap")


def average(rows: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the steps of an interval, and the last learning rate.

    NaN is skipped in metrics that are NaN when there is nothing to measure (MAY_BE_ABSENT), and kept in all others.
    """
    fetched = jax.device_get(rows)
    means = {}
    for name in fetched[0]:
        values = np.asarray([row[name] for row in fetched], np.float64)
        values = values[~np.isnan(values)] if name.startswith(MAY_BE_ABSENT) else values
        if len(values):
            means[name] = float(values.mean())
    means["learning_rate"] = float(fetched[-1]["learning_rate"])
    return means


class Interval:
    """Metrics and times of the steps since the last log line."""

    def __init__(self) -> None:
        self.rows: list[dict[str, jax.Array]] = []
        self.measured: dict[str, float] = {}  # latest values of metrics that only some steps have
        self.shares: list[np.ndarray] = []  # for each batch, the share of each input file
        self.begun = time.perf_counter()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the steps so far, which compiled, from the step time, unless no other step follows."""
        self.host_seconds, self.started, self.untimed = 0.0, time.perf_counter(), len(self.rows)

    def summary(self, inputs: Iterable[str] = ()) -> dict[str, float]:
        """Mean metrics, times per step and, with several input files, the share of each in the batches."""
        values = average(self.rows)
        timed = len(self.rows) - self.untimed
        seconds = time.perf_counter() - (self.started if timed else self.begun)
        steps = timed or len(self.rows)
        times = {
            "step_seconds": seconds / steps,
            "tokens_per_second": values.pop("tokens") * steps / seconds,
            "host_share": self.host_seconds / seconds,
        }
        values |= times | self.measured
        if self.shares:
            shares = np.mean(self.shares, axis=0)
            values |= {f"share/{name}": float(share) for name, share in zip(inputs, shares, strict=True)}
        return values


def follow(session: Session, number: int, upkeep: Upkeep, params: Any, step: int) -> Session:
    """Replaces the corpus between two steps by its newest version, if there is a newer one.

    Only the new rows are embedded, with the present parameters. A version that cannot be used is refused with a line in
    the log, and training continues with the old one.
    """
    cfg, old = session.cfg, session.data.corpus
    corpus = session.versions.look(old) if session.versions else None
    if corpus is None:
        return session
    try:
        setup.check(cfg, corpus, session.loaded.mesh, session.retriever_losses)
        data = setup.prepare(cfg, corpus)
        if not setup.same_questions(data, session.data):
            raise InputError(f"the questions of {cfg.train} are no longer those of the run; put them back")
        every_batch = all_batches(cfg, data, session.loaded.mesh)
        location = location_of(live_corpus.updated(session.loaded, corpus), cfg.search)
        refresher, index = make_refresher(location), upkeep.index
        if index is not None:
            index = location.followed(index, old, refresher.encoder(params), step)
    except InputError as error:
        logs.info(f"{corpus.directory} ({corpus.hash[:16]}): {error}; {old.directory} ({old.hash[:16]}) stays in use")
        return session
    loaded = location.loaded
    setting = setting_of(cfg, loaded, data, number, session.retriever_losses)
    upkeep.move(setting, location, data.examples.texts, refresher, index)
    same = loaded.n_rows == session.loaded.n_rows
    logs.info(
        f"step {step}: the corpus is now {corpus.directory} ({corpus.hash[:16]}): {corpus.n_live} passages, "
        f"{len(corpus) - len(old)} new rows{'' if same else ', larger tables'}"
    )
    return session._replace(
        data=data,
        location=location,
        refresher=refresher,
        batches=every_batch,
        program=session.program if same else make_answer(loaded, session.answering),
    )


def said_of(stage: StageConfig, widths: tuple[int, ...]) -> str:
    """Question and target width for the log, if the stage has buckets."""
    if not stage.buckets and not stage.target_buckets:
        return ""
    return f" with {widths[0]} tokens a question and {widths[1]} a target"


def run_stage(
    session: Session, number: int, start: int, state: TrainState, upkeep: Upkeep, seconds: float
) -> tuple[Session, TrainState, float]:
    """Runs the remaining steps of one stage.

    number: of the stage; start: steps of the run before this stage; seconds: training time of the run so far.
    Returns the session, which changes with the version of the corpus, the state and the training time.
    """
    cfg = session.cfg
    stage = cfg.stages[number]
    begun = time.perf_counter()
    first, end = int(state.step), start + stage.steps
    step_fn: Any = None
    compiled: set[tuple[int, ...]] = set()  # widths of the batches that the step has been compiled for
    # a batch depends on seed and step alone, so that a resumed run continues with the batch that is next
    iterator = batching.iterate(session.batches[number], first - start)
    key = jax.random.key(cfg.seed)
    interval = Interval()
    with Progress(
        stage.steps, f"{stage.name} {number + 1}/{len(cfg.stages)}", "step", initial=first - start
    ) as progress:
        for step in range(first, end):
            into = step - start
            if session.preemption.asked(step):
                stop(session, number, state, upkeep, interval, into, seconds + time.perf_counter() - begun)
            before = time.perf_counter()
            drawn = next(iterator)
            waited = time.perf_counter() - before
            interval.measured |= upkeep.before(state.params, into, step, drawn)
            before = time.perf_counter()
            fed = upkeep.feed(state.params, drawn)
            interval.host_seconds += waited + time.perf_counter() - before
            if step_fn is None:
                step_fn, compiled = jit_step(upkeep.setting, start, state, fed.table), set()
            widths = batching.widths_of(drawn)
            compiles = widths not in compiled
            compiled.add(widths)
            if session.profile is not None:
                session.profile.before(step + 1)
            state, changed, metrics = step_fn(state, *fed, key)
            if session.profile is not None:
                session.profile.after(step + 1, state)
            upkeep.after(changed)
            interval.rows.append(metrics)
            interval.shares += [drawn["share"]] if "share" in drawn else []
            # at most two steps are in flight: the host prepares the next one while the device computes, but does not
            # run ahead of it without limit
            behind = 1 if compiles else min(2, len(interval.rows))
            jax.block_until_ready(interval.rows[-behind])
            if compiles:  # compilation is not step time
                spent = time.perf_counter() - before
                words = f"{stage.name}: first step{said_of(stage, widths)}"
                logs.info(f"{words} after {spent:.1f} s of compiling and running")
                interval.restart_clock()
            progress.update(1, loss=metrics["loss"])
            logged = (into + 1) % cfg.log_every == 0 or step + 1 == end
            if step + 1 == end:  # the next stage begins with its own index: a background build is of no use any more
                upkeep.refresher.drop()
            measured: dict[str, float] = {}
            if logged:
                check_finite(session, number, into + 1, interval)
                row = {"stage": stage.name, **interval.summary(session.data.weights), **upkeep.age(step)}
                moved = follow(session, number, upkeep, state.params, step + 1)
                if moved is not session:
                    row |= {"corpus": moved.data.corpus.hash, "n_passages": moved.data.corpus.n_live}
                    iterator = batching.iterate(moved.batches[number], into + 1)
                    step_fn = step_fn if moved.loaded.n_rows == session.loaded.n_rows else None
                    session = moved
                if cfg.evaluate_every and ((into + 1) % cfg.evaluate_every == 0 or step + 1 == end):
                    measured = evaluate_dev(session, state.params, upkeep.index, step)
                row |= measured
                row |= hooked(session, Moment(step + 1, stage.name, row, state.params, session.loaded, upkeep.index))
                session.write(step + 1, row)
            if (into + 1) % cfg.checkpoint_every == 0 or step + 1 == end or (cfg.keep_best and measured):
                sessions.save(session, state, upkeep, seconds + time.perf_counter() - begun, measured)
            if logged:
                interval = Interval()
    return session, state, seconds + time.perf_counter() - begun


def hooked(session: Session, moment: Moment) -> dict[str, float]:
    """Calls all hooks at a log line; the numbers that they return, by name."""
    return {name: float(value) for hook in session.hooks for name, value in (hook(moment) or {}).items()}


def check_finite(session: Session, number: int, done: int, interval: Interval) -> None:
    """InputError where a step of the interval has diverged; done: steps of the stage so far."""
    rows = interval.rows
    diverged.check(session.cfg, session.data, number, done - len(rows), rows, session.keeper.newest)


def stop(
    session: Session, number: int, state: TrainState, upkeep: Upkeep, interval: Interval, into: int, seconds: float
) -> None:
    """Stops the run after `into` steps of stage `number`; always raises Preempted.

    Writes the metrics since the last log line and a checkpoint; none with into=0, where the last checkpoint of the
    stage before is of this very step.
    """
    step = int(state.step)
    if interval.rows:
        check_finite(session, number, into, interval)
        name, means = session.cfg.stages[number].name, interval.summary(session.data.weights)
        session.write(step, {"stage": name, **means, **upkeep.age(step - 1)})
    if into:
        sessions.save(session, state, upkeep, seconds)
    session.keeper.wait()
    raise Preempted(step)


def evaluate_dev(session: Session, params: Any, index: Any, step: int) -> dict[str, float]:
    """Evaluates the first `evaluate_questions` dev questions with the present parameters; metrics named eval/..."""
    index = session.refresher.full(params, step) if index is None else index
    cfg, answering = session.cfg, session.answering
    rows = evaluate.predict(session.location, params, index, session.dev, answering, session.program, cfg.task.match)
    summary = metrics.summarize(rows, metrics.Judging(answering.allowed_answers, cfg.task.match))
    best = cfg.best_metric.removeprefix("eval/")
    shown = [name for name in dict.fromkeys((best, *HEADLINES)) if name in summary]
    figures = ", ".join(f"{name} {summary[name]:.3f}" for name in shown[:SHOWN])
    logs.info(f"step {step + 1}: {len(rows)} dev questions: {figures}")
    return {f"eval/{name}": value for name, value in summary.items() if name != "n"}


def all_batches(cfg: TrainConfig, data: Data, mesh: jax.sharding.Mesh) -> list[Any]:
    """The batches of every stage, of which this process makes only its own rows."""
    return [setup.batches(stage, cfg, data, number, mesh) for number, stage in enumerate(cfg.stages)]


def train(
    cfg: TrainConfig,
    directory: Path,
    *,
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES,
    hooks: Sequence[Hook] = (),
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Trains all stages in a run directory, or resumes from its last undamaged checkpoint; writes params/ and index/.

    Returns run directory, steps, training seconds and the last row of metrics. At SIGTERM it saves a checkpoint and
    returns early, with `preempted` in the result. InputError for a configuration or data that cannot be trained.

    retriever_losses: by the names that stages may use; hooks: called at every log line; profile: steps to trace.
    """
    if profile is not None:
        profile.prepare()
    corpus, mesh = setup.opened(cfg, directory), sharding.make_mesh(cfg.mesh or None)
    setup.check(cfg, corpus, mesh, retriever_losses)
    data = setup.prepare(cfg, corpus, directory)
    every_batch = all_batches(cfg, data, mesh)
    dev = formats.read_questions(cfg.dev)[: cfg.evaluate_questions] if cfg.evaluate_every else []
    dev = tasks.posed(dev, cfg.task, corpus) if dev else []
    if not cfg.live:  # a later version of a live corpus may bring the passages that the dev questions name
        evaluate.gold_ids(dev, corpus, Path(cfg.dev), answer_config.answering(cfg))
    if cfg.init and not (directory / "config.json").exists():
        runs.check_init(Path(cfg.init), cfg.model, corpus, mesh)
    with lock.held(directory) if distributed.first() else contextlib.nullcontext() as held:
        return train_in(cfg, directory, data, every_batch, dev, mesh, held, retriever_losses, hooks, profile)


def train_in(
    cfg: TrainConfig,
    directory: Path,
    data: Data,
    every_batch: list[Any],
    dev: list[formats.Question],
    mesh: jax.sharding.Mesh,
    held: lock.Lock | None,
    retriever_losses: Mapping[str, RetrieverLoss],
    hooks: Sequence[Hook],
    profile: Profile | None,
) -> dict[str, Any]:
    """`train` after its checks, with the lock of the run directory held."""
    corpus = data.corpus
    setup.open_run(cfg, directory, data)
    setup.keep(directory, data)
    keeper = checkpoint.Checkpoints(directory / "checkpoints", cfg.keep_checkpoints, cfg.keep_best, cfg.best_metric)
    done, total = keeper.latest() or 0, sum(stage.steps for stage in cfg.stages)
    if done == total and distributed.everywhere(finished(directory, total)):
        logs.info(f"{directory}: all {total} steps are done")
        return result(directory, total, keeper.position(done)["seconds"])
    loaded = runs.load(cfg.model, corpus, mesh, cfg.search.in_graph, cfg.live)
    answering = answer_config.answering(cfg, n_retrieved=20, batch=64, retrieval_only=cfg.model.generator is None)
    location = location_of(loaded, cfg.search, None if cfg.live else directory / "search")
    with Preemption() as preemption:
        session = Session(
            cfg=cfg,
            directory=directory,
            data=data,
            location=location,
            refresher=make_refresher(location),
            keeper=keeper,
            writer=None,
            preemption=preemption,
            batches=every_batch,
            dev=dev,
            answering=answering,
            program=make_answer(loaded, answering),
            versions=live_corpus.Versions(cfg.corpus) if cfg.live else None,
            lock=held,
            retriever_losses=retriever_losses,
            hooks=hooks,
            profile=profile,
        )
        try:
            return run_stages(session, total)
        except Preempted as error:
            logs.info(f"{directory}: SIGTERM: saved and stopped after step {error.step} of {total}; the same command "
                      "goes on from there")  # fmt: skip
            return {"run": str(directory), "steps": error.step, "of": total, "preempted": True}
        finally:
            keeper.close()
            if profile is not None:
                profile.stop()


def run_stages(session: Session, total: int) -> dict[str, Any]:
    """Runs the remaining stages, then writes params/ and index/."""
    cfg, directory, loaded = session.cfg, session.directory, session.loaded
    restored = sessions.resume(session)
    done = restored.step if restored else 0
    writer = MetricWriter(directory, resume_step=done) if distributed.first() else None
    session = session._replace(writer=writer, index_hash=sessions.begun_with(session, done))
    if restored:
        params, seconds, given = restored.state.params, restored.seconds, None
    else:
        params, seconds = sessions.init_params(loaded, cfg.seed, cfg.init), 0.0
        given = sessions.given_index(session, params) if cfg.index else None
    start = 0
    try:
        for number, stage in enumerate(cfg.stages):
            end = start + stage.steps
            if done < end:
                if restored and start < done:
                    state, upkeep = restored.state, restored.upkeep
                else:
                    state = first_state(loaded.rag, stage, loaded.mesh, params, start)
                    upkeep = session.upkeep(number, given if start == 0 else None)
                restored = None
                session, state, seconds = run_stage(session, number, start, state, upkeep, seconds)
                params = state.params
            start = end
    finally:
        if writer is not None:
            writer.close()
    if session.preemption.asked(total):
        session.keeper.wait()
        raise Preempted(total)
    session.check_lock()
    checkpoint.save_params(directory / "params", params.items())
    known = snapshots.open_snapshot(cfg.index) if cfg.index else None
    runs.write_index(session.loaded, params, total, directory / "index", overwrite=True, known=known)
    return result(directory, total, seconds)


def finished(directory: Path, total: int) -> bool:
    """Whether params/ and index/, which a run writes at its end, are there, the index as of its last step."""
    try:
        checkpoint.check_params(directory / "params")
        return snapshots.open_snapshot(directory / "index").manifest.step == total
    except InputError:
        return False


def result(directory: Path, total: int, seconds: float) -> dict[str, Any]:
    rows = logs.read_rows(directory / logs.METRICS_FILE)
    last = rows[-1] if rows else {}
    return {"run": str(directory), "steps": total, "training_seconds": round(seconds, 1), "last": last}
