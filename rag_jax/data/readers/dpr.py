"""Files of questions with their passages inside: those of DPR's training, Fusion-in-Decoder and FlagEmbedding."""

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
from rag_jax.data.readers.simple_rows import numbered

_SIDES = {
    "positive_ctxs": "positive_passage_ids",
    "hard_negative_ctxs": "hard_negative_passage_ids",
    "negative_ctxs": "negative_passage_ids",
}
_TEVATRON = {"positive_passages": "positive_ctxs", "negative_passages": "hard_negative_ctxs", "query": "question"}
_IDS = ("passage_id", "psg_id", "id", "_id", "docid")


def context(fields: Fields) -> Passage:
    """A passage {"title", "text"}, with an id under one of five names, else one derived from its content."""
    title, text = optional(fields, "title"), string(fields, "text")
    named = next((name for name in _IDS if fields.get(name) not in (None, "")), None)
    name = identity(fields, named) if named else content_id(title, text)
    return Passage(name, title, text, name)


def training(fields: Fields, own_id: str) -> list[Question]:
    """DPR's {"question", "answers", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}.

    Tevatron's {"query_id", "query", "positive_passages", "negative_passages"} is read, too; its negatives are hard.
    """
    if "positive_passages" in fields:
        fields = {"answers": []} | {_TEVATRON.get(name, name): value for name, value in fields.items()}
    sides = {
        ours: list(unique(found.id for found in every(each({theirs: []} | fields, theirs, lambda c: [context(c)]))))
        for theirs, ours in _SIDES.items()
    }
    return numbered(rest(fields, *_SIDES) | sides, own_id)


def training_passages(fields: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """All contexts of a question."""
    fields = {_TEVATRON.get(name, name): value for name, value in fields.items()}
    for name in _SIDES:
        yield from each({name: []} | fields, name, lambda found: [context(found)])


def fusion(fields: Fields, own_id: str) -> list[Question]:
    """Fusion-in-Decoder's {"question", "answers", "ctxs"}, perhaps "target"; `ctxs` are retrieved passages with flags.

    Contexts with `isgold` are the right passages; those with a false `has_answer` are hard negatives, as DPR mines
    them. A context that merely contains an answer is neither. All ids are kept as `retrieved_passage_ids`.
    """

    def marked(found: Fields) -> list[tuple[str, bool | None, bool | None]]:
        return [(context(found).id, flag(found, "isgold", "is_gold"), flag(found, "has_answer", "hasanswer"))]

    found = every(each(fields, "ctxs", marked))
    right = unique(name for name, gold, _ in found if gold)
    wrong = unique(name for name, _, answering in found if answering is False and name not in right)
    sides = {"positive_passage_ids": list(right), "hard_negative_passage_ids": list(wrong)}
    target = optional(fields, "target") or None
    if target and "answers" not in fields:
        fields = fields | {"answers": []}
    extra = {"retrieved_passage_ids": [name for name, _, _ in found]}
    return numbered(rest(fields, "ctxs", "target") | sides | extra | ({"target": target} if target else {}), own_id)


def fusion_passages(fields: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """All contexts of a question."""
    return each(fields, "ctxs", lambda found: [context(found)])


def pairs(fields: Fields, own_id: str) -> list[Question]:
    """FlagEmbedding's {"query", "pos": [texts], "neg": [texts]}: right passages and hard negatives, without answers.

    The ids of the texts are derived from their content.
    """
    right, wrong = ([passage.id for passage in _texts(fields, name)] for name in ("pos", "neg"))
    sides = {"positive_passage_ids": right, "hard_negative_passage_ids": [name for name in wrong if name not in right]}
    made = {"question": string(fields, "query"), "answers": []}
    return numbered(rest(fields, "query", "pos", "neg", "prompt") | made | sides, own_id)


def pairs_passages(fields: Fields, own_id: str) -> list[Passage]:
    """The texts of both sides."""
    return [*_texts(fields, "pos"), *_texts(fields, "neg")]


def _texts(fields: Fields, name: str) -> list[Passage]:
    texts = [text for text in unique(strings({"neg": []} | fields, name)) if text.strip()]
    return [Passage(content_id("", text), "", text, content_id("", text)) for text in texts]
