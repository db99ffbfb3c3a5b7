"""Configuration at the edge: `configs/*.py:get_config(arg)` (ml_collections) -> frozen dataclasses, where a typo
raises.
"""

import dataclasses
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_collections

from rag_jax import metrics
from rag_jax.data import tasks
from rag_jax.data.readers import sources
from rag_jax.data.tasks import TaskConfig
from rag_jax.errors import InputError
from rag_jax.index import refresh_schedule
from rag_jax.inference.config import AnswerConfig
from rag_jax.models.decoder_only import LmConfig, check_window
from rag_jax.rag import RagConfig
from rag_jax.retrieval.bm25 import Bm25Config
from rag_jax.retrieval.scann_index import AnnConfig
from rag_jax.retrieval.search import Fusion
from rag_jax.training import optimizer
from rag_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    objective: `contrastive` (in-batch, gold passages), `inverse_cloze` (the same with sentences of the corpus as
    questions, see retrieval/inverse_cloze.py), `denoise` (masked spans of the corpus) or `rag` (the model's marginal
    likelihood). documents: `retrieved` searches the index, `gold` reads the first gold passage alone, `none` nothing
    but the question. n_docs: so many are read, 0 for as many as model.n_docs says. hard_negatives: in the contrastive
    loss, that many passages a question are negatives too: of those found for it (negatives=`retrieved`), or drawn from
    its hard_negative_passage_ids (`given`, as in DPR). window: with gold documents, only that many tokens of the
    passage around the answer, 0 for the whole. refresh: when the index is made anew, see schedule.py ("" for only at
    the stage's start). n_retrieved: that many are found, embedded as they are now, and the n_docs best of them read; 0:
    the n_docs found. write_back: what a step embeds anyway goes into the index. drift_every: steps between measurements
    of how far the index has drifted, 0 for none.
    normaliser: p(z|x) is over what was retrieved, or over the whole corpus. prior_gradient=False stops the gradient
    to the retriever. questions: train on this many of the questions of each input only, 0 for all.

    buckets, target_buckets: widths in tokens, ascending. A batch has questions (targets) of one bucket alone and is as
    wide as that; what is longer than the last one is as wide as model.question_length (target_length).

    accumulate: the batch goes through the model in so many parts, one after another; the update is the same (but that
    normaliser=`corpus` with a context encoder that trains measures in each part how far passages have moved).
    doc_chunk: so many of the n_docs are read at a time, 0 for all. logit_chunk: so much of the vocabulary has logits at
    a time, and the gradient makes them anew; 0: all of them are made once and kept, 4 bytes each of batch * n_docs *
    target length * vocabulary, for a quarter less work in the output layer.
    """

    name: str
    objective: Literal["contrastive", "inverse_cloze", "denoise", "rag"] = "rag"
    documents: Literal["retrieved", "gold", "none"] = "retrieved"
    steps: int = 1000
    batch: int = 16
    n_docs: int = 0  # 0: the model's
    hard_negatives: int = 0
    negatives: Literal["retrieved", "given"] = "retrieved"
    source_length: int = 0  # 0: the model's
    window: int = 0
    refresh: str = ""
    n_retrieved: int = 0
    write_back: bool = False
    drift_every: int = 0
    normaliser: Literal["retrieved", "corpus"] = "retrieved"
    label_smoothing: float = 0.0
    hf_compat: bool = False
    prior_gradient: bool = True
    questions: int = 0
    buckets: tuple[int, ...] = ()
    target_buckets: tuple[int, ...] = ()
    accumulate: int = 1
    doc_chunk: int = 0
    logit_chunk: int = 2048
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class SearchConfig:
    """How passages are searched. `exact`: on the devices, inside the step; the others on the host, between steps.

    dtype: of the index on the devices. recall_target: below 1, the search may miss that share where this is faster
    (TPU). scann, bm25: how those are built. fusion: how `hybrid` makes one ranking of BM25's and that of the `dense`
    search.
    """

    kind: Literal["exact", "scann", "bm25", "hybrid"] = "exact"
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    recall_target: float = 1.0
    dense: Literal["exact", "scann"] = "exact"
    scann: AnnConfig = field(default_factory=AnnConfig)
    bm25: Bm25Config = field(default_factory=Bm25Config)
    fusion: Fusion = field(default_factory=Fusion)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: data, model and stages. Vocabulary sizes of the model are those of the corpus' tokenizers.

    train: an input with questions, or several with how often they come: "0.7*A + 0.3*B"; "" where no stage has
    questions. answers: of a question that has several, its first one, one drawn in each epoch (`sample`), or a pair of
    its own for every one (`every`). task: what is read and written. answering: how the run answers by default, in
    evaluations and when it is asked: fields of AnswerConfig over those that follow from the model.
    init: a run directory, or a converted checkpoint, whose parameters are the start, "" for new ones; what `model` and
    `answering` leave open is then as there. index: an index of the first parameters, made by rag-jax index, "" to embed
    at the start. drift_sample: passages that the drift of the index is measured on. live: at every log line, training
    looks whether `corpus` leads to an update of the one in use, and goes on with that. keep_best: besides the newest
    `keep_checkpoints`, that many stay whose evaluation had the largest `best_metric`; each evaluation has a checkpoint.
    stop_on_nonfinite: the run ends at the first loss or gradient that is not finite, with nothing written of it.
    """

    corpus: str
    train: str
    dev: str
    stages: tuple[StageConfig, ...]
    model: RagConfig = field(default_factory=RagConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    answering: Mapping[str, object] = field(default_factory=dict)
    init: str = ""
    index: str = ""
    search: SearchConfig = field(default_factory=SearchConfig)
    drift_sample: int = 1024
    live: bool = False
    mesh: Mapping[str, int] = field(default_factory=dict)
    target_length: int = 32
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
        object.__setattr__(self, "stages", tuple(self._with_n_docs(stage) for stage in self.stages))

    def _with_n_docs(self, stage: StageConfig) -> StageConfig:
        """The stage, with the n_docs of the model where it reads what is retrieved and names no number of its own."""
        return stage if stage.n_docs or not retrieves(stage) else dataclasses.replace(stage, n_docs=self.model.n_docs)


def answering(cfg: TrainConfig, **defaults: object) -> AnswerConfig:
    """How a run answers by default: what its configuration says, over `defaults`, over what its model is made for."""
    made_for = {"n_docs": cfg.model.n_docs, "max_length": cfg.target_length}
    return build(AnswerConfig, {**made_for, **defaults, **cfg.answering}, "config.answering")


def searches(stage: StageConfig) -> bool:
    """Whether the stage's step searches the index."""
    if stage.objective == "contrastive":
        return stage.hard_negatives > 0 and stage.negatives == "retrieved"
    return stage.objective == "rag" and stage.documents == "retrieved"


def contrasts(stage: StageConfig) -> bool:
    """Whether the stage trains the encoders on pairs of question and passage."""
    return stage.objective in ("contrastive", "inverse_cloze")


def asks(stage: StageConfig) -> bool:
    """Whether the stage has questions; the others are made of the corpus alone."""
    return stage.objective in ("contrastive", "rag")


def reached(stage: StageConfig) -> set[str]:
    """Parameter groups that the loss of the stage depends on."""
    if contrasts(stage):
        return {"question_encoder", "context_encoder"}
    if stage.objective == "denoise" or stage.documents != "retrieved":
        return {"generator"}
    return set(optimizer.GROUPS)


def check(cfg: TrainConfig) -> None:
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
    if not cfg.train and (asking := [stage.name for stage in cfg.stages if asks(stage)]):
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
        check_stage(cfg, stage)


def check_stage(cfg: TrainConfig, stage: StageConfig) -> None:
    """The same for one stage."""
    where = f"stage {stage.name}: "
    for name in ("steps", "batch", "accumulate", *(("n_docs",) if retrieves(stage) else ())):
        at_least(1, where + name, getattr(stage, name))
    for name in (
        "hard_negatives", "window", "n_retrieved", "drift_every", "questions", "source_length", "doc_chunk",
        "logit_chunk",
    ):  # fmt: skip
        at_least(0, where + name, getattr(stage, name))
    check_unread(stage, where)
    if stage.batch % stage.accumulate:
        raise InputError(f"{where}batch={stage.batch} is not a multiple of accumulate={stage.accumulate}")
    if stage.doc_chunk and stage.n_docs % stage.doc_chunk:
        raise InputError(f"{where}n_docs={stage.n_docs} is not a multiple of doc_chunk={stage.doc_chunk}")
    if stage.negatives == "given" and not stage.hard_negatives:
        raise InputError(f"{where}negatives='given' needs hard_negatives: how many a question")
    check_widths(f"{where}buckets", stage.buckets, cfg.model.question_length, "model.question_length")
    check_widths(f"{where}target_buckets", stage.target_buckets, cfg.target_length, "target_length")
    check_search(cfg, stage, where)
    length = stage.source_length or cfg.model.source_length
    if cfg.model.generator is None and not contrasts(stage):
        raise InputError(f"{where}objective={stage.objective!r} needs a generator, and model.generator is None")
    if cfg.model.generator is not None and length > cfg.model.generator.positions:
        raise InputError(f"{where}source_length={length} is more than the {cfg.model.generator.positions} positions")
    if isinstance(cfg.model.generator, LmConfig):
        try:
            check_window(length + cfg.target_length, cfg.model.generator)
        except ValueError as error:
            raise InputError(f"{where}{error}") from error
    if stage.objective == "rag" and stage.window + cfg.model.tail_length >= length:
        raise InputError(
            f"{where}source_length={length} has no room for a window of {stage.window} tokens beside questions of "
            f"{cfg.model.tail_length} and a first token"
        )
    optimizer.schedule(stage.optimizer, stage.steps)
    optimizer.check(stage.optimizer)
    trained = {group for group in stage.optimizer.groups if not optimizer.is_frozen(stage.optimizer, group)}
    if not trained or trained - reached(stage):
        raise InputError(
            f"{where}optimizer.groups trains {', '.join(sorted(trained)) or 'nothing'}; with objective="
            f"{stage.objective!r} and documents={stage.documents!r} it may name {', '.join(sorted(reached(stage)))}"
        )


def retrieves(stage: StageConfig) -> bool:
    """Whether the generator reads what was retrieved."""
    return stage.objective == "rag" and stage.documents == "retrieved"


def writes(stage: StageConfig) -> bool:
    """Whether the generator trains."""
    return not contrasts(stage)


RETRIEVES = retrieves, "objective='rag' with documents='retrieved'"
WRITES = writes, "objectives that train the generator: 'rag', 'denoise'"
SEARCHES = searches, "stages that search: documents='retrieved', or hard_negatives"
ASKS = asks, "objectives that have questions"
CONTRASTIVE = (lambda stage: stage.objective == "contrastive"), "objective='contrastive'"
RAG = (lambda stage: stage.objective == "rag"), "objective='rag'"
READS = (lambda stage: stage.objective == "rag" and stage.documents == "gold"), "objective='rag' with documents='gold'"
# Which stages read a field of StageConfig, and in words; every stage reads those that are not here.
READ_BY: dict[str, tuple[Callable[[StageConfig], bool], str]] = {
    "documents": RAG,
    "n_docs": RETRIEVES,
    "hard_negatives": CONTRASTIVE,
    "negatives": CONTRASTIVE,
    "source_length": WRITES,
    "window": READS,
    "refresh": SEARCHES,
    "n_retrieved": RETRIEVES,
    "write_back": RETRIEVES,
    "drift_every": SEARCHES,
    "normaliser": RETRIEVES,
    "label_smoothing": WRITES,
    "hf_compat": RETRIEVES,
    "prior_gradient": RETRIEVES,
    "questions": ASKS,
    "buckets": ASKS,
    "target_buckets": RAG,
    "doc_chunk": RETRIEVES,
    "logit_chunk": WRITES,
}
EVERY_STAGE = ("name", "objective", "steps", "batch", "accumulate", "optimizer")
# The same of SearchConfig. Its sections are each of the search they are named after, whichever is chosen now.
SEARCHED_BY: dict[str, tuple[Callable[[SearchConfig], bool], str]] = {
    "dtype": (lambda search: search.kind == "exact", "kind='exact'"),
    "recall_target": (lambda search: search.kind == "exact", "kind='exact'"),
    "dense": (lambda search: search.kind == "hybrid", "kind='hybrid'"),
}
SECTIONS = ("scann", "bm25", "fusion")


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that have another value than by default."""
    found = {}
    for f in dataclasses.fields(config):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if getattr(config, f.name) != default:
            found[f.name] = getattr(config, f.name)
    return found


def check_unread(stage: StageConfig, where: str) -> None:
    """InputError for what is set, and what nothing of this stage would read."""
    for name, value in changed(stage).items():
        belongs, place = READ_BY.get(name, (None, ""))
        one = name == "n_docs" and value == 1 and RAG[0](stage)  # true without a search, too
        if belongs is not None and not belongs(stage) and not one:
            raise InputError(f"{where}{name}={value!r} is only for {place}")


def check_search_config(search: SearchConfig) -> None:
    """InputError for what is set of a search of another kind."""
    for name, value in changed(search).items():
        belongs, place = SEARCHED_BY.get(name, (None, ""))
        if belongs is not None and not belongs(search):
            raise InputError(f"search.{name}={value!r} is only for search.{place}; it is kind={search.kind!r}")


def check_widths(name: str, widths: tuple[int, ...], longest: int, of: str) -> None:
    """InputError for widths of buckets that are not ascending, from 1 to below `longest`."""
    if list(widths) != sorted({width for width in widths if 0 < width < longest}):
        said = ", ".join(map(str, widths))
        raise InputError(f"{name}={said} must be ascending numbers from 1 to below {of}={longest}")


def check_search(cfg: TrainConfig, stage: StageConfig, where: str) -> None:
    """What belongs to searching and to keeping the index fresh."""
    try:
        when = refresh_schedule.parse(stage.refresh)
    except InputError as error:
        raise InputError(f"{where}{error}") from error
    side = "question_encoder" if cfg.model.tie_encoders else "context_encoder"
    trains = side in stage.optimizer.groups and not optimizer.is_frozen(stage.optimizer, side)
    if stage.refresh and not trains:
        raise InputError(f"{where}refresh={stage.refresh!r}, but the stage does not train {side}: nothing would change")
    if stage.n_retrieved and stage.n_retrieved <= stage.n_docs:
        raise InputError(f"{where}n_retrieved={stage.n_retrieved} must be more than n_docs={stage.n_docs}, or 0")
    if (
        stage.write_back
        and not stage.n_retrieved
        and (not trains or cfg.model.encoder.dropout or cfg.model.encoder.weights_dropout)
    ):
        raise InputError(
            f"{where}write_back=True has nothing exact to write: the stage has to train {side} with "
            "model.encoder.dropout=0 (and attention_dropout), or to set n_retrieved"
        )
    if cfg.search.kind != "exact":
        for name, value in (
            ("write_back", stage.write_back),
            ("refresh", stage.refresh if when.kind == "rolling" else ""),
            ("normaliser", "" if stage.normaliser == "retrieved" else stage.normaliser),
        ):
            if value:
                raise InputError(f"{where}{name}={value!r} needs the index in graph: search.kind='exact'")


def at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}")


def build(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A frozen dataclass from nested mappings; unknown or missing keys and wrong types raise InputError with their
    path.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected keys and values ({', '.join(typing.get_type_hints(cls))}), got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    kwargs = {name: convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    for name, f in fields.items():
        if name not in kwargs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: missing key {name!r}")
    return cls(**kwargs)


def convert(hint: Any, value: Any, where: str) -> Any:
    """One field's value in the type its dataclass states."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is object:
        return value  # checked where it is used
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return one_of([kind for kind in arguments if kind is not type(None)], value, where)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise InputError(f"{where}: expected a list, got {value!r}")
        return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected names and values, got {value!r}")
        return {name: convert(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint in (float, str) and isinstance(value, int) and not isinstance(value, bool):
        return hint(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def one_of(classes: Sequence[type], value: Any, where: str) -> Any:
    """The dataclass whose `kind` is that of the value, the first where it names none; None stays None."""
    if value is None:
        return None
    kinds = {cls.kind: cls for cls in classes}  # type: ignore[attr-defined]
    kind = value.get("kind", next(iter(kinds))) if isinstance(value, Mapping) else next(iter(kinds))
    if kind not in kinds:
        raise InputError(f"{where}.kind: {kind!r} is not one of {', '.join(map(repr, kinds))}")
    return build(kinds[kind], value, where)


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
    """Apply `key.sub=value` (value as JSON, else text); `stages.NAME.key=value` picks a stage by its name."""
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}: expected key=value, such as stages.joint.steps=100")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, last = path.split(".")
        node: Any = config
        for name in parents:
            node = section(node, name, f"--set {path}")
        if not isinstance(node, ml_collections.ConfigDict):
            raise InputError(f"--set {path}: {'.'.join(parents)} holds no keys, it is {node!r}")
        if isinstance(node.get(last), str) and not isinstance(value, str):
            value = text  # as 250 in refresh=250
        try:
            with node.unlocked():
                node[last] = value
        except TypeError as error:  # ml_collections holds a key to the type of its value
            raise InputError(f"--set {assignment}: {error}") from error


def section(node: Any, name: str, where: str) -> Any:
    """What stands under `name`: in a list of stages the one of that name, else a section, a new one if need be.

    A name that no section has is found out when the configuration is built.
    """
    if isinstance(node, tuple | list):
        stages = {stage["name"]: stage for stage in node}
        if name not in stages:
            raise InputError(f"{where}: no stage {name!r}; stages: {', '.join(stages)}")
        return stages[name]
    if not isinstance(node, ml_collections.ConfigDict):
        raise InputError(f"{where}: nothing stands under {name!r}, since above it is {node!r}")
    if name not in node:
        with node.unlocked():
            node[name] = ml_collections.ConfigDict()
    return node[name]


def evaluated(path: str, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """What `configs/NAME.py` or `configs/NAME.py:ARGUMENT` says, with `key=value` overrides, as plain values."""
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise InputError(f"{file}: no such configuration file; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location("rag_jax_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # a configuration may build on the one beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise InputError(f"{file}: a configuration file defines get_config(argument) -> ml_collections.ConfigDict")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    override(config, assignments)
    return plain(config)


def load(path: str, assignments: Sequence[str] = ()) -> TrainConfig:
    """The TrainConfig of a configuration file, with `key=value` overrides; `model` and `answering` are filled up from
    `init`.
    """
    values = evaluated(path, assignments)
    start = Path(str(values.get("init") or "")) / "config.json"
    if values.get("init") and start.is_file():
        first = read(start)
        values["model"] = merge(plain(first.model), values.get("model") or {})
        values["answering"] = merge(first.answering, values.get("answering") or {})
    return build(TrainConfig, values)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section; a generator of another kind stands for itself."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same = value.get("kind", old.get("kind")) == old.get("kind")
            value = merge(old, value) if same else value
        merged[name] = value
    return merged


def plain(value: Any) -> Any:
    """ConfigDicts, dataclasses and tuples as plain dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def save(config: TrainConfig, path: Path) -> None:
    path.write_text(json.dumps(plain(config), indent=2) + "\n")


def read(path: Path) -> TrainConfig:
    """The configuration that a run directory keeps."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text else None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); it must be in a run directory, made by rag-jax train"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        why = "not a JSON object" if text else "the file is empty"
        raise InputError(f"{path}: {why}; restore it from a copy, or name another run directory")
    return build(TrainConfig, renewed(values), str(path))


def renewed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a run that an earlier version wrote, with the names of now."""
    stages = values.get("stages")
    if isinstance(stages, list):  # n_docs was 5 where a stage did not say it, also in stages that read nothing of it
        values = {**values, "stages": [s | {"n_docs": 0} if _unread(s) else s for s in stages]}
    model = values.get("model")
    generator = model.get("generator") if isinstance(model, Mapping) else None
    if isinstance(model, Mapping) and isinstance(generator, Mapping) and "generate_from_eos" in generator:
        now = {name: value for name, value in generator.items() if name != "generate_from_eos"}
        now |= {"start_id": generator.get("eos_id", 2)} if generator["generate_from_eos"] else {}
        return {**values, "model": {**model, "generator": now}}
    return values


def _unread(stage: Any) -> bool:
    """Whether a stage, as it is stored, has the n_docs of no retrieval."""
    if not isinstance(stage, dict) or stage.get("n_docs") != 5:
        return False
    return (stage.get("objective"), stage.get("documents")) != ("rag", "retrieved")
