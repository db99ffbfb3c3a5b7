"""The questions that a stage trains on: those that bring what its objective needs, in batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.data.examples import Examples
from rag_jax.errors import InputError


@dataclass(frozen=True)
class Data:
    """Training examples of a corpus.

    weights: of their inputs.
    unkept: what the examples were made of, where they are not kept in the run directory yet.
    """

    examples: Examples
    corpus: Corpus
    weights: Mapping[str, float]
    unkept: Mapping[str, Any] | None = None


class QuestionNeeds(NamedTuple):
    """What a question must bring to be trained on.

    gold: a right passage. negatives: so many wrong ones are drawn from its own, 0 for none. window: the answer occurs
    in the first right passage, of which so many tokens around it are read, 0 for the whole passage.
    """

    gold: bool = False
    negatives: int = 0
    window: int = 0


def usable_pairs(needs: QuestionNeeds, found: Examples, stage: str) -> np.ndarray:
    """The pairs of question and answer that a stage can train on; InputError where there are none."""
    pairs = np.arange(len(found.label))
    if needs.gold:
        pairs = pairs[found.gold.lengths(found.question_of(pairs)) > 0]
        if not len(pairs):
            raise InputError(f"stage {stage}: no training question names a gold passage (positive_passage_ids)")
    if needs.negatives:
        questions = found.question_of(pairs)
        if not (found.hard.lengths(questions) + found.other.lengths(questions)).any():
            raise InputError(
                f"stage {stage}: no training question names a wrong passage (hard_negative_passage_ids, "
                "negative_passage_ids) that the corpus has, which negatives='given' needs"
            )
    if needs.window:
        pairs = pairs[found.answer_P2[pairs, 1] > 0]
        if not len(pairs):
            raise InputError(f"stage {stage}: no answer occurs in its gold passage, which window={needs.window} needs")
    return pairs
