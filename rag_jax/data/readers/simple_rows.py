"""Formats with one simple record per row: our own JSON lines, NQ-open, Atlas, FlashRAG, wikiextractor's pages."""

from rag_jax.data.readers.rows import (
    BadLine,
    Fields,
    Passage,
    Question,
    content_id,
    identity,
    kind,
    optional,
    rest,
    string,
    strings,
    unique,
)

_LISTS = (
    "positive_passage_ids",
    "also_relevant_passage_ids",
    "hard_negative_passage_ids",
    "negative_passage_ids",
)

# Names of the same fields in other formats.
IDS = ("id", "_id", "qid", "qId", "question_id", "QuestionId", "query_id", "claim_id", "docid")
QUESTIONS = ("question", "query", "qText", "Question")
ANSWERS = ("answer", "answers", "golden_answers", "Answer")
_PAGES = ("EntityPages", "SearchResults", "entity_pages", "search_results")  # TriviaQA: whole texts, dropped


def passage(fields: Fields, own_id: str = "") -> list[Passage]:
    """{"id" or "_id", "title", "text"}, perhaps "document" or "doc_id": the document that it was cut from."""
    name = identity(fields, "id", "_id")
    title, text = string(fields, "title", empty=True), string(fields, "text")
    document = fields.get("document", fields.get("doc_id"))
    if document is None or document == "":
        return [Passage(name, title, text, name)]
    if isinstance(document, bool) or not isinstance(document, str | int):
        raise BadLine(f"the document id must be a string, it is {kind(document)}")
    return [Passage(name, title, text, str(document))]


def wikipedia(fields: Fields, own_id: str = "") -> list[Passage]:
    """wikiextractor's {"id", "url", "title", "text"}; no passage without text; a title at its start is removed."""
    if fields.get("text") == "":
        return []
    text, title = string(fields, "text"), string(fields, "title")
    body = text.removeprefix(f"{title}\n").strip()
    return passage({**fields, "text": body}) if body else []


def question(fields: Fields, own_id: str = "") -> list[Question]:
    """{"id" or "_id", "question", "answers"}, perhaps "target" and lists of passage ids."""
    found = Question(
        id=identity(fields, "id", "_id"),
        question=string(fields, "question"),
        answers=strings(fields, "answers"),
        **{name: strings(fields, name) for name in _LISTS if name in fields},
        target=None if fields.get("target") is None else string(fields, "target"),
        extra=rest(fields, "id", "_id", "question", "answers", "target", *_LISTS),
    )
    return [found]


def identified(fields: Fields, own_id: str) -> str:
    """The id of a record, under any name of IDS; else `own_id`, which is made of its position in the file."""
    name = next((name for name in IDS if fields.get(name) not in (None, "")), None)
    return identity(fields, name) if name else own_id


def numbered(fields: Fields, own_id: str) -> list[Question]:
    """Like `question`, but the id may have any name of IDS or be missing; see `identified`."""
    named = next((name for name in IDS if fields.get(name) not in (None, "")), "id")
    return question({**rest(fields, named), "id": identified(fields, own_id)})


def asked(fields: Fields, own_id: str) -> list[Question]:
    """A question and its answers under the names of NQ-open, Atlas, FlashRAG, WebQuestions and TriviaQA (QUESTIONS,
    ANSWERS); a single answer may be a string.
    """
    names = [next((name for name in known if name in fields), known[0]) for known in (QUESTIONS, ANSWERS)]
    made = {"question": string(fields, names[0]), "answers": _answers(fields, names[1])}
    return numbered(rest(fields, *names, *_PAGES) | made, own_id)


def _answers(fields: Fields, name: str) -> list[str]:
    found = fields.get(name)
    if isinstance(found, dict):  # TriviaQA's: the answer and its other names
        parts = [found.get(name, found.get(name.lower())) for name in ("Value", "Aliases", "HumanAnswers")]
        if isinstance(parts[0], str):
            others = [strings({name: part}, name) for part in parts[1:] if part is not None]
            return list(unique((parts[0], *(alias for some in others for alias in some))))
        raise BadLine(f"field {name!r} is an object; it must have the answer as 'Value' or 'value', a string")
    return list(strings({**fields, name: [found] if isinstance(found, str) else found}, name))


def atlas_passage(fields: Fields, own_id: str = "") -> list[Passage]:
    """{"text"}, perhaps "title" and "section", which is appended to the title as in Atlas.

    Without an id (see `identified`) it is derived from the content.
    """
    title, section, text = optional(fields, "title"), optional(fields, "section"), string(fields, "text")
    title = f"{title}: {section}" if title and section else title or section
    return passage({**fields, "id": identified(fields, content_id(title, text)), "title": title})


def contents_passage(fields: Fields, own_id: str = "") -> list[Passage]:
    """{"id", "contents"} of Pyserini and FlashRAG: a first line in quotation marks is the title."""
    first, _, text = string(fields, "contents").partition("\n")
    title = first.strip()
    quoted = len(title) > 1 and title[0] == title[-1] == '"' and bool(text.strip())
    made = {"title": title[1:-1].strip(), "text": text} if quoted else {"title": "", "text": fields["contents"]}
    return passage({**fields, "id": identified(fields, content_id(made["title"], made["text"])), **made})
