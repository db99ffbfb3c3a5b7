"""Training from Python: the loop of `rag-jax train`, with texts from memory and your own losses and hooks.

    data = rag_jax.Texts(passages=[...], questions=[...], corpus={"tokenizers_from": "runs/converted/tokenizers"})
    result = rag_jax.fit("world", "runs/mine", data=data, losses={"mine": loss}, hooks=[print])
    result.pipeline().ask("Who ...?")

The same call again resumes what was interrupted.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rag_jax.corpus import build as corpus_build
from rag_jax.errors import InputError
from rag_jax.inference.pipeline import Pipeline
from rag_jax.losses import RETRIEVER_LOSSES, RetrieverLoss
from rag_jax.system import configuration
from rag_jax.system.renaming import renamed
from rag_jax.training import config as configs
from rag_jax.training import train as training
from rag_jax.training.config import TrainConfig
from rag_jax.training.session import Hook

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    """Passages and questions in memory, each a mapping like a line of a JSONL file.

    passages: `id`, `text`, and `title` where there is one.
    questions, dev: `question`, `answers`, and, where they are known, `id` and `positive_passage_ids`.
    corpus: options of corpus.build.BuildOptions, such as encoder_length=256. If they name no tokenizers, those of the
      configuration's `init` are used or, without `init`, new ones of 8,192 tokens are trained on the passages.
    """

    passages: Iterable[Record]
    questions: Iterable[Record]
    dev: Iterable[Record] = ()
    corpus: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A trained run: its directory, its steps, the seconds of training, and its last row of metrics."""

    run: Path
    steps: int
    seconds: float
    last: Mapping[str, Any]

    def pipeline(self, **options: Any) -> Pipeline:
        """The run, ready to answer; options as of Pipeline.from_run."""
        return Pipeline.from_run(self.run, **options)


def fit(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    run: str | Path,
    *,
    data: Texts | None = None,
    losses: Mapping[str, RetrieverLoss] | None = None,
    hooks: Sequence[Hook] = (),
) -> Result:
    """Train, or resume what was interrupted, in the directory `run`.

    config: the dataclass, nested values, or a configuration file, by path or by the name of a shipped one.
    data: texts in place of the configuration's corpus, train and dev; they are written to RUN-data, once.
    losses: retriever losses by name, (scores_BK, token_logp_BKT, mask_BT) -> loss_B; a stage adds one by its
      `retriever_losses={name: weight}`.
    hooks: called at every log line with a `session.Moment`; the numbers that one returns go into the row of metrics.

    Your own objective is a subclass of training.stage.Objective, in a StageConfig of the TrainConfig. InputError for
    configurations and data that cannot be trained, before the first step; InterruptedError at SIGTERM.
    """
    directory = Path(run)
    cfg = with_texts(config, Path(f"{directory}-data"), data)
    found = training.train(cfg, directory, retriever_losses={**RETRIEVER_LOSSES, **(losses or {})}, hooks=hooks)
    if found.get("preempted"):
        raise InterruptedError(f"{directory}: SIGTERM after step {found['steps']}; call fit again to resume")
    return Result(directory, found["steps"], found["training_seconds"], found["last"])


def with_texts(config: TrainConfig | Mapping[str, Any] | str | Path, folder: Path, data: Texts | None) -> TrainConfig:
    """The configuration as a TrainConfig, with paths of the written `data`, if any, in place of its own files."""
    if isinstance(config, TrainConfig):
        return replace(config, **write_texts(folder, data, config.init)) if data else config
    plain = configuration.plain(config) if isinstance(config, Mapping) else configuration.evaluated(str(config))
    return configs.from_plain(plain | (write_texts(folder, data, str(plain.get("init") or "")) if data else {}))


def write_texts(folder: Path, data: Texts, init: str) -> dict[str, Any]:
    """Writes the texts and builds their corpus, unless the folder has the same; returns paths for a configuration."""
    parts = {name: list(getattr(data, name)) for name in ("passages", "questions", "dev")}
    if not parts["passages"] or not parts["questions"]:
        raise InputError("data: needs passages and questions; there are none")
    texts = {name: "".join(json.dumps(dict(row)) + "\n" for row in rows) for name, rows in parts.items()}
    paths = {name: folder / f"{name}.jsonl" for name in texts}
    same = all(path.is_file() and path.read_text(encoding="utf-8") == texts[name] for name, path in paths.items())
    if folder.exists() and not same:
        raise InputError(f"{folder}: holds other texts; remove it with its run, or name another run directory")
    if not same:
        folder.mkdir(parents=True)
        for name, path in paths.items():
            with renamed(path) as temporary:
                temporary.write_text(texts[name], encoding="utf-8")
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus_build.write([paths["passages"]], corpus, corpus_options(data.corpus, init))
    dev = {"dev": str(paths["dev"])} if parts["dev"] else {}
    return {"corpus": str(corpus), "train": str(paths["questions"]), **dev}


def corpus_options(given: Mapping[str, Any], init: str) -> corpus_build.BuildOptions:
    """Options of the corpus, with the tokenizers of `init` where none are named, or new ones of 8,192 tokens."""
    named = {"encoder_tokenizer", "generator_tokenizer", "tokenizers_from", "train_tokenizer"} & set(given)
    if not named:
        own: dict[str, Any] = {"train_tokenizer": (8192, 8192)}
        if init:
            own = {"tokenizers_from": Path(init) / "tokenizers"}
        given = {**given, **own}
    try:
        return corpus_build.BuildOptions(**given)
    except TypeError as error:
        raise InputError(f"data.corpus: {error}") from error
