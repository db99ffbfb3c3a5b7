"""The formats closest to ours: our own JSON lines, NQ-open, DPR's question files, psgs_w100, wikiextractor's pages."""

from rag_jax.data.rows import BadLine, Fields, Passage, Question, identity, kind, optional, rest, string, strings

_LISTS = (
    "positive_passage_ids",
    "also_relevant_passage_ids",
    "hard_negative_passage_ids",
    "negative_passage_ids",
)


def passage(fields: Fields, own_id: str = "") -> list[Passage]:
    """{"id" or "_id", "title", "text"}, and the document's id where it was cut from one."""
    name = identity(fields, "id", "_id")
    title, text = string(fields, "title", empty=True), string(fields, "text")
    document = fields.get("document", fields.get("doc_id"))
    if document is None or document == "":
        return [Passage(name, title, text, name)]
    if isinstance(document, bool) or not isinstance(document, str | int):
        raise BadLine(f"the document id must be a string, it is {kind(document)}")
    return [Passage(name, title, text, str(document))]


def wikipedia(fields: Fields, own_id: str = "") -> list[Passage]:
    """wikiextractor's {"id", "url", "title", "text"}: pages without text are none, a title in the text is left out."""
    if fields.get("text") == "":
        return []
    text, title = string(fields, "text"), string(fields, "title")
    body = text.removeprefix(f"{title}\n").strip()
    return passage({**fields, "text": body}) if body else []


def question(fields: Fields, own_id: str = "") -> list[Question]:
    """{"id" or "_id", "question", "answers"}, and "target" and lists of passage ids where there are some."""
    found = Question(
        id=identity(fields, "id", "_id"),
        question=string(fields, "question"),
        answers=strings(fields, "answers"),
        **{name: strings(fields, name) for name in _LISTS if name in fields},
        target=None if fields.get("target") is None else string(fields, "target"),
        extra=rest(fields, "id", "_id", "question", "answers", "target", *_LISTS),
    )
    return [found]


def numbered(fields: Fields, own_id: str) -> list[Question]:
    """As `question`; one without an id gets that of its place in the file."""
    return question({"id": own_id, **fields})


def nq_open(fields: Fields, own_id: str) -> list[Question]:
    """{"question", "answer": [...]}; a single answer may be a string."""
    answer = fields.get("answer")
    answers = strings({**fields, "answer": [answer] if isinstance(answer, str) else answer}, "answer")
    return numbered({**rest(fields, "answer"), "answers": list(answers)}, own_id)


def beir_passage(fields: Fields, own_id: str = "") -> list[Passage]:
    """BEIR's {"_id", "title", "text"}: the title may be missing, the text empty where there is a title."""
    title = optional(fields, "title")
    text = optional(fields, "text") or title
    return passage({**rest(fields, "metadata"), "title": title, "text": text})
