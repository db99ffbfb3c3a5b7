"""Updated corpora and snapshots equal ones that are built and embedded from scratch; old rows keep their numbers."""

import json
import shutil

import numpy as np
import pytest
import tiny

from rag_jax.corpus.build import build
from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.update import update
from rag_jax.errors import InputError
from rag_jax.index import snapshot
from rag_jax.inference.encode_corpus import PassageEncoder

WORDS = ["river", "mountain", "city", "born", "wrote", "in", "of", "the", "new", "king", "museum", "year", "1950"]
TABLES = ("encoder_ids", "encoder_length", "generator_ids", "generator_length")


def text(n, seed):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def write(path, texts):
    rows = ({"id": name, "title": f"Entity {name}", "text": words} for name, words in texts.items())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus of 30 short documents and one cut in three, updated three times; a run and an index of the first."""
    out = tmp_path_factory.mktemp("data")
    texts = {f"p{i}": text(3 + i, i) for i in range(30)} | {"long": text(60, 99)}
    sizes = {"train_tokenizer": (300, 400), "encoder_length": 64, "generator_length": 80, "passage_words": 20}
    build([write(out / "base.jsonl", texts)], out / "base", **sizes)
    new = write(out / "new.jsonl", {"q0": text(9, 100), "q1": text(30, 101), "doc": text(50, 102)})
    other = write(out / "other.jsonl", {"p3": text(30, 103), "long": text(42, 104)})
    update(out / "base", out / "one", add=[new], replace=[other], delete=["p5", "p29"])
    again = write(out / "again.jsonl", {"p3": text(4, 105), "q0": text(5, 106)})
    back = write(out / "back.jsonl", {"p5": text(6, 107)})
    update(out / "one", out / "two", add=[back], replace=[again], delete=["doc"])
    update(out / "two", out / "three", delete=["q1"])
    tiny.untrained_run(out / "base", out / "run")
    assert tiny.rag_jax("index", out / "run", "--corpus", out / "base", "--out", out / "index") == 0
    return out


def update_index(data, old, corpus, out, *words):
    return tiny.rag_jax(
        "index", "--update", old, "--run", data / "run", "--corpus", data / corpus, "--out", out, *words
    )


def live(corpus):
    """id -> passage, for the rows that are not deleted."""
    return {corpus[row].id: corpus[row] for row in np.flatnonzero(corpus.live_N)}


def test_rows_keep_their_numbers_and_ids_lead_to_the_newest(data):
    base, one, two, three = (Corpus.open(data / name) for name in ("base", "one", "two", "three"))
    assert (len(base), base.live_N, base.chain) == (33, None, [(base.hash, 33)])
    for older, newer in ((base, one), (one, two), (two, three)):
        n = len(older)
        assert newer.chain[:-1] == older.chain and newer.chain[-1] == (newer.hash, len(newer))
        assert [newer[row] for row in range(n)] == list(older) == list(newer)[:n]
        for name in TABLES:
            np.testing.assert_array_equal(getattr(newer, name)[:n], getattr(older, name)[:])
            assert (
                getattr(newer, name).shape[0] == len(newer) and getattr(newer, name).dtype == getattr(older, name).dtype
            )
    assert [len(one), len(two), len(three)] == [40, 43, 43]
    assert np.flatnonzero(~one.live_N).tolist() == [3, 5, 29, 30, 31, 32]
    gone = [one.row(name) for name in ("p3", "q0")] + one.pieces("doc")
    assert np.flatnonzero(~two.live_N).tolist() == sorted([3, 5, 29, 30, 31, 32, *gone])
    assert np.flatnonzero(~three.live_N & two.live_N).tolist() == [two.row("q1")]
    assert one.row("p3") == 37 and one[one.row("p3")].text == text(30, 103)
    assert two[two.row("p3")].text == text(4, 105) and two[two.row("p5")].text == text(6, 107)
    assert one.pieces("doc") == [35, 36] and two.pieces("doc") == [] and len(one.pieces("long")) == 2
    assert [two[row].id for row in two.pieces("long")] == ["long-0", "long-1"]
    for corpus in (one, two, three):
        passages = live(corpus)
        assert [corpus[row] for row in corpus.rows(list(passages))] == list(passages.values())
        assert len(passages) == corpus.live_N.sum() == len(corpus) - corpus.manifest["n_deleted"]
    for name in ("p5", "p29", "q9"):
        with pytest.raises(InputError, match=f"passage '{name}' is not in this corpus"):
            one.row(name)
    with pytest.raises(InputError, match=r"was cut into 2 passages \(long-0 ...\)"):
        one.row("long")
    assert one.rows(["p5", "p4"], missing=-7).tolist() == [-7, 4]


def test_the_tables_are_those_of_a_corpus_built_anew(data, tmp_path):
    two = Corpus.open(data / "two")
    passages = {passage.id: passage for passage in live(two).values()}
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages.values()]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh = build([tmp_path / "all.jsonl"], tmp_path / "out", tokenizers_from=data / "base", passage_words=0)
    at = two.rows(list(passages))
    for name in TABLES:
        np.testing.assert_array_equal(getattr(two, name)[at], getattr(fresh, name)[:])
    assert two.encoder_tokenizer.hash == fresh.encoder_tokenizer.hash


def test_the_files_of_the_base_are_shared_and_outlive_it(data, tmp_path):
    for name in ("base", "one"):
        shutil.copytree(data / name, tmp_path / name)
    expected = [passage.text for passage in Corpus.open(data / "one")]
    new = write(tmp_path / "new.jsonl", {"z": "one more"})
    update(tmp_path / "one", tmp_path / "out", add=[new])
    for name in ("passages.jsonl", "encoder_ids.npy", "segments/0001/generator_ids.npy", "tokenizers/encoder"):
        linked, own = tmp_path / "out" / name, tmp_path / "one" / name
        assert linked.is_dir() or linked.stat().st_ino == own.stat().st_ino
    shutil.rmtree(tmp_path / "one")
    out = Corpus.open(tmp_path / "out")
    assert [passage.text for passage in out] == [*expected, "one more"] and out.row("z") == 40
    np.testing.assert_array_equal(out.live_N[:40], Corpus.open(data / "one").live_N)


def test_what_does_not_fit_is_refused_by_name(data, tmp_path):
    out = tmp_path / "out"
    known, unknown = write(tmp_path / "k.jsonl", {"p7": "x"}), write(tmp_path / "u.jsonl", {"z7": "x"})
    twice = write(tmp_path / "t.jsonl", {"z7": "y"})
    cut = write(tmp_path / "c.jsonl", {"z": text(50, 1)})
    piece = update(data / "base", tmp_path / "piece", add=[write(tmp_path / "z1.jsonl", {"z-1": "a"})]).directory
    for base, changes, message in (
        (data / "base", {"delete": ["p1", "z7"]}, "passage 'z7' is not in this corpus; take it from --delete"),
        (data / "one", {"delete": ["p5"]}, "passage 'p5' is not in this corpus"),
        (
            data / "base",
            {"add": [known]},
            f"{known}:1: passage 'p7' is in {data / 'base'} already; use --replace for it",
        ),
        (
            data / "base",
            {"replace": [unknown]},
            f"{unknown}:1: passage 'z7' is not in {data / 'base'}; use --add for it",
        ),
        (data / "base", {"replace": [known], "delete": ["p7"]}, "is in --delete, too"),
        (data / "base", {"add": [unknown, twice]}, f"{twice}:1: duplicate id 'z7', first at {unknown}:1"),
        (piece, {"add": [cut]}, f"{cut}:1: is cut into passages, and 'z-1' is one of"),
        (data / "base", {}, "nothing to do: pass --add, --replace or --delete"),
    ):
        with pytest.raises(InputError) as refused:
            update(base, out, **changes)
        assert message in str(refused.value) and not out.exists()


def test_by_the_command_line(data, tmp_path, capsys):
    (tmp_path / "gone.txt").write_text("p8\n\n p9 \n")
    words = ["--update", data / "base", "--delete", "p1", f"@{tmp_path / 'gone.txt'}", "--out", tmp_path / "out"]
    capsys.readouterr()
    assert tiny.rag_jax("corpus", *words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    out = Corpus.open(tmp_path / "out")
    assert (said["n_passages"], said["n_deleted"], said["hash"]) == (33, 3, out.hash)
    assert np.flatnonzero(~out.live_N).tolist() == [1, 8, 9] and out.hash != Corpus.open(data / "base").hash
    for words, message in (
        (["x.jsonl", "--update", data / "base"], "x.jsonl: with --update, passages are named by --add or --replace"),
        (["x.jsonl", "--add", "y.jsonl"], "--add goes with --update CORPUS"),
        ([], "no INPUT; name passages, or --update"),
        (["--update", data / "base", "--delete", "@nowhere"], "nowhere: unreadable"),
    ):
        assert tiny.rag_jax("corpus", *words, "--out", tmp_path / "other") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_updated_snapshot_equals_embedding_everything_anew(data, tmp_path, dtype):
    words = ["--corpus", data / "base", "--shard-rows", 10, "--out", tmp_path / "job", "--dtype", dtype]
    assert tiny.rag_jax("encode", data / "run", *words) == 0
    assert tiny.rag_jax("index", tmp_path / "job", "--out", tmp_path / "base") == 0
    assert update_index(data, tmp_path / "base", "one", tmp_path / "one") == 0
    assert update_index(data, tmp_path / "one", "three", tmp_path / "three") == 0
    assert update_index(data, tmp_path / "base", "three", tmp_path / "at-once") == 0
    whole = ["--corpus", data / "three", "--shard-rows", 43, "--out", tmp_path / "new-job", "--dtype", dtype]
    assert tiny.rag_jax("encode", data / "run", *whole) == 0
    assert tiny.rag_jax("index", tmp_path / "new-job", "--out", tmp_path / "anew") == 0
    anew, three = snapshot.open_snapshot(tmp_path / "anew"), snapshot.open_snapshot(tmp_path / "three")
    assert three.manifest == anew.manifest and len(three.shards) == 6 and len(anew.shards) == 1
    tolerance = 1e-5 if dtype == "float32" else 1.1 * float(np.max(anew.scale_N))
    np.testing.assert_allclose(three.embeddings_NE, anew.embeddings_NE, atol=tolerance)
    np.testing.assert_allclose(
        snapshot.open_snapshot(tmp_path / "at-once").embeddings_NE, three.embeddings_NE, atol=tolerance
    )
    for i in range(4):  # shared, not embedded again
        assert three.shards[i].path.stat().st_ino == (tmp_path / "job" / three.shards[i].path.name).stat().st_ino
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "job")
    assert np.isfinite(snapshot.open_snapshot(tmp_path / "three").embeddings_NE[:]).all()


def test_only_new_rows_are_embedded(data, tmp_path, monkeypatch):
    asked, rows = [], PassageEncoder.rows

    def spy(self, corpus, *args):
        embed = rows(self, corpus, *args)
        return lambda first, last, done: (asked.append((first, last)), embed(first, last, done))[1]

    monkeypatch.setattr(PassageEncoder, "rows", spy)
    assert update_index(data, data / "index", "one", tmp_path / "one") == 0 and asked == [(33, 40)]
    assert update_index(data, tmp_path / "one", "three", tmp_path / "three") == 0 and asked == [(33, 40), (40, 43)]
    deleted = update(data / "base", tmp_path / "deleted", delete=["p0"])
    assert update_index(data, data / "index", tmp_path / "deleted", tmp_path / "four") == 0 and len(asked) == 2
    assert snapshot.open_snapshot(tmp_path / "four").manifest.corpus_hash == deleted.hash


def test_a_snapshot_of_another_corpus_or_encoder_is_not_updated(data, tmp_path, capsys):
    other = tiny.untrained_run(data / "base", tmp_path / "run", seed=1)
    words = ["--update", data / "index", "--run", other, "--corpus", data / "one", "--out", tmp_path / "out"]
    assert tiny.rag_jax("index", *words) == 2
    said = capsys.readouterr().err
    assert "was made with encoder_hash" in said and "embed it all: rag-jax index RUN --corpus" in said
    assert snapshot.open_snapshot(data / "index").manifest.encoder_hash[:16] in said
    sibling = update(data / "base", tmp_path / "sibling", delete=["p1"])
    assert update_index(data, data / "index", "one", tmp_path / "one") == 0
    assert update_index(data, tmp_path / "one", tmp_path / "sibling", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "is no update of that one" in said and sibling.hash[:16] in said
    assert Corpus.open(data / "one").hash[:16] in said and not (tmp_path / "out").exists()
    assert tiny.rag_jax("index", "--update", data / "index", "--corpus", data / "one", "--out", tmp_path / "out") == 2
    assert "--update INDEX needs --run RUN and --corpus CORPUS" in capsys.readouterr().err
