"""Tasks: which fields of a question are read and written, and what of them reaches the model."""

import pytest

from rag_jax.corpus.directory import Corpus
from rag_jax.data import examples as tokenised
from rag_jax.data import tasks
from rag_jax.data.readers.formats import Question
from rag_jax.data.tasks import TaskConfig
from rag_jax.errors import InputError


@pytest.fixture(scope="module")
def corpus(tiny_data):
    return Corpus.open(tiny_data / "corpus")


@pytest.fixture(scope="module")
def asked(corpus):
    return [
        Question("0", "Is it?", ("yes",), (corpus[3].id, corpus[5].id), "It is, they say.", {"label": "yes"}),
        Question("1", "Who?", (" ", "Anna Aska"), ("gone", corpus[1].id)),
        Question("2", "What then?", ("nothing",)),
        Question("3", "And?", (), (corpus[2].id,)),
    ]


def posed(asked, corpus, **task):
    return [(q.id, q.question, q.target, q.answers) for q in tasks.posed(asked, TaskConfig(**task), corpus)]


def test_by_default_questions_stay_as_they_are(asked, corpus):
    assert tasks.posed(asked, TaskConfig(), corpus) == asked


def test_answers_in_place_of_long_targets(asked, corpus):
    made = tasks.posed(asked, TaskConfig(writes="answer"), corpus)
    assert [q.target for q in made] == [None] * 4 and made[0].answers == ("yes",) and made[0].extra == {"label": "yes"}
    examples = tokenised.tokenise(made[:1], corpus, question_length=16, target_length=16)
    assert corpus.generator_tokenizer.decode(examples.label[0]) == " yes"


def test_questions_are_written_from_answers_and_from_passages(asked, corpus):
    assert posed(asked, corpus, reads="answer", writes="question") == [
        ("0", "yes", "Is it?", ()),
        ("1", "Anna Aska", "Who?", ()),
        ("2", "nothing", "What then?", ()),
    ]  # the last one has no answer
    assert posed(asked, corpus, reads="passage", writes="question") == [
        ("0", corpus[3].text, "Is it?", ()),
        ("1", corpus[1].text, "Who?", ()),  # the first one that the corpus has
        ("3", corpus[2].text, "And?", ()),
    ]
    assert posed(asked, corpus, reads="passage", writes="answer")[0] == ("0", corpus[3].text, None, ("yes",))
    made = tasks.posed(asked, TaskConfig("answer", "question"), corpus)
    examples = tokenised.tokenise(made, corpus, question_length=16, target_length=16, live=True)
    generator = corpus.generator_tokenizer
    assert [generator.decode(examples.tail[i]) for i in range(3)] == [" // yes", " // Anna Aska", " // nothing"]
    assert [generator.decode(examples.label[i]) for i in range(3)] == [" Is it?", " Who?", " What then?"]
    assert [examples.gold[i].tolist() for i in range(3)] == [[3, 5], [1], []]


def test_what_cannot_be_is_said(asked, corpus):
    with pytest.raises(InputError, match=r"no question has what task\.reads='passage' needs"):
        tasks.posed(asked[2:3], TaskConfig("passage", "question"), corpus)
    for reads, writes in (("question", "question"), ("answer", "answer"), ("answer", "target")):
        with pytest.raises(InputError, match=f"task.reads='{reads}' with task.writes='{writes}'"):
            tasks.check(TaskConfig(reads, writes))
    for fine in (TaskConfig(), TaskConfig("answer", "question"), TaskConfig("passage", "target")):
        tasks.check(fine)
