"""Preparation of a training run before its first step: tokenised data, batches, checks and the run directory."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax

from rag_jax.corpus.directory import Corpus
from rag_jax.data import batching, example_cache, examples, tasks
from rag_jax.data.readers import formats, sources
from rag_jax.errors import InputError
from rag_jax.index import refresh_schedule
from rag_jax.losses import RETRIEVER_LOSSES, RetrieverLoss
from rag_jax.runs import checkpoint, live_corpus
from rag_jax.runs import config as run_config
from rag_jax.runs import directory as runs
from rag_jax.system import configuration, distributed, sharding
from rag_jax.system.logs import info
from rag_jax.system.renaming import renamed
from rag_jax.training import config
from rag_jax.training.config import TrainConfig
from rag_jax.training.data import Data, usable_pairs
from rag_jax.training.stage import StageConfig

MAY_CHANGE = ("learning_rate", "stop_on_nonfinite")  # keys that a resumed run may have with another value
EXAMPLES = "examples"  # directory of the tokenised questions in a run directory


def prepare(cfg: TrainConfig, corpus: Corpus, directory: Path | None = None) -> Data:
    """The tokenised training questions: from the cache in the run directory if it matches, else tokenised now."""
    corpus = runs.answered(cfg.model, corpus)
    if not cfg.train:
        return Data(examples.none(), corpus, {})
    weights = sources.weighted(cfg.train)
    settings: dict[str, Any] = {
        "question_length": cfg.model.question_length,
        "target_length": cfg.target_length,
        "answers": cfg.answers,
        "negatives": any(stage.objective.needs().negatives for stage in cfg.stages),
        "live": cfg.live,
        "keeps": cfg.model.question_keeps,
        "tail_length": cfg.model.tail_length,
    }
    task = configuration.plain(cfg.task)
    wrapping = corpus.generator_tokenizer.wrapping
    said = {} if wrapping is None else {"labels": [list(wrapping.opening), list(wrapping.closing), wrapping.pad_id]}
    wanted = example_cache.made_of(list(weights), corpus, corpus.hash, task=task, **settings, **said)
    kept = None if directory is None else example_cache.read(directory / EXAMPLES, wanted)
    if kept is not None:
        return Data(kept, corpus, weights)
    inputs = [tasks.each(formats.iterate_questions(one), cfg.task, corpus) for one in weights]
    parts = [examples.tokenise(some, corpus, name=one, **settings) for one, some in zip(weights, inputs, strict=True)]
    return Data(examples.joined(parts), corpus, weights, wanted)


def keep(directory: Path, data: Data) -> None:
    """Writes examples that were not read from the cache into the run directory, in the first process."""
    if data.unkept is not None and distributed.first():
        example_cache.write(directory / EXAMPLES, data.examples, dict(data.unkept))


def same_questions(a: Data, b: Data) -> bool:
    """Whether the questions are the same, although their corpora may differ."""
    return a.examples.fingerprint(questions_only=True) == b.examples.fingerprint(questions_only=True)


def batches(
    stage: StageConfig, cfg: TrainConfig, data: Data, number: int, mesh: jax.sharding.Mesh | None = None
) -> grain.MapDataset:
    """Endless batches of stage `number`; InputError where the questions lack what the stage needs.

    mesh: make only the rows of each batch that lie on devices of this process; None: all rows.
    """
    own = None if mesh is None else sharding.own_rows(mesh, stage.batch)
    seed = cfg.seed * len(cfg.stages) + number
    if not stage.objective.asks:
        return stage.objective.corpus_batches(stage, cfg, data, seed, own)
    needs, units = stage.objective.needs(), units_of(stage, cfg, data)
    refresh_schedule.parse(stage.refresh, epoch(stage, cfg, data))  # checked again, now that an epoch is known
    wanted = batching.BatchOptions(
        batch=stage.batch,
        seed=seed,
        lengths=(cfg.model.question_length, cfg.target_length),
        tail_length=cfg.model.tail_length,
        question_widths=stage.buckets,
        target_widths=stage.target_buckets,
        window=needs.window,
        negatives=needs.negatives,
        weights=tuple(data.weights.values()),
        own=own,
    )
    absent = set(range(len(data.weights))) - set(data.examples.input_N[units.question_U].tolist())
    if absent and len(units):
        name = list(data.weights)[min(absent)]
        raise InputError(f"stage {stage.name}: {name} has no question that the stage can use; leave it out of train")
    return batching.question_batches(data.examples, units, data.corpus, wanted)


def units_of(stage: StageConfig, cfg: TrainConfig, data: Data) -> batching.EpochUnits:
    """The units (questions, or pairs of question and answer) of an epoch; InputError where there are none."""
    pairs = usable_pairs(stage.objective.needs(), data.examples, stage.name)
    return batching.units_of(data.examples, pairs, cfg.answers == "sample", stage.questions)


def epoch(stage: StageConfig, cfg: TrainConfig, data: Data) -> int:
    """Steps of an epoch: units of the stage over its batch size, at least 1; 1 without questions."""
    return max(1, len(units_of(stage, cfg, data)) // stage.batch) if stage.objective.asks else 1


def check(
    cfg: TrainConfig,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    retriever_losses: Mapping[str, RetrieverLoss] = RETRIEVER_LOSSES,
) -> None:
    """InputError for a configuration that would fail later, also given this corpus and mesh; see `config.check`."""
    config.check(cfg, retriever_losses)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.live and jax.process_count() > 1:
        raise InputError(f"live=True with {jax.process_count()} processes, which may see different versions; use one")
    if cfg.model.n_docs > corpus.n_live:
        raise InputError(f"model.n_docs={cfg.model.n_docs}, but the corpus has {corpus.n_live} passages")
    for stage in cfg.stages:
        for name, count in stage.objective.searched().items():
            if count > corpus.n_live:
                raise InputError(f"stage {stage.name}: {name}={count}, but the corpus has {corpus.n_live} passages")
        if stage.batch % (shards * stage.accumulate):
            parts = f" in {stage.accumulate} parts" if stage.accumulate > 1 else ""
            raise InputError(
                f"stage {stage.name}: batch={stage.batch}{parts} does not divide over {shards} devices; make it a "
                "multiple"
            )


def open_run(cfg: TrainConfig, directory: Path, data: Data) -> None:
    """Makes the run directory, or checks that an existing one can be resumed.

    InputError where it was started with another configuration (but for MAY_CHANGE) or other data. The first process
    writes; all of them check.
    """
    known = directory / "config.json"
    identity = runs.identity(data.corpus) | {"questions": data.examples.fingerprint(questions_only=cfg.live)}
    changed = []
    if known.exists():
        own = {stage.objective.kind: type(stage.objective) for stage in cfg.stages}
        old, new = configuration.plain(config.read_run(directory, own)), configuration.plain(cfg)
        changed = take_changes(old, new)
        differing = differences(old, new)
        if differing:
            raise InputError(
                f"{directory} was started with another configuration ({differing}); name another --run directory"
            )
        begun = runs.read_identity(directory)
        if cfg.live and begun["corpus_hash"] in dict(data.corpus.chain):
            identity["corpus_hash"] = begun["corpus_hash"]  # an update of what the run began with
        differing = differences(begun, identity)
        if differing:
            raise InputError(
                f"{directory} was started with other data ({differing}); put back what {cfg.corpus} and {cfg.train} "
                "were, or name another --run directory"
            )
    elif distributed.first():
        _begin(cfg, directory, data, identity)
    distributed.barrier("run directory")
    if changed and distributed.first():
        info(f"{directory}: its configuration is changed: {'; '.join(changed)}")
        _write_config(cfg, directory)


def _begin(cfg: TrainConfig, directory: Path, data: Data, identity: dict[str, Any]) -> None:
    """Writes a new run directory; config.json comes last, as its presence says that the rest is there."""
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    (directory / runs.IDENTITY).write_text(json.dumps(identity, indent=2) + "\n")
    corpus = data.corpus
    shutil.copytree(corpus.directory / "tokenizers", directory / "tokenizers", dirs_exist_ok=True)
    provenance = Path(cfg.init) / runs.PROVENANCE
    if cfg.init and provenance.is_dir():
        shutil.copytree(provenance, directory / runs.PROVENANCE, dirs_exist_ok=True)
    _write_config(cfg, directory)


def _write_config(cfg: TrainConfig, directory: Path) -> None:
    with renamed(directory / runs.CONFIG) as temporary:
        run_config.save(cfg, temporary)
        runs.write_manifest(directory, {runs.CONFIG: temporary})


def take_changes(old: Any, new: Any, path: str = "") -> list[str]:
    """Copies the values of MAY_CHANGE from `new` into `old`, both plain; returns the changes, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in old.keys() & new.keys():
            where = f"{path}.{name}".strip(".")
            if name in MAY_CHANGE and old[name] != new[name]:
                found.append(f"{where}: {old[name]!r} before, {new[name]!r} now")
                old[name] = new[name]
            else:
                found += take_changes(old[name], new[name], where)
        return sorted(found)
    if isinstance(old, list) and isinstance(new, list):
        return [
            one for i, pair in enumerate(zip(old, new, strict=False)) for one in take_changes(*pair, f"{path}[{i}]")
        ]
    return []


def differences(old: Any, new: Any, path: str = "") -> str:
    """The path of the first key in which two plain configurations differ, with both values; "" if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            found = differences(old.get(name), new.get(name), f"{path}.{name}".strip("."))
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(
            filter(None, (differences(*pair, f"{path}[{i}]") for i, pair in enumerate(zip(old, new, strict=True)))), ""
        )
    return "" if old == new else f"{path}: {old!r} there, {new!r} now"


def opened(cfg: TrainConfig, directory: Path) -> Corpus:
    """Opens the corpus of the configuration or, with `live`, the version that the run's last checkpoint names."""
    if not cfg.live:
        return Corpus.open(cfg.corpus)
    if (directory / "checkpoints").is_dir():
        keeper = checkpoint.Checkpoints(directory / "checkpoints")
        done = keeper.latest()
        position = keeper.position(done) if done else {}
        if "corpus" in position:
            return live_corpus.reopen(position["corpus"], cfg.corpus)
    return live_corpus.open_version(cfg.corpus)
