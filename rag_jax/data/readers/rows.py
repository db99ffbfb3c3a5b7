"""Passages and questions, and the checks of the fields that they are made of."""

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
    """One question; `extra` keeps the fields this class does not name.

    also_relevant_passage_ids: further right passages, found counts as right and they are no negatives.
    hard_negative_passage_ids: found by a search, but wrong; negative_passage_ids: any others that are wrong.
    Of a question known to have no answer, `extra` says `answerable: False`, and in `context_passage_ids` of what it was
    asked. Further fields in `extra` that evaluation reads: `relevance`, grades by passage id; `provenance`, a list of
    ways to answer, each the list of the documents that it needs, else `wikipedia_ids`, the documents of the one way;
    `excluded_passage_ids`, passages that do not count as found; `label`.
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
    """One record of a file: the 1-based line it begins at, which record it is (from 1 on), and its fields."""

    line: int
    number: int
    fields: Fields


class BadLine(ValueError):
    """What is wrong with one record; becomes an InputError with its place, or is counted and skipped."""


def refuse(message: str, report: OnBad | None) -> None:
    """Raises InputError, or tells `report` that the record is skipped."""
    if report is None:
        raise InputError(f"{message}; correct it or pass --skip-bad-lines")
    report(f"skipped {message}")


def content_id(title: str, text: str) -> str:
    """The id of a passage whose file gives it none: the same text has the same id, whatever file it comes from."""
    return "text-" + hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:16]


def each(fields: Fields, name: str, parse: Callable[[Fields], Iterable[T | BadLine]]) -> Iterator[T | BadLine]:
    """What `parse` makes of every object in the list field `name`; a bad one becomes a BadLine that says which."""
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
    """All of what `each` gives; the first bad one is raised."""
    good = []
    for item in items:
        if isinstance(item, BadLine):
            raise item
        good.append(item)
    return good


def unique(values: Iterable[str]) -> tuple[str, ...]:
    """Without repetitions, in order."""
    return tuple(dict.fromkeys(values))


def identity(fields: Fields, *names: str) -> str:
    """The first of the fields `names` that is there, as a string; whole numbers are taken too."""
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
    """A string that may be missing, null or empty: then ""."""
    return "" if fields.get(name) is None else string(fields, name, empty=True)


def strings(fields: Fields, name: str) -> tuple[str, ...]:
    if name not in fields:
        raise BadLine(f"missing field {name!r} (a list of strings)")
    values = fields[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadLine(f"field {name!r} must be a list of strings, it is {kind(values)}")
    return tuple(checked(value, name) for value in values)


def flag(fields: Fields, *names: str) -> bool | None:
    """The first of the fields `names` that is there, true or false; None where there is none."""
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        return None
    if not isinstance(fields[name], bool):
        raise BadLine(f"field {name!r} must be true or false, it is {kind(fields[name])}")
    return fields[name]


def checked(value: str, name: str) -> str:
    """JSON escapes can smuggle in what UTF-8 cannot hold and what no text contains."""
    if "\0" in value:
        raise BadLine(f"NUL character in {name}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadLine(f"half a surrogate pair in {name}")
    return value


def rest(fields: Fields, *named: str) -> Fields:
    """The fields but for those named: the `extra` of a question."""
    return {name: value for name, value in fields.items() if name not in named}


def kind(value: Any) -> str:
    """In words, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list):
        other = next((item for item in value if not isinstance(item, str)), "")
        return f"a list with {kind(other)} in it"
    return names.get(type(value), "a number")
