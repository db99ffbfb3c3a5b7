"""Records of JSON files: equal to json.load for every block size; line numbers equal to counting."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from rag_jax.data.readers import json_stream
from rag_jax.data.readers.sources import InputFile
from rag_jax.errors import InputError


def read(path: Path) -> list[tuple[int, int, dict]]:
    return [tuple(row) for row in json_stream.records(InputFile(path, path.name, 0), None)]


def value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value: strings with quotes, escapes, brackets and astral characters; numbers of all kinds."""
    kind = rng.randrange(4 if depth > 2 else 6)
    if kind == 0:
        return "".join(rng.choice('ab"\\[]{},: \n\u2028é😀ש') for _ in range(rng.randrange(20)))
    if kind == 1:
        return rng.choice([0, -7, 12345678901234, 1.5, -2.25e-9, 1e300])
    if kind == 2:
        return rng.choice([True, False, None])
    if kind == 3:
        return "x" * rng.randrange(200)
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{i}": value(rng, depth + 1) for i in range(rng.randrange(4))}


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("seed", range(6))
def test_any_value_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, seed: int
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    rng = random.Random(seed)
    rows = [{"n": i, "v": value(rng)} for i in range(30)]
    indent, ascii = rng.choice([None, 1, 4]), rng.random() < 0.5
    for whole in (rows, {"version": 1.25, "a": '}\\"{', "data": rows, "after": [1, {"data": []}]}):
        text = json.dumps(whole, indent=indent, ensure_ascii=ascii)
        path = tmp_path / "x.json"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
        found = read(path)
        assert [fields for _, _, fields in found] == rows
        assert [number for _, number, _ in found] == list(range(1, 31))
        # A record begins at the line on which its number `"n": i` or the brace before that stands.
        starts = [text[: text.index(f'"n": {i},')].count("\n") + (1 if indent is None else 0) for i in range(30)]
        assert [line for line, _, _ in found] == starts


def test_lines_array_and_data_of_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": "\u2028"}, {"a": []}]
    texts = {
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "array": json.dumps(rows),
        "data": json.dumps({"data": rows}),
        "empty": "",
    }
    for name, text in texts.items():
        for raw in (text.encode(), gzip.compress(text.encode())):
            path = tmp_path / f"{name}.json"
            path.write_bytes(raw)
            assert [fields for _, _, fields in read(path)] == (rows if text else [])
    (tmp_path / "none.json").write_text(" [ ] ")
    assert read(tmp_path / "none.json") == []


BROKEN = [
    ('[{"a": 1},\n{"a": 2}', 2, "ends too early"),
    ('[{"a": 1},\n{"a": "2', 2, "ends within the record that begins at line 2"),
    ('[{"a": 1},\n{"a": ', 2, "ends within the record"),
    ('[{"a": 1},\n]', 2, "broken JSON"),
    ('[{"a": 1}\n{"a": 2}]', 2, "',' or ']' is needed after a record, not '{'"),
    ('[{"a": 1},\n{"a"\n 2}]', 3, "broken JSON (Expecting ':' delimiter)"),
    ('[{"a": 1},\n{"a": "x\ny"}]', 2, "broken JSON (Invalid control character"),
    ('[{"a": 1},\n{"a": tru, "b": "' + "x" * 100 + '"}]', 2, "broken JSON (Expecting value)"),
    ('[{"a": 1}]\n\n[1]', 3, "more after the end"),
    ('{"data": [{"a": 1}]\n', 2, "ends too early"),
    ('{"data": [{"a": 1}],\n 3: 4}', 2, "'\"' is needed where a name begins, not '3'"),
    ('[{"a": 1},\n{"a": ' + "[" * 200_000, 2, "broken JSON"),
    ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", 2, "broken JSON (Exceeds"),
    ('[{"a": 1},\n"b"]', 2, "record 2: a JSON object is needed, this is a string"),
]


@pytest.mark.parametrize(("text", "line", "message"), BROKEN, ids=[f"{i}" for i in range(len(BROKEN))])
@pytest.mark.parametrize("block", [5, 1 << 18])
def test_what_is_broken_is_named_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, message: str, block: int
) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)


@pytest.mark.parametrize("block", [3, 1 << 18])
def test_bytes_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "x.json"
    for bad, message in (
        (b"\0", "NUL byte"),
        (b"\xe9", "not UTF-8 (byte 0xe9)"),
        (b"\xf0\x9f\x98", "not UTF-8 (byte 0xf0)"),
    ):
        path.write_bytes(b'[{"a": "\xf0\x9f\x98\x80"},\n{"a": "' + bad + b'"}]')
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_memory_is_that_of_a_record_not_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("w") as stream:
        stream.write("[")
        for i in range(400):
            stream.write(("," if i else "") + json.dumps({"i": i, "text": "y" * 50_000}))
        stream.write("]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        total = sum(fields["i"] for _, _, fields in json_stream.records(InputFile(path, path.name, 0), None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == sum(range(400)) and peak < 3_000_000
