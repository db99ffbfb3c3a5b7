"""TensorFlow Datasets as input, from array_record files that are written here."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_jax.data.readers.formats import digest, expand, read_passages, read_questions
from rag_jax.data.readers.tfds_source import MAPPINGS, spec
from rag_jax.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("importlib_resources")

TEXT = tfds.features.Text
SQUAD = {
    "id": TEXT(),
    "title": TEXT(),
    "context": TEXT(),
    "question": TEXT(),
    "answers": tfds.features.Sequence({"text": TEXT(), "answer_start": np.int32}),
}


def content(title: str, text: str) -> str:
    return "text-" + hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:16]


def prepare(
    directory: Path, called: str, features: dict[str, Any], rows: list[dict[str, Any]], config: str = ""
) -> None:
    """Writes a data set with one split, train, as `tfds` does; its builder is not registered anywhere."""

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = called
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            return enumerate(rows)

    Prepared(data_dir=directory, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    answers = [{"text": ["Öslo", "Öslo", "it"], "answer_start": [0, 0, 0]}, {"text": [], "answer_start": []}]
    rows = [
        {"id": f"s{i}", "title": "T", "context": f"Öslo is {i // 2}.", "question": f"Where {i}?", "answers": answers[0]}
        for i in range(4)
    ]
    prepare(directory, "squad", SQUAD, rows, "v1.1")
    two = [row | {"is_impossible": i == 1, "answers": answers[i == 1]} for i, row in enumerate(rows)]
    prepare(directory, "squad", SQUAD | {"is_impossible": np.bool_}, two, "v2.0")
    nq = [{"question": f"who {i}?", "answer": [f"a{i}", "b"]} for i in range(30)]
    prepare(directory, "natural_questions_open", {"question": np.str_, "answer": tfds.features.Sequence(np.str_)}, nq)
    answer = {"aliases": tfds.features.Sequence(TEXT()), "value": TEXT()}
    trivia = [{"question_id": "tc_1", "question": "Who?", "answer": {"aliases": ["A. B.", "A B"], "value": "A B"}}]
    prepare(
        directory,
        "trivia_qa",
        {"question_id": TEXT(), "question": TEXT(), "answer": answer},
        trivia,
        "unfiltered.nocontext",
    )
    yes = [{"question": f"is it {i}", "passage": "It is.", "title": "", "answer": bool(i)} for i in range(2)]
    prepare(directory, "bool_q", {"question": TEXT(), "passage": TEXT(), "title": TEXT(), "answer": np.bool_}, yes)
    other = [{"q": "Who?", "gold": "x", "level": 3, "doc": "Some text.", "head": "H"}]
    prepare(directory, "my_own", {"q": TEXT(), "gold": TEXT(), "level": np.int32, "doc": TEXT(), "head": TEXT()}, other)
    bad = [{"question": text, "answers": ["x"]} for text in (b"good?", b"b\xe9d?", b"too?")]
    prepare(directory, "broken", {"question": TEXT(), "answers": tfds.features.Sequence(TEXT())}, bad)
    return directory


def test_bytes_that_are_no_text(prepared: Path) -> None:
    with pytest.raises(InputError, match=r":2: not UTF-8 \(byte 0xe9\)"):
        read_questions(f"tfds:broken/train?data_dir={prepared}")
    found = read_questions(f"tfds:broken/train?data_dir={prepared}", skip_bad_lines=True)
    assert [question.id for question in found] == ["broken/train-1", "broken/train-3"]


def test_squad(prepared: Path) -> None:
    found = read_questions(f"tfds:squad/v1.1/train?data_dir={prepared}")
    assert [(q.id, q.question, q.answers) for q in found] == [
        (f"s{i}", f"Where {i}?", ("Öslo", "it")) for i in range(4)
    ]
    texts = list(read_passages([f"tfds:squad/v1.1/train?data_dir={prepared}"]))
    assert [(p.title, p.text) for p in texts] == [("T", "Öslo is 0."), ("T", "Öslo is 1.")]
    assert [p.id for p in texts] == [content("T", "Öslo is 0."), content("T", "Öslo is 1.")]
    assert [q.positive_passage_ids for q in found] == [(texts[i // 2].id,) for i in range(4)]


def test_squad_two_has_questions_without_answers(prepared: Path) -> None:
    found = read_questions(f"tfds:squad/v2.0:1.0.0/train?data_dir={prepared}")
    assert [q.extra.get("answerable", True) for q in found] == [True, False, True, True]
    assert (found[1].answers, found[1].positive_passage_ids) == ((), ())
    assert found[1].extra["context_passage_ids"] == [content("T", "Öslo is 0.")]


def test_the_same_questions_as_from_the_file(prepared: Path, tmp_path: Path) -> None:
    """SQuAD through TFDS and as JSON names the same passages, so one corpus serves both."""
    paragraph = {"context": "Öslo is 0.", "qas": [{"id": "s0", "question": "Where 0?", "answers": [{"text": "Öslo"}]}]}
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [paragraph]}]}))
    [theirs] = read_questions(path)
    ours = read_questions(f"tfds:squad/v1.1/train?data_dir={prepared}")[0]
    assert ours.positive_passage_ids == theirs.positive_passage_ids and ours.id == theirs.id


def test_ready_mappings(prepared: Path) -> None:
    nq = read_questions(f"tfds:natural_questions_open/train?data_dir={prepared}")
    assert [(q.question, q.answers) for q in nq] == [(f"who {i}?", (f"a{i}", "b")) for i in range(30)]
    assert [q.id for q in nq] == [f"natural_questions_open/train-{n}" for n in range(1, 31)]
    [trivia] = read_questions(f"tfds:trivia_qa/unfiltered.nocontext/train?data_dir={prepared}")
    assert (trivia.id, trivia.answers) == ("tc_1", ("A B", "A. B."))
    yes = read_questions(f"tfds:bool_q/train?data_dir={prepared}")
    assert [q.answers for q in yes] == [("no",), ("yes",)]
    [passage] = read_passages([f"tfds:bool_q/train?data_dir={prepared}"])
    assert (passage.text,) == ("It is.",) and yes[0].positive_passage_ids == (passage.id,)
    assert "tensorflow" not in sys.modules


def test_parts_of_a_split(prepared: Path) -> None:
    found = read_questions(f"tfds:natural_questions_open/train[10:13]?data_dir={prepared}")
    assert [q.question for q in found] == ["who 10?", "who 11?", "who 12?"]


def test_a_mapping_of_ones_own(prepared: Path) -> None:
    [question] = read_questions(f"tfds:my_own/train?question=q&answers=gold,head&level=level&data_dir={prepared}")
    assert (question.question, question.answers, question.extra) == ("Who?", ("x", "H"), {"level": 3})
    [passage] = read_passages([f"tfds:my_own/train?text=doc&title=head&data_dir={prepared}"])
    assert (passage.id, passage.title, passage.text) == (content("H", "Some text."), "H", "Some text.")
    [asked] = read_questions(f"tfds:my_own/train?question=q&answers=gold&context=doc&title=head&data_dir={prepared}")
    assert asked.positive_passage_ids == (passage.id,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tfds:squad", "expected tfds:NAME/SPLIT"),
        ("tfds:/train", "expected tfds:NAME/SPLIT"),
        ("tfds:my_own/train?question", "expected tfds:NAME/SPLIT"),
        ("tfds:nosuch/train?data_dir={}", "no prepared data set 'nosuch'.*download_and_prepare"),
        ("tfds:quac/train?data_dir={}", "no prepared data set 'quac'.*array_record"),
        ("tfds:my_own/test?data_dir={}", "no split 'test'; there are train"),
        ("tfds:my_own/train[3:x]?data_dir={}", "cannot read this part"),
        ("tfds:my_own/train?question=Q&answers=gold&data_dir={}", "question=Q: no such feature; there are doc, gold"),
        (
            "tfds:squad/v1.1/train?question=question&answers=answers&data_dir={}",
            "answers=answers: no such feature; .*answers.text",
        ),
        (
            "tfds:my_own/train?question=level&answers=gold&data_dir={}",
            ":1: field 'question' must be a string, it is a num",
        ),
    ],
)
def test_refused(prepared: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_questions(text.format(prepared))
    assert str(error.value).startswith(text.format(prepared))


def test_passages_need_a_text(prepared: Path) -> None:
    with pytest.raises(InputError, match="neither text nor context"):
        list(read_passages([f"tfds:natural_questions_open/train?data_dir={prepared}"]))


def test_digest_is_of_files_and_mapping(prepared: Path, tmp_path: Path) -> None:
    def of(text: str) -> str:
        [source] = expand([text])
        return digest(source)

    assert expand([f"tfds:my_own/train?text=doc&data_dir={prepared}"])[0].name == "my_own/train"
    once = of(f"tfds:my_own/train?text=doc&data_dir={prepared}")
    assert once == of(f"tfds:my_own/train?text=doc&data_dir={prepared}")
    assert once != of(f"tfds:my_own/train?text=head&data_dir={prepared}")
    features = {"doc": TEXT(), "head": TEXT()}
    prepare(tmp_path, "my_own", features, [{"doc": "Some other text.", "head": "H"}])
    assert once != of(f"tfds:my_own/train?text=doc&data_dir={tmp_path}")


def test_specs() -> None:
    assert spec("tfds:squad/v2.0:3.0.0/validation[:5%]").split == "validation[:5%]"
    assert spec("tfds:squad/v2.0:3.0.0/train").fields == MAPPINGS["squad/v2.0"]
    assert spec("tfds:squad/v1.1/train").fields == MAPPINGS["squad"] == spec("tfds:squad/train").fields
    assert spec("tfds:x/y?question=a.b&data_dir=/d") == ("x", "y", {"question": "a.b"}, "/d")


def test_the_world_and_passages_of_our_own(tmp_path: Path) -> None:
    from rag_jax.data.passages_tfds import PassagesBuilder, PassagesConfig
    from rag_jax.data.synthetic.world import World
    from rag_jax.data.synthetic.world_tfds import WorldBuilder, WorldConfig

    config = WorldConfig(entities=40, seed=3)
    WorldBuilder(data_dir=tmp_path, config=config).download_and_prepare()
    world = World(40, 3)
    asked = read_questions(f"tfds:world/{config.name}/dev?data_dir={tmp_path}")
    rows = list(world.rows("dev"))
    assert [(q.id, q.question, list(q.answers), list(q.positive_passage_ids)) for q in asked] == [
        (row["id"], row["question"], row["answers"], row["positive_passage_ids"]) for row in rows
    ]
    assert [q.extra["relation"] for q in asked] == [row["relation"] for row in rows]
    source = f"tfds:world/{config.name}/passages?data_dir={tmp_path}"
    texts = list(read_passages([source]))
    assert [(p.id, p.title, p.text) for p in texts] == [
        (r["id"], r["title"], r["text"]) for r in world.rows("passages")
    ]

    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"id": p.id, "title": p.title, "text": p.text, "doc_id": "d"}) + "\n" for p in texts)
    )
    PassagesBuilder(data_dir=tmp_path, config=PassagesConfig(name="mine", inputs=(str(path),))).download_and_prepare()
    assert list(read_passages([f"tfds:passages/mine/passages?data_dir={tmp_path}"])) == list(read_passages([path]))
    with pytest.raises(InputError, match="both are needed"):
        PassagesConfig(name="mine")
    assert "tensorflow" not in sys.modules
