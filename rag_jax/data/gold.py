"""The right (gold) passages of questions in a corpus: the rows that their ids name, and the ids that the corpus lacks.

An id names a passage, or a document that was cut into passages when the corpus was built. Training, the oracle and
evaluation all use this, so that what one refuses the others refuse, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from rag_jax.data.readers.rows import Passage, Question
from rag_jax.errors import InputError
from rag_jax.metrics import matching
from rag_jax.system.logs import info

Level = Literal["passage", "document"]

MOST = 0.5  # with a larger share of unknown gold ids, a file seems to be made for another corpus
FEW = 20  # so many unknown ids are never refused: with few questions a large share may be chance
SHOWN = 3  # unknown ids that a message names


class PassageLookup(Protocol):
    """The part of a corpus (corpus.directory.Corpus) that finding right passages needs."""

    directory: Path

    @property
    def n_cut(self) -> int: ...
    def __getitem__(self, row: int) -> Passage: ...
    def rows(self, passage_ids: Sequence[str], missing: int | None = None) -> np.ndarray: ...
    def pieces(self, passage_id: str) -> list[int]: ...
    def cut_from(self, row: int) -> str | None: ...
    def deleted(self, passage_id: str) -> bool: ...


def rows_of(ids: Iterable[str], corpus: PassageLookup) -> dict[str, list[int]]:
    """Rows of each id: one of a passage, several of a document that was cut, none where the corpus lacks it."""
    each = list(dict.fromkeys(ids))
    found = corpus.rows(each, missing=-1).tolist() if each else []
    return {one: [row] if row >= 0 else corpus.pieces(one) for one, row in zip(each, found, strict=True)}


def right_rows(questions: Sequence[Question], corpus: PassageLookup, tally: "Tally | None" = None) -> list[list[int]]:
    """Rows of the right passages of each question, each once.

    A document that was cut counts with those of its passages that hold an answer, or with all where none does.
    tally: counts the ids of these questions, too.
    """
    leads = rows_of((one for question in questions for one in question.right_passage_ids), corpus)
    found = []
    for question in questions:
        rows: dict[int, None] = {}
        for one in question.right_passage_ids:
            pieces = leads[one]
            holding = holders(pieces, question.answers, corpus) if len(pieces) > 1 else []
            rows |= dict.fromkeys(holding or pieces)
        found.append(list(rows))
    if tally is not None:
        tally.count(questions, leads, corpus)
    return found


def holders(rows: Sequence[int], answers: Sequence[str], corpus: PassageLookup) -> list[int]:
    """The rows whose text has one of the answers."""
    return [row for row in rows if matching.has_answer(corpus[row].text, answers)]


@dataclass
class Tally:
    """Counts of gold ids.

    named: ids that questions name.
    missing: those that the corpus never had.
    deleted: those that were deleted from it.
    first_missing: the first SHOWN missing ids.
    """

    named: int = 0
    missing: int = 0
    deleted: int = 0
    first_missing: list[str] = field(default_factory=list)

    def count(self, questions: Sequence[Question], leads: Mapping[str, Sequence[int]], corpus: PassageLookup) -> None:
        for one in (one for question in questions for one in question.right_passage_ids):
            self.named += 1
            if leads[one]:
                continue
            if corpus.deleted(one):
                self.deleted += 1
                continue
            self.missing += 1
            if len(self.first_missing) < SHOWN and one not in self.first_missing:
                self.first_missing.append(one)

    def words(self, where: object) -> str:
        """A sentence on the unknown and the deleted ids, "" where there are none; where: the corpus."""
        parts = []
        if self.missing:
            more = ", ..." if self.missing > len(self.first_missing) else ""
            names = ", ".join(map(repr, self.first_missing)) + more
            parts.append(f"{self.missing:,} of {self.named:,} gold ids are not in the corpus {where} ({names})")
        if self.deleted:
            parts.append(f"{self.deleted:,} of {self.named:,} gold ids were deleted from the corpus {where}")
        return "; ".join(parts)

    def settle(self, name: object, where: object, effect: str, mend: str, refuse: bool = True) -> None:
        """Warns of unknown and deleted gold ids; InputError where most are unknown and `refuse` is set.

        name: of the questions. where: the corpus. effect: what follows from such ids, for the warning. mend: what the
        user can do, for the error.
        """
        words = self.words(where)
        if refuse and self.missing > max(FEW, MOST * self.named):
            raise InputError(f"{name}: {words}: it seems to be made for another corpus; {mend}")
        if words:
            info(f"warning: {name}: {words}; {effect}")


def tally(questions: Sequence[Question], corpus: PassageLookup) -> Tally:
    """The tally of these questions alone."""
    found = Tally()
    found.count(questions, rows_of((one for q in questions for one in q.right_passage_ids), corpus), corpus)
    return found


def levels(questions: Sequence[Question], corpus: PassageLookup) -> list[Level]:
    """Whether the ranking of each question is judged by passage or by document (the texts before the build cut them).

    A question that names a cut document is judged by document, one that names a piece of one by passage. Questions that
    only name uncut texts are judged by passage if others are and none is by document; else by document, since it is
    documents that files usually name.
    """
    if not corpus.n_cut:
        return ["passage"] * len(questions)
    leads = rows_of((one for question in questions for one in question.right_passage_ids), corpus)
    told: list[Level | None] = []
    for question in questions:
        rows = [leads[one] for one in question.right_passage_ids]
        if any(len(some) > 1 or (some and corpus[some[0]].id != one)
               for one, some in zip(question.right_passage_ids, rows, strict=True)):  # fmt: skip
            told.append("document")
        elif any(corpus.cut_from(row) is not None for some in rows for row in some):
            told.append("passage")
        else:
            told.append(None)
    usual: Level = "passage" if "passage" in told and "document" not in told else "document"
    return [one or usual for one in told]
