"""Settings of answering questions, which a run's configuration (`answering`) and the command line fill in."""

from dataclasses import dataclass
from typing import Literal

from rag_jax.runs.config import RunConfig
from rag_jax.system.configuration import build


@dataclass(frozen=True)
class AnswerConfig:
    """How questions are answered; names and meanings of decoding are those of decoding.rules.DecodingOptions.

    n_docs: passages read per question; 0: model.n_docs.
    n_retrieved: passages found per question, of which the first n_docs are read; the others count for recall.
    num_beams: beams of the search; 1: greedy.
    max_length: tokens of an answer, with start and end tokens.
    mode: decoding of RAG-Sequence (section 2.5 of the paper): `thorough` scores every candidate under every passage,
      `fast` takes p(y|x,z) as 0 where the beams of z did not produce y.
    batch: questions answered at once, over all devices.
    closed_book: read no passage.
    oracle: read the gold passages of the question first, then retrieved ones.
    retrieval_only: find passages and write no answer.
    prior: p(z|x) from inner products of the embeddings (`dense`), or from the scores of the `search`, e.g. BM25.
    candidates: of RAG-Sequence, answers taken from each passage; 0: all its beams.
    doc_chunk: passages held in memory at a time; 0: all.
    min_length: tokens of an answer at least, with the start token.
    length_penalty: the log-probability of an answer is divided by its length to this power.
    early_stopping: when a search ends, see DecodingOptions.
    no_repeat_ngram_size: size of n-grams that may not occur twice in an answer; 0: all may.
    repetition_penalty: above 1, tokens of the answer so far become less likely to come again; 1: none.
    bad_words, bad_word_ids: what no answer may contain, as texts and as token sequences.
    suppress_ids, begin_suppress_ids: tokens that no answer may contain, or begin with.
    start_id, forced_bos_id, forced_eos_id: token ids; -1: the model's; the forced ones also -2: none.
    end_ids: tokens that end an answer; (): the model's.
    allowed_answers: the only answers that may be given, as texts; (): any.
    do_sample: draw tokens at random, after temperature, the top_k most likely (0: all) and the nucleus top_p.
    seed: of do_sample.
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
    """How a run answers by default.

    Values of its configuration come before `defaults`, and those before model.n_docs and target_length.
    """
    made_for = {"n_docs": cfg.model.n_docs, "max_length": cfg.target_length}
    return build(AnswerConfig, {**made_for, **defaults, **cfg.answering}, "config.answering")
