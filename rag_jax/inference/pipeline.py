"""Questions -> answers with the passages they came from: question encoder, search, join, generate, as one jitted
program.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax import losses, retrieve
from rag_jax.corpus.directory import Corpus
from rag_jax.data import batching, gold
from rag_jax.data.readers.formats import Question
from rag_jax.data.tokenizers import Tokenizer, pad_rows
from rag_jax.decoding import search as decoding_search
from rag_jax.errors import InputError
from rag_jax.index import device_index
from rag_jax.index import snapshot as snapshots
from rag_jax.index.device_index import Index
from rag_jax.inference import config as answer_config
from rag_jax.inference.config import AnswerConfig
from rag_jax.rag import Params, TokenTables
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieval.search import SearchResult
from rag_jax.retrieve import Batch
from rag_jax.runs import checkpoint, live_corpus
from rag_jax.runs import directory as runs
from rag_jax.runs.config import RunConfig
from rag_jax.runs.index_location import Arrays, IndexLocation, Lookup, location_of
from rag_jax.system import sharding
from rag_jax.system.logs import Progress


class Answers(NamedTuple):
    """Arrays of the answers to B questions.

    sequences: int [B, T], tokens of the answer with start and end.
    scores: [B], log p(y|x).
    rows, read: corpus rows of the passages retrieved [B, R] and read [B, K], -1 for none.
    prior, posterior: [B, K], probabilities p(z|x) and p(z|x,y) of the passages read.
    token_posterior: [B, T - 1, K], p(z|x,y_t,y_<t) of every token after the start; None but for RAG-Token.
    """

    sequences: jax.Array
    scores: jax.Array
    rows: jax.Array
    read: jax.Array
    prior: jax.Array
    posterior: jax.Array
    token_posterior: jax.Array | None = None


@dataclass(frozen=True)
class ReadPassage:
    """A passage that an answer came from; prior and posterior are probabilities over the passages read."""

    id: str
    title: str
    text: str
    prior: float
    posterior: float


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    score: log p(y|x).
    passages: those read, largest prior first; () with closed_book and where the search found none, when the generator
      answered from the question alone.
    retrieved: ids of all passages found, in the order of the search.
    tokens: texts of the answer's tokens, without special ones.
    token_posterior: p(z|x,y_t,y_<t) for each of `tokens`, over the passages in the order of `passages` (figure 2 of the
      paper); None but for RAG-Token.
    """

    text: str
    score: float
    passages: tuple[ReadPassage, ...]
    retrieved: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    token_posterior: tuple[tuple[float, ...], ...] | None = None


class AnswerFn(Protocol):
    """A jitted program that answers a batch; number: of the batch, for which do_sample has a random key of its own."""

    def __call__(
        self, params: Params, index: Index | None, passages: TokenTables, batch: Batch, number: int = 0
    ) -> Answers: ...


# fields that DecodingOptions and AnswerConfig share; not bad_words, which are ids in one and texts in the other
OPTIONS = tuple(
    {f.name for f in dataclasses.fields(decoding_search.DecodingOptions)}
    & {f.name for f in dataclasses.fields(AnswerConfig)} - {"bad_words"}
)
MODELS, NOTHING = -1, -2  # values of a special token in AnswerConfig: take the model's, force none


def options_of(cfg: AnswerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of DecodingOptions that a configuration sets, without those that it leaves to the model."""
    options: dict[str, Any] = {name: getattr(cfg, name) for name in OPTIONS}
    for name in ("start_id", "forced_bos_id", "forced_eos_id", "end_ids"):
        if options[name] in (MODELS, ()):
            del options[name]
        elif options[name] == NOTHING:
            options[name] = None
    words = word_ids(tokenizer, cfg.bad_words) if cfg.bad_words else ()
    return options | {"bad_words": (*words, *cfg.bad_word_ids)}


def check_ids(cfg: AnswerConfig, vocab_size: int) -> None:
    """InputError for a special token that is not in the vocabulary, and for a start that is none."""
    named = {f"end_ids[{i}]": (token, 0) for i, token in enumerate(cfg.end_ids)}
    named |= {"start_id": (cfg.start_id, MODELS)}
    named |= {name: (getattr(cfg, name), NOTHING) for name in ("forced_bos_id", "forced_eos_id")}
    for name, (token, least) in named.items():
        if not least <= token < vocab_size:
            special = {0: "", MODELS: "; -1: the model's", NOTHING: "; -1: the model's, -2: none"}[least]
            raise InputError(f"{name}={token} must be an id of the {vocab_size} tokens of the generator{special}")


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words, each as it is tokenised at the start of a text and after a space."""
    both = [text for word in words for text in (word.strip(), f" {word.strip()}")]
    return tuple(dict.fromkeys(tuple(ids) for ids in tokenizer.encode_batch(both) if ids))


def allowed_ids(loaded: runs.Loaded, answers: Sequence[str], max_length: int) -> list[list[int]]:
    """Token sequences of the allowed answers, without the start token; InputError for one that is empty or too long.

    Each answer is tokenised twice: without a space before it, as released checkpoints write it, and with one, as
    training here does. Both are allowed, as the model assigns probability to the form that it learned.
    """
    tokenizer, start_id = loaded.corpus.generator_tokenizer, loaded.rag.config.reader.start_id
    made = []
    both = [form for answer in answers for form in (answer.strip(), f" {answer.strip()}")]
    for text, ids in zip(both, tokenizer.encode_batch(both), strict=True):
        label = tokenizer.label(ids, len(ids) + 4)
        label = label[1:] if label[0] == start_id else label
        if not ids or len(label) >= max_length:
            raise InputError(
                f"allowed answer {text.strip()!r} has {len(label)} tokens; there must be some, and at most "
                f"max_length - 1 = {max_length - 1} with the end"
            )
        made.append(label)
    return made


def check_answering(loaded: runs.Loaded, cfg: AnswerConfig) -> None:
    """InputError for settings that are out of range or exclude each other."""
    for name, value, least in (
        ("n_docs", cfg.n_docs or loaded.rag.config.n_docs, 1),
        ("n_retrieved", cfg.n_retrieved, 1),
        ("num_beams", cfg.num_beams, 1),
        ("max_length", cfg.max_length, 2),
        ("batch", cfg.batch, 1),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    check_docs(loaded, cfg)
    if cfg.closed_book + cfg.retrieval_only + cfg.oracle > 1:
        raise InputError("closed book, retrieval alone and oracle exclude each other; ask for one of them")
    if cfg.oracle and cfg.prior == "search":
        raise InputError("oracle: the search has no scores of passages that it did not find; use prior='dense'")


def decoding_of(loaded: runs.Loaded, cfg: AnswerConfig) -> tuple[dict[str, Any], decoding_search.PrefixTree | None]:
    """Arguments of Rag.generate, and the tree of allowed answers or None; ({}, None) for retrieval alone."""
    if cfg.retrieval_only:
        return {}, None
    model, tree = loaded.rag.config, None
    reader = model.reader  # InputError for a retriever alone
    check_ids(cfg, reader.vocab_size)
    options = options_of(cfg, loaded.corpus.generator_tokenizer)
    if cfg.allowed_answers:
        tree = decoding_search.prefix_tree(allowed_ids(loaded, cfg.allowed_answers, cfg.max_length), reader.eos_id)
    try:
        loaded.rag.decoding_options(cfg.n_docs or model.n_docs, cfg.candidates, **options)
        reader.check_length(model.source_length + cfg.max_length)
    except ValueError as error:
        raise InputError(str(error)) from error
    return options | {"mode": cfg.mode, "candidates": cfg.candidates, "doc_chunk": cfg.doc_chunk}, tree


def make_answer(loaded: runs.Loaded, cfg: AnswerConfig) -> AnswerFn:
    """The jitted program that answers a batch; it is compiled again only for a batch of other shapes.

    With closed_book the generator reads an empty passage before the question. InputError for settings that are out of
    range, exclude each other, or do not fit the model.
    """
    n_rows, n_docs = loaded.n_rows, cfg.n_docs or loaded.rag.config.n_docs
    check_answering(loaded, cfg)
    how, tree = decoding_of(loaded, cfg)
    prefix_ids = loaded.corpus.generator_tokenizer.prefix_ids
    setting = retrieve.InferenceSetting(loaded.rag, loaded.mesh, n_rows, prefix_ids)
    wanted = min(max(cfg.n_retrieved, n_docs), n_rows)

    def answer(
        params: Params,
        index: Index,
        passages: TokenTables,
        batch: dict[str, jax.Array],
        tree: decoding_search.PrefixTree | None,
        number: jax.Array,
    ) -> Answers:
        if cfg.closed_book:
            rows_BR = jnp.zeros((len(batch["question_ids"]), 1), jnp.int32)
            scores_BR = jnp.zeros(rows_BR.shape)
            nothing = jnp.zeros((len(rows_BR), 2), jnp.int32)
            ids, mask = retrieve.contexts(setting, passages, rows_BR, batch | {"window": nothing})
        else:
            q_BE = retrieve.embed_questions(setting, params, batch, None)
            if "documents" in batch:
                rows_BR, scores_BR = batch["documents"], batch["scores"]
                if cfg.prior == "dense":
                    scores_BR = jnp.einsum("be,bre->br", q_BE, device_index.stored(index, rows_BR))
                if "found" in batch:
                    scores_BR = losses.of_found(scores_BR, batch["found"])
            else:
                scores_BR, rows_BR = retrieve.find(setting, q_BE, index, wanted)
        read_BK, scores_BK = rows_BR[:, :n_docs], scores_BR[:, :n_docs]
        if cfg.retrieval_only:
            prior_BK = jnp.exp(losses.prior_logp(scores_BK))
            nothing = jnp.zeros((len(read_BK), 0), int)
            return Answers(nothing, nothing.sum(-1), *corpus_rows(batch, rows_BR, read_BK), prior_BK, prior_BK)
        if cfg.oracle and "documents" not in batch:  # found on the host, they come in this order
            read_BK = gold_first(batch["gold"], rows_BR, n_docs)
            scores_BK = jnp.einsum("be,bke->bk", q_BE, device_index.stored(index, read_BK))
        if not cfg.closed_book:
            ids, mask = retrieve.contexts(setting, passages, read_BK, batch)
        try:
            loaded.rag.generator.check_room(ids.shape[-1], cfg.max_length)
        except ValueError as error:
            raise InputError(f"max_length={cfg.max_length}: {error}; ask for a smaller one") from error
        key = jax.random.fold_in(jax.random.key(cfg.seed), number)
        found = loaded.rag.generate(params, ids, mask, scores_BK, tree=tree, key=key, **how)
        prior_BK = jnp.exp(losses.prior_logp(scores_BK))
        by_token = None if cfg.closed_book else found.token_posterior
        rows = corpus_rows(batch, rows_BR, read_BK)
        return Answers(found.sequences, found.scores, *rows, prior_BK, found.doc_posterior, by_token)

    program = jax.jit(answer)

    def call(
        params: Params, index: Index | None, passages: TokenTables, batch: dict[str, jax.Array], number: int = 0
    ) -> Answers:
        return program(params, index, passages, batch, tree, np.int32(number))

    return call


def corpus_rows(batch: Batch, rows_BR: jax.Array, read_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Corpus rows of the passages retrieved [B, R] and read [B, K], -1 for none.

    With a search on the host rows_BR and read_BK count in the small tables of the batch, and the batch has the corpus
    rows beside them; in graph they are corpus rows already.
    """
    return batch.get("retrieved_rows", rows_BR), batch.get("document_rows", read_BK)


def gold_first(gold_BG: jax.Array, rows_BR: jax.Array, n_docs: int) -> jax.Array:
    """Rows [B, K]: the gold passages, then the retrieved ones that are not gold, in their order; -1 for none."""
    gold_BG = gold_BG.astype(rows_BR.dtype)
    repeated_BR = (rows_BR[:, :, None] == gold_BG[:, None, :]).any(-1)
    both_BX = jnp.concatenate([gold_BG, jnp.where(repeated_BR, -1, rows_BR)], axis=1)
    return jnp.take_along_axis(both_BX, jnp.argsort(both_BX < 0, axis=1, stable=True)[:, :n_docs], axis=1)


def right_rows(questions: Sequence[Question], corpus: Corpus) -> np.ndarray:
    """Corpus rows [N, G] of the questions' gold passages, -1 where there are fewer (see gold.right_rows).

    Passages that the corpus lacks are left out.
    """
    found = gold.right_rows(questions, corpus)
    return pad_rows(found, max(1, *map(len, found)) if found else 1, -1, np.int32)[0]


def check_docs(loaded: runs.Loaded, cfg: AnswerConfig) -> None:
    """InputError where more passages are to be read than the corpus has."""
    n_docs, n = cfg.n_docs or loaded.rag.config.n_docs, loaded.corpus.n_live
    if n_docs > n:
        raise InputError(f"n_docs={n_docs}, but the corpus has {n} passages; ask for at most {n}")


def depth(loaded: runs.Loaded, cfg: AnswerConfig) -> int:
    """Number of passages to search for each question (a search may find fewer); 0 for closed_book."""
    wanted = max(cfg.n_retrieved, cfg.n_docs or loaded.rag.config.n_docs)
    return 0 if cfg.closed_book else min(wanted, loaded.corpus.n_live)


def lookup(
    loaded: runs.Loaded, cfg: AnswerConfig, questions: Sequence[str], known: SearchResult | None = None
) -> Lookup:
    """The request of this process's questions to an index on the host; known: an earlier search result to use."""
    n_docs = cfg.n_docs or loaded.rag.config.n_docs

    def read(arrays: Arrays, found: SearchResult | None) -> tuple[np.ndarray, Arrays]:
        if found is None:  # closed book
            return np.zeros(len(questions), np.int32), {}
        read_BK, scores_BK = found.ids_BK[:, :n_docs], found.scores_BK[:, :n_docs]
        if cfg.oracle:
            read_BK = np.asarray(gold_first(jnp.asarray(arrays["gold"]), jnp.asarray(found.ids_BK), n_docs))
        return read_BK, {
            "scores": np.where(np.isfinite(scores_BK), scores_BK, 0).astype(np.float32),
            "found": read_BK >= 0,
            "document_rows": read_BK,
            "retrieved_rows": found.ids_BK,
        }

    return Lookup(depth(loaded, cfg), lambda: list(questions), read, None if cfg.closed_book else known)


def bucket(length: int, longest: int, least: int = 16) -> int:
    """Rounds a length up to least, 2 * least, 4 * least, ..., longest: few different shapes need few programs."""
    size = min(least, longest)
    while size < min(length, longest):
        size *= 2
    return min(size, longest)


def answer_questions(
    location: IndexLocation,
    params: Params,
    index: Any,
    questions: Sequence[str],
    cfg: AnswerConfig,
    program: AnswerFn | None = None,
    gold_NG: np.ndarray | None = None,
    known: SearchResult | None = None,
) -> list[Answer]:
    """Answers to questions, in their order.

    program: of `make_answer`, None to make it here.
    gold_NG: the `right_rows` of the questions, which cfg.oracle needs.
    known: an earlier search result for them, [N, n_docs or more], used in place of a search; without -1 where the index
      is on the devices.

    Questions of similar length are batched together, and lengths and batch size are rounded up to a few sizes
    (`bucket`), so that other questions of the same sizes need no compilation. With several processes all pass the same
    questions, and all get all answers.
    """
    loaded = location.loaded
    check_docs(loaded, cfg)
    if cfg.oracle and gold_NG is None:
        raise InputError("oracle needs the right passages of the questions, which rag-jax evaluate reads of their file")
    program = program or make_answer(loaded, cfg)
    corpus, model = loaded.corpus, loaded.rag.config
    sides = corpus.encoder_tokenizer, corpus.generator_tokenizer
    tables = batching.encode_questions(
        questions, *sides, model.question_length, model.question_keeps, model.tail_length
    )
    shards = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    size = -(-bucket(len(questions), cfg.batch, 1) // shards) * shards
    length_N = np.maximum(tables["question_length"], tables["tail_length"])
    order = np.argsort(-length_N, kind="stable")  # the longest first: what does not fit in memory fails at once
    answers: list[Answer | None] = [None] * len(questions)
    with Progress(len(questions), "answering", "question") as progress:
        for number, start in enumerate(range(0, len(questions), size)):
            rows = order[np.minimum(np.arange(start, start + size), len(questions) - 1)]
            width = bucket(int(length_N[rows].max()), model.question_length)
            own = rows[sharding.own_rows(loaded.mesh, size)]
            batch = {name: table[own][:, :width] if table.ndim == 2 else table[own] for name, table in tables.items()}
            if cfg.oracle and gold_NG is not None:
                batch["gold"] = gold_NG[own]
            found_B = None if known is None else SearchResult(known.ids_BK[own], known.scores_BK[own])
            wanted = lookup(loaded, cfg, [questions[row] for row in own], found_B)
            given = location.given(params, index, batch, wanted)
            out = sharding.fetched(program(params, given.table, given.passages, given.batch, number))
            count = min(size, len(questions) - start)
            found = collect(corpus, out, count, cfg.closed_book)
            for row, one in zip(rows, found, strict=False):
                answers[row] = one
            progress.update(count)
    return [one for one in answers if one is not None]


def collect(corpus: Corpus, out: Any, count: int, closed_book: bool) -> list[Answer]:
    """Turns the arrays of the first `count` answers of a batch into answers with texts and passages."""
    answers, tokenizer = [], corpus.generator_tokenizer
    for i in range(count):
        read = []
        order = np.argsort(-out.prior[i], kind="stable")  # a search on the host may have ranked by other scores
        order = order[out.read[i][order] >= 0]
        for place in order:
            p = corpus[int(out.read[i][place])]
            read.append(ReadPassage(p.id, p.title, p.text, float(out.prior[i][place]), float(out.posterior[i][place])))
        text = tokenizer.decode([int(token) for token in out.sequences[i]]).strip()
        retrieved = () if closed_book else tuple(corpus[int(row)].id for row in out.rows[i] if row >= 0)
        ids_S, by_token = out.sequences[i][1:], None
        said_S = np.array([int(token) not in tokenizer.special_ids for token in ids_S], bool)
        tokens = tuple(tokenizer.pieces([int(token) for token in ids_S[said_S]]))
        if out.token_posterior is not None and len(order):
            by_token = tuple(tuple(map(float, shares_K)) for shares_K in out.token_posterior[i][said_S][:, order])
        passages = () if closed_book else tuple(read)
        answers.append(Answer(text, float(out.scores[i]), passages, retrieved, tokens, by_token))
    return answers


@dataclass(frozen=True)
class Pipeline:
    """A trained run, ready to answer: `Pipeline.from_run(path).ask("Who ...?")`.

    It does not change: `with_index` returns another pipeline with other passages, which shares parameters and programs.
    A server switches by one assignment, while questions in progress are still answered from the old pipeline.

    programs: compiled programs by their settings, filled as they are needed.
    """

    directory: Path
    config: RunConfig
    location: IndexLocation
    params: Params
    index: Any
    snapshot: snapshots.Snapshot
    programs: dict[AnswerConfig, AnswerFn] = field(default_factory=dict, repr=False)

    @property
    def loaded(self) -> runs.Loaded:
        """The model and the corpus."""
        return self.location.loaded

    @property
    def search(self) -> SearchConfig:
        """How passages are searched."""
        return self.location.cfg

    @classmethod
    def from_run(
        cls, path: str | Path, index: str | Path | None = None, search: SearchConfig | None = None, live: bool = False
    ) -> "Pipeline":
        """Opens a run to answer questions.

        index: an index made by `rag-jax index`, to answer from other passages without training; None: the run's own.
        search: how passages are searched; None: as the run was trained.
        live: give the tables spare rows (`runs.directory.capacity`), so that `with_index` needs no compilation for an
          update of the corpus that fits in them.

        InputError where the index was made by another encoder, or its corpus with other tokenizers or passages.
        """
        directory = Path(path)
        config = runs.read_config(directory)
        checkpoint.check_params(directory / "params")
        snapshot = snapshots.open_snapshot(index or directory / "index")
        corpus = Corpus.open(snapshot.manifest.corpus)
        runs.check_tokenizers(directory, corpus)
        search = search or config.search
        mesh = sharding.mesh_here(config.mesh)
        loaded = runs.load(config.model.unrolled(), corpus, mesh, search.in_graph, live)
        params = runs.read_params(directory, loaded.rag, loaded.mesh)
        runs.check_snapshot(loaded, params, snapshot)
        location = location_of(loaded, search, directory / "search")
        return cls(directory, config, location, params, location.of_snapshot(snapshot), snapshot)

    def with_index(self, path: str | Path) -> "Pipeline":
        """A pipeline with another index snapshot, usually of an update of the corpus; this one stays as it is.

        Both share parameters and the arrays that are equal in both. Its answers are those of `from_run` with that
        snapshot. Compiled programs are kept if the tables have as many rows as before (see `live` of from_run), and
        always with a search on the host. InputError as in from_run.
        """
        snapshot = snapshots.open_snapshot(path)
        corpus = Corpus.open(snapshot.manifest.corpus)
        runs.check_tokenizers(self.directory, corpus)
        snapshots.check(snapshot, corpus.hash, self.snapshot.manifest.encoder_hash, corpus.encoder_tokenizer.hash)
        loaded = live_corpus.updated(self.loaded, corpus)
        location = location_of(loaded, self.search, self.directory / "search")
        index = location.of_next_snapshot(self.index, self.snapshot, snapshot)
        programs = self.programs if location.table_rows == self.location.table_rows else {}
        return dataclasses.replace(self, location=location, index=index, snapshot=snapshot, programs=programs)

    def search_manifest(self) -> dict[str, Any]:
        """Description of the search, for reports."""
        return self.location.manifest(self.index)

    def answer_config(self, **changes: Any) -> AnswerConfig:
        """The run's default AnswerConfig, with changed fields."""
        return dataclasses.replace(answer_config.answering(self.config), **changes)

    def answer(
        self,
        questions: Sequence[str],
        cfg: AnswerConfig,
        gold_NG: np.ndarray | None = None,
        known: SearchResult | None = None,
    ) -> list[Answer]:
        """Answers to questions, in their order; InputError for an empty question.

        gold_NG, known: see answer_questions.
        """
        if not all(question.strip() for question in questions):
            raise InputError("a question is empty; give some words")
        if cfg not in self.programs:
            self.programs[cfg] = make_answer(self.loaded, cfg)
        program = self.programs[cfg]
        return answer_questions(self.location, self.params, self.index, questions, cfg, program, gold_NG, known)

    def ask(self, question: str, n_docs: int = 0, num_beams: int = 0) -> Answer:
        """The answer to one question, with the passages it came from; 0: the run's default."""
        given = {"n_docs": n_docs, "num_beams": num_beams}
        changes = {name: value for name, value in given.items() if value}
        return self.answer([question], self.answer_config(batch=1, n_retrieved=1, **changes))[0]
