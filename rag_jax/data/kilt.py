"""KILT: task files whose answers point into Wikipedia pages, and the pages; a passage is a paragraph of a page."""

import re
from collections.abc import Iterator

from rag_jax.data.dpr import context
from rag_jax.data.rows import (
    BadLine,
    Fields,
    Passage,
    Question,
    checked,
    each,
    every,
    identity,
    kind,
    optional,
    rest,
    string,
    unique,
)

_MARKUP = re.compile(r"^(Section::::|BULLET::::-?)\s*")


def paragraph_id(page: str, number: int) -> str:
    return f"{page}-{number}"


def question(fields: Fields, own_id: str) -> list[Question]:
    """{"id", "input", "output": [{"answer", "provenance"}]}; a blind test file has no output.

    The right passages are the paragraphs that the provenance names, `wikipedia_ids` in `extra` their pages. Where the
    question brings its `passages` (as CLAPnq does), it was asked of these.
    """
    outputs = every(each({"output": []} | fields, "output", _output))
    answers = unique(answer for answer, _, _ in outputs if answer)
    paragraphs = unique(name for _, names, _ in outputs for name in names)
    pages = unique(page for _, _, found in outputs for page in found)
    extra = rest(fields, "id", "input", "output", "passages")
    if pages:
        extra["wikipedia_ids"] = list(pages)
    if "passages" in fields:
        asked_of = [passage.id for passage in every(passages(fields, own_id))]
        if answers:
            paragraphs = unique((*paragraphs, *asked_of))
        else:
            extra |= {"answerable": False, "context_passage_ids": asked_of}
    return [Question(identity(fields, "id"), string(fields, "input"), answers, paragraphs, extra=extra)]


def _output(output: Fields) -> list[tuple[str, list[str], list[str]]]:
    """The answer, the paragraphs and the pages of one output, each of which may be missing."""
    found = every(each({"provenance": []} | output, "provenance", _provenance))
    return [(optional(output, "answer"), [name for names, _ in found for name in names], [page for _, page in found])]


def _provenance(fields: Fields) -> list[tuple[list[str], str]]:
    page = identity(fields, "wikipedia_id")
    if fields.get("start_paragraph_id") is None:
        return [([], page)]
    start = fields["start_paragraph_id"]
    end = fields.get("end_paragraph_id", start)
    if type(start) is not int or type(end) is not int:
        raise BadLine("start_paragraph_id and end_paragraph_id must be whole numbers")
    if not 0 <= start <= end:
        raise BadLine(f"there are no paragraphs {start} to {end}")
    return [([paragraph_id(page, number) for number in range(max(start, 1), end + 1)], page)]


def passages(fields: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """The passages that a question brings with it."""
    return each(fields, "passages", lambda found: [context(found)])


def page(fields: Fields, own_id: str) -> list[Passage]:
    """{"wikipedia_id", "wikipedia_title", "text": [paragraphs]}: every paragraph but the first, which is the title.

    Headings and items of lists lose their marks, but stay: the provenance of a question may name them.
    """
    name, title = identity(fields, "wikipedia_id", "_id"), string(fields, "wikipedia_title")
    paragraphs = fields.get("text")
    if not isinstance(paragraphs, list) or not all(isinstance(text, str) for text in paragraphs):
        raise BadLine(f"field 'text' must be a list of paragraphs, it is {kind(paragraphs)}")
    texts = [_MARKUP.sub("", checked(text, "text")).strip() for text in paragraphs]
    return [
        Passage(paragraph_id(name, number), title, text, name) for number, text in enumerate(texts) if number and text
    ]
