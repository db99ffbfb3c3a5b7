"""Multi-hop questions with their paragraphs in the file: HotpotQA, 2WikiMultihopQA and MuSiQue."""

from collections.abc import Iterator
from typing import Any

from rag_jax.data.readers.rows import (
    BadLine,
    Fields,
    Passage,
    Question,
    content_id,
    each,
    every,
    flag,
    kind,
    optional,
    rest,
    string,
    strings,
    unique,
)
from rag_jax.data.readers.simple_rows import identified, numbered


def hotpot(fields: Fields, own_id: str) -> list[Question]:
    """{"_id", "question", "answer", "supporting_facts": [[title, number]], "context": [[title, [sentences]]]}.

    The paragraphs with a supporting fact are the right passages, the others hard negatives. A blind test file has
    neither answer nor facts. Hugging Face has context and facts as lists by name, and `id`.
    """
    found = list(hotpot_passages(fields, own_id))
    facts = fields.get("supporting_facts")
    named = facts.get("title") if isinstance(facts, dict) else [f[0] for f in facts or () if isinstance(f, list) and f]
    if not isinstance(named, list):
        raise BadLine(f"field 'supporting_facts' must be pairs of a title and a number, it is {kind(facts)}")
    absent = [title for title in named if title not in {passage.title for passage in found}]
    if absent:
        raise BadLine(f"supporting_facts names {absent[0]!r}, which no paragraph of the context is called")
    sides = {"positive_passage_ids": [passage.id for passage in found if passage.title in named]}
    if named:
        sides["hard_negative_passage_ids"] = [passage.id for passage in found if passage.title not in named]
    answers = [string(fields, "answer")] if fields.get("answer") is not None else []
    return numbered(rest(fields, "context", "supporting_facts", "answer") | {"answers": answers, **sides}, own_id)


def hotpot_passages(fields: Fields, own_id: str) -> Iterator[Passage]:
    """The paragraphs of the context."""
    context: Any = fields.get("context")
    if isinstance(context, dict):
        pairs: Any = zip(context.get("title") or (), context.get("sentences") or (), strict=False)
    else:
        pairs = context if isinstance(context, list) else ()
    for number, pair in enumerate(map(tuple, pairs)):
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], list):
            raise BadLine(f"context[{number}]: a title and a list of sentences are needed")
        sentences = strings({"sentences": pair[1]}, "sentences")
        title, text = string({"title": pair[0]}, "title"), ""
        for sentence in sentences:  # HotpotQA's begin with a space, 2WikiMultihopQA's do not
            text += sentence if not text or sentence[:1].isspace() or text[-1:].isspace() else f" {sentence}"
        if text.strip():
            name = content_id(title, text.strip())
            yield Passage(name, title, text.strip(), name)


def musique(fields: Fields, own_id: str) -> list[Question]:
    """{"id", "question", "answer", "answer_aliases", "answerable", "paragraphs": [{"title", "paragraph_text",
    "is_supporting"}]}.

    The full set has each question twice under the same id, the second time without a paragraph that it needs; the id of
    that one gets the ending -unanswerable here.
    """
    found = every(each(fields, "paragraphs", lambda one: [(_paragraph(one), flag(one, "is_supporting"))]))
    names = [passage.id for passage, _ in found]
    answerable = flag(fields, "answerable") is not False
    changed: Fields = {"answers": [], "answerable": answerable}
    if answerable:
        right = unique(passage.id for passage, supporting in found if supporting)
        answer = optional(fields, "answer")
        aliases = strings({"answer_aliases": []} | fields, "answer_aliases")
        changed["answers"] = list(unique((answer, *aliases))) if answer else []
        changed["positive_passage_ids"] = list(right)
        if right:
            changed["hard_negative_passage_ids"] = [name for name in unique(names) if name not in right]
    else:
        changed |= {"context_passage_ids": names, "id": f"{identified(fields, own_id)}-unanswerable"}
    return numbered(rest(fields, "paragraphs", "answer", "answer_aliases") | changed, own_id)


def musique_passages(fields: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """All paragraphs."""
    return each(fields, "paragraphs", lambda one: [_paragraph(one)])


def _paragraph(fields: Fields) -> Passage:
    title, text = optional(fields, "title"), string(fields, "paragraph_text")
    name = content_id(title, text)
    return Passage(name, title, text, name)
