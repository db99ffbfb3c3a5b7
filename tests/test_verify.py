"""`rag-jax verify`: all damage is named, with what to do; undamaged artifacts pass."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rag_jax.corpus.directory import Corpus
from rag_jax.index import encode_job, snapshot
from rag_jax.runs import checkpoint
from rag_jax.runs.checkpoint import Checkpoints
from rag_jax.system import files, sharding


@pytest.fixture(scope="module")
def made(tiny_data, tmp_path_factory):
    """A corpus, a run with index and checkpoints, and an encode job."""
    out = tmp_path_factory.mktemp("verify")
    shutil.copytree(tiny_data / "corpus", out / "corpus")
    run = tiny.untrained_run(out / "corpus", out / "run")
    words = ["index", run, "--corpus", out / "corpus", "--out"]
    assert tiny.rag_jax(*words, out / "index") == 0 and tiny.rag_jax(*words, run / "index") == 0
    keeper = Checkpoints(run / "checkpoints", keep=10)
    for step in (1, 2):
        keeper.save(step, {"state": {"x": jnp.arange(600.0) + step}, "host": np.arange(5)}, {"seconds": 1.0})
    keeper.close()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    about = snapshot.open_snapshot(out / "index").manifest
    job = encode_job.Job(
        run=str(run), corpus=str(out / "corpus"), corpus_hash=about.corpus_hash, encoder_hash=about.encoder_hash,
        tokenizer_hash=about.tokenizer_hash, step=0, n_passages=40, width=8, dtype="int8", shard_rows=13, batch=4,
    )  # fmt: skip
    encode_job.begin(out / "job", job)
    encode_job.make(out / "job", job, lambda first, last, done: np.ones((last - first, 8), np.float32))
    return out


def verified(path, capsys):
    """Exit status and printed JSON of the command."""
    capsys.readouterr()
    status = tiny.rag_jax("verify", path, "--json")
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "kind"), [("corpus", "corpus"), ("index", "index"), ("run", "run"), ("job", "encode job"),
                       ("run/params", "parameters"), ("run/index", "index")],
)  # fmt: skip
def test_whole(name, kind, made, capsys):
    status, found = verified(made / name, capsys)
    assert (status, found["kind"], found["damaged"]) == (0, kind, []) and found["bytes"] > 0
    assert tiny.rag_jax("verify", made / name) == 0
    assert capsys.readouterr().out.endswith("bytes: whole\n")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE = {
    "corpus": [("encoder_ids.npy", "build the corpus again"), ("passages.jsonl", "build the corpus again"),
               ("manifest.json", "corpus"), ("tokenizers/generator/tokenizer_config.json", "build the corpus again")],
    "index": [("", "build the index again"), ("manifest.json", "index")],
    "job": [("rows-000000000013-000000000026.safetensors", "remove that file and go on: rag-jax encode"),
            ("job.json", "rag-jax encode")],
    "run": [("config.json", "config.json"), ("corpus.json", "corpus.json"), ("params", "parameters again"),
            ("index", "build the index again"), ("checkpoints/1/arrays", "goes on from the one before")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "file", "advice"), [(n, f, a) for n, some in DAMAGE.items() for f, a in some])
def test_damaged(name, file, advice, made, tmp_path, capsys):
    shutil.copytree(made / name, tmp_path / name)
    path = tmp_path / name / file
    path = largest(path) if path.is_dir() else path
    if path.suffix == ".json" and name == "run":
        path.write_text(path.read_text()[:-9])  # it has no manifest here
    else:
        flip(path)
    status, found = verified(tmp_path / name, capsys)
    assert status == 2 and len(found["damaged"]) >= 1
    assert any(advice in line for line in found["damaged"]), found["damaged"]
    assert tiny.rag_jax("verify", tmp_path / name) == 2
    assert "damaged" in capsys.readouterr().out


def test_everything_damaged_is_named(made, tmp_path, capsys):
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    for name in ("encoder_ids.npy", "offsets.npy"):
        flip(tmp_path / "corpus" / name)
    (tmp_path / "corpus" / "id_rows.npy").unlink()
    status, found = verified(tmp_path / "corpus", capsys)
    assert status == 2 and [line.split(":")[0].rpartition("/")[2] for line in found["damaged"]] == [
        "encoder_ids.npy", "id_rows.npy", "offsets.npy"]  # fmt: skip


def test_parts_that_do_not_fit_each_other(made, tiny_data, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    about = snapshot.open_snapshot(made / "index").manifest
    manifest = tmp_path / "run" / "index" / files.MANIFEST
    fields = json.loads(manifest.read_text())
    for name in ("kind", "format_version", "manifest_hash"):
        del fields[name]
    files.write_sealed(manifest, snapshot.KIND, snapshot.VERSION, fields | {"corpus": str(tiny_data / "edited-corpus")})
    status, found = verified(tmp_path / "run", capsys)
    assert status == 2 and about.corpus_hash[:16] in found["damaged"][0]
    shutil.copytree(made / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "params")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    old = checkpoint.check_params(made / "run" / "params")
    assert old["checksums"]
    other = tiny.untrained_run(made / "corpus", tmp_path / "seed", seed=1)
    shutil.copytree(other / "params", tmp_path / "other" / "params")
    status, found = verified(tmp_path / "other", capsys)
    assert status == 2 and "its encoder_hash is" in found["damaged"][0] and mesh.size == 1


def test_an_unfinished_job_is_not_damaged(made, tmp_path, capsys):
    shutil.copytree(made / "job", tmp_path / "job")
    next((tmp_path / "job").glob("rows-*")).unlink()
    status = tiny.rag_jax("verify", tmp_path / "job")
    assert status == 0 and "3 of 4 shards are there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo', None),  # the last line alone: a kill
        ("metrics.jsonl", b'{"step": 1}\nx\xff\x00{{\n{"step": 2}\n', "metrics.jsonl:2: not a metrics row"),
        ("metrics.jsonl", b'{"step": "1"}\n{"step": 2}\n', "metrics.jsonl:1: not a metrics row"),
        ("corpus.json", b"", "corpus.json: damaged: it is empty"),
        ("corpus.json", b"[]", "corpus.json: damaged: it names no corpus"),
        ("corpus.json", b'{"corpus_hash": 5}', "corpus.json: damaged: it names no corpus"),
        ("config.json", b"", "config.json: the file is empty"),
        ("config.json", b"[" * 100_000, "config.json: not JSON"),
        ("config.json", b"3", "config.json: not a JSON object"),
    ],
)
def test_files_that_say_nothing(name, content, said, made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    status, found = verified(tmp_path / "run", capsys)
    assert status == (2 if said else 0)
    assert said is None or any(said in line for line in found["damaged"]), found["damaged"]
    if name != "metrics.jsonl":  # and in another command
        words = ["index", tmp_path / "run", "--corpus", made / "corpus", "--out", tmp_path / "out"]
        assert tiny.rag_jax(*words) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("field", ["segments", "files", "n_passages", "lengths", "dtype", "hash"])
@pytest.mark.parametrize("value", [None, 5, "x", [1], {"a": 1}])
def test_manifests_of_wrong_types(field, value, made, tmp_path):
    """Manifests with a right hash, as another program or a person may write them."""
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    path = tmp_path / "corpus" / files.MANIFEST
    fields = json.loads(path.read_text())
    for name in ("kind", "format_version", "manifest_hash"):
        del fields[name]
    files.write_sealed(path, "corpus", 3, fields | {field: value})

    def read():
        corpus = Corpus.open(tmp_path / "corpus")
        return corpus[0], corpus.rows([corpus[0].id]), len(corpus.encoder_ids[:])

    if (field, value) in (("hash", "x"),):
        read()  # any text is accepted as a hash
        return
    with pytest.raises(files.InputError, match=r"corpus/.*again"):
        read()


def test_no_artifact(tmp_path, capsys):
    assert tiny.rag_jax("verify", tmp_path / "nothing") == 2
    assert tiny.rag_jax("verify", tmp_path) == 2
    assert "nothing that rag-jax has finished" in capsys.readouterr().err
    (tmp_path / files.MANIFEST).write_text("{")
    assert tiny.rag_jax("verify", tmp_path) == 2
    assert "damaged: not a manifest" in capsys.readouterr().out
