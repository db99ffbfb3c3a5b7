"""How questions are answered: the settings of `answer`, which a run's configuration and the command line fill in."""

from dataclasses import dataclass
from typing import Literal

from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import build


@dataclass(frozen=True)
class AnswerConfig:
    """How to answer. n_retrieved passages are found (for recall), the first n_docs of them are read; 0: the model's.

    closed_book: no passage is read. oracle: the question's right passages are read first, then what was retrieved.
    retrieval_only: passages are found, and no answer is written. mode and candidates (of each document, 0: all its
    beams) are of RAG-Sequence. allowed_answers: the only answers there may be, and bad_words what none may say, as
    texts; bad_word_ids: the same as tokens. doc_chunk: documents held in memory at a time, 0: all. seed: of do_sample.
    start_id, forced_bos_id, forced_eos_id, end_ids: -1 (empty) for the model's, -2 for nothing forced. The rest is as
    in decoding.search.Options.
    """

    n_docs: int = 0
    n_retrieved: int = 100
    num_beams: int = 1
    max_length: int = 32
    mode: Literal["thorough", "fast"] = "thorough"
    batch: int = 16
    closed_book: bool = False
    oracle: bool = False
    retrieval_only: bool = False
    prior: Literal["dense", "search"] = "dense"
    candidates: int = 0
    doc_chunk: int = 0
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: Literal[False, True, "never"] = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    suppress_ids: tuple[int, ...] = ()
    begin_suppress_ids: tuple[int, ...] = ()
    start_id: int = -1
    forced_bos_id: int = -1
    forced_eos_id: int = -1
    end_ids: tuple[int, ...] = ()
    allowed_answers: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def answering(cfg: RunConfig, **defaults: object) -> AnswerConfig:
    """How a run answers by default: what its configuration says, over `defaults`, over what its model is made for."""
    made_for = {"n_docs": cfg.model.n_docs, "max_length": cfg.target_length}
    return build(AnswerConfig, {**made_for, **defaults, **cfg.answering}, "config.answering")
