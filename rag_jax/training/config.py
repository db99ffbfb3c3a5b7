"""The configuration of a training run, how it is read from files, and the checks that refuse contradictory values."""

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
    """Configuration of a whole training run; the fields of RunConfig, and these.

    train: file of training questions, or a weighted mixture of files, "0.7*A + 0.3*B"; "" if no stage has questions.
    stages: trained one after another; their names must differ.
    init: run directory or converted checkpoint to take parameters from, "" for random ones; fields of `model` and
      `answering` that the configuration does not set are then taken from there, too.
    index: index of the initial parameters, made by `rag-jax index`, "" to embed the corpus at the start.
    drift_sample: passages on which the overlap of the stored index with fresh embeddings is measured.
    answers: for a question with several answers, train on the `first`, on one drawn in each epoch (`sample`), or on
      `every` one as a pair of its own.
    seed: of initialisation, data order and dropout.
    log_every: updates between two rows of metrics. (Each stage ends with a row, and with a checkpoint.)
    checkpoint_every: updates between two checkpoints, a multiple of log_every.
    keep_checkpoints: number of newest checkpoints that are kept.
    keep_best: number of checkpoints kept besides those, by largest `best_metric`; above 0, every evaluation saves one.
    best_metric: name of a metric of the evaluation, with eval/ before it.
    evaluate_every: updates between two evaluations on `dev`, a multiple of log_every; 0: never.
    evaluate_questions: questions of `dev` in each evaluation, its first ones.
    stop_on_nonfinite: end the run when a loss, gradient or parameter is not finite, before anything is saved of it.

    With `live`, training looks at every log line whether the path `corpus` leads to an update of the corpus in use, and
    continues with that. Vocabulary sizes of 0 in `model` become those of the corpus' tokenizers.
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
        """Builds the configuration from nested values; each stage is built with the options of its objective."""
        stages = values.get("stages")
        if isinstance(stages, tuple | list):
            built = (stage_from(stage, f"{where}.stages[{i}]", objectives) for i, stage in enumerate(stages))
            values = {**values, "stages": tuple(built)}
        return build_fields(cls, values, where)


def stage_from(values: Any, where: str, objectives: Objectives = OBJECTIVES) -> StageConfig:
    """A stage from one flat mapping that holds its own fields and the options of its objective.

    InputError for an unknown key, and for an option of another objective, unless its value is that objective's default.
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
    """A stage from keywords: fields of StageConfig, `objective` by name, and the options of that objective."""
    return stage_from({"name": name, **values}, f"stage {name}")


def check(cfg: TrainConfig, retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES) -> None:
    """InputError for values of a run that contradict each other or would fail only after training has begun."""
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
    metrics.Judging(match=cfg.task.match)
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
    """InputError for values of one stage that contradict each other or would fail only when it begins."""
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
    try:
        optimizer.schedule(stage.optimizer, stage.steps)
        optimizer.check(stage.optimizer)
    except InputError as error:
        raise InputError(f"{where}optimizer: {error}") from error
    trained, may = trained_groups(stage), stage.objective.groups
    if not trained or trained - may:
        raise InputError(
            f"{where}optimizer.groups trains {', '.join(sorted(trained)) or 'nothing'}; with {stage.objective.said} it "
            f"may name {', '.join(sorted(may))}"
        )


def check_generator(cfg: TrainConfig, stage: StageConfig, where: str) -> None:
    """InputError where a stage trains the generator and the model has none."""
    if "generator" in stage.objective.groups and cfg.model.generator is None:
        raise InputError(f"{where}objective={stage.objective.kind!r} needs a generator, and model.generator is None")


# Field of StageConfig -> (whether a stage with this objective reads it, those stages in words). Every stage reads the
# fields that are not here.
READ_BY: dict[str, tuple[Callable[[Objective], bool], str]] = {
    "refresh": (lambda o: o.searches, "stages that search: documents='retrieved', or hard_negatives"),
    "drift_every": (lambda o: o.searches, "stages that search: documents='retrieved', or hard_negatives"),
    "write_back": (lambda o: o.embeds_fresh, "objective='rag' with documents='retrieved'"),
    "questions": (lambda o: o.asks, "objectives that have questions"),
    "buckets": (lambda o: o.asks, "objectives that have questions"),
    "target_buckets": (lambda o: o.has_targets, "objective='rag'"),
}


def check_unread(stage: StageConfig, where: str) -> None:
    """InputError for a field or option that differs from its default although this stage never reads it."""
    unread = {name: words for name, (reads, words) in READ_BY.items() if not reads(stage.objective)}
    unread |= stage.objective.unread()
    for name, value in {**changed(stage), **changed(stage.objective)}.items():
        if name in unread:
            raise InputError(f"{where}{name}={value!r} is only for {unread[name]}")


def trained_groups(stage: StageConfig) -> set[str]:
    """The parameter groups that a stage updates."""
    return {group for group in stage.optimizer.groups if not optimizer.is_frozen(stage.optimizer, group)}


def check_refresh(cfg: TrainConfig, stage: StageConfig, where: str) -> None:
    """InputError for refresh and write_back that cannot be parsed, change nothing, or need another search."""
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
    """InputError for bucket widths, in tokens, that are not strictly ascending numbers from 1 to below `longest`."""
    if list(widths) != sorted({width for width in widths if 0 < width < longest}):
        said = ", ".join(map(str, widths))
        raise InputError(f"{name}={said} must be ascending numbers from 1 to below {of}={longest}")


def load(path: str, assignments: Sequence[str] = ()) -> TrainConfig:
    """Reads a configuration file, with `key=value` overrides; see `from_plain` for what comes from `init`."""
    return from_plain(evaluated(path, assignments))


def from_plain(values: dict[str, Any]) -> TrainConfig:
    """TrainConfig from nested values; what `model` and `answering` do not set is taken from the run `init`."""
    start = Path(str(values.get("init") or "")) / "config.json"
    if values.get("init") and start.is_file():
        first = run_config.read(start)
        values["model"] = merge(plain(first.model), values.get("model") or {})
        values["answering"] = merge(first.answering, values.get("answering") or {})
    return build(TrainConfig, values)


def read_run(run_dir: Path, objectives: Objectives = MappingProxyType({})) -> TrainConfig:
    """The configuration that a run was trained with; InputError where its file was altered after it was written.

    objectives: known besides those of OBJECTIVES, by name.
    """
    runs.check_written(run_dir)
    return read(run_dir / runs.CONFIG, objectives)


def read(path: Path, objectives: Objectives = MappingProxyType({})) -> TrainConfig:
    """TrainConfig from a run's config.json; InputError where it cannot be read. objectives: as in `read_run`."""
    return TrainConfig.from_values(renewed(run_config.stored(path)), str(path), {**OBJECTIVES, **objectives})


def renewed(values: dict[str, Any]) -> dict[str, Any]:
    """Stored values with n_docs=0 in stages that do not retrieve and were written when its default was 5."""
    stages = values.get("stages")
    if isinstance(stages, list):  # that default stood in every stage, also in those that do not read n_docs
        return {**values, "stages": [s | {"n_docs": 0} if _unread(s) else s for s in stages]}
    return values


def _unread(stage: Any) -> bool:
    """Whether a stored stage has n_docs=5, the former default, but retrieves nothing."""
    if not isinstance(stage, dict) or stage.get("n_docs") != 5:
        return False
    return (stage.get("objective"), stage.get("documents")) != ("rag", "retrieved")
