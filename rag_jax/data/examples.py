"""Questions and answers as arrays: tokenised once, a few thousand at a time, without padding."""

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
OF_THE_CORPUS = ("gold", "hard", "other", "answer_P2")  # fields that may differ with another version of the corpus


class PassageTable(right.PassageLookup, Protocol):
    """The part of a corpus that examples read."""

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
    """N questions with P answers as arrays; question i has the answers (pairs) first_N1[i] to first_N1[i + 1].

    question: N rows of token ids, the input of the question encoder.
    tail: N rows of token ids, the end of the generator's input: " // question" and the suffix.
    text: N rows of bytes, the question in UTF-8.
    gold, hard, other: N rows of corpus rows: the right passages, hard negatives, other wrong passages.
    label: P rows of token ids, `<s> answer </s>`.
    answer_P2: first position of the answer's tokens in the first gold passage and the one after the last; or (0, 0).
    first_N1: int64 [N + 1].
    input_N: number of the input that the question is from.
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
        """The question of each of these pairs."""
        return np.searchsorted(self.first_N1, pairs, side="right") - 1

    def texts(self, questions: Iterable[int]) -> list[str]:
        return [bytes(self.text[i]).decode() for i in questions]

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by name, as `of` reads them."""
        found: dict[str, np.ndarray] = {}
        for name, value in vars(self).items():
            if isinstance(value, Ragged):
                found |= {f"{name}.values": value.values, f"{name}.start": value.start_N1}
            else:
                found[name] = value
        return found

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> "Examples":
        """Examples from their arrays by name; KeyError where one is missing."""
        made: dict[str, Any] = {}
        for field in fields(cls):
            name = field.name
            ragged = field.type in (Ragged, "Ragged")
            made[name] = Ragged(arrays[f"{name}.values"], arrays[f"{name}.start"]) if ragged else arrays[name]
        return cls(**made)

    def fingerprint(self, questions_only: bool = False) -> str:
        """Hash of the arrays, with which a checkpoint refuses to resume on other data.

        questions_only: only of the arrays that do not depend on the corpus.
        """
        digest = hashlib.sha256()
        for name, value in self.arrays().items():
            if questions_only and name.partition(".")[0] in OF_THE_CORPUS:
                continue
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode() + np.ascontiguousarray(value).data)
        return digest.hexdigest()


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several inputs as one, in order; `input_N` numbers the inputs."""
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
    """No examples, for a run whose stages have no questions."""
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
    """Token ids of each question in both forms, (question, tail), as in `Examples`.

    length, keeps, tail_length: as in `batching.encode_questions`.
    """
    room = max(length - len(encoder.prefix_ids) - len(encoder.suffix_ids), 0)
    short = [kept(ids, room, keeps) for ids in encoder.encode_batch(list(questions))]
    suffix = list(generator.suffix_ids)
    room, head = (tail_length or length) - len(suffix), len(generator.encode_batch([QUESTION_SEPARATOR.rstrip()])[0])
    bare = (ids[: len(ids) - len(suffix)] for ids in join_tail(generator, questions))
    return wrap(encoder, short, length), [[*kept(ids, room, keeps, head), *suffix] for ids in bare]


def kept(ids: list[int], room: int, keeps: str, head: int = 0) -> list[int]:
    """At most `room` of the ids: the first ones; or with keeps="end" the first `head` and the last ones."""
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
    """Tokenises the questions of one input; those without an answer or target are left out.

    question_length, tail_length, keeps: as in `batching.encode_questions`.
    target_length: most tokens of a label.
    answers: "first": the target or first answer of a question; "sample", "every": all its answers.
    negatives: also look up hard and other negatives; those that the corpus lacks are left out.
    live: the corpus may still get the gold passages it lacks, so many of them are no error.
    name: of the input, for messages.
    Gold passages that the corpus lacks are counted and reported; InputError where they are the most (gold.Tally), and
    where no question has an answer.
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
            of = np.repeat(np.arange(len(asked)), list(map(len, wanted)))  # the question of each pair
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
    """The questions in lists of CHUNK."""
    left = iter(questions)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def wanted_answers(question: Question, answers: Answers) -> list[str]:
    """The texts that the generator learns to write for a question: its target, else its first or all its answers."""
    texts = [question.target] if question.target else list(question.answers)
    texts = [text.strip() for text in texts if text.strip()]
    return texts[:1] if answers == "first" else texts


def find(needle: Sequence[int], haystack: np.ndarray) -> int:
    """First position of the ids `needle` in `haystack`, or -1."""
    # Searched as bytes: a match that does not begin at a multiple of 4 straddles ids and is none.
    wanted, row = np.asarray(needle, np.int32).tobytes(), np.asarray(haystack, np.int32).tobytes()
    at = row.find(wanted)
    while at % 4 and at >= 0:
        at = row.find(wanted, at + 1)
    return at // 4 if at >= 0 and needle else -1


def as_they_stand(
    answers: Sequence[str], gold: Sequence[Sequence[int]], corpus: PassageTable
) -> tuple[list[list[int]], np.ndarray]:
    """Token ids of each answer as the gold passage spells it, and `Examples.answer_P2`.

    gold: rows of the right passages of each answer's question.
    An answer is tokenised with a space before it, as in the middle of a text. Where the passage has it only without,
    as after a bracket or in Chinese, so is the label: a label of the passage's own tokens can be copied.
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
    """Rows of the (hard, other) negatives of each question, without its gold passages, whatever the file says."""

    leads = right.rows_of(
        (one for q in questions for one in (*q.hard_negative_passage_ids, *q.negative_passage_ids)), corpus
    )

    def without(ids: Sequence[str], known: Sequence[int]) -> list[int]:
        """Rows of the ids, each once, without known ones; a document that was cut gives all its pieces."""
        return [row for row in dict.fromkeys(row for one in ids for row in leads[one]) if row not in known]

    hard = [without(q.hard_negative_passage_ids, rows) for q, rows in zip(questions, gold, strict=True)]
    known = [[*rows, *wrong] for rows, wrong in zip(gold, hard, strict=True)]
    return hard, [without(q.negative_passage_ids, rows) for q, rows in zip(questions, known, strict=True)]
