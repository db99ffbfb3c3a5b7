"""Questions for a retriever from a corpus alone: the inverse cloze task (Lee et al. 2019, section 4).

The question is the title or a sentence of a passage, and its gold passage is that passage. In 90% of the cases the
question is removed from the passage, so that matching words alone does not solve the task; in the others it stays.
"""

import re

import grain
import numpy as np

from rag_jax.corpus.build import encoder_rows
from rag_jax.corpus.directory import Corpus
from rag_jax.data.batching import Batch, passage_batches
from rag_jax.data.readers.formats import Passage
from rag_jax.data.tokenizers import pad_rows, wrap

REMOVED = 0.9  # share of the examples whose passage loses the question
_BETWEEN = re.compile(r"(?<=[.!?…؟۔।])\s+|(?<=[。！？])")


def sentences(text: str) -> list[str]:
    """The sentences of a text, cut after the marks that end one in any script."""
    return [part.strip() for part in _BETWEEN.split(text) if part.strip()]


def example(passage: Passage, rng: np.random.Generator, removed: float = REMOVED) -> tuple[str, Passage]:
    """(question, passage) from a passage: its title or one of its sentences, drawn uniformly, and the passage.

    removed: probability that the question is removed from the passage; one that has no other part stays whole.
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
    """Endless shuffled batches of questions, each with its own passage as `passage_ids`; deleted passages are left out.

    own: rows of each batch that this process makes, the same as in the whole batch; None: all.
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
