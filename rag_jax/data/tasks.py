"""Tasks: the same question files serve to train answering, classification and question generation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rag_jax.data import gold
from rag_jax.data.readers.rows import Question
from rag_jax.errors import InputError


@dataclass(frozen=True)
class TaskConfig:
    """The input and output of the model, and how its output is judged.

    reads: the input, with which it also retrieves: the question, its first answer (as in the paper's Jeopardy question
        generation), or the text of its first right passage.
    writes: the output. "target": the target of the question if it has one, else an answer; "answer": always an answer;
        "question": the question.
    match: how an output is compared with the right ones, a key of metrics.matching.MATCHERS.
    """

    reads: Literal["question", "answer", "passage"] = "question"
    writes: Literal["target", "answer", "question"] = "target"
    match: str = "string"


def check(task: TaskConfig) -> None:
    """Raises InputError where the task reads what it writes."""
    if task.reads == task.writes or (task.reads == "answer" and task.writes == "target"):
        raise InputError(f"task.reads={task.reads!r} with task.writes={task.writes!r}: what is read would be written")


def each(questions: Iterable[Question], task: TaskConfig, corpus: gold.PassageLookup) -> Iterator[Question]:
    """The questions as the task poses them: `question` is the text that is read. Those without one are left out."""
    return (_written(question, task, text) for question in questions if (text := _read(question, task, corpus)))


def posed(questions: Iterable[Question], task: TaskConfig, corpus: gold.PassageLookup) -> list[Question]:
    """The questions of `each` as a list; InputError where none is left."""
    made = list(each(questions, task, corpus))
    if not made:
        raise InputError(f"no question has what task.reads={task.reads!r} needs")
    return made


def _read(question: Question, task: TaskConfig, corpus: gold.PassageLookup) -> str:
    if task.reads == "answer":
        return next((answer for answer in question.answers if answer.strip()), "")
    if task.reads == "passage":
        return next((corpus[row].text for row in gold.right_rows([question], corpus)[0]), "")
    return question.question


def _written(question: Question, task: TaskConfig, text: str) -> Question:
    if task.writes == "question":
        return replace(question, question=text, target=question.question, answers=())
    return replace(question, question=text, target=None if task.writes == "answer" else question.target)
