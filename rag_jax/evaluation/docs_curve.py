"""Quality of answers by the number of documents read at test time (Lewis et al. 2020, figure 3): one search, then one
decoding for each number. Answers are stored beside the report, so that a killed evaluation resumes after the numbers
that are done.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax import metrics
from rag_jax.errors import InputError
from rag_jax.inference import pipeline as pipelines
from rag_jax.inference.pipeline import Answer, AnswerConfig, Pipeline
from rag_jax.retrieval.search import SearchResult
from rag_jax.system import configuration, distributed, files, logs

DIRECTORY = "n_docs_curve"
KIND, VERSION = "answers", 1

Said = list[tuple[str, float]]  # text and log p(y|x) of every question


def check(pipeline: Pipeline, cfg: AnswerConfig, numbers: Sequence[int]) -> None:
    """Raises InputError for impossible numbers of documents, before anything is decoded."""
    if numbers and (cfg.closed_book or cfg.retrieval_only or cfg.oracle):
        raise InputError(
            "--n-docs-curve reads the passages found and writes answers: leave out --closed-book, --retrieval-only and "
            "--oracle"
        )
    for n_docs in numbers:
        if n_docs < 1:
            raise InputError(f"--n-docs-curve {n_docs}: the numbers of documents must be at least 1")
        pipelines.check_docs(pipeline.loaded, dataclasses.replace(cfg, n_docs=n_docs))


def curve(
    pipeline: Pipeline,
    cfg: AnswerConfig,
    numbers: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    setting: metrics.Judging,
    out: Path,
) -> list[dict[str, float]]:
    """Figures of answers, with intervals, for every number of documents: [{"n_docs", "exact_match", "exact_match_low",
    ...}].

    rows: prediction rows of answers with `cfg`; its own number of documents is not decoded again.
    """
    own = cfg.n_docs or pipeline.loaded.rag.config.n_docs
    known = {own: [(row["prediction"], row["score"]) for row in rows]}
    texts = [row["question"] for row in rows]
    said = answers_by_docs(pipeline, cfg, sorted(set(numbers)), texts, known, out / DIRECTORY)
    found = []
    for n_docs, pairs in said.items():
        changed = [{**row, "prediction": text, "score": score} for row, (text, score) in zip(rows, pairs, strict=True)]
        names = [name for name in metrics.by_default(changed, setting) if name in metrics.OF_ANSWERS]
        summary = metrics.summarize(changed, setting, names, intervals=True)
        figures = [f"{name}{end}" for name in metrics.OF_ANSWERS if name in summary for end in ("", "_low", "_high")]
        found.append({"n_docs": n_docs, **{name: summary[name] for name in figures}})
    return found


def answers_by_docs(
    pipeline: Pipeline,
    cfg: AnswerConfig,
    numbers: Sequence[int],
    texts: Sequence[str],
    known: Mapping[int, Said],
    directory: Path,
) -> dict[int, Said]:
    """The answers with each number of documents, from `known` or the directory where they are there, else decoded."""
    found: dict[int, Said] = {}
    search: SearchResult | None = None
    if distributed.first():
        directory.mkdir(parents=True, exist_ok=True)
    for place, n_docs in enumerate(numbers, start=1):
        path = directory / f"{n_docs}.json"
        key = identity(pipeline, dataclasses.replace(cfg, n_docs=n_docs), texts)
        kept = known.get(n_docs) or distributed.from_first(read(path, key) if distributed.first() else None)
        if kept is None:
            logs.info(f"answers with {n_docs} documents ({place} of {len(numbers)} numbers)")
            search = search or searched(pipeline, cfg, texts, max(numbers))
            # A search in graph ranks by its scores; one on the host may rank by something other than the prior.
            prior = "search" if pipeline.search.in_graph else cfg.prior
            here = dataclasses.replace(cfg, n_docs=n_docs, n_retrieved=n_docs, prior=prior)
            kept = [(one.text, one.score) for one in pipeline.answer(texts, here, known=search)]
            if distributed.first():
                files.write_sealed(path, KIND, VERSION, {"key": key, "answers": kept})
        else:
            logs.info(f"answers with {n_docs} documents ({place} of {len(numbers)} numbers): done before")
        found[n_docs] = [(text, score) for text, score in kept]
    return found


def searched(pipeline: Pipeline, cfg: AnswerConfig, texts: Sequence[str], deepest: int) -> SearchResult:
    """The first `deepest` passages of every question; their scores are the logarithms of the prior over them."""
    alone = dataclasses.replace(cfg, retrieval_only=True, n_docs=deepest, n_retrieved=deepest)
    return as_result(pipeline, pipeline.answer(texts, alone), deepest)


def as_result(pipeline: Pipeline, answers: Sequence[Answer], deepest: int) -> SearchResult:
    ids_NK = np.full((len(answers), deepest), -1, np.int32)
    scores_NK = np.full((len(answers), deepest), -np.inf, np.float32)
    for ids_K, scores_K, found in zip(ids_NK, scores_NK, answers, strict=True):
        names = found.retrieved[:deepest]
        prior = {passage.id: passage.prior for passage in found.passages}
        ids_K[: len(names)] = pipeline.loaded.corpus.rows(names)
        shares_K = np.array([prior[name] for name in names], np.float32)
        scores_K[: len(names)] = np.log(np.maximum(shares_K, np.finfo(np.float32).tiny))
    return SearchResult(ids_NK, scores_NK)


def identity(pipeline: Pipeline, cfg: AnswerConfig, texts: Sequence[str]) -> str:
    """A hash of everything that the answers depend on: parameters, index, search, settings and questions."""
    parameters = files.file_sha256(pipeline.directory / "params" / files.MANIFEST)
    asked = [parameters, pipeline.snapshot.hash, pipeline.search_manifest(), configuration.plain(cfg), list(texts)]
    return files.canonical_sha256(asked)


def read(path: Path, key: str) -> Said | None:
    """The answers in a file; None if it is missing, damaged, or has another key."""
    try:
        kept = files.read_sealed(path, KIND, VERSION, "")
    except InputError:
        return None
    return kept["answers"] if kept["key"] == key else None
