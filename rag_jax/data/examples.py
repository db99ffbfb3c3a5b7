"""Questions and answers as arrays: tokenised once, a few thousand at a time, each text as long as it is."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np

from rag_jax.data import gold as right
from rag_jax.data import ragged
from rag_jax.data.joining import QUESTION_SEPARATOR, join_tail
from rag_jax.data.ragged import Growing, Ragged
from rag_jax.data.readers.rows import Question
from rag_jax.data.tokenizers import Tokenizer, wrap
from rag_jax.errors import InputError
from rag_jax.system.logs import Progress

Answers = Literal["first", "sample", "every"]

CHUNK = 8192  # questions that are Python objects at a time
OF_THE_CORPUS = ("gold", "hard", "other", "answer_P2")  # what another version of the corpus may change


class PassageTable(right.Passages, Protocol):
    """What examples need of a corpus."""

    generator_ids: np.ndarray
    generator_length: np.ndarray

    @property
    def encoder_tokenizer(self) -> Tokenizer: ...
    @property
    def generator_tokenizer(self) -> Tokenizer: ...
    @property
    def live_N(self) -> np.ndarray | None: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Examples:
    """N questions, each with one or more of P answers: those of question i are the pairs first_N1[i]:first_N1[i + 1].

    Ids of tokens as models read them: `question` for the encoder, `tail` (" // question" and the suffix) for the
    generator, `label` is `<s> answer </s>`. `text` is the question in UTF-8. `gold`, `hard`, `other`: rows in the
    corpus of the right passages, of hard negatives and of other wrong ones. `answer_P2` is where the answer's tokens
    stand in the first gold passage, or (0, 0). `input_N`: which input the question is from.
    """

    question: Ragged
    tail: Ragged
    text: Ragged
    gold: Ragged
    hard: Ragged
    other: Ragged
    label: Ragged
    answer_P2: np.ndarray
    first_N1: np.ndarray
    input_N: np.ndarray

    def __len__(self) -> int:
        return len(self.question)

    def question_of(self, pairs: np.ndarray) -> np.ndarray:
        """Which question each of these pairs is of."""
        return np.searchsorted(self.first_N1, pairs, side="right") - 1

    def texts(self, questions: Iterable[int]) -> list[str]:
        return [bytes(self.text[i]).decode() for i in questions]

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by name; `of` makes the same examples of them."""
        found: dict[str, np.ndarray] = {}
        for name, value in vars(self).items():
            if isinstance(value, Ragged):
                found |= {f"{name}.values": value.values, f"{name}.start": value.start_N1}
            else:
                found[name] = value
        return found

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> "Examples":
        """KeyError where one is missing."""
        made: dict[str, Any] = {}
        for field in fields(cls):
            name = field.name
            ragged = field.type in (Ragged, "Ragged")
            made[name] = Ragged(arrays[f"{name}.values"], arrays[f"{name}.start"]) if ragged else arrays[name]
        return cls(**made)

    def fingerprint(self, questions_only: bool = False) -> str:
        """Hash of every array: a checkpoint's data position means nothing for other data. questions_only: of those that
        are the same whatever the corpus holds.
        """
        digest = hashlib.sha256()
        for name, value in self.arrays().items():
            if questions_only and name.partition(".")[0] in OF_THE_CORPUS:
                continue
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode() + np.ascontiguousarray(value).data)
        return digest.hexdigest()


def joined(parts: Sequence[Examples]) -> Examples:
    """Those of several inputs, one after another."""
    if len(parts) == 1:
        return parts[0]
    made: dict[str, Any] = {}
    for field in fields(Examples):
        values = [getattr(part, field.name) for part in parts]
        made[field.name] = ragged.joined(values) if isinstance(values[0], Ragged) else np.concatenate(values)
    made["first_N1"] = ragged.starts(np.concatenate([np.diff(part.first_N1) for part in parts]))
    made["input_N"] = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
    return Examples(**made)


def none() -> Examples:
    """Those of a run whose stages have no questions."""
    empty = {"text": np.uint8, **dict.fromkeys(("question", "tail", "gold", "hard", "other", "label"), np.int32)}
    tables = {name: Growing(dtype).whole() for name, dtype in empty.items()}
    return Examples(**tables, answer_P2=np.zeros((0, 2), np.int32), first_N1=ragged.starts(np.zeros(0, np.int32)),
                    input_N=np.zeros(0, np.int16))  # fmt: skip


def both_sides(
    questions: Sequence[str],
    encoder: Tokenizer,
    generator: Tokenizer,
    length: int,
    keeps: str = "start",
    tail_length: int = 0,
) -> tuple[list[list[int]], list[list[int]]]:
    """(question, tail) of each as `Examples` has them. Those longer than `length` (tail_length, where one is given for
    the tail) keep their beginning, or end.
    """
    room = max(length - len(encoder.prefix_ids) - len(encoder.suffix_ids), 0)
    short = [kept(ids, room, keeps) for ids in encoder.encode_batch(list(questions))]
    suffix = list(generator.suffix_ids)
    room, head = (tail_length or length) - len(suffix), len(generator.encode_batch([QUESTION_SEPARATOR.rstrip()])[0])
    bare = (ids[: len(ids) - len(suffix)] for ids in join_tail(generator, questions))
    return wrap(encoder, short, length), [[*kept(ids, room, keeps, head), *suffix] for ids in bare]


def kept(ids: list[int], room: int, keeps: str, head: int = 0) -> list[int]:
    """At most `room` of the ids: the first, or, where keeps is "end", the `head` first and the last."""
    if len(ids) <= room or keeps == "start":
        return ids[:room]
    return [*ids[:head], *ids[len(ids) - room + head :]]


def tokenise(
    questions: Iterable[Question],
    corpus: PassageTable,
    *,
    question_length: int,
    target_length: int,
    answers: Answers = "first",
    negatives: bool = False,
    live: bool = False,
    keeps: str = "start",
    name: str = "the questions",
    tail_length: int = 0,
) -> Examples:
    """Examples of one input: of every question its target, or its first answer, or (`sample`, `every`) all of them.

    Questions with no answer are left out. Gold passages that the corpus lacks are none: they are counted and named, and
    refused where they are most (gold.Tally), but with `live` they may still come. negatives: read those, too; ones that
    the corpus has not are left out. name: of the input, for messages.
    """
    encoder, generator = corpus.encoder_tokenizer, corpus.generator_tokenizer
    ids = {side: np.uint16 if t.vocab_size <= 2**16 else np.uint32 for side, t in (("e", encoder), ("g", generator))}
    types: dict[str, Any] = {"question": ids["e"], "tail": ids["g"], "label": ids["g"], "text": np.uint8}
    types |= dict.fromkeys(("gold", "hard", "other"), np.int32)
    tables = {name: Growing(dtype) for name, dtype in types.items()}
    spans: list[np.ndarray] = [np.zeros((0, 2), np.int32)]
    counts: list[int] = []
    tally = right.Tally()
    with Progress(None, "tokenising questions", "question") as progress:
        for chunk in chunks(questions):
            wanted = [wanted_answers(question, answers) for question in chunk]
            asked = [question for question, texts in zip(chunk, wanted, strict=True) if texts]
            wanted = [texts for texts in wanted if texts]
            texts = [question.question for question in asked]
            both = both_sides(texts, encoder, generator, question_length, keeps, tail_length)
            gold = right.right_rows(asked, corpus, tally)
            of = np.repeat(np.arange(len(asked)), list(map(len, wanted)))
            written, stand_P2 = as_they_stand([a for some in wanted for a in some], [gold[i] for i in of], corpus)
            spans.append(stand_P2)
            sides = wrong_rows(asked, gold, corpus) if negatives else ([[]] * len(asked), [[]] * len(asked))
            labels = [generator.label(row, target_length) for row in written]
            bytes_of = [text.encode() for text in texts]
            new: tuple[Sequence[Any], ...] = (*both, labels, bytes_of, gold, *sides)
            for table, rows in zip(tables.values(), new, strict=True):
                table.add(rows)
            counts += map(len, wanted)
            progress.update(len(chunk))
    mend = "name the corpus of these questions, or correct their positive_passage_ids"
    tally.settle(name, corpus.directory, "they count as no gold passage", mend, refuse=not live)
    if not counts:
        raise InputError("no question has an answer or a target; training needs at least one")
    return Examples(
        **{name: table.whole() for name, table in tables.items()},
        answer_P2=np.concatenate(spans),
        first_N1=ragged.starts(np.asarray(counts)),
        input_N=np.zeros(len(counts), np.int16),
    )


def chunks(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """CHUNK of them at a time."""
    left = iter(questions)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def wanted_answers(question: Question, answers: Answers) -> list[str]:
    """What the generator may learn to write."""
    texts = [question.target] if question.target else list(question.answers)
    texts = [text.strip() for text in texts if text.strip()]
    return texts[:1] if answers == "first" else texts


def find(needle: Sequence[int], haystack: np.ndarray) -> int:
    """First position of the ids `needle` in `haystack`, or -1."""
    wanted, row = np.asarray(needle, np.int32).tobytes(), np.asarray(haystack, np.int32).tobytes()
    at = row.find(wanted)
    while at % 4 and at >= 0:
        at = row.find(wanted, at + 1)
    return at // 4 if at >= 0 and needle else -1


def as_they_stand(
    answers: Sequence[str], gold: Sequence[Sequence[int]], corpus: PassageTable
) -> tuple[list[list[int]], np.ndarray]:
    """Ids of each answer, and Examples.answer_P2; gold: of the question of each answer.

    An answer in the middle of a text follows a space. One that stands there without it alone, as behind a bracket or
    in Chinese, is written without: labels made of the passage's tokens can be copied.
    """
    tokenizer = corpus.generator_tokenizer
    written, bare = (tokenizer.encode_batch([space + answer for answer in answers]) for space in (" ", ""))
    spans_P2 = np.zeros((len(answers), 2), np.int32)
    for i, rows in enumerate(gold):
        passage = corpus.generator_ids[rows[0]][: corpus.generator_length[rows[0]]] if rows else np.zeros(0, np.int32)
        for ids in (written[i], bare[i]):
            at = find(ids, passage)
            if at >= 0:
                written[i], spans_P2[i] = ids, (at, at + len(ids))
                break
    return written, spans_P2


def wrong_rows(
    questions: Sequence[Question], gold: Sequence[Sequence[int]], corpus: PassageTable
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of the (hard, other) negatives of each question; right passages are none, whatever the file says."""

    leads = right.rows_of(
        (one for q in questions for one in (*q.hard_negative_passage_ids, *q.negative_passage_ids)), corpus
    )

    def without(ids: Sequence[str], known: Sequence[int]) -> list[int]:
        """Rows of the ids, all of those of a document that was cut, each once, without those that are known."""
        return [row for row in dict.fromkeys(row for one in ids for row in leads[one]) if row not in known]

    hard = [without(q.hard_negative_passage_ids, rows) for q, rows in zip(questions, gold, strict=True)]
    known = [[*rows, *wrong] for rows, wrong in zip(gold, hard, strict=True)]
    return hard, [without(q.negative_passage_ids, rows) for q, rows in zip(questions, known, strict=True)]
