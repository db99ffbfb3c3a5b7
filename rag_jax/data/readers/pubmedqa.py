"""PubMedQA: one JSON object of articles by PubMed id, each with a question about the sections of its abstract."""

from rag_jax.data.readers.rows import (
    Fields,
    Passage,
    Question,
    content_id,
    identity,
    optional,
    rest,
    string,
    strings,
)


def question(fields: Fields, own_id: str) -> list[Question]:
    """{"QUESTION", "CONTEXTS", "LABELS", "LONG_ANSWER", "final_decision"}; `id` is the article's key in the file.

    The decision is the answer and the label, the long answer the target; the sections are the right passages.
    """
    label, target = optional(fields, "final_decision"), optional(fields, "LONG_ANSWER")
    made = Question(
        id=identity(fields, "id") if "id" in fields else own_id,
        question=string(fields, "QUESTION"),
        answers=(label,) if label else (),
        positive_passage_ids=tuple(passage.id for passage in passages(fields, own_id)),
        target=target or None,
        extra=rest(fields, "id", "QUESTION", "CONTEXTS", "LONG_ANSWER") | ({"label": label} if label else {}),
    )
    return [made]


def passages(fields: Fields, own_id: str) -> list[Passage]:
    """The sections of the abstract; the label of a section, such as "Background", is its title."""
    texts, labels = strings(fields, "CONTEXTS"), strings({"LABELS": []} | fields, "LABELS")
    titles = [label.capitalize() for label in labels] if len(labels) == len(texts) else [""] * len(texts)
    pairs = [(title, text) for title, text in zip(titles, texts, strict=True) if text.strip()]
    return [Passage(content_id(*pair), *pair, identity(fields, "id") if "id" in fields else own_id) for pair in pairs]
