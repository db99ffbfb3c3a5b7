"""Questions -> answers with the passages they came from: question encoder, search, join, generate, as one jitted
program.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax import checkpoint, objectives, sharding, steps
from rag_jax import run as runs
from rag_jax.config import StageConfig, TrainConfig
from rag_jax.data import pipeline
from rag_jax.errors import InputError
from rag_jax.logs import Progress
from rag_jax.rag import Params, Passages
from rag_jax.retrieval import index as snapshots
from rag_jax.retrieval import mips
from rag_jax.retrieval.corpus import Corpus
from rag_jax.steps import Index


@dataclass(frozen=True)
class AnswerConfig:
    """How to answer. n_retrieved passages are found (for recall), the first n_docs of them are read; 0: the model's.

    closed_book: no passage is read. retrieval_only: passages are found, and no answer is written.
    """

    n_docs: int = 0
    n_retrieved: int = 100
    num_beams: int = 1
    max_length: int = 32
    mode: Literal["thorough", "fast"] = "thorough"
    batch: int = 16
    closed_book: bool = False
    retrieval_only: bool = False


class Answers(NamedTuple):
    """Arrays of a batch: sequences [B,T], scores [B], rows and prior of what was retrieved [B,R], posterior [B,K]."""

    sequences: jax.Array
    scores: jax.Array
    rows: jax.Array
    prior: jax.Array
    posterior: jax.Array


@dataclass(frozen=True)
class Passage:
    """A passage that an answer came from; prior and posterior are probabilities over the passages read."""

    id: str
    title: str
    text: str
    prior: float
    posterior: float


@dataclass(frozen=True)
class Answer:
    """The answer, its log p(y|x), the passages read (best prior first) and the ids of all that were retrieved."""

    text: str
    score: float
    passages: tuple[Passage, ...]
    retrieved: tuple[str, ...]


AnswerFn = Callable[[Params, Index, Passages, dict[str, jax.Array]], Answers]


def make_answer(loaded: runs.Loaded, cfg: AnswerConfig) -> AnswerFn:
    """The program, jitted. Without passages (closed book) the generator sees an empty passage before the question."""
    model, n_passages = loaded.rag.config, len(loaded.corpus)
    n_docs = cfg.n_docs or model.n_docs
    for name, value, least in (
        ("n_docs", n_docs, 1),
        ("n_retrieved", cfg.n_retrieved, 1),
        ("num_beams", cfg.num_beams, 1),
        ("max_length", cfg.max_length, 2),
        ("batch", cfg.batch, 1),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    if n_docs > n_passages:
        raise InputError(f"n_docs={n_docs}, but the corpus has {n_passages} passages; ask for at most {n_passages}")
    if cfg.closed_book and cfg.retrieval_only:
        raise InputError("closed book and retrieval alone leave nothing to do; ask for one of them")
    if not cfg.retrieval_only:
        _ = model.reader  # InputError for a retriever alone
    stage = StageConfig("answer", n_docs=n_docs)
    setting = steps.Setting(loaded.rag, stage, loaded.mesh, n_passages, loaded.corpus.generator_tokenizer.prefix_ids)
    wanted = min(max(cfg.n_retrieved, n_docs), n_passages)

    def answer(params: Params, index: Index, passages: Passages, batch: dict[str, jax.Array]) -> Answers:
        if cfg.closed_book:
            rows_BR = jnp.zeros((len(batch["question_ids"]), 1), jnp.int32)
            scores_BR = jnp.zeros(rows_BR.shape)
            nothing = jnp.zeros((len(rows_BR), 2), jnp.int32)
            ids, mask = steps.contexts(setting, passages, rows_BR, batch | {"window": nothing})
        else:
            q_BE = steps.embed_questions(setting, params, batch, None)
            scores_BR, rows_BR = mips.search(q_BE, index.embeddings_NE, wanted, mesh=loaded.mesh, n_valid=n_passages)
            if cfg.retrieval_only:
                prior_BK, nothing = (
                    jnp.exp(objectives.prior_logp(scores_BR[:, :n_docs])),
                    jnp.zeros((len(q_BE), 0), int),
                )
                return Answers(nothing, nothing.sum(-1), rows_BR, prior_BK, prior_BK)
            ids, mask = steps.contexts(setting, passages, rows_BR[:, :n_docs], batch)
        scores_BK = scores_BR[:, :n_docs]
        found = loaded.rag.generate(params, ids, mask, scores_BK, cfg.num_beams, cfg.max_length, cfg.mode)
        prior_BK = jnp.exp(objectives.prior_logp(scores_BK))
        return Answers(found.sequences, found.scores, rows_BR, prior_BK, found.doc_posterior)

    return jax.jit(answer)


def answer_questions(
    loaded: runs.Loaded,
    params: Params,
    index: Index,
    questions: Sequence[str],
    cfg: AnswerConfig,
    program: AnswerFn | None = None,
) -> list[Answer]:
    """Answers in the order of the questions; every batch has the same shape, so the program is compiled once."""
    program = program or make_answer(loaded, cfg)
    corpus = loaded.corpus
    tables = pipeline.encode_questions(
        questions, corpus.encoder_tokenizer, corpus.generator_tokenizer, loaded.rag.config.question_length
    )
    shards = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    size = -(-cfg.batch // shards) * shards
    answers: list[Answer] = []
    with Progress(len(questions), "answering", "question") as progress:
        for start in range(0, len(questions), size):
            rows = np.minimum(np.arange(start, start + size), len(questions) - 1)
            batch = {name: table[rows] for name, table in tables.items()}
            out = program(params, index, loaded.passages, sharding.shard_batch(loaded.mesh, batch))
            count = min(size, len(questions) - start)
            answers += collect(corpus, jax.device_get(out), count, cfg.closed_book)
            progress.update(count)
    return answers


def collect(corpus: Corpus, out: Any, count: int, closed_book: bool) -> list[Answer]:
    """Arrays of one batch -> answers with texts."""
    answers = []
    for i in range(count):
        read = []
        for row, prior, posterior in zip(out.rows[i], out.prior[i], out.posterior[i], strict=False):
            p = corpus[int(row)]
            read.append(Passage(p.id, p.title, p.text, float(prior), float(posterior)))
        text = corpus.generator_tokenizer.decode([int(token) for token in out.sequences[i]]).strip()
        retrieved = () if closed_book else tuple(corpus[int(row)].id for row in out.rows[i])
        answers.append(Answer(text, float(out.scores[i]), () if closed_book else tuple(read), retrieved))
    return answers


@dataclass(frozen=True)
class Pipeline:
    """A trained run, ready to answer: `Pipeline.from_run(path).ask("Who ...?")`. Programs are compiled once each."""

    config: TrainConfig
    loaded: runs.Loaded
    params: Params
    index: Index
    snapshot: snapshots.Snapshot
    programs: dict[AnswerConfig, AnswerFn] = field(default_factory=dict, repr=False)

    @classmethod
    def from_run(cls, path: str | Path, index: str | Path | None = None) -> "Pipeline":
        """Open a run with its own index, or with another made by `rag-jax index` (hot swap: other passages, no
        retraining).

        InputError where the index was made by another encoder, or its corpus with other tokenizers or passages.
        """
        directory = Path(path)
        config = runs.read_config(directory)
        checkpoint.check_params(directory / "params")
        snapshot = snapshots.open_snapshot(index or directory / "index")
        corpus = Corpus.open(snapshot.manifest.corpus)
        runs.check_tokenizers(directory, corpus)
        loaded = runs.load(config.model, corpus, sharding.make_mesh(config.mesh or None))
        params = runs.read_params(directory, loaded.rag, loaded.mesh)
        snapshots.check(snapshot, corpus.hash, runs.encoder_hash(loaded, params))
        embeddings = sharding.shard_rows(loaded.mesh, snapshot.embeddings_NE, 0)
        step = jax.device_put(np.int32(snapshot.manifest.step), sharding.replicated(loaded.mesh))
        return cls(config, loaded, params, Index(embeddings, step), snapshot)

    def answer_config(self, **changes: Any) -> AnswerConfig:
        """How the run answers by default, with changes."""
        base = AnswerConfig(n_docs=self.config.model.n_docs, max_length=self.config.target_length)
        return dataclasses.replace(base, **changes)

    def answer(self, questions: Sequence[str], cfg: AnswerConfig) -> list[Answer]:
        """Answers in the order of the questions; InputError for an empty one."""
        if not all(question.strip() for question in questions):
            raise InputError("a question is empty; give some words")
        if cfg not in self.programs:
            self.programs[cfg] = make_answer(self.loaded, cfg)
        return answer_questions(self.loaded, self.params, self.index, questions, cfg, self.programs[cfg])

    def ask(self, question: str, n_docs: int = 0, num_beams: int = 1) -> Answer:
        """One answer, with the passages it came from."""
        changes = {"n_docs": n_docs} if n_docs else {}
        return self.answer([question], self.answer_config(batch=1, n_retrieved=1, num_beams=num_beams, **changes))[0]
