"""Block checksums: every flipped bit is detected when it is first read, from any thread, in any order."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.verified_arrays import open_npy
from rag_jax.errors import InputError
from rag_jax.index import snapshot
from rag_jax.system import block_checksums, files
from rag_jax.system.block_checksums import SIZE, Blocks

ROWS, WIDTH = 3000, 100  # of uint16: just over nine blocks


@pytest.fixture
def table(tmp_path):
    """A random array, its file and the file's manifest entry."""
    array = np.random.default_rng(0).integers(0, 2**16, (ROWS, WIDTH)).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    return array, tmp_path / "a.npy", block_checksums.of_file(tmp_path / "a.npy")


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def opened(path, entry):
    return open_npy(path, entry, "mend it", "<u2", (ROWS, WIDTH))


def test_the_rows_of_the_array(table):
    array, path, entry = table
    found = opened(path, entry)
    rng = np.random.default_rng(1)
    for rows in (rng.integers(0, ROWS, 50), np.array([5]), slice(7, 900), slice(0, ROWS), slice(9, 9), 2999, -1):
        np.testing.assert_array_equal(found[rows], array[rows])
    np.testing.assert_array_equal(found[rng.integers(0, 2, ROWS) > 0][:0], array[:0])
    assert found.shape == array.shape and isinstance(found[3:9], np.memmap)


@settings(max_examples=40)
@given(data=st.data())
def test_a_flip_is_seen_exactly_where_its_block_is_read(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flip")
    np.save(folder / "a.npy", np.zeros((ROWS, WIDTH), np.uint16))
    path, entry = folder / "a.npy", block_checksums.of_file(folder / "a.npy")
    start = path.stat().st_size - ROWS * WIDTH * 2
    byte = data.draw(st.integers(SIZE, path.stat().st_size - 1))  # opening the file reads the first block
    flip(path, byte, data.draw(st.integers(0, 7)))
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=5))
    touched = {
        b for row in rows for at in [start + row * WIDTH * 2] for b in (at // SIZE, (at + WIDTH * 2 - 1) // SIZE)
    }
    found = opened(path, entry)
    if byte // SIZE in touched:
        for _ in range(2):  # and every further time
            with pytest.raises(InputError, match=r"a\.npy: damaged: bytes .* mend it"):
                found[np.array(rows)]
        with pytest.raises(InputError, match="damaged"):
            found[min(rows) : max(rows) + 1]
    else:
        assert not found[np.array(rows)].any()


def test_a_block_is_read_once_and_by_many_threads_at_once(table, monkeypatch):
    array, path, entry = table
    found, summed = opened(path, entry), []
    plain = block_checksums.xxh3_64_intdigest
    monkeypatch.setattr(block_checksums, "xxh3_64_intdigest", lambda data: summed.append(len(data)) or plain(data))
    for _ in range(3):
        found[500:600]
    assert len(summed) == 1
    monkeypatch.setattr(block_checksums, "AT_ONCE", 2)  # several tasks, so that several threads work
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda seed: found[np.random.default_rng(seed).permutation(ROWS)].sum(), range(16)))
    assert set(results) == {array.sum()}
    before = len(summed)
    found[:]
    assert len(summed) == before


def test_the_header_and_the_size_are_verified(table):
    _, path, entry = table
    flip(path, 20)  # a byte of the header's type
    with pytest.raises(InputError, match="damaged: bytes 0 to 65,535"):
        opened(path, entry)
    with pytest.raises(InputError, match=r"not an array file|the manifest says"):
        opened(path, {"bytes": entry["bytes"]})  # an older format has no sums
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="600127 bytes, the manifest says 600128"):
        opened(path, entry)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="0 bytes"):
        opened(path, entry)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr'", b"x" * 200])
def test_headers_that_are_none(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npy: not an array file"):
        open_npy(tmp_path / "a.npy", {"bytes": len(content)}, "mend it", "<u2", (3,))


def test_without_sums_the_whole_is_verified_by_its_hash(table):
    _, path, entry = table
    old = {name: entry[name] for name in ("bytes", "sha256")}
    block_checksums.whole(path, old, "mend it")
    flip(path, 300_000)
    with pytest.raises(InputError, match="damaged: its content is not what the manifest says; mend it"):
        block_checksums.whole(path, old, "mend it")
    with pytest.raises(InputError, match=r"damaged: bytes 262,144 to 327,679 .*; mend it"):
        block_checksums.whole(path, entry, "mend it")


def test_sums_of_another_length_are_refused(table):
    _, path, entry = table
    with pytest.raises(InputError, match=f"10 block sums for {10 * SIZE + 1} bytes"):
        Blocks(path, entry | {"bytes": 10 * SIZE + 1}, "mend it")


def as_before(directory, version):
    """Rewrites an artifact in the format of the version before, without block sums."""
    path = directory / files.MANIFEST
    fields = json.loads(path.read_text())
    kind = fields.pop("kind")
    for name in ("format_version", "manifest_hash", "checksums"):
        fields.pop(name, None)
    for entry in fields["files"].values():
        del entry[block_checksums.FIELD]
    files.write_sealed(path, kind, version, fields)


def test_artifacts_of_the_version_before_open_with_one_line(tmp_path, tiny_data, capsys):
    shutil.copytree(tiny_data / "corpus", tmp_path / "corpus")
    run = tiny.untrained_run(tmp_path / "corpus", tmp_path / "run")
    assert tiny.rag_jax("index", run, "--corpus", tmp_path / "corpus", "--out", tmp_path / "index") == 0
    for name in ("corpus", "index", "run/params"):
        as_before(tmp_path / name, 2)
    capsys.readouterr()
    assert tiny.rag_jax("index", run, "--corpus", tmp_path / "corpus", "--out", tmp_path / "again") == 0
    for _ in range(2):
        old, new = snapshot.open_snapshot(tmp_path / "index"), snapshot.open_snapshot(tmp_path / "again")
        np.testing.assert_array_equal(old.embeddings_NE[:], new.embeddings_NE[:])
        assert Corpus.open(tmp_path / "corpus")[3].text
    said = capsys.readouterr().err.splitlines()
    for name in ("corpus", "index", "run/params"):
        lines = [line for line in said if line.startswith(f"{tmp_path / name}: a ")]
        assert len(lines) == 1 and "of an older format, without checksums by block" in lines[0]
        assert f"rag-jax verify {tmp_path / name}" in lines[0]
    # an update has sums of all files, also of those that it shares, after they were found whole
    (tmp_path / "new.jsonl").write_text('{"id": "new", "title": "T", "text": "A new passage."}\n')
    words = ["corpus", "--update", tmp_path / "corpus", "--add", tmp_path / "new.jsonl", "--out"]
    assert tiny.rag_jax(*words, tmp_path / "updated") == 0
    assert all(block_checksums.FIELD in entry for entry in Corpus.open(tmp_path / "updated").manifest["files"].values())
    flip(tmp_path / "corpus" / "encoder_ids.npy", 200)
    assert tiny.rag_jax(*words, tmp_path / "damaged") == 2
    assert "encoder_ids.npy: damaged" in capsys.readouterr().err


def test_shared_files_keep_their_sums_and_are_not_read_again(tmp_path, tiny_data, monkeypatch):
    (tmp_path / "new.jsonl").write_text('{"id": "new", "title": "T", "text": "A new passage."}\n')
    read, plain = [], block_checksums.of_file
    monkeypatch.setattr(block_checksums, "of_file", lambda path: read.append(path) or plain(path))
    words = ["corpus", "--update", tiny_data / "corpus", "--add", tmp_path / "new.jsonl", "--out", tmp_path / "updated"]
    assert tiny.rag_jax(*words) == 0
    assert read and all("segments" in path.parts for path in read)
    was, now = (Corpus.open(path).manifest["files"] for path in (tiny_data / "corpus", tmp_path / "updated"))
    assert was.items() <= now.items()
