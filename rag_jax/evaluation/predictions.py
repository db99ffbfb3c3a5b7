"""Builds prediction rows, one per question, which predictions.jsonl stores and metrics read; metrics/figures.py
describes their keys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rag_jax.corpus.directory import Corpus
from rag_jax.data import gold
from rag_jax.data.readers.formats import Passage, Question
from rag_jax.inference.config import AnswerConfig
from rag_jax.inference.pipeline import Answer
from rag_jax.metrics import matching

DIGITS = 4  # decimals of the posteriors of tokens, which take up most of a row


def deeper(cfg: AnswerConfig, questions: Sequence[Question], corpus: Corpus) -> AnswerConfig:
    """`cfg` that retrieves more passages: as many more as may have to be excluded from the ranking of a question."""
    lost = [excluded(question) for question in questions]
    leads = gold.rows_of((one for names in lost for one in names), corpus)
    most = max((sum(len(leads[one]) for one in names) for names in lost), default=0)
    return dataclasses.replace(cfg, n_retrieved=cfg.n_retrieved + most)


def rows(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    corpus: Corpus,
    depth: int,
    retrieval_only: bool = False,
    match: str = "string",
) -> list[dict[str, Any]]:
    """The prediction rows of the questions.

    depth: passages that were asked for, 0 without retrieval; further ones are left out.
    match: as in metrics.Judging.
    """
    units = PassageCache(corpus)
    levels = gold.levels(questions, corpus)
    return [
        row(question, found, units, level, depth)
        | ({"prediction": None} if retrieval_only else {})
        | {"retrieved_has_answer": has_answer(question, found, units, depth, match)}
        for question, found, level in zip(questions, answers, levels, strict=True)
    ]


class PassageCache:
    """Cache of the passages of a corpus by id, and of the documents that they are a part of."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._known: dict[str, tuple[Passage, str]] = {}

    def of(self, passage_id: str) -> tuple[Passage, str]:
        """(passage, id of the document that it was cut from, or its own id if it was not cut)."""
        if passage_id not in self._known:
            at = self.corpus.row(passage_id)
            self._known[passage_id] = self.corpus[at], self.corpus.cut_from(at) or passage_id
        return self._known[passage_id]

    def uncut(self, one: str) -> str:
        """The document that a gold id names; the id of a passage that was cut from a document names that document."""
        row = int(self.corpus.rows([one], missing=-1)[0])
        return one if row < 0 else self.of(one)[1]


def row(question: Question, found: Answer, units: PassageCache, level: gold.Level, depth: int) -> dict[str, Any]:
    """A prediction row without `retrieved_has_answer`."""
    golds, right = answers_of(question), question.right_passage_ids
    relevance, needed = question.extra.get("relevance"), ways(question, units.corpus)
    pages = not right and relevance is None and needed  # pages alone are known, as KILT's entity linking has it
    if pages:
        level, right = "document", tuple(dict.fromkeys(page for way in needed for page in way))
    elif level == "document":
        right = tuple(dict.fromkeys(map(units.uncut, right)))
        relevance = relevance and by_document(relevance, units)
    retrieved = kept(question, found, units)[:depth]
    documents = {}
    if level == "document":
        for one in dict.fromkeys((*retrieved, *(passage.id for passage in found.passages))):
            passage, document = units.of(one)
            documents[one] = passage.document if pages else document
    return {
        "id": question.id,
        "question": question.question,
        "prediction": found.text,
        "answers": golds,
        "target": question.target,
        "label": question.extra.get("label"),
        "unanswerable": not (golds or question.target is not None or right or relevance),
        "score": found.score,
        "tokens": list(found.tokens),
        "gold": list(right),
        "gold_documents": needed,
        "relevance": relevance,
        "level": level if right or relevance else None,
        "depth": depth,
        "retrieved": retrieved,
        "documents": {one: document for one, document in documents.items() if one != document},
        "read": [passage.id for passage in found.passages],
        "prior": [passage.prior for passage in found.passages],
        "posterior": [passage.posterior for passage in found.passages],
        "token_posterior": found.token_posterior
        and [[round(share, DIGITS) for share in shares] for shares in found.token_posterior],
        "retrieved_documents": list(dict.fromkeys(units.of(one)[0].document for one in retrieved)),
    }


def has_answer(question: Question, found: Answer, units: PassageCache, depth: int, match: str) -> list[bool]:
    """Whether the text of each retrieved passage has an answer; the title does not count (DPR)."""
    finder, golds = matching.FINDERS[match], answers_of(question)
    return [finder(units.of(one)[0].text, golds) for one in kept(question, found, units)[:depth]]


def answers_of(question: Question) -> list[str]:
    """The answers that are not blank; training leaves blank ones out, too."""
    return [answer for answer in question.answers if answer.strip()]


def excluded(question: Question) -> list[str]:
    """Ids of passages, or documents, that do not count as retrieved for the question."""
    found = question.extra.get("excluded_passage_ids")
    return list(map(str, found)) if isinstance(found, list) else []


def kept(question: Question, found: Answer, units: PassageCache) -> list[str]:
    """The retrieved ids without the excluded ones."""
    out = set(excluded(question))
    return [one for one in found.retrieved if one not in out and not (out and units.of(one)[1] in out)]


def by_document(relevance: dict[str, Any], units: PassageCache) -> dict[str, Any]:
    """Grades by document: that of its best passage."""
    grades: dict[str, Any] = {}
    for one, grade in relevance.items():
        document = units.uncut(one)
        grades[document] = max(grade, grades.get(document, grade))
    return grades


def ways(question: Question, corpus: Corpus) -> list[list[str]]:
    """The documents that each way to answer needs: KILT's `provenance`, a list of lists, if the question has it.

    Else a single way: `wikipedia_ids`, or the documents of the right passages (the id itself if the corpus lacks it).
    """
    provenance, pages = (question.extra.get(name) for name in ("provenance", "wikipedia_ids"))
    if isinstance(provenance, list) and all(isinstance(way, list) for way in provenance):
        return [list(dict.fromkeys(map(str, way))) for way in provenance]
    if isinstance(pages, list) and pages:
        return [list(dict.fromkeys(map(str, pages)))]
    leads = gold.rows_of(question.right_passage_ids, corpus)
    found = [corpus[some[0]].document if some else one for one, some in leads.items()]
    return [list(dict.fromkeys(found))] if found else []
