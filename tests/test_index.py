"""Encode jobs and snapshots of a run equal embedding passages one by one; mismatched inputs are refused."""

import dataclasses
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import encode as embedding
from rag_jax.index import encode_job
from rag_jax.index import snapshot as snapshots
from rag_jax.inference.encode_corpus import read_encoder
from rag_jax.runs import directory as runs
from rag_jax.system import sharding

WORDS = ["river", "mountain", "city", "born", "wrote", "in", "of", "the", "new", "king", "museum", "year", "1950"]
SMALL = ["--shard-rows", 12, "--batch", 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two corpora of passages from short to long, and an untrained run."""
    out, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, seed in (("corpus", 0), ("edited", 1)):
        rows = [
            {
                "id": f"p{i}",
                "title": f"Entity {i}",
                "text": " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + f" {seed}",
            }
            for i in range(40)
        ]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["--train-tokenizer", "--encoder-vocab", 300, "--generator-vocab", 400]
    lengths = ["--encoder-length", 64, "--generator-length", 64]
    assert tiny.rag_jax("corpus", out / "corpus.jsonl", "--out", out / "corpus", *train, *lengths) == 0
    same = ["--tokenizers-from", out / "corpus"]
    assert tiny.rag_jax("corpus", out / "edited.jsonl", "--out", out / "edited", *same) == 0
    tiny.untrained_run(out / "corpus", out / "run")
    return out


@pytest.fixture(scope="module")
def corpus(data):
    return Corpus.open(data / "corpus")


@pytest.fixture(scope="module")
def encoder(data, corpus):
    return read_encoder(data / "run", corpus)


@pytest.fixture(scope="module")
def expected(encoder, corpus):
    """Embeddings of single passages at full width, on one device."""
    embed = jax.jit(encoder.embed)
    params = jax.device_put(encoder.params, jax.devices()[3])
    mask_NL = np.arange(corpus.encoder_ids.shape[1]) < corpus.encoder_length[:, None].astype(int)
    rows = zip(corpus.encoder_ids.astype(np.int32), mask_NL, strict=True)
    return np.concatenate([embed(params, ids[None], mask[None]) for ids, mask in rows])


@pytest.fixture(scope="module")
def job(data, tmp_path_factory):
    """An encode job finished by the command line."""
    out = tmp_path_factory.mktemp("job") / "job"
    assert tiny.rag_jax("encode", data / "run", "--corpus", data / "corpus", "--out", out, *SMALL) == 0
    return out


def test_rows_are_embedded_alike_on_any_devices_and_in_any_batch(encoder, corpus, expected):
    for devices, batch in ((1, 7), (8, 16), (3, 256)):
        rows = embedding.row_embedder(
            encoder.embed, encoder.params, corpus.encoder_ids, corpus.encoder_length, batch, jax.devices()[:devices]
        )
        counts = []
        found = rows(3, 31, counts.append)
        np.testing.assert_allclose(found, expected[3:31], atol=1e-5)
        assert found.dtype == np.float32 and sum(counts) == 28
        assert rows(3, 31, counts.append).tobytes() == found.tobytes()


def test_the_parameters_are_those_of_the_whole_run(data, corpus, encoder):
    config = runs.read_config(data / "run")
    loaded = runs.load(config.model, corpus, sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    params = runs.read_params(data / "run", loaded.rag, loaded.mesh)
    assert encoder.hash == runs.encoder_hash(loaded, params) and encoder.step == 0
    assert encoder.width == loaded.rag.config.encoder.output_width


def test_one_go_equals_a_job(data, job, corpus, expected, tmp_path):
    assert tiny.rag_jax("index", data / "run", "--corpus", data / "corpus", "--out", tmp_path / "index") == 0
    one = snapshots.open_snapshot(tmp_path / "index")
    assert one.manifest == snapshots.from_job(job, corpus, tmp_path / "other").manifest and len(one.shards) == 1
    assert isinstance(one.embeddings_NE[:], np.memmap)
    np.testing.assert_allclose(one.embeddings_NE, expected, atol=1e-5)


def test_a_snapshot_shares_the_files_of_its_job(job, corpus, expected, tmp_path):
    assert tiny.rag_jax("index", job, "--out", tmp_path / "index") == 0
    snapshot = snapshots.open_snapshot(tmp_path / "index")
    assert [shard.path.name for shard in snapshot.shards] == [shard.name for shard in encode_job.read_job(job).shards]
    assert len(snapshot.shards) == 4
    assert all(shard.path.stat().st_ino == (job / shard.path.name).stat().st_ino for shard in snapshot.shards)
    np.testing.assert_allclose(snapshot.embeddings_NE, expected, atol=1e-5)
    assert snapshot.embeddings_NE.shape == expected.shape and snapshot.scale_N is None
    assert snapshot.manifest.corpus == str(corpus.directory) and snapshot.manifest.corpus_hash == corpus.hash
    assert snapshot.manifest.tokenizer_hash == corpus.encoder_tokenizer.hash


def test_where_links_are_impossible_the_files_are_copied(job, corpus, tmp_path, monkeypatch):
    def impossible(*_):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", impossible)
    copied = snapshots.from_job(job, corpus, tmp_path / "index")
    monkeypatch.undo()
    linked = snapshots.from_job(job, corpus, tmp_path / "linked")
    assert copied.shards[0].path.stat().st_ino != (job / copied.shards[0].path.name).stat().st_ino
    assert copied.hash == linked.hash
    np.testing.assert_array_equal(copied.embeddings_NE, linked.embeddings_NE)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_types(data, expected, tmp_path, dtype):
    words = ["--corpus", data / "corpus", *SMALL, "--dtype", dtype, "--out", tmp_path / "job"]
    assert tiny.rag_jax("encode", data / "run", *words) == 0
    assert tiny.rag_jax("index", tmp_path / "job", "--out", tmp_path / "index") == 0
    found = snapshots.open_snapshot(tmp_path / "index")
    if dtype == "bfloat16":
        assert found.embeddings_NE.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found.embeddings_NE, np.float32), expected, rtol=2**-8, atol=1e-5)
        return
    assert found.rows_NE.dtype == np.int8 and found.embeddings_NE.dtype == np.float32
    scale_N1 = np.abs(expected).max(1, keepdims=True) / 127
    np.testing.assert_allclose(found.scale_N[:, None], scale_N1, rtol=1e-4)
    assert (np.abs(found.embeddings_NE[:] - expected) <= 0.51 * scale_N1).all()
    rows = np.array([39, 0, 12, 12])
    np.testing.assert_array_equal(found.rows_NE[rows] * found.scale_N[rows][:, None], found.embeddings_NE[rows])
    size = sum(path.stat().st_size for path in (tmp_path / "index").glob("*.safetensors"))
    assert size < expected.nbytes / 2 + 4 * 1024


def test_an_unfinished_or_damaged_job_is_no_snapshot(job, corpus, data, tmp_path, capsys):
    mine = tmp_path / "job"
    shutil.copytree(job, mine)
    path = mine / encode_job.read_job(mine).shards[1].name
    good = path.read_bytes()
    path.unlink()
    command = f"rag-jax encode {data / 'run'} --corpus {data / 'corpus'} --out {mine}"
    assert tiny.rag_jax("index", mine, "--out", tmp_path / "index") == 2
    said = capsys.readouterr().err
    assert f"1 of 4 shards are missing, the first {path.name}; finish it with: {command}" in said
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), good[:-8]):
        path.write_bytes(damaged)
        assert tiny.rag_jax("index", mine, "--out", tmp_path / "index") == 2
        said = capsys.readouterr().err
        assert f"{path}: " in said and f"remove that file and embed its rows again: {command}" in said
    with pytest.raises(InputError, match="embeds a corpus with hash") as refused:
        snapshots.from_job(mine, Corpus.open(data / "edited"), tmp_path / "index")
    assert corpus.hash[:16] in str(refused.value)
    assert not (tmp_path / "index").exists()
    path.unlink()
    assert tiny.rag_jax(*command.split()[1:], *SMALL) == 0
    assert path.read_bytes() == good


def test_a_job_of_another_encoder_or_corpus_is_refused(job, data, tmp_path, capsys):
    there = encode_job.read_job(job)
    assert tiny.rag_jax("encode", data / "run", "--corpus", data / "edited", "--out", job, *SMALL) == 2
    said = capsys.readouterr().err
    assert there.corpus_hash[:16] in said and Corpus.open(data / "edited").hash[:16] in said
    for words, message in (
        (["--shard-rows", 0], "--shard-rows 0: at least 1"),
        (["--process", 1], "--process needs --coordinator, too"),
        (["--coordinator", "here", "--process", 0, "--processes", 1], "--coordinator here: HOST:PORT is needed"),
        (["--coordinator", "a:1", "--process", 2, "--processes", 2], "--process 2 of --processes 2"),
        (["--distributed", "auto", "--process", 2], "leave out --process"),
    ):
        assert tiny.rag_jax("encode", data / "run", "--corpus", data / "corpus", "--out", job, *words) == 2
        assert message in capsys.readouterr().err
    assert tiny.rag_jax("index", data / "run", "--out", tmp_path / "index") == 2
    assert "--corpus says what to embed" in capsys.readouterr().err


def test_a_run_is_embedded_in_any_type_and_verified(data, expected, tmp_path, capsys):
    out = tmp_path / "index"
    words = ["index", data / "run", "--corpus", data / "corpus", "--out", out]
    assert tiny.rag_jax(*words, "--dtype", "int8") == 0
    found = np.asarray(snapshots.open_snapshot(out).embeddings_NE[:])
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 200)
    assert snapshots.open_snapshot(out).manifest.dtype == "int8"
    path = next(out.glob("*.safetensors"))
    bits = bytearray(path.read_bytes())
    bits[-3] ^= 1
    path.write_bytes(bits)
    capsys.readouterr()
    with pytest.raises(InputError, match=rf"{path.name}: damaged: bytes 0 to .* the index again"):
        np.asarray(snapshots.open_snapshot(out).embeddings_NE[-1:])
    with pytest.raises(SystemExit):
        tiny.rag_jax("index", data / "run", "--corpus", data / "corpus")
    assert "--out" in capsys.readouterr().err


def test_damaged_snapshots_are_refused(job, corpus, tmp_path):
    whole = snapshots.from_job(job, corpus, tmp_path / "whole")

    def damaged(name, change):
        out = tmp_path / name
        shutil.copytree(whole.directory, out)
        change(out, out / whole.shards[2].path.name)
        with pytest.raises(InputError, match="build the index again") as refused:
            np.asarray(snapshots.open_snapshot(out).embeddings_NE)
        return str(refused.value)

    def flip(out, path, place=-5):
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        path.write_bytes(content)

    assert "damaged: bytes" in damaged("flipped", flip)
    assert "bytes, the manifest says" in damaged(
        "truncated", lambda out, path: path.write_bytes(path.read_bytes()[:-9])
    )
    assert "None bytes" in damaged("missing", lambda out, path: path.unlink())
    assert "no manifest.json" in damaged("half", lambda out, path: (out / "manifest.json").unlink())
    swapped = damaged("swapped", lambda out, path: path.write_bytes(whole.shards[1].path.read_bytes()))
    assert "has first 12, and 24 was wanted" in swapped
    old = damaged("old", lambda out, path: change_manifest(out, '"format_version": 3', '"format_version": 1'))
    assert "format version 1, this program reads 3" in old
    edited = damaged("edited", lambda out, path: change_manifest(out, '"step": 0', '"step": 1'))
    assert "altered after it was written" in edited


def change_manifest(out, old, new):
    path = out / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_full_disk_leaves_nothing_half_written(job, corpus, tmp_path):
    whole = snapshots.from_job(job, corpus, tmp_path / "whole")
    rows = [(np.arange(len(corpus)), whole.embeddings_NE[:])]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.embeddings_NE[:].nbytes // 2, hard))
    try:
        with pytest.raises(InputError, match=r"out: cannot be written \(.*File too large.*\); allow larger files"):
            snapshots.write(tmp_path / "out", whole.manifest, rows)
        begun = dataclasses.replace(encode_job.read_job(job), shard_rows=40)
        encode_job.begin(tmp_path / "job", begun)
        with pytest.raises(InputError, match=r"File too large.*finished shards are kept: mend it and give the same"):
            encode_job.make(tmp_path / "job", begun, lambda first, last, done: rows[0][1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "whole"]
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["job.json"]


def test_a_snapshot_of_other_things_is_refused_with_both_hashes(job, corpus, encoder, tmp_path):
    snapshot = snapshots.from_job(job, corpus, tmp_path / "index")
    own = (corpus.hash, encoder.hash, corpus.encoder_tokenizer.hash)
    snapshots.check(snapshot, *own)
    for i, words in enumerate(("which is now", "an encoder other than", "a tokenizer other than")):
        other = ["0" * 64 if i == j else value for j, value in enumerate(own)]
        with pytest.raises(InputError, match=words) as refused:
            snapshots.check(snapshot, *other)
        assert own[i][:16] in str(refused.value) and "0" * 16 in str(refused.value)
        assert f"rag-jax index RUN --corpus {corpus.directory} --out DIR" in str(refused.value)


def test_the_hash_is_of_the_content_not_of_the_place(job, corpus, tmp_path):
    one, two = (snapshots.from_job(job, corpus, tmp_path / name) for name in "ab")
    assert one.hash == two.hash
    manifest = dataclasses.replace(one.manifest, corpus="elsewhere")
    whole = [(np.arange(len(corpus)), one.embeddings_NE[:])]
    moved = snapshots.write(tmp_path / "c", manifest, whole)
    changed = one.embeddings_NE[:].copy()
    changed[7, 1] += 1e-3
    other = snapshots.write(tmp_path / "d", manifest, [(np.arange(len(corpus)), changed)])
    assert len({one.hash, moved.hash, other.hash}) == 3  # moved: the same values, but in one file
    assert json.loads((tmp_path / "c/manifest.json").read_text())["corpus"] == "elsewhere"
    again = snapshots.write(tmp_path / "e", one.manifest, whole)
    assert again.hash == moved.hash


@pytest.mark.slow
def test_killed_at_random_moments_and_in_two_processes_the_files_are_the_same(tmp_path):
    """scripts/kill_encode.py finds no difference, and it did kill."""
    script = Path(__file__).resolve().parents[1] / "scripts/kill_encode.py"
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--kills", "6"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["kills"] >= 4 and len(report["checks"]) == 4 and all(report["checks"].values())
