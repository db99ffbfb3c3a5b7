"""What is read and what is written: the same question files give answering, classification and question generation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rag_jax.data import gold
from rag_jax.data.readers.rows import Question
from rag_jax.errors import InputError


@dataclass(frozen=True)
class TaskConfig:
    """What the model reads and writes, and how that is judged.

    reads: the question, its first answer (as the paper's Jeopardy questions), or the text of its first right passage;
    that is what retrieves, too. writes: the `target` where the question has one, else an answer; `answer`: an answer
    in any case; or the question. match: of metrics.matching.MATCHERS.
    """

    reads: Literal["question", "answer", "passage"] = "question"
    writes: Literal["target", "answer", "question"] = "target"
    match: str = "string"


def check(task: TaskConfig) -> None:
    """InputError where the same is read and written."""
    if task.reads == task.writes or (task.reads == "answer" and task.writes == "target"):
        raise InputError(f"task.reads={task.reads!r} with task.writes={task.writes!r}: what is read would be written")


def each(questions: Iterable[Question], task: TaskConfig, corpus: gold.Passages) -> Iterator[Question]:
    """The questions as the task has them, `question` what is read; those that lack it are left out."""
    return (_written(question, task, text) for question in questions if (text := _read(question, task, corpus)))


def posed(questions: Iterable[Question], task: TaskConfig, corpus: gold.Passages) -> list[Question]:
    """All of `each`; InputError where none is left."""
    made = list(each(questions, task, corpus))
    if not made:
        raise InputError(f"no question has what task.reads={task.reads!r} needs")
    return made


def _read(question: Question, task: TaskConfig, corpus: gold.Passages) -> str:
    if task.reads == "answer":
        return next((answer for answer in question.answers if answer.strip()), "")
    if task.reads == "passage":
        return next((corpus[row].text for row in gold.right_rows([question], corpus)[0]), "")
    return question.question


def _written(question: Question, task: TaskConfig, text: str) -> Question:
    if task.writes == "question":
        return replace(question, question=text, target=question.question, answers=())
    return replace(question, question=text, target=None if task.writes == "answer" else question.target)
