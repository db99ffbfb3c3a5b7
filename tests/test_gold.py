"""From gold ids of questions to passages, where documents were cut, updated and deleted; unknown ids."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.corpus.build import build
from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.update import update
from rag_jax.data import gold
from rag_jax.data.examples import tokenise, wrong_rows
from rag_jax.data.readers.formats import Question
from rag_jax.errors import InputError

WORDS = ["river", "stone", "lamp", "market", "garden", "winter", "captain", "silver", "bridge", "engine", "poet"]


def text(words: int, seed: int, said: str = "") -> str:
    """Sentences of ten words; `said` is in the last one."""
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(WORDS, k=9)) + " end." for _ in range(words // 9)]
    return " ".join([*sentences, f"{said}." if said else ""]).strip()


def write(path: Path, passages: dict[str, str], **more: str) -> Path:
    rows = [{"id": name, "title": "T", "text": body, **more} for name, body in passages.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three corpora.

    base: documents d1, d2 and d-9 cut in pieces, and passages that were never cut, with ids that end in a number.
    one: d1 replaced by a shorter text, d2-1 deleted.
    two: d2 deleted as well, then a passage d2-0 added.
    """
    out = tmp_path_factory.mktemp("gold")
    passages = {
        "a": "short", "d1": text(300, 1, "the answer is Zorblax"), "d1-3": "no piece of d1", "d1-x": "nor this",
        "d2": text(300, 2), "e-0": "whole", "e-1": "whole, too", "d-9": text(220, 3), "d-9-7": "not of d-9",
    }  # fmt: skip
    source = write(out / "p.jsonl", passages, document="book")
    build([source], out / "base", train_tokenizer=(300, 320))
    again = write(out / "again.jsonl", {"d1": text(220, 4, "Zorblax again")})
    update(out / "base", out / "one", replace=[again], delete=["d2-1"])
    update(out / "one", out / "between", delete=["d2"])
    update(out / "between", out / "two", add=[write(out / "new.jsonl", {"d2-0": "another"})])
    return out


def from_ids(corpus: Corpus) -> dict[str, str]:
    """{passage id: document id} of the valid passages that were cut from a document."""
    live = range(len(corpus)) if corpus.live_N is None else np.flatnonzero(corpus.live_N)
    found = {corpus[row].id: corpus.cut_from(int(row)) for row in live}
    return {one: document for one, document in found.items() if document is not None}


def test_what_was_cut_and_what_only_looks_so(folder: Path) -> None:
    base, one, two = (Corpus.open(folder / name) for name in ("base", "one", "two"))
    pieces = {"d1": ["d1-0", "d1-1", "d1-2"], "d2": ["d2-0", "d2-1", "d2-2"], "d-9": ["d-9-0", "d-9-1"]}
    assert from_ids(base) == {piece: document for document, some in pieces.items() for piece in some}
    for document, some in pieces.items():
        assert [base[row].id for row in base.pieces(document)] == some
    assert base.pieces("e") == [] and base.pieces("d1-3") == [base.row("d1-3")]
    assert from_ids(one) == {
        "d1-0": "d1", "d1-1": "d1", "d2-0": "d2", "d2-2": "d2", "d-9-0": "d-9", "d-9-1": "d-9",
    }  # fmt: skip
    assert one.pieces("d1") == [len(base), len(base) + 1]
    assert [one[row].id for row in one.pieces("d2")] == ["d2-0", "d2-2"]
    assert set(from_ids(two).values()) == {"d1", "d-9"}
    assert two.cut_from(two.row("d2-0")) is None and two.pieces("d2") == [] and two.deleted("d2")


def test_a_corpus_that_does_not_say_where_a_document_ends(folder: Path, tmp_path: Path) -> None:
    """In the older format the last piece is recognised by ids that continue within one document."""
    source = write(tmp_path / "p.jsonl", {"d1": text(300, 1)})
    with source.open("a") as stream:
        stream.write(json.dumps({"id": "d1-3", "title": "", "text": "no piece"}) + "\n")
    corpus = build([source], tmp_path / "out", tokenizers_from=folder / "base")
    hashes, rows = (np.load(tmp_path / f"out/id_{name}.npy") for name in ("hashes", "rows"))
    again = np.flatnonzero(np.append(False, hashes[1:] == hashes[:-1]))
    assert rows[again].tolist() == [2]  # the last piece, under the id of the document
    vars(corpus.segments[0])["_id_table"] = tuple(np.delete(table, again) for table in (hashes, rows))
    assert corpus.pieces("d1") == [0, 1, 2] and from_ids(corpus) == {f"d1-{i}": "d1" for i in range(3)}


def asked(*ids: str, answers: tuple[str, ...] = ("Zorblax",), **more: tuple[str, ...]) -> Question:
    return Question("q", "which?", answers, ids, **more)  # type: ignore[arg-type]


def test_of_a_cut_document_the_passage_with_the_answer_or_all(folder: Path) -> None:
    corpus = Corpus.open(folder / "base")
    d1, d2 = corpus.pieces("d1"), corpus.pieces("d2")
    questions = [
        asked("d1"), asked("d2"), asked("d1", answers=()), asked("a", "d1", "d1-2"), asked("gone", "d1-0"),
        asked("d1", answers=("no such thing", "zorblax")), asked("a", answers=()),
    ]  # fmt: skip
    tally = gold.Tally()
    assert gold.right_rows(questions, corpus, tally) == [
        [d1[2]], d2, d1, [corpus.row("a"), d1[2]], [d1[0]], [d1[2]], [corpus.row("a")],
    ]  # fmt: skip
    assert (tally.named, tally.missing, tally.deleted, tally.first_missing) == (10, 1, 0, ["gone"])
    assert gold.tally(questions, corpus) == tally
    made = tokenise([asked("d1"), asked("d2")], corpus, question_length=8, target_length=8)
    assert [row.tolist() for row in (made.gold[0], made.gold[1])] == [[d1[2]], d2]


def test_documents_as_wrong_passages(folder: Path) -> None:
    corpus = Corpus.open(folder / "base")
    question = asked("d1", hard_negative_passage_ids=("d2", "d1-2", "none"), negative_passage_ids=("d1", "a", "d2-0"))
    right = gold.right_rows([question], corpus)
    hard, other = wrong_rows([question], right, corpus)
    assert hard == [corpus.pieces("d2")]
    assert other == [[*corpus.pieces("d1")[:2], corpus.row("a")]]


def test_levels(folder: Path) -> None:
    corpus = Corpus.open(folder / "base")
    whole, document, piece = asked("a", "e-0"), asked("a", "d1"), asked("d2-1", "a")
    assert gold.levels([whole], corpus) == ["document"]
    assert gold.levels([whole, document], corpus) == ["document", "document"]
    assert gold.levels([whole, piece], corpus) == ["passage", "passage"]
    assert gold.levels([whole, piece, document], corpus) == ["document", "passage", "document"]
    assert gold.levels([asked("d1-3")], corpus) == ["document"]  # its id looks like a piece's, but it is none
    one = Corpus.open(folder / "one")
    assert gold.levels([asked("d2")], one) == ["document"]


def test_unknown_ids_are_named_and_refused_where_they_are_most(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Corpus.open(folder / "one")
    few = gold.tally([asked("a", *(f"wiki:{i}" for i in range(5)), "d2-1")], one)
    few.settle("q.jsonl", one.directory, "they do not count", "mend it")
    said = capsys.readouterr().err
    assert f"q.jsonl: 5 of 7 gold ids are not in the corpus {one.directory} ('wiki:0', 'wiki:1', 'wiki:2', ...)" in said
    assert "1 of 7 gold ids were deleted" in said and "they do not count" in said
    most = gold.tally([asked("a", *(f"wiki:{i}" for i in range(40)))], one)
    with pytest.raises(InputError, match=r"q\.jsonl: 40 of 41 gold ids are not in .*another corpus; mend it"):
        most.settle("q.jsonl", one.directory, "", "mend it")
    most.settle("q.jsonl", one.directory, "", "mend it", refuse=False)
    half = gold.tally([asked(*["a"] * 40, *(f"wiki:{i}" for i in range(40)))], one)
    half.settle("q.jsonl", one.directory, "", "mend it")
    capsys.readouterr()
    gold.tally([asked("a", "d1")], one).settle("q.jsonl", one.directory, "", "mend it")
    assert capsys.readouterr().err == ""
    questions = [asked(f"wiki:{i}") for i in range(40)]
    with pytest.raises(InputError, match=r"nq\.jsonl: 40 of 40 gold ids are not in the corpus .*'wiki:0'"):
        tokenise(questions, one, question_length=8, target_length=8, name="nq.jsonl")
    made = tokenise([*questions[:9], asked("a")], one, question_length=8, target_length=8)
    assert made.gold.lengths().tolist() == [0] * 9 + [1]


@settings(max_examples=8)
@given(st.data())
def test_any_ids(folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Ids that end in numbers, in any order, some documents cut: each piece belongs to its own document."""
    names = data.draw(st.lists(st.sampled_from(["d", "d-0", "d-1", "d-2", "d-3", "d-0-0", "x-1", "x"]), min_size=1,
                               max_size=5, unique=True))  # fmt: skip
    long = {name: data.draw(st.sampled_from([20, 250, 350])) for name in names}
    taken = [f"{name}-{i}" for name in names if long[name] > 200 for i in range(4)]
    names = [name for name in names if name not in taken]
    out = tmp_path_factory.mktemp("any")
    source = write(out / "p.jsonl", {name: text(long[name], i) for i, name in enumerate(names)})
    corpus = build([source], out / "out", tokenizers_from=folder / "base")
    rows = 0
    for name in names:
        pieces = corpus.pieces(name)
        assert pieces == list(range(rows, rows + len(pieces))) and (len(pieces) > 1) == (long[name] > 200)
        for row in pieces:
            assert corpus.cut_from(row) == (name if len(pieces) > 1 else None)
        rows += len(pieces)
    assert rows == len(corpus)
