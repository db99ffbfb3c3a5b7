"""How a run is trained: its stages, and what may not stand together in a configuration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rag_jax import metrics
from rag_jax.data import tasks
from rag_jax.data.readers import sources
from rag_jax.errors import InputError
from rag_jax.index import refresh_schedule
from rag_jax.inference.config import AnswerConfig
from rag_jax.losses import RETRIEVER_LOSSES, RetrieverLoss
from rag_jax.retrieval.config import check_search_config
from rag_jax.runs import config as run_config
from rag_jax.runs import directory as runs
from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import at_least, build, build_fields, changed, evaluated, merge, plain
from rag_jax.training import optimizer
from rag_jax.training.objectives import OBJECTIVES
from rag_jax.training.objectives.rag import MarginalLikelihood
from rag_jax.training.stage import Objective, StageConfig

Objectives = Mapping[str, type[Objective]]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A whole run: data, model and stages. Vocabulary sizes of the model are those of the corpus' tokenizers.

    train: an input with questions, or several with how often they come: "0.7*A + 0.3*B"; "" where no stage has
    questions. answers: of a question that has several, its first one, one drawn in each epoch (`sample`), or a pair of
    its own for every one (`every`).
    init: a run directory, or a converted checkpoint, whose parameters are the start, "" for new ones; what `model` and
    `answering` leave open is then as there. index: an index of the first parameters, made by rag-jax index, "" to embed
    at the start. drift_sample: passages that the drift of the index is measured on. live: at every log line, training
    looks whether `corpus` leads to an update of the one in use, and goes on with that. keep_best: besides the newest
    `keep_checkpoints`, that many stay whose evaluation had the largest `best_metric`; each evaluation has a checkpoint.
    stop_on_nonfinite: the run ends at the first loss or gradient that is not finite, with nothing written of it.
    """

    train: str
    stages: tuple[StageConfig, ...]
    init: str = ""
    index: str = ""
    drift_sample: int = 1024
    answers: Literal["first", "sample", "every"] = "first"
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_best: int = 0
    best_metric: str = "eval/exact_match"
    evaluate_every: int = 0
    evaluate_questions: int = 200
    stop_on_nonfinite: bool = True

    def __post_init__(self) -> None:
        build(AnswerConfig, self.answering, "config.answering")
        resolved = (replace(stage, objective=stage.objective.resolved(self)) for stage in self.stages)
        object.__setattr__(self, "stages", tuple(resolved))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str, objectives: Objectives = OBJECTIVES) -> "TrainConfig":
        """From nested values; a stage is built with the options of its objective."""
        stages = values.get("stages")
        if isinstance(stages, tuple | list):
            built = (stage_from(stage, f"{where}.stages[{i}]", objectives) for i, stage in enumerate(stages))
            values = {**values, "stages": tuple(built)}
        return build_fields(cls, values, where)


def stage_from(values: Any, where: str, objectives: Objectives = OBJECTIVES) -> StageConfig:
    """A stage from its values, those of its objective among them; InputError for unknown ones and for those of another
    objective, unless they are what that has by default.
    """
    if isinstance(values, StageConfig):
        return values
    if not isinstance(values, Mapping):
        names = ", ".join(f.name for f in fields(StageConfig))
        raise InputError(f"{where}: expected keys and values ({names}), got {values!r}")
    kind = values.get("objective", MarginalLikelihood.kind)
    if not isinstance(kind, str) or kind not in objectives:
        raise InputError(f"{where}.objective: {kind!r} is not one of {', '.join(map(repr, objectives))}")
    options = {f.name for f in fields(objectives[kind])}
    common = {f.name for f in fields(StageConfig)}
    for name in sorted(set(values) - options - common):
        others = [other for other in objectives.values() if name in {f.name for f in fields(other)}]
        if not others:
            known = ", ".join(sorted(common | options))
            raise InputError(f"{where}: unknown key {name!r}; known keys: {known}")
        built = [build(other, {name: values[name]}, where) for other in others]
        if name in changed(built[0]):
            words = dict.fromkeys(other.READ_BY.get(name, f"objective={other.kind!r}") for other in others)
            said = f"stage {values.get('name', '')}: {name}={values[name]!r}"
            raise InputError(f"{said} is only for {' or '.join(words)}; it has objective={kind!r}")
    objective = build(objectives[kind], {name: value for name, value in values.items() if name in options}, where)
    mine = {name: value for name, value in values.items() if name in common}
    return build_fields(StageConfig, {**mine, "objective": objective}, where)


def make_stage(name: str, **values: Any) -> StageConfig:
    """A stage by its fields and the options of its objective, as a configuration has them."""
    return stage_from({"name": name, **values}, f"stage {name}")


def check(cfg: TrainConfig, retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES) -> None:
    """InputError for values that contradict each other or would fail late."""
    if not cfg.stages or len({stage.name for stage in cfg.stages}) < len(cfg.stages):
        raise InputError(f"stages need different names: {', '.join(s.name for s in cfg.stages) or 'there are none'}")
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "evaluate_questions"):
        at_least(1, name, getattr(cfg, name))
    for name in ("checkpoint_every", "evaluate_every"):
        if getattr(cfg, name) % cfg.log_every:
            raise InputError(f"{name}={getattr(cfg, name)} must be a multiple of log_every={cfg.log_every}")
    at_least(0, "keep_best", cfg.keep_best)
    if cfg.keep_best and not cfg.evaluate_every:
        raise InputError(f"keep_best={cfg.keep_best} needs evaluate_every: {cfg.best_metric} is measured there")
    at_least(3, "target_length", cfg.target_length)
    tasks.check(cfg.task)
    metrics.Setting(match=cfg.task.match)
    if not cfg.train and (asking := [stage.name for stage in cfg.stages if stage.objective.asks]):
        raise InputError(f"train='' names no questions, which stage {asking[0]} needs: --set train=FILE")
    sources.weighted(cfg.train)
    prefix = len(cfg.model.query_prefix_ids)
    limits = [("model.question_length", cfg.model.question_length + prefix, cfg.model.encoder.positions)]
    if cfg.model.generator is not None:
        limits.append(("target_length", cfg.target_length, cfg.model.generator.positions))
        limits.append(("model.source_length", cfg.model.source_length, cfg.model.generator.positions))
    for name, length, positions in limits:
        if length > positions:
            raise InputError(f"{name}={length} is more than the {positions} positions of the model")
    check_search_config(cfg.search)
    for stage in cfg.stages:
        check_stage(cfg, stage, retriever_losses)


def check_stage(cfg: TrainConfig, stage: StageConfig, retriever_losses: Mapping[str, RetrieverLoss]) -> None:
    """The same for one stage."""
    where = f"stage {stage.name}: "
    for name in ("steps", "batch", "accumulate"):
        at_least(1, where + name, getattr(stage, name))
    for name in ("drift_every", "questions"):
        at_least(0, where + name, getattr(stage, name))
    check_unread(stage, where)
    for name in stage.objective.loss_names():
        if name not in retriever_losses:
            known = ", ".join(map(repr, retriever_losses))
            raise InputError(f"{where}retriever_losses: {name!r} is not one of {known}")
    if stage.batch % stage.accumulate:
        raise InputError(f"{where}batch={stage.batch} is not a multiple of accumulate={stage.accumulate}")
    check_widths(f"{where}buckets", stage.buckets, cfg.model.question_length, "model.question_length")
    check_widths(f"{where}target_buckets", stage.target_buckets, cfg.target_length, "target_length")
    check_refresh(cfg, stage, where)
    check_generator(cfg, stage, where)
    stage.objective.check(stage, cfg, where)
    optimizer.schedule(stage.optimizer, stage.steps)
    optimizer.check(stage.optimizer)
    trained, may = trained_groups(stage), stage.objective.groups
    if not trained or trained - may:
        raise InputError(
            f"{where}optimizer.groups trains {', '.join(sorted(trained)) or 'nothing'}; with {stage.objective.said} it "
            f"may name {', '.join(sorted(may))}"
        )


def check_generator(cfg: TrainConfig, stage: StageConfig, where: str) -> None:
    """What a stage that trains the generator needs of it."""
    if "generator" in stage.objective.groups and cfg.model.generator is None:
        raise InputError(f"{where}objective={stage.objective.kind!r} needs a generator, and model.generator is None")


# Which stages read a field of StageConfig, and in words; every stage reads those that are not here.
READ_BY: dict[str, tuple[Callable[[Objective], bool], str]] = {
    "refresh": (lambda o: o.searches, "stages that search: documents='retrieved', or hard_negatives"),
    "drift_every": (lambda o: o.searches, "stages that search: documents='retrieved', or hard_negatives"),
    "write_back": (lambda o: o.embeds_fresh, "objective='rag' with documents='retrieved'"),
    "questions": (lambda o: o.asks, "objectives that have questions"),
    "buckets": (lambda o: o.asks, "objectives that have questions"),
    "target_buckets": (lambda o: o.has_targets, "objective='rag'"),
}


def check_unread(stage: StageConfig, where: str) -> None:
    """InputError for what is set, and what nothing of this stage would read."""
    unread = {name: words for name, (reads, words) in READ_BY.items() if not reads(stage.objective)}
    unread |= stage.objective.unread()
    for name, value in {**changed(stage), **changed(stage.objective)}.items():
        if name in unread:
            raise InputError(f"{where}{name}={value!r} is only for {unread[name]}")


def trained_groups(stage: StageConfig) -> set[str]:
    """The parameter groups that a stage updates."""
    return {group for group in stage.optimizer.groups if not optimizer.is_frozen(stage.optimizer, group)}


def check_refresh(cfg: TrainConfig, stage: StageConfig, where: str) -> None:
    """What belongs to keeping the index fresh."""
    try:
        when = refresh_schedule.parse(stage.refresh)
    except InputError as error:
        raise InputError(f"{where}{error}") from error
    side = cfg.model.passage_side
    if stage.refresh and side not in trained_groups(stage):
        raise InputError(f"{where}refresh={stage.refresh!r}, but the stage does not train {side}: nothing would change")
    exact = side in trained_groups(stage) and not (cfg.model.encoder.dropout or cfg.model.encoder.weights_dropout)
    if stage.write_back and not exact and not stage.objective.embeds_exactly:
        raise InputError(
            f"{where}write_back=True has nothing exact to write: the stage has to train {side} with "
            "model.encoder.dropout=0 (and attention_dropout), or to set n_retrieved"
        )
    if not cfg.search.in_graph:
        for name, value in (
            ("write_back", stage.write_back),
            ("refresh", stage.refresh if when.kind == "rolling" else ""),
        ):
            if value:
                raise InputError(f"{where}{name}={value!r} needs the index in graph: search.kind='exact'")


def check_widths(name: str, widths: tuple[int, ...], longest: int, of: str) -> None:
    """InputError for widths of buckets that are not ascending, from 1 to below `longest`."""
    if list(widths) != sorted({width for width in widths if 0 < width < longest}):
        said = ", ".join(map(str, widths))
        raise InputError(f"{name}={said} must be ascending numbers from 1 to below {of}={longest}")


def load(path: str, assignments: Sequence[str] = ()) -> TrainConfig:
    """The TrainConfig of a configuration file, with `key=value` overrides; `model` and `answering` are filled up from
    `init`.
    """
    return from_plain(evaluated(path, assignments))


def from_plain(values: dict[str, Any]) -> TrainConfig:
    """The TrainConfig of nested values, filled up from `init`."""
    start = Path(str(values.get("init") or "")) / "config.json"
    if values.get("init") and start.is_file():
        first = run_config.read(start)
        values["model"] = merge(plain(first.model), values.get("model") or {})
        values["answering"] = merge(first.answering, values.get("answering") or {})
    return build(TrainConfig, values)


def read_run(run_dir: Path, objectives: Objectives = MappingProxyType({})) -> TrainConfig:
    """The configuration that a run was trained with; InputError where it is not the one that was written. objectives:
    that it may have besides ours.
    """
    runs.check_written(run_dir)
    return read(run_dir / runs.CONFIG, objectives)


def read(path: Path, objectives: Objectives = MappingProxyType({})) -> TrainConfig:
    """The configuration in a config.json of a run."""
    return TrainConfig.from_values(renewed(run_config.stored(path)), str(path), {**OBJECTIVES, **objectives})


def renewed(values: dict[str, Any]) -> dict[str, Any]:
    """The stages of a run that an earlier version wrote, with the values of now."""
    stages = values.get("stages")
    if isinstance(stages, list):  # n_docs was 5 where a stage did not say it, also in stages that read nothing of it
        return {**values, "stages": [s | {"n_docs": 0} if _unread(s) else s for s in stages]}
    return values


def _unread(stage: Any) -> bool:
    """Whether a stage, as it is stored, has the n_docs of no retrieval."""
    if not isinstance(stage, dict) or stage.get("n_docs") != 5:
        return False
    return (stage.get("objective"), stage.get("documents")) != ("rag", "retrieved")
