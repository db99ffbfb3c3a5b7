"""Passages and questions, and checks of the fields that they are read from."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from rag_jax.errors import InputError

OnBad = Callable[[str], None]
Fields = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    """One retrievable text; `document` names the document it was cut from (its own id if it was not cut)."""

    id: str
    title: str
    text: str
    document: str


@dataclass(frozen=True)
class Question:
    """One question.

    answers: acceptable short answers.
    positive_passage_ids: right passages.
    target: a long text to be written instead of an answer.
    extra: all other fields of the record. Those that evaluation reads:
        answerable: False if the question is known to have no answer; context_passage_ids: what it was asked about.
        relevance: grades by passage id.
        provenance: list of ways to answer, each a list of the documents it needs; else wikipedia_ids: one such list.
        excluded_passage_ids: passages that do not count as retrieved.
        label: the class of a claim or question.
    also_relevant_passage_ids: further right passages: retrieving one counts, and they are no negatives.
    hard_negative_passage_ids: wrong passages that a search returned.
    negative_passage_ids: other wrong passages.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_passage_ids: tuple[str, ...] = ()
    target: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    also_relevant_passage_ids: tuple[str, ...] = ()
    hard_negative_passage_ids: tuple[str, ...] = ()
    negative_passage_ids: tuple[str, ...] = ()

    @property
    def right_passage_ids(self) -> tuple[str, ...]:
        """All right passages, the positive ones first."""
        return self.positive_passage_ids + self.also_relevant_passage_ids


class Row(NamedTuple):
    """One record of a file: the line on which it begins, its number (both from 1 on), and its fields."""

    line: int
    number: int
    fields: Fields


class BadLine(ValueError):
    """Error in one record; becomes an InputError with file and line, or is reported and the record skipped."""


def refuse(message: str, report: OnBad | None) -> None:
    """Raises InputError, or tells `report` that the record is skipped."""
    if report is None:
        raise InputError(f"{message}; correct it or pass --skip-bad-lines")
    report(f"skipped {message}")


def content_id(title: str, text: str) -> str:
    """The id of a passage without one in its file: the same title and text give the same id in any file."""
    return "text-" + hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:16]


def each(fields: Fields, name: str, parse: Callable[[Fields], Iterable[T | BadLine]]) -> Iterator[T | BadLine]:
    """Applies `parse` to every object in the list field `name`; a bad one gives a BadLine with its number."""
    parts = fields.get(name)
    if not isinstance(parts, list):
        what = f"missing field {name!r}" if name not in fields else f"field {name!r} is {kind(parts)}"
        yield BadLine(f"{what}; it must be a list of objects")
        return
    for number, part in enumerate(parts):
        try:
            if not isinstance(part, dict):
                raise BadLine(f"an object is needed, this is {kind(part)}")
            for item in parse(part):
                yield BadLine(f"{name}[{number}]: {item}") if isinstance(item, BadLine) else item
        except BadLine as bad:
            yield BadLine(f"{name}[{number}]: {bad}")


def every(items: Iterable[T | BadLine]) -> list[T]:
    """The items of `each` as a list; raises the first BadLine among them."""
    good = []
    for item in items:
        if isinstance(item, BadLine):
            raise item
        good.append(item)
    return good


def unique(values: Iterable[str]) -> tuple[str, ...]:
    """The distinct values, in order of first occurrence."""
    return tuple(dict.fromkeys(values))


def identity(fields: Fields, *names: str) -> str:
    """The first of the fields `names` that exists, as a string; it may be a whole number."""
    name = next((name for name in names if name in fields), names[0])
    if isinstance(fields.get(name), int) and not isinstance(fields[name], bool):
        return str(fields[name])
    return string(fields, name)


def string(fields: Fields, name: str, empty: bool = False) -> str:
    if name not in fields:
        raise BadLine(f"missing field {name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise BadLine(f"field {name!r} must be a string, it is {kind(value)}")
    if not empty and not value.strip():
        raise BadLine(f"empty {name}")
    return checked(value, name)


def optional(fields: Fields, name: str) -> str:
    """A string field; "" if it is missing, null or empty."""
    return "" if fields.get(name) is None else string(fields, name, empty=True)


def strings(fields: Fields, name: str) -> tuple[str, ...]:
    if name not in fields:
        raise BadLine(f"missing field {name!r} (a list of strings)")
    values = fields[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadLine(f"field {name!r} must be a list of strings, it is {kind(values)}")
    return tuple(checked(value, name) for value in values)


def flag(fields: Fields, *names: str) -> bool | None:
    """The first of the fields `names` that exists and is not null, a boolean; None if there is none."""
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        return None
    if not isinstance(fields[name], bool):
        raise BadLine(f"field {name!r} must be true or false, it is {kind(fields[name])}")
    return fields[name]


def checked(value: str, name: str) -> str:
    """The value; BadLine for NUL characters and halves of surrogate pairs, which JSON escapes can smuggle in."""
    if "\0" in value:
        raise BadLine(f"NUL character in {name}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadLine(f"half a surrogate pair in {name}")
    return value


def rest(fields: Fields, *named: str) -> Fields:
    """The fields except those named, for the `extra` of a question."""
    return {name: value for name, value in fields.items() if name not in named}


def kind(value: Any) -> str:
    """The JSON type of a value in words, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list):
        other = next((item for item in value if not isinstance(item, str)), "")
        return f"a list with {kind(other)} in it"
    return names.get(type(value), "a number")
