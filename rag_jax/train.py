"""`rag-jax train`: the stages of a configuration one after another, killable at any moment.

    config, corpus, questions -> for each stage: optimiser, index, batches, one jitted step -> params/, index/

The same command started again goes on from the last checkpoint and ends with bit-identical parameters.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax import checkpoint, config, evaluate, live, logs, metrics, optimizer, preparing, refresh, sharding
from rag_jax import run as runs
from rag_jax.answer import AnswerConfig, AnswerFn, make_answer
from rag_jax.config import StageConfig, TrainConfig
from rag_jax.data import formats, pipeline
from rag_jax.errors import InputError
from rag_jax.hosted import HostIndex, Searchers, on_host
from rag_jax.logs import MetricWriter, Progress
from rag_jax.models.lexical import inverse_document_frequency, lexical_start
from rag_jax.refresh import Index, Refresher, on_devices
from rag_jax.retrieval import index as snapshots
from rag_jax.steps import Setting, TrainState, jit_step
from rag_jax.upkeep import Feed, OnDevice, OnHost, Upkeep, kept_fields


def average(rows: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of every metric over the interval; NaN (nothing to measure) is passed over; the last learning rate."""
    fetched = jax.device_get(rows)
    means = {}
    for name in fetched[0]:
        values = np.asarray([row[name] for row in fetched], np.float64)
        values = values[~np.isnan(values)] if name.startswith("recall") else values
        if len(values):
            means[name] = float(values.mean())
    means["learning_rate"] = float(fetched[-1]["learning_rate"])
    return means


class Interval:
    """Metrics since the last log line, and where the time went."""

    def __init__(self) -> None:
        self.rows: list[dict[str, jax.Array]] = []
        self.measured: dict[str, float] = {}  # the last of what is not measured in every step
        self.begun = time.perf_counter()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the steps up to now out of the times, unless no other follows: they compiled."""
        self.host_seconds, self.started, self.untimed = 0.0, time.perf_counter(), len(self.rows)

    def summary(self) -> dict[str, float]:
        values = average(self.rows)
        timed = len(self.rows) - self.untimed
        seconds = time.perf_counter() - (self.started if timed else self.begun)
        steps = timed or len(self.rows)
        times = {
            "step_seconds": seconds / steps,
            "tokens_per_second": values.pop("tokens") * steps / seconds,
            "host_share": self.host_seconds / seconds,
        }
        return values | times | self.measured


class Session(NamedTuple):
    """What stays the same over all stages of a run."""

    cfg: TrainConfig
    directory: Path
    data: preparing.Data
    loaded: runs.Loaded
    searchers: Searchers
    refresher: Refresher
    keeper: checkpoint.Checkpoints
    writer: MetricWriter
    batches: list[grain.MapDataset]
    dev: list[formats.Question]
    answering: AnswerConfig
    program: AnswerFn
    versions: live.Versions | None
    index_hash: str  # of the index that the run began with, "" where it made its own

    def upkeep(self, number: int, index: Any) -> Upkeep:
        """What stage `number` does about its index."""
        return upkeep_of(self.cfg, self.loaded, self.data, self.refresher, number, index)


def init_state(loaded: runs.Loaded, stage: StageConfig, params: Any, step: int) -> TrainState:
    """The state at the start of a stage: a fresh optimiser, sharded as its parameters are."""
    tx = optimizer.make(stage.optimizer, stage.steps)

    def opt_state() -> Any:
        return tx.init(optimizer.split(stage.optimizer, loaded.rag.init(jax.random.key(0)))[0])

    place = sharding.replicated(loaded.mesh)
    return TrainState(jax.device_put(np.int32(step), place), params, sharding.init(loaded.mesh, opt_state))


def make_refresher(cfg: TrainConfig, loaded: runs.Loaded, searchers: Searchers) -> Refresher:
    """What makes the run's index anew."""
    if loaded.passages is None:
        make = on_host(loaded.rag, searchers)
    else:
        make = on_devices(loaded.rag, loaded.mesh, loaded.passages, cfg.search.dtype, loaded.live_N)
    return Refresher(make, loaded.mesh, loaded.encoder_side)


def upkeep_of(
    cfg: TrainConfig, loaded: runs.Loaded, data: preparing.Data, refresher: Refresher, number: int, index: Any
) -> Upkeep:
    """What stage `number` does about its index, which is `index` so far."""
    setting, way = way_of(cfg, loaded, data, number)
    return Upkeep(setting, way, refresher, cfg.seed, cfg.drift_sample, index)


def way_of(cfg: TrainConfig, loaded: runs.Loaded, data: preparing.Data, number: int) -> tuple[Setting, Feed]:
    """What the step of stage `number` closes over, and how it is fed."""
    stage = cfg.stages[number]
    setting = Setting(
        rag=loaded.rag,
        stage=stage,
        mesh=loaded.mesh,
        n_passages=loaded.n_rows,
        prefix_ids=loaded.corpus.generator_tokenizer.prefix_ids,
        search=cfg.search,
        epoch=max(1, len(data.examples) // stage.batch),
    )
    if loaded.passages is not None:
        return setting, OnDevice(setting, loaded.passages)
    return setting, OnHost(setting, loaded.corpus, [question.question for question in data.questions])


def save(session: Session, state: TrainState, upkeep: Upkeep, seconds: float) -> None:
    arrays = {"state": state._asdict(), **upkeep.arrays()}
    index = {"index_hash": session.index_hash} if session.index_hash else {}
    version = {"corpus": live.position(session.data.corpus)} if session.versions else {}
    session.keeper.save(int(state.step), arrays, {"seconds": seconds, **upkeep.position(), **index, **version})


def begun_with(cfg: TrainConfig, keeper: checkpoint.Checkpoints, done: int) -> str:
    """The hash of the index that the configuration names, "" where it names none; a checkpoint has it, too."""
    if not cfg.index:
        return ""
    return keeper.position(done)["index_hash"] if done else snapshots.open_snapshot(cfg.index).hash


def restore(session: Session, number: int, params: Any, step: int) -> tuple[TrainState, Upkeep, float]:
    """State, index and training seconds of the checkpoint of `step`, which lies in stage `number`."""
    stage, refresher = session.cfg.stages[number], session.refresher
    position = session.keeper.position(step)
    like = {"state": init_state(session.loaded, stage, params, 0)._asdict()}
    corpus = session.data.corpus
    n = position.get("corpus", live.position(corpus))["n_passages"]  # fewer than now where that version is gone
    if config.searches(stage):
        like["index"] = kept_fields(blank_index(session, n))
    if "pending_step" in position:
        like["pending"] = refresher.encoder(params)
    arrays = session.keeper.restore(step, like)
    index = None
    if config.searches(stage):
        encoder = refresher.encoder(arrays["state"]["params"]) if n < len(corpus) else {}
        index = whole_index(session, arrays["index"], n, encoder, step)
    if "pending_step" in position:
        refresher.resume(arrays["pending"], position["pending_step"])
    logs.info(f"{session.directory}: going on from step {step}")
    return TrainState(**arrays["state"]), session.upkeep(number, index), position["seconds"]


def follow(session: Session, number: int, upkeep: Upkeep, params: Any, step: int) -> Session:
    """Between two steps: the newest version of the corpus, if there is another one, in place of the one in use.

    Only its new rows are embedded, with these parameters. A version that cannot be used is refused by a line in the
    log, and training goes on.
    """
    cfg, old = session.cfg, session.data.corpus
    corpus = session.versions.look(old) if session.versions else None
    if corpus is None:
        return session
    try:
        preparing.check(cfg, corpus, session.loaded.mesh)
        data = preparing.prepare(cfg, corpus, session.data.questions)
        every_batch = [preparing.batches(stage, cfg, data, number) for number, stage in enumerate(cfg.stages)]
        loaded, searchers = live.updated(session.loaded, corpus), Searchers(cfg.search, corpus, session.loaded.mesh)
        refresher, index = make_refresher(cfg, loaded, searchers), upkeep.index
        if index is not None:
            index = live.followed(index, loaded, old, searchers, refresher.encoder(params), step)
    except InputError as error:
        logs.info(f"{corpus.directory} ({corpus.hash[:16]}): {error}; {old.directory} ({old.hash[:16]}) stays in use")
        return session
    upkeep.move(*way_of(cfg, loaded, data, number), refresher, index)
    same = loaded.n_rows == session.loaded.n_rows
    logs.info(
        f"step {step}: the corpus is now {corpus.directory} ({corpus.hash[:16]}): {corpus.n_live} passages, "
        f"{len(corpus) - len(old)} new rows{'' if same else ', larger tables'}"
    )
    return session._replace(
        data=data,
        loaded=loaded,
        searchers=searchers,
        refresher=refresher,
        batches=every_batch,
        program=session.program if same else make_answer(loaded, session.answering),
    )


def run_stage(
    session: Session, number: int, start: int, state: TrainState, upkeep: Upkeep, seconds: float
) -> tuple[Session, TrainState, float]:
    """The steps of one stage that are still to do; returns the session, which changes with the version of the corpus,
    the state, and the training seconds of the run so far.
    """
    cfg = session.cfg
    stage = cfg.stages[number]
    begun = time.perf_counter()
    first, end = int(state.step), start + stage.steps
    step_fn: Any = None
    iterator = pipeline.iterate(session.batches[number], first - start)
    key = jax.random.key(cfg.seed)
    interval = Interval()
    with Progress(
        stage.steps, f"{stage.name} {number + 1}/{len(cfg.stages)}", "step", initial=first - start
    ) as progress:
        for step in range(first, end):
            into = step - start
            before = time.perf_counter()
            drawn = next(iterator)
            waited = time.perf_counter() - before
            interval.measured |= upkeep.before(state.params, into, step, drawn)
            before = time.perf_counter()
            fed = upkeep.feed(state.params, drawn)
            interval.host_seconds += waited + time.perf_counter() - before
            compiles = step_fn is None
            step_fn = step_fn or jit_step(upkeep.setting, start, state, fed.table)
            state, changed, metrics = step_fn(state, *fed, key)
            upkeep.after(changed)
            interval.rows.append(metrics)
            jax.block_until_ready(interval.rows[max(-2, -len(interval.rows))])  # at most two steps under way
            if compiles:  # compilation is not step time
                logs.info(
                    f"{stage.name}: first step after {time.perf_counter() - before:.1f} s of compiling and running"
                )
                interval.restart_clock()
            progress.update(1, loss=metrics["loss"])
            logged = (into + 1) % cfg.log_every == 0 or step + 1 == end
            if step + 1 == end:
                upkeep.refresher.drop()
            if logged:
                row = {"stage": stage.name, **interval.summary(), **upkeep.age(step)}
                moved = follow(session, number, upkeep, state.params, step + 1)
                if moved is not session:
                    row |= {"corpus": moved.data.corpus.hash, "n_passages": moved.data.corpus.n_live}
                    iterator = pipeline.iterate(moved.batches[number], into + 1)
                    step_fn = step_fn if moved.loaded.n_rows == session.loaded.n_rows else None
                    session = moved
                if cfg.evaluate_every and ((into + 1) % cfg.evaluate_every == 0 or step + 1 == end):
                    row |= evaluate_dev(session, state.params, upkeep.index, step)
                session.writer.write(step + 1, row)
            if (into + 1) % cfg.checkpoint_every == 0 or step + 1 == end:
                save(session, state, upkeep, seconds + time.perf_counter() - begun)
            if logged:
                interval = Interval()
    return session, state, seconds + time.perf_counter() - begun


def evaluate_dev(session: Session, params: Any, index: Any, step: int) -> dict[str, float]:
    """Exact match and recall on the first `evaluate_questions` of the dev questions, as eval/... metrics."""
    index = session.refresher.full(params, step) if index is None else index
    summary = metrics.summarize(
        evaluate.predict(session.loaded, params, index, session.dev, session.answering, session.program)
    )
    return {f"eval/{name}": value for name, value in summary.items() if name != "n"}


def train(cfg: TrainConfig, directory: Path) -> dict[str, Any]:
    """Run every stage, going on from the run's last checkpoint if it has one; writes params/ and index/ at the end."""
    corpus, mesh = preparing.opened(cfg, directory), sharding.make_mesh(cfg.mesh or None)
    preparing.check(cfg, corpus, mesh)
    data = preparing.prepare(cfg, corpus)
    every_batch = [preparing.batches(stage, cfg, data, number) for number, stage in enumerate(cfg.stages)]
    dev = formats.read_questions(cfg.dev)[: cfg.evaluate_questions] if cfg.evaluate_every else []
    if cfg.init and not (directory / "config.json").exists():
        runs.check_init(Path(cfg.init), cfg.model, corpus, mesh)
    preparing.open_run(cfg, directory, data)
    keeper = checkpoint.Checkpoints(directory / "checkpoints", cfg.keep_checkpoints)
    done, total = keeper.latest() or 0, sum(stage.steps for stage in cfg.stages)
    if done == total and finished(directory, total):
        logs.info(f"{directory}: all {total} steps are done")
        seconds = keeper.position(done)["seconds"]
        keeper.close()
        return result(directory, total, seconds)
    loaded = runs.load(cfg.model, corpus, mesh, cfg.search.kind == "exact", cfg.live)
    answering = AnswerConfig(
        n_docs=cfg.model.n_docs,
        n_retrieved=20,
        max_length=cfg.target_length,
        batch=64,
        retrieval_only=cfg.model.generator is None,
    )
    searchers = Searchers(cfg.search, corpus, mesh, None if cfg.live else directory / "search")
    session = Session(
        cfg=cfg,
        directory=directory,
        data=data,
        loaded=loaded,
        searchers=searchers,
        refresher=make_refresher(cfg, loaded, searchers),
        keeper=keeper,
        writer=MetricWriter(directory, resume_step=done),
        batches=every_batch,
        dev=dev,
        answering=answering,
        program=make_answer(loaded, answering),
        versions=live.Versions(cfg.corpus) if cfg.live else None,
        index_hash=begun_with(cfg, keeper, done),
    )
    params = init_params(loaded, cfg.seed, cfg.init if not done else "")
    given = given_index(session, params) if cfg.index and not done else None
    seconds, start = 0.0, 0
    for number, stage in enumerate(cfg.stages):
        end = start + stage.steps
        if done <= end:
            if start < done:
                state, upkeep, seconds = restore(session, number, params, done)
            else:
                state = init_state(session.loaded, stage, params, start)
                upkeep = session.upkeep(number, given if start == 0 else None)
            if done < end:
                session, state, seconds = run_stage(session, number, start, state, upkeep, seconds)
            params = state.params
        start = end
    session.writer.close()
    checkpoint.save_params(directory / "params", params.items())
    logs.info("embedding the corpus for the run's index")
    runs.write_index(session.loaded, params, total, directory / "index", overwrite=True)
    keeper.close()
    return result(directory, total, seconds)


def finished(directory: Path, total: int) -> bool:
    """Whether everything that a run writes at its end is there."""
    try:
        checkpoint.check_params(directory / "params")
        return snapshots.open_snapshot(directory / "index").manifest.step == total
    except InputError:
        return False


def result(directory: Path, total: int, seconds: float) -> dict[str, Any]:
    last = logs.read_rows(directory / logs.METRICS_FILE)[-1]
    return {"run": str(directory), "steps": total, "training_seconds": round(seconds, 1), "last": last}


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


def blank_index(session: Session, n: int) -> Index:
    """An index of zeros, in the shapes and places of one that the run makes of n passages."""
    loaded = session.loaded
    width = loaded.rag.config.encoder.output_width
    if loaded.passages is None:
        arrays: Any = np.zeros((n, width), np.float32), np.zeros(n, np.int32)
        return Index(*arrays)
    return refresh.blank(loaded.mesh, loaded.table_rows(n), width, session.cfg.search.dtype)


def whole_index(session: Session, arrays: dict[str, Any], n: int, encoder: Any, step: int) -> Index | HostIndex:
    """The index whose arrays a checkpoint kept for n passages; rows that came since are embedded as in `follow`."""
    loaded, searchers = session.loaded, session.searchers
    if loaded.passages is not None:
        index = Index(**arrays, live_N=runs.live_on_device(loaded))
        return live.longer_index(index, loaded, n, encoder, step) if n < len(loaded.corpus) else index
    embeddings_NE, step_N = (np.asarray(arrays[name]) for name in ("embeddings_NE", "step_N"))
    if n < len(loaded.corpus):
        embeddings_NE, step_N = live.longer_rows(embeddings_NE, step_N, loaded, encoder, step)
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
    drift_E = refresh.no_drift(loaded.mesh, index.embeddings_NE.shape[1])
    return index._replace(step_N=jnp.zeros_like(index.step_N), drift_E=drift_E)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:ARGUMENT")
    parser.add_argument(
        "--run", required=True, type=Path, help="run directory; an unfinished run in it is gone on with"
    )
    parser.add_argument("--stage", action="append", default=[], help="train only this stage (may be repeated)")
    parser.add_argument(
        "--init", type=Path, help="start from the parameters of this run directory or converted checkpoint"
    )
    parser.add_argument("--refresh", metavar="WHEN", help="in all stages that search: 250, rolling:500, ... (README)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the configuration"
    )
    parser.epilog = (
        "example: rag-jax train --config configs/world.py --run runs/world --set stages.joint.steps=400\n"
        "Killed and started again with the same words, it goes on where it was."
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    start = [f"init={json.dumps(str(args.init))}"] if args.init else []
    cfg = config.load(args.config, [*args.set, *start])
    if args.stage:
        known = [stage.name for stage in cfg.stages]
        missing = [name for name in args.stage if name not in known]
        if missing:
            raise InputError(f"--stage {missing[0]}: no such stage; {args.config} has {', '.join(known)}")
        cfg = dataclasses.replace(cfg, stages=tuple(stage for stage in cfg.stages if stage.name in args.stage))
    if args.refresh is not None:
        stages = [dataclasses.replace(s, refresh=args.refresh) if config.searches(s) else s for s in cfg.stages]
        cfg = dataclasses.replace(cfg, stages=tuple(stages))
    return train(cfg, args.run)
