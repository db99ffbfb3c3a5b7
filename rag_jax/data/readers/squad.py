"""SQuAD 1.1 and 2.0: articles of paragraphs with questions; the paragraphs are the passages."""

from collections.abc import Iterator

from rag_jax.data.readers.rows import (
    BadLine,
    Fields,
    Passage,
    Question,
    content_id,
    each,
    every,
    flag,
    identity,
    optional,
    rest,
    string,
    strings,
    unique,
)
from rag_jax.data.readers.simple_rows import identified


def questions(article: Fields, own_id: str) -> Iterator[Question | BadLine]:
    """All questions of an article; the right passage is the paragraph, with an id derived from its content."""
    title = optional(article, "title")

    def asked(paragraph: Fields) -> Iterator[Question | BadLine]:
        context = content_id(title, string(paragraph, "context"))
        return each(paragraph, "qas", lambda fields: [question(fields, context)])

    return each(article, "paragraphs", asked)


def question(fields: Fields, context: str) -> Question:
    """One question about the passage with id `context`.

    An impossible one has no answer and no right passage; `context_passage_ids` names the passage instead.
    """
    found = every(each(fields, "answers", lambda answer: [string(answer, "text")]))
    extra = rest(fields, "id", "question", "answers", "is_impossible")
    impossible = flag(fields, "is_impossible")
    if impossible and found:
        raise BadLine(f"question {fields.get('id')!r} is_impossible, but has the answer {found[0]!r}")
    if impossible:
        extra |= {"answerable": False, "context_passage_ids": [context]}
    return Question(
        id=identity(fields, "id"),
        question=string(fields, "question"),
        answers=() if impossible else unique(found),
        positive_passage_ids=() if impossible else (context,),
        extra=extra,
    )


def passages(article: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """The paragraphs of an article; its title is their document."""
    title = optional(article, "title")
    return each(article, "paragraphs", lambda paragraph: [passage(title, string(paragraph, "context"))])


def passage(title: str, text: str) -> Passage:
    name = content_id(title, text)
    return Passage(name, title, text, title or name)


def flat_question(fields: Fields, own_id: str) -> list[Question]:
    """{"id", "title", "context", "question", "answers": {"text": [...]}}, as in Hugging Face's data sets.

    A question without an answer is impossible.
    """
    answers = fields.get("answers")
    if isinstance(answers, dict):
        texts = strings({"text": [answers.get("text")]} | answers, "text")
        answers = [{"text": text} for text in texts]
    context = content_id(optional(fields, "title"), string(fields, "context"))
    impossible = {"is_impossible": True} if answers == [] else {}
    made = rest(fields, "title", "context") | {"id": identified(fields, own_id), "answers": answers}
    return [question(impossible | made, context)]


def flat_passages(fields: Fields, own_id: str) -> list[Passage]:
    """The paragraph that a question is about."""
    return [passage(optional(fields, "title"), string(fields, "context"))]
