"""The training questions of a run, and which of them a stage can use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rag_jax.corpus.directory import Corpus
from rag_jax.data.examples import Examples
from rag_jax.errors import InputError


@dataclass(frozen=True)
class Data:
    """Tokenised training questions with the corpus that their passages are rows of.

    weights: relative frequency of each input file in the batches.
    unkept: key of the example cache (data/example_cache.py) under which the examples are still to be written to the
      run directory; None if they are there, or there are none.
    """

    examples: Examples
    corpus: Corpus
    weights: Mapping[str, float]
    unkept: Mapping[str, Any] | None = None


class QuestionNeeds(NamedTuple):
    """Requirements of a stage's objective on each question.

    gold: whether a gold passage must be known.
    negatives: number of negatives that are drawn from those given with the question; 0: none.
    window: tokens of the first gold passage that are read around the answer, which must occur in it; 0: no window.
    """

    gold: bool = False
    negatives: int = 0
    window: int = 0


def usable_pairs(needs: QuestionNeeds, found: Examples, stage: str) -> np.ndarray:
    """Indices of the pairs of question and answer that a stage can train on; InputError where there are none."""
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
