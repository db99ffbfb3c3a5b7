"""Questions for a retriever from a corpus alone: the inverse cloze task (Lee et al. 2019, section 4).

A title or a sentence of a passage is the question, and the passage is what it has to find: without it in 90% of the
cases, so that more than the same words has to be learned, with it in the others.
"""

import re

import grain
import numpy as np

from rag_jax.corpus.build import encoder_rows
from rag_jax.corpus.directory import Corpus
from rag_jax.data.batching import Batch, passage_batches
from rag_jax.data.readers.formats import Passage
from rag_jax.data.tokenizers import pad_rows, wrap

REMOVED = 0.9
_BETWEEN = re.compile(r"(?<=[.!?…؟۔।])\s+|(?<=[。！？])")


def sentences(text: str) -> list[str]:
    """The text cut behind marks that end a sentence, in any script."""
    return [part.strip() for part in _BETWEEN.split(text) if part.strip()]


def example(passage: Passage, rng: np.random.Generator, removed: float = REMOVED) -> tuple[str, Passage]:
    """(question, passage): a part of it drawn evenly, its title and its sentences being the parts, and what is left.

    A passage of one part is left whole.
    """
    title, parts = [passage.title] if passage.title else [], sentences(passage.text)
    drawn = int(rng.integers(len(title) + len(parts)))
    question = [*title, *parts][drawn]
    if rng.random() >= removed or len(title) + len(parts) == 1:
        return question, passage
    if title and not drawn:
        return question, Passage(passage.id, "", passage.text, passage.document)
    kept = [part for i, part in enumerate(parts) if i != drawn - len(title)]
    return question, Passage(passage.id, passage.title, " ".join(kept), passage.document)


def batches(
    corpus: Corpus, batch: int, seed: int, question_length: int, own: np.ndarray | None = None
) -> grain.MapDataset:
    """Endless shuffled batches of questions with passages of their own, `passage_ids`; deleted ones are left out. own:
    only these rows of each batch are made, as they would be among all; None for all.
    """
    tokenizer, length = corpus.encoder_tokenizer, int(corpus.encoder_ids.shape[1])

    def assemble(drawn: list[tuple[int, np.random.Generator]]) -> Batch:
        pairs = [example(corpus[row], rng) for row, rng in drawn]
        questions = wrap(tokenizer, tokenizer.encode_batch([question for question, _ in pairs]), question_length)
        passages, _ = encoder_rows(tokenizer, [passage for _, passage in pairs], length)
        question_ids, question_lengths = pad_rows(questions, question_length, tokenizer.pad_id, np.int32)
        passage_ids, passage_lengths = pad_rows(passages, length, tokenizer.pad_id, np.int32)
        return {
            "question_ids": question_ids,
            "question_length": question_lengths,
            "passage_ids": passage_ids,
            "passage_length": passage_lengths,
            "gold": np.array([row for row, _ in drawn], np.int32)[:, None],
        }

    return passage_batches(corpus, batch, seed, own, assemble)
