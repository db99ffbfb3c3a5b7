"""KILT: task files whose answers name paragraphs of Wikipedia pages, and these pages; a passage is a paragraph."""

import re
from collections.abc import Iterator

from rag_jax.data.readers.dpr import context
from rag_jax.data.readers.rows import (
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

    The right passages are the paragraphs that the provenance names. In `extra`, `provenance` has the pages of every
    output, each of which suffices to answer, and `wikipedia_ids` the pages of all. Where the record has `passages`, as
    in CLAPnq, the question was asked about these: they are right, or the context of a question without an answer.
    """
    outputs = every(each({"output": []} | fields, "output", _output))
    answers = unique(answer for answer, _, _ in outputs if answer)
    paragraphs = unique(name for _, names, _ in outputs for name in names)
    ways = list(dict.fromkeys(unique(pages) for _, _, pages in outputs if pages))
    extra = rest(fields, "id", "input", "output", "passages")
    if ways:
        extra["wikipedia_ids"] = list(unique(page for way in ways for page in way))
        extra["provenance"] = [list(way) for way in ways]
    if "passages" in fields:
        asked_of = [passage.id for passage in every(passages(fields, own_id))]
        if answers:
            paragraphs = unique((*paragraphs, *asked_of))
        else:
            extra |= {"answerable": False, "context_passage_ids": asked_of}
    return [Question(identity(fields, "id"), string(fields, "input"), answers, paragraphs, extra=extra)]


def _output(output: Fields) -> list[tuple[str, list[str], list[str]]]:
    """(answer, paragraphs, pages) of one output, each of which may be missing or null."""
    named = {name: value for name, value in output.items() if value is not None}
    found = every(each({"provenance": []} | named, "provenance", _provenance))
    return [(optional(output, "answer").strip(), [one for names, _ in found for one in names], [p for _, p in found])]


def _provenance(fields: Fields) -> list[tuple[list[str], str]]:
    """(paragraphs, page). Without a paragraph, or with -1 (KILT's authors did not find it), only the page counts."""
    page = identity(fields, "wikipedia_id").strip()
    start = _paragraph(fields, "start_paragraph_id")
    end = _paragraph(fields, "end_paragraph_id")
    if start is None:
        return [([], page)]
    end = start if end is None else end
    if start > end:
        raise BadLine(f"there are no paragraphs {start} to {end}")
    return [([paragraph_id(page, number) for number in range(max(start, 1), end + 1)], page)]


def _paragraph(fields: Fields, name: str) -> int | None:
    """A number of a paragraph, perhaps written as a string; None where it is missing, null or -1."""
    value = fields.get(name)
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        value = int(value)
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 0:
        raise BadLine(f"{name} must be a whole number from 0 on, or -1 for none, it is {value!r}")
    return value


def passages(fields: Fields, own_id: str) -> Iterator[Passage | BadLine]:
    """The passages in the record of a question."""
    return each(fields, "passages", lambda found: [context(found)])


def page(fields: Fields, own_id: str) -> list[Passage]:
    """{"wikipedia_id", "wikipedia_title", "text": [paragraphs]}: every paragraph but the first, which is the title.

    Headings and list items stay, without their marks, because the provenance of a question may name them.
    """
    name, title = identity(fields, "wikipedia_id", "_id"), string(fields, "wikipedia_title")
    paragraphs = fields.get("text")
    if not isinstance(paragraphs, list) or not all(isinstance(text, str) for text in paragraphs):
        raise BadLine(f"field 'text' must be a list of paragraphs, it is {kind(paragraphs)}")
    texts = [_MARKUP.sub("", checked(text, "text")).strip() for text in paragraphs]
    return [
        Passage(paragraph_id(name, number), title, text, name) for number, text in enumerate(texts) if number and text
    ]
