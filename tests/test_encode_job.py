"""Encode jobs: shards appear whole, no work is repeated, and mismatched inputs are refused."""

import dataclasses
import errno
import os
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from rag_jax.errors import InputError
from rag_jax.index import encode_job, shards
from rag_jax.index.encode_job import Job
from rag_jax.index.shards import Identity
from rag_jax.system import files

N, E = 50, 6
EMBEDDINGS = np.random.default_rng(0).normal(0, 2, (N, E)).astype(np.float32)
JOB = Job(
    run="runs/a", corpus="corpora/c", corpus_hash="c" * 64, encoder_hash="e" * 64, tokenizer_hash="t" * 64,
    step=3, n_passages=N, width=E, dtype="float32", shard_rows=8, batch=4,
)  # fmt: skip


def embed(first, last, done):
    done(last - first)
    return EMBEDDINGS[first:last]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """A finished encode job."""
    encode_job.begin(tmp_path / "whole", JOB)
    assert encode_job.make(tmp_path / "whole", JOB, embed) == 7
    return tmp_path / "whole"


@pytest.mark.parametrize("dtype", shards.DTYPES)
def test_a_shard_is_a_safetensors_file_and_says_what_it_is(tmp_path, dtype):
    identity = Identity("c" * 64, "e" * 64, 10, 10 + N, E, dtype)
    embeddings = EMBEDDINGS.copy()
    embeddings[4] = 0
    with (tmp_path / identity.name).open("wb", buffering=0) as stream:
        shards.write(stream, identity, embeddings)
    shard = shards.read(tmp_path / identity.name)
    assert shard.identity == identity and shard.entry()["sha256"] == files.file_sha256(shard.path)
    with safe_open(shard.path, "flax") as opened:
        stored = {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        assert opened.metadata()["encoder_hash"] == "e" * 64
    np.testing.assert_array_equal(shard.embeddings_XE(), stored["embeddings"])
    if dtype == "int8":
        scale = np.abs(embeddings).max(1) / np.float32(127)
        np.testing.assert_array_equal(shard.scale_X(), scale)
        np.testing.assert_array_equal(stored["scale"], scale)
        error = np.abs(stored["embeddings"] * scale[:, None] - embeddings)
        assert (error <= scale[:, None] * 0.5001).all() and (np.abs(stored["embeddings"]).max(1)[:4] == 127).all()
    else:
        np.testing.assert_array_equal(shard.embeddings_XE(), embeddings.astype(jnp.dtype(dtype)))


def test_a_job_goes_on_with_what_is_missing_and_ends_with_the_same_bytes(whole, tmp_path):
    expected = contents(whole)
    names = [identity.name for identity in JOB.shards]
    kept = {name: (whole / name).stat().st_ino for name in names}
    (whole / names[2]).unlink()
    (whole / f".{names[2]}.building").write_bytes(b"half a shard" * 50)
    (whole / names[6]).unlink()
    (whole / f".{names[4]}.building").write_bytes(b"of a shard that is there")
    (whole / ".job.json.1234").write_bytes(b"{")
    asked = []

    def spy(first, last, done):
        asked.append((first, last))
        return embed(first, last, done)

    encode_job.begin(whole, JOB)
    assert encode_job.make(whole, JOB, spy) == 2 and asked == [(16, 24), (48, 50)]
    assert contents(whole) == expected
    assert all((whole / name).stat().st_ino == kept[name] for name in names if name not in (names[2], names[6]))
    assert encode_job.make(whole, JOB, spy) == 0 and len(asked) == 2


@pytest.mark.parametrize(
    "change",
    [{"encoder_hash": "f" * 64}, {"corpus_hash": "d" * 64}, {"dtype": "int8"}, {"shard_rows": 9}, {"batch": 5}],
)
def test_another_job_in_the_same_directory_is_refused(whole, change):
    before = contents(whole)
    with pytest.raises(InputError) as refused:
        encode_job.begin(whole, dataclasses.replace(JOB, **change))
    (name, now), was = next(iter(change.items())), None
    was = getattr(JOB, name)
    assert all(str(value)[:16] in str(refused.value) for value in (name, now, was))
    assert "rag-jax encode runs/a --corpus corpora/c --out OTHER" in str(refused.value)
    assert contents(whole) == before
    encode_job.begin(whole, dataclasses.replace(JOB, run="runs/moved", corpus="corpora/moved"))


def test_damaged_and_foreign_shards_are_refused(whole):
    path = whole / JOB.shards[3].name
    good = path.read_bytes()
    other = dataclasses.replace(JOB.shards[3], encoder_hash="f" * 64)
    for damage, message in (
        (lambda: path.write_bytes(good[:-4]), f"{len(good) - 4} bytes, its header says {len(good)}"),
        (lambda: path.write_bytes(good[:5]), "not a shard of embeddings"),
        (lambda: path.write_bytes(b"\xff" * len(good)), "not a shard of embeddings"),
        (lambda: rewrite(path, other), "encoder_hash ffffffffffffffff, and eeeeeeeeeeeeeeee was wanted"),
    ):
        damage()
        with pytest.raises(InputError, match="remove that file and give the rag-jax encode command again") as refused:
            encode_job.make(whole, JOB, embed)
        assert message in str(refused.value) and str(path) in str(refused.value)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InputError, match="content has sha256"):
        shards.read(path).entry()


def rewrite(path, identity):
    with path.open("wb", buffering=0) as stream:
        shards.write(stream, identity, EMBEDDINGS[identity.first : identity.last])


def test_a_directory_of_something_else_is_no_job(tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".job.json.12ab").write_text("{")  # left by a killed process, or of one that is writing now
    encode_job.begin(begun, JOB)
    assert encode_job.read_job(begun) == JOB
    shutil.rmtree(begun)
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(InputError, match="exists and is no encode job; choose another --out"):
        encode_job.begin(tmp_path, JOB)
    with pytest.raises(InputError, match=r"not a finished encode job \(no job.json\)"):
        encode_job.read_job(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"all my work"}


def test_a_full_disk_loses_nothing_that_was_finished(whole, tmp_path, monkeypatch):
    out, write_all, room = tmp_path / "out", files.write_all, [2000]

    def full(stream, parts):
        for part in parts:
            data = bytes(memoryview(part).cast("B"))
            write_all(stream, [data[: room[0]]])
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    encode_job.begin(out, JOB)
    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(InputError, match=r"No space left on device\); finished shards are kept") as refused:
        encode_job.make(out, JOB, embed)
    there = sorted(path.name for path in out.iterdir())
    assert (
        2 <= len(there) < 8 and "building" not in str(there) and JOB.shards[len(there) - 1].name in str(refused.value)
    )
    monkeypatch.undo()
    assert encode_job.make(out, JOB, embed) == 8 - len(there)
    assert contents(out) == contents(whole)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    encode_job.begin(tmp_path / "out", JOB)

    def diverged(first, last, done):
        rows = EMBEDDINGS[first:last].copy()
        rows[np.arange(first, last) == 19] = np.nan
        return rows

    with pytest.raises(InputError, match="passage row 19: its embedding is not finite"):
        encode_job.make(tmp_path / "out", JOB, diverged)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_several_workers_share_the_work(whole, tmp_path):
    """Each shard is made once, nobody waits for a slow worker, and the shard of a dead one is made at the end."""
    out, asked, told = tmp_path / "out", [], []
    encode_job.begin(out, JOB)

    def work(process, seconds):
        def embed_rows(first, last, done):
            asked.append(first)
            time.sleep(seconds)
            return embed(first, last, done)

        told.append(encode_job.make(out, JOB, embed_rows, process, 2))

    threads = [threading.Thread(target=work, args=(process, 0.01 + 0.04 * process)) for process in range(2)]
    with pytest.raises(RuntimeError), files.claimed(out / JOB.shards[2].name) as stream:
        stream.write(b"half")
        for thread in threads:
            thread.start()
        while len(asked) < 6 or any(out.glob(".*48*")):
            time.sleep(0.01)
        time.sleep(0.1)
        assert all(thread.is_alive() for thread in threads) and 16 not in asked
        raise RuntimeError("the third worker dies")
    for thread in threads:
        thread.join()
    assert sorted(asked) == [identity.first for identity in JOB.shards] and asked[-1] == 16
    assert sum(told) == 7 and min(told) >= 1
    assert contents(out) == contents(whole)


def test_a_claim_is_exclusive_and_ends_with_its_holder(tmp_path):
    path = tmp_path / "a"
    with files.claimed(path) as first:
        with files.claimed(path) as second:
            assert first is not None and second is None
        first.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    with files.claimed(path) as again:
        assert again is None
    with pytest.raises(RuntimeError), files.claimed(tmp_path / "b") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
