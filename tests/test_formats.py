"""Readers: every form of input, and every way in which a line can be wrong, with file and line."""

import gzip
import json
import random
from pathlib import Path

import pytest

from rag_jax.data.cutting import cut
from rag_jax.data.readers.formats import Passage, expand, read_passages, read_questions
from rag_jax.errors import InputError

GOOD = {"id": "p1", "title": "Oslo", "text": "Oslo lies in Norway."}


def line(**changes: object) -> bytes:
    row = {**GOOD, **changes}
    return json.dumps({key: value for key, value in row.items() if value is not ...}).encode() + b"\n"


def write(path: Path, *lines: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
    return path


def ids(*paths: str | Path) -> list[str]:
    return [passage.id for passage in read_passages(list(paths))]


def test_jsonl_fields_bom_crlf_blank_lines_and_unicode_line_ends(tmp_path: Path) -> None:
    second = '{"id": 7, "title": "", "text": "a\u2028b\u0085c", "doc_id": "d"}\r\n'.encode()
    path = write(
        tmp_path / "p.jsonl", b"\xef\xbb\xbf", line().replace(b"\n", b"\r\n"), b"\r\n", second, line(id="x")[:-1]
    )
    assert list(read_passages([path])) == [
        Passage("p1", "Oslo", "Oslo lies in Norway.", "p1"),
        Passage("7", "", "a\u2028b\u0085c", "d"),
        Passage("x", "Oslo", "Oslo lies in Norway.", "x"),
    ]


BAD_LINES = [
    (line(id=...), "missing field 'id'"),
    (line(title=...), "missing field 'title'"),
    (line(text=...), "missing field 'text'"),
    (line(id=None), "'id' must be a string, it is null"),
    (line(id=True), "'id' must be a string, it is true or false"),
    (line(id=" "), "empty id"),
    (line(title=["a"]), "'title' must be a string, it is a list"),
    (line(text=1.5), "'text' must be a string, it is a number"),
    (line(text=" \n "), "empty text"),
    (line(document={}), "document id must be a string"),
    (line()[:-5] + b"\n", "broken JSON"),
    (b"[1, 2]\n", "a JSON object is needed, this is a list"),
    (b"[" * 100_000 + b"\n", "broken JSON (maximum"),
    (b'{"id": ' + b"1" * 5000 + b"}\n", "broken JSON (Exceeds"),
    (line().replace(b"Norway", b"Norw\xe9ge"), "not UTF-8 (byte 0xe9 at column"),
    (line().replace(b"Norway", b"Nor\0way"), "NUL byte"),
    (line(text="a\0b"), "NUL character in text"),
    (line(text="a\ud800b"), "half a surrogate pair in text"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_named_and_can_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bytes, message: str
) -> None:
    path = write(tmp_path / "p.jsonl", line(), b"\n", bad, line(id="p2"))
    with pytest.raises(InputError) as error:
        list(read_passages([path]))
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    heard: list[str] = []
    assert [p.id for p in read_passages([path], skip_bad_lines=True, on_bad=heard.append)] == ["p1", "p2"]
    assert len(heard) == 1 and f"{path}:3: " in heard[0] and message in heard[0]
    list(read_passages([path], skip_bad_lines=True))
    assert f"{path}:3: " in capsys.readouterr().err


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "no passages"),
        ("p.jsonl", b"\n \n", "no passages"),
        ("p.jsonl", json.dumps(GOOD).encode("utf-16"), ":1: UTF-16"),
        ("p.jsonl.gz", gzip.compress(b"".join(line(id=f"p{i}") for i in range(5000)))[:-20], "truncated gzip"),
        ("p.jsonl.gz", gzip.compress(line(), mtime=0)[:-8] + b"\0" * 8, "truncated gzip"),
        ("p.tsv", b"id\ttext\n1\tx\n", ":1: the header must name id, text and title"),
        ("p.tsv", b"id\ttext\ttitle\n", "no passages"),
        ("p.pdf", b"%PDF", "rename it"),
    ],
)
def test_a_bad_file_is_an_error_even_when_bad_lines_are_skipped(
    tmp_path: Path, name: str, content: bytes, message: str, skip: bool
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        list(read_passages([path], skip_bad_lines=skip))
    assert str(error.value).startswith(str(path))


def test_missing_file_and_pattern(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file"):
        ids(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        ids(tmp_path / "*.jsonl")
    with pytest.raises(InputError, match="no input"):
        ids()


@pytest.mark.parametrize(
    "name", ["part-{}-of-00003", "p-{}-of-00003.jsonl", "p.jsonl-{}-of-00003", "p-{}-of-00003.jsonl.gz"]
)
def test_part_sets_by_any_name(tmp_path: Path, name: str) -> None:
    paths = []
    for i in range(3):
        content = line(id=f"a{i}") + line(id=f"b{i}")
        paths.append(write(tmp_path / name.format(f"{i:05d}"), gzip.compress(content) if ".gz" in name else content))
    expected = ["a0", "b0", "a1", "b1", "a2", "b2"]
    whole = name.replace("-{}-of-00003", "")
    for given in ([tmp_path / whole], [paths[0]], [paths[2]], paths, [str(tmp_path / name.format("*"))]):
        assert ids(*given) == expected
    last = write(tmp_path / "last.jsonl", line())
    assert [source.input for source in expand([*paths, last, last])] == [0, 0, 0, 1]
    paths[1].unlink()
    for given in (tmp_path / whole, paths[0], paths[2]):
        with pytest.raises(InputError, match=r"has 3 parts and misses .*00001-of-00003"):
            ids(given)


def test_parts_of_two_sets_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "p-00000-of-00001.jsonl", line())
    write(tmp_path / "p-00000-of-00002.jsonl", line())
    write(tmp_path / "p-00001-of-00002.jsonl", line())
    with pytest.raises(InputError, match="two sets"):
        ids(tmp_path / "p.jsonl")


def test_psgs_w100(tmp_path: Path) -> None:
    rows = b'id\ttext\ttitle\r\n1\t"say ""hi"" now"\t"Erie ""Canal"""\r\n2\tplain "text" here\tB\r\n'
    for path in (write(tmp_path / "p.tsv", rows), write(tmp_path / "p.tsv.gz", gzip.compress(rows))):
        assert list(read_passages([path])) == [
            Passage("1", 'Erie "Canal"', 'say "hi" now', "1"),
            Passage("2", "B", 'plain "text" here', "2"),
        ]
    for bad, message in [(b"3\tx", "3 columns are needed"), (b'3\t"x\tT', "quoting"), (b"3\t\tT", "empty text")]:
        path = write(tmp_path / "bad.tsv", rows, bad, b"\n4\tx\tT\n")
        with pytest.raises(InputError, match=rf"bad\.tsv:4: .*{message}"):
            ids(path)
        assert [p.id for p in read_passages([path], skip_bad_lines=True)] == ["1", "2", "4"]


def test_folder_of_text(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    write(folder / "b.txt", b"\xef\xbb\xbfFirst line.\r\n\r\nSecond.\r\n")
    write(folder / "sub" / "a.md", b"\n# The Title #\n\nBody *here*.\n## Later\nMore.\n")
    write(folder / "sub" / "plain.md", b"No heading.\n# Not the title\n")
    write(folder / "sub" / ".hidden.txt", b"no")
    write(folder / "picture.png", b"\x89PNG\0")
    expected = [
        Passage("docs/b.txt", "b", "First line.\n\nSecond.", "docs/b.txt"),
        Passage("docs/sub/a.md", "The Title", "Body *here*.\n## Later\nMore.", "docs/sub/a.md"),
        Passage("docs/sub/plain.md", "plain", "No heading.\n# Not the title", "docs/sub/plain.md"),
    ]
    assert list(read_passages([folder])) == expected
    write(folder / "c.txt", b"")
    with pytest.raises(InputError, match=r"c\.txt:1: empty text"):
        ids(folder)
    write(folder / "c.txt", b"fine\nbr\xffken\n")
    with pytest.raises(InputError, match=r"c\.txt:2: not UTF-8"):
        ids(folder)
    assert list(read_passages([folder], skip_bad_lines=True)) == expected
    write(folder / "passages.jsonl", line())
    with pytest.raises(InputError, match=r"holds passages\.jsonl"):
        ids(folder)
    write(tmp_path / "empty" / "x.png", b"")
    with pytest.raises(InputError, match=r"no \.txt or \.md"):
        ids(tmp_path / "empty")


QUESTION = {"id": "q1", "question": "Where?", "answers": ["Oslo"], "positive_passage_ids": ["p1"]}


def test_questions(tmp_path: Path) -> None:
    rows = [QUESTION | {"label": 3}, {"id": "q2", "question": "A: hi\nB:", "answers": [], "target": "hello"}]
    path = write(tmp_path / "q.jsonl", *(json.dumps(row).encode() + b"\n" for row in rows))
    first, second = read_questions(path)
    assert (first.answers, first.positive_passage_ids, first.target, first.extra) == (
        ("Oslo",),
        ("p1",),
        None,
        {"label": 3},
    )
    assert (second.answers, second.positive_passage_ids, second.target, second.extra) == ((), (), "hello", {})


def test_further_right_passages_come_after_the_positive_ones(tmp_path: Path) -> None:
    row = QUESTION | {"also_relevant_passage_ids": ["p7", "p2"]}
    (question,) = read_questions(write(tmp_path / "q.jsonl", json.dumps(row).encode()))
    assert question.right_passage_ids == ("p1", "p7", "p2") and question.positive_passage_ids == ("p1",)
    assert not question.extra


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "empty question"),
        ({"question": None}, "'question' must be a string"),
        ({"answers": "Oslo"}, "'answers' must be a list of strings, it is a string"),
        ({"answers": [1]}, "'answers' must be a list of strings, it is a list with a number in it"),
        ({"answers": ...}, "missing field 'answers'"),
        ({"positive_passage_ids": [None]}, "'positive_passage_ids' must be a list of strings"),
        ({"also_relevant_passage_ids": "p1"}, "'also_relevant_passage_ids' must be a list of strings"),
        ({"target": 3}, "'target' must be a string"),
        ({"id": "q1"}, "duplicate id 'q1', first at"),
    ],
)
def test_bad_questions(tmp_path: Path, change: dict[str, object], message: str) -> None:
    row = {key: value for key, value in (QUESTION | {"id": "q2"} | change).items() if value is not ...}
    path = write(tmp_path / "q.jsonl", json.dumps(QUESTION).encode() + b"\n", json.dumps(row).encode() + b"\n")
    with pytest.raises(InputError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert [question.id for question in read_questions(path, skip_bad_lines=True)] == ["q1"]


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no questions"):
        read_questions(write(tmp_path / "q.jsonl", b"\n"))


def words(text: str) -> float:
    return sum(0.5 if "\u4e00" <= c <= "\u9fff" or c in "。，" else 0 for c in text) or len(text.split())


@pytest.mark.parametrize("seed", range(20))
def test_cutting_keeps_every_word_and_ends_at_sentences(seed: int) -> None:
    rng = random.Random(seed)
    sentences = [
        " ".join("w" * rng.randint(1, 9) for _ in range(rng.randint(3, 25))) + rng.choice(".?!") for _ in range(80)
    ]
    text = rng.choice([" ", "  ", "\n\n"]).join(sentences)
    pieces = cut(Passage("d", "T", text, "doc"), 100)
    assert [(p.id, p.title, p.document) for p in pieces] == [(f"d-{i}", "T", "doc") for i in range(len(pieces))]
    assert " ".join(p.text for p in pieces).split() == text.split()
    assert all(60 <= words(p.text) <= 145 and p.text[-1] in ".?!" for p in pieces)
    assert abs(words(text) / len(pieces) - 100) < 10


def test_cutting_leaves_short_texts_whole_and_cuts_what_has_no_sentences() -> None:
    for n in (1, 160, 200):
        passage = Passage("d", "T", " ".join(["word"] * n), "d")
        assert cut(passage, 100) == [passage]
    long = Passage("d", "T", " ".join(["word"] * 1000), "d")
    assert [len(piece.text.split()) for piece in cut(long, 100)] == [100] * 10
    assert cut(long, 0) == [long]
    chinese = Passage("d", "", "黑豹队的防守只丢了分，在联赛中排名第六。" * 100, "d")
    pieces = cut(chinese, 100)
    assert "".join(p.text for p in pieces) == chinese.text
    assert all(70 <= words(p.text) <= 130 and p.text.endswith("。") for p in pieces)
    unbroken = Passage("d", "", "x" * 10_000, "d")
    assert cut(unbroken, 100) == [unbroken]


def test_real_passages_stay_whole(shared_data) -> None:
    for name, count in [("squad", 2606), ("medquad", 19303), ("nq_gold", 11696)]:
        passages = list(read_passages([shared_data(name) / "passages.jsonl"]))
        assert len(passages) == count
        assert all(len(cut(passage, 100)) == 1 for passage in passages)
    [table] = [shared_data("raw") / "dpr_passages.psgs_w100_layout.tsv"]
    assert len(list(read_passages([table]))) == 250
