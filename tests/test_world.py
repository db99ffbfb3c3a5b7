"""The fictional world: determinism, properties of passages and questions, edits, and its files."""

import hashlib
import json
import re
import subprocess
import sys
import tracemalloc
from itertools import islice, pairwise
from pathlib import Path
from string import Formatter

import pytest

from rag_jax.data.synthetic import world
from rag_jax.data.synthetic.world import (
    FILES,
    MAX_ENTITIES,
    MAX_WORDS,
    MIN_WORDS,
    SPLITS,
    SYLLABLES,
    World,
    permute,
    write,
)
from rag_jax.data.synthetic.world_text import DISTRACTORS, KINDS, ORGANISATION_NOUNS, RELATIONS, WORK_NOUNS
from rag_jax.errors import InputError

N = 1000


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def occurrences(phrase: str, text: str) -> int:
    return len(re.findall(rf"\b{re.escape(phrase)}\b", text))


@pytest.fixture(scope="module")
def plain() -> World:
    return World(N, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "nested" / "out"
    write(out, N, 0)
    return out


def test_wordings_are_many_and_complete() -> None:
    for kind in KINDS:
        assert len(RELATIONS[kind]) >= 6
        for relation in RELATIONS[kind]:
            assert len(set(relation.statements)) >= 5, relation.name
            assert len(set(relation.questions)) >= 4, relation.name
            for statement in relation.statements:
                slots = [slot for _, slot, _, _ in Formatter().parse(statement) if slot]
                assert slots.count("a") == 1 and len(slots) == 2 and set(slots) - {"a"} <= {"s", "o", "p"}, statement
            for question in relation.questions:
                assert question.count("{n}") == 1 and question.endswith("?"), question
        # A question must say which relation it is about.
        questions = [q for relation in RELATIONS[kind] for q in relation.questions]
        assert len(questions) == len(set(questions))
    for text in DISTRACTORS:
        slots = [slot for _, slot, _, _ in Formatter().parse(text) if slot]
        assert len(slots) == len(set(slots)), text


def test_a_word_has_one_reading_as_syllables() -> None:
    assert len(set(SYLLABLES)) == len(SYLLABLES)
    pairs = {a + b for a in SYLLABLES for b in SYLLABLES}
    assert len(pairs) == len(SYLLABLES) ** 2
    assert not pairs & set(SYLLABLES)


def test_names_are_no_words_of_the_templates() -> None:
    """Bare words and towns are single words; one that the templates use would occur twice in a sentence."""
    texts = [t for kind in KINDS for r in RELATIONS[kind] for t in r.statements + r.questions]
    texts += [*DISTRACTORS, *ORGANISATION_NOUNS, *WORK_NOUNS]
    words = {w.lower() for t in texts for w in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", t))}
    any_syllable, last = "|".join(SYLLABLES), "|".join(world._LAST_OPEN)
    assert not [w for w in words if re.fullmatch(f"({any_syllable}){{1,2}}({last})", w)]


@pytest.mark.parametrize("size", [1, 2, 3, 20, 1000, 1025])
def test_permute_is_a_bijection(size: int) -> None:
    assert sorted(permute(x, size, 7) for x in range(size)) == list(range(size))


def test_names_are_unique() -> None:
    some = World(MAX_ENTITIES, 3)
    names = [world._name(3, *world._locate(i)) for i in range(50_000)]
    names += [world._name(3, *world._locate(i)) for i in range(MAX_ENTITIES - 1000, MAX_ENTITIES)]
    assert len(set(names)) == len(names)
    for i in (0, MAX_ENTITIES - 1):
        assert some.passage(i)["title"] == names[-1 if i else 0]


def test_answers_are_in_no_other_passage(plain: World) -> None:
    """Otherwise "Who was married to X?" could be answered from "Y was married to X"."""
    names = {plain.entity(i).name for i in range(N)}
    answers = [q["answers"][0] for i in range(N) for q in plain.questions(i)]
    assert not names & set(answers)
    named = [a for a in answers if " " in a]
    assert len(set(named)) > 0.999 * len(named)


def test_distractors_name_entities(plain: World) -> None:
    """Passages that mention an entity without answering anything about it make retrieval a task."""
    towns = {plain.entity(i).name for i in range(N) if plain.entity(i).kind == "place"}
    words = [
        w.rstrip(".") for i in range(N) if plain.entity(i).kind != "place" for w in plain.passage(i)["text"].split()
    ]
    mentioned = {w for w in words if w in towns}
    assert len(mentioned) > 0.8 * len(towns)


def test_no_name_contains_another(plain: World) -> None:
    """So a question that names one entity mentions no other."""
    names = {plain.entity(i).name for i in range(1000)}
    for name in names:
        words = name.split()
        parts = {" ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}
        assert parts & names == {name}


def test_same_seed_same_text_other_seed_other_text(plain: World) -> None:
    assert world.VERSION == "1.0.0", "the text of a version never changes; after changing it, renew these lines"
    assert plain.passage(0)["title"] == World(N, 0).passage(0)["title"] != World(N, 1).passage(0)["title"]
    text = json.dumps([[plain.passage(i), plain.questions(i), plain.split(i)] for i in range(100)])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "5a219ddecb518adf31fd9f839ceca518fafeaae99e433f401ddd5aa3ddf71a96"
    )


def test_an_entity_depends_only_on_seed_and_index(plain: World) -> None:
    other = World(10_000_000, 0)
    for i in (999, 503, 0, 17):
        assert other.entity(i) == plain.entity(i)
        assert other.split(i) == plain.split(i)
    with pytest.raises(IndexError, match="entity 2000 of 1000"):
        plain.entity(2000)


@pytest.mark.parametrize("edit", [False, True])
def test_passages_and_questions(edit: bool) -> None:
    """Length, uniqueness and unambiguity of the answers, names, form of the questions."""
    some = World(N, 5, edit)
    for i in range(0, N, 2 if edit else 1):
        entity, passage, questions = some.entity(i), some.passage(i), some.questions(i)
        text = passage["text"]
        assert passage.keys() == {"id", "title", "text"}
        assert passage["title"] == entity.name and passage["id"] == entity.id
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS
        assert entity.name in text and "{" not in text
        assert re.fullmatch(r"([A-Z][^.]*\.)( [A-Z][^.]*\.)+", text), text
        assert 4 <= len(questions) == len(entity.facts) <= 6
        assert len({q["relation"] for q in questions}) == len(questions)
        assert len({q["answers"][0] for q in questions}) == len(questions)
        stated = [relation for _, relation in entity.sentences]
        assert stated.count(None) >= 2
        for question in questions:
            (answer,) = question["answers"]
            assert occurrences(answer, text) == 1, (answer, text)
            (sentence,) = [t for t, relation in entity.sentences if relation == question["relation"]]
            assert answer in sentence
            assert len(answer.removeprefix("The ").split()) <= 3
            assert question["question"].endswith("?") and entity.name in question["question"]
            assert answer not in question["question"]
            assert question["positive_passage_ids"] == [passage["id"]] and question["entity"] == passage["id"]
            assert question["id"] == f"{passage['id']}-{question['relation']}"


def test_answers_cannot_be_guessed(plain: World) -> None:
    """Always giving the most frequent answer of a relation is almost never right."""
    answers: dict[tuple[str, str], list[str]] = {}
    for i in range(N):
        for q in plain.questions(i):
            answers.setdefault((q["id"].split("-")[1], q["relation"]), []).extend(q["answers"])
    assert len(answers) == sum(map(len, RELATIONS.values()))
    right = sum(max(map(some.count, set(some))) for some in answers.values())
    assert right / sum(map(len, answers.values())) < 0.03


def test_splits(plain: World, written: Path) -> None:
    split = [plain.split(i) for i in range(N)]
    assert {s: split.count(s) for s in SPLITS} == {"train": 0.85 * N, "dev": 0.05 * N, "test": 0.1 * N}
    files = {s: rows(written / f"{s}.jsonl") for s in SPLITS}
    about = {s: {row["entity"] for row in some} for s, some in files.items()}
    assert not about["train"] & about["test"] and not about["train"] & about["dev"] and not about["dev"] & about["test"]
    assert set.union(*about.values()) == {plain.entity(i).id for i in range(N)}
    for i in range(N):
        assert plain.entity(i).id in about[plain.split(i)]
    names = {plain.entity(i).name for i in range(N)}
    held_out = {plain.entity(i).name for i in range(N) if plain.split(i) != "train"}
    for row in files["train"]:
        words = row["question"].rstrip("?").split()
        runs = {" ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, min(a + 4, len(words)) + 1)}
        assert len(runs & names) == 1 and not runs & held_out


def test_files(plain: World, written: Path) -> None:
    assert sorted(p.name for p in written.iterdir()) == sorted([*(f"{n}.jsonl" for n in FILES), "world.json"])
    assert rows(written / "passages.jsonl") == [plain.passage(i) for i in range(N)]
    questions = [row for s in SPLITS for row in rows(written / f"{s}.jsonl")]
    expected = [row for i in range(N) for row in plain.questions(i)]
    assert sorted(q["id"] for q in questions) == sorted(q["id"] for q in expected)
    assert {q["id"]: q for q in questions} == {q["id"]: q for q in expected}
    assert not any({"changed", "previous_answers"} & q.keys() for q in questions)
    # Shuffled: neither the order of the entities nor questions of one entity side by side.
    numbers = [int(q["id"].split("-")[2]) for q in rows(written / "test.jsonl")]
    assert sum(a < b for a, b in pairwise(numbers)) < 0.6 * len(numbers)
    assert sum(a == b for a, b in pairwise(numbers)) < 0.05 * len(numbers)
    manifest = json.loads((written / "world.json").read_text())
    counts = {n: len(rows(written / f"{n}.jsonl")) for n in FILES}
    sha256 = manifest.pop("sha256")
    easier = {"relations": 0, "wordings": 0}
    assert manifest == {"version": world.VERSION, "seed": 0, "entities": N, "edit": False, "counts": counts, **easier}
    assert sha256 == {f"{n}.jsonl": hashlib.sha256((written / f"{n}.jsonl").read_bytes()).hexdigest() for n in FILES}


def test_edit_changes_the_flagged_answers_and_nothing_else(plain: World) -> None:
    edited = World(N, 0, edit=True)
    changed = total = 0
    for i in range(0, N, 2):
        before, after = plain.questions(i), edited.questions(i)
        old_text, new_text = plain.passage(i)["text"], edited.passage(i)["text"]
        assert plain.passage(i)["id"] == edited.passage(i)["id"]
        assert plain.passage(i)["title"] == edited.passage(i)["title"]
        undone = new_text
        for old, new in zip(before, after, strict=True):
            assert {k: v for k, v in old.items() if k != "answers"} == {
                k: v for k, v in new.items() if k not in ("answers", "changed", "previous_answers")
            }
            assert new["changed"] == (old["answers"] != new["answers"]) == ("previous_answers" in new)
            if new["changed"]:
                assert new["previous_answers"] == old["answers"]
                assert new["answers"][0] not in old_text and occurrences(old["answers"][0], new_text) == 0
                undone = undone.replace(new["answers"][0], old["answers"][0])
        assert undone == old_text != new_text
        count = sum(q["changed"] for q in after)
        assert len(after) // 2 <= count <= (len(after) + 1) // 2
        changed, total = changed + count, total + len(after)
    assert 0.47 < changed / total < 0.53


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    entities = world._CHUNK + 300  # more than one unit of work
    assert write(tmp_path / "one", entities, 1, edit=True) == write(tmp_path / "two", entities, 1, edit=True, workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_memory_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_CHUNK", 20)
    monkeypatch.setattr(world, "_name", world._name.__wrapped__)  # the cache may grow to its fixed size
    stream = world._chunks(World(10_000_000, 0), workers=1)
    tracemalloc.start()
    try:
        for _ in islice(stream, 5):
            pass
        early, _ = tracemalloc.get_traced_memory()
        size = sum(len(data) for _, _, data in islice(stream, 25))
        late, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 200_000
    assert late - early < 0.1 * size and peak < size


def test_refuses(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    with pytest.raises(InputError, match="full: already exists"):
        write(full, 20, 0)
    with pytest.raises(InputError, match="precious: already exists"):
        write(full / "precious", 20, 0)
    for bad in (0, -1, world.MIN_ENTITIES - 1, MAX_ENTITIES + 1):
        with pytest.raises(InputError, match="entities"):
            write(tmp_path / "new", bad, 0)
    with pytest.raises(InputError, match="seed"):
        write(tmp_path / "new", 20, -1)
    with pytest.raises(InputError, match="workers"):
        write(tmp_path / "new", 20, 0, workers=0)
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and [p.name for p in full.iterdir()] == ["precious"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: World, i: int) -> list:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(World, "questions", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write(tmp_path / "out", 20, 0)
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write(tmp_path / "out", 20, 0)["counts"]["passages"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    beside = tmp_path / "beside"
    beside.mkdir()
    assert (tmp_path / "out").stat().st_mode == beside.stat().st_mode


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rag_jax", "world", "--out", "w", "--entities", "40", "--seed", "4", "--edit"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["counts"]["passages"] == 40 and result["edit"] is True and result["passages_per_second"] > 0
    assert len(rows(tmp_path / "w" / "passages.jsonl")) == 40
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists" in again.stderr and "Traceback" not in again.stderr and not again.stdout


def test_import_needs_no_tensorflow_datasets() -> None:
    banned = "{'tensorflow_datasets', 'jax', 'tensorflow'}"
    code = f"import sys, rag_jax.data.synthetic.world; assert not {banned} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorflow_datasets_builder(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    from rag_jax.data.synthetic.world_tfds import WorldBuilder, WorldConfig

    builder = WorldBuilder(data_dir=tmp_path, config=WorldConfig(entities=60, seed=2, edit=True))
    builder.download_and_prepare()
    expected = World(60, 2, edit=True)
    for split in FILES:
        source = builder.as_data_source(split)
        wanted = list(expected.rows(split))
        assert len(source) == len(wanted) > 0
        for got, row in zip(source, wanted, strict=True):
            for key in ("id", "title", "text", "question", "relation", "entity"):
                assert got[key].decode() == row.get(key, "")
            for key in ("answers", "positive_passage_ids", "previous_answers"):
                assert [x.decode() for x in got[key]] == row.get(key, [])
            assert bool(got["changed"]) == row.get("changed", False)
    assert "tensorflow" not in sys.modules
    # Another world goes elsewhere, and what is built is found again.
    assert WorldBuilder(data_dir=tmp_path, config=WorldConfig(entities=60, seed=3)).data_path != builder.data_path
    again = WorldBuilder(data_dir=tmp_path, config=WorldConfig(entities=60, seed=2, edit=True))
    assert len(again.as_data_source("passages")) == 60
    with pytest.raises(InputError, match="entities"):
        WorldConfig(entities=1)


def test_fewer_relations_and_wordings_are_a_part_of_the_world() -> None:
    easy, full = World(200, 0, relations=6, wordings=2), World(200, 0)
    asked = {(i % 5, row["relation"]) for i in range(200) for row in easy.questions(i)}
    assert len({relation for kind, relation in asked if kind == 2}) == 6
    assert asked < {(i % 5, row["relation"]) for i in range(200) for row in full.questions(i)}
    for i in range(200):
        entity = easy.entity(i)
        known = {r.name: r for r in RELATIONS[entity.kind][:6]}
        for fact in entity.facts:
            assert fact.answer in easy.passage(i)["text"]
            subject = f"the {entity.name}" if entity.kind == "organisation" else entity.name
            wordings = [q.replace("{n}", subject) for q in known[fact.relation].questions[:2]]
            assert fact.question in wordings
    with pytest.raises(InputError, match="at least 6"):
        World(200, 0, relations=5)
