"""Corpora that change while questions are answered and while a run trains."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny
from test_train import assert_same_run, rows

from rag_jax.corpus.directory import Corpus
from rag_jax.corpus.update import update
from rag_jax.data import batching
from rag_jax.data.gold import Tally, right_rows
from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.index import device_index
from rag_jax.index import snapshot as snapshots
from rag_jax.inference import pipeline as pipelines
from rag_jax.inference.pipeline import Pipeline
from rag_jax.retrieval.config import SearchConfig
from rag_jax.runs import directory as runs
from rag_jax.runs import live_corpus
from rag_jax.system import sharding
from rag_jax.training import config, setup, train

NAMES = ("corpus", "one", "two", "three")  # each an update of the one before; 40, 42, 43 and 53 rows
STEPS = 35
FINE = contextlib.nullcontext()
SWITCHES = {10: "one", 15: "two", 20: "edited-corpus", 25: "three"}  # step -> where the link points to from then on
MODES = {
    "contrastive": {"stage": "retriever", "hard_negatives": 3, "refresh": "background+4:7", "drift_every": 5},
    "scann": {"stage": "retriever", "hard_negatives": 3, "refresh": "7", "search.kind": "scann"},
    "rolling": {"refresh": "rolling:4"},
    "small": {"refresh": "5", "n_retrieved": 6, "write_back": True, "search.dtype": "int8"},
    "normaliser": {"refresh": "6", "normaliser": "corpus", "search.dtype": "bfloat16"},
    "bm25": {"search.kind": "bm25", "n_retrieved": 6},
    "hybrid": {"refresh": "when:overlap<1:4", "search.kind": "hybrid", "search.dense": "scann"},
}


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """The versions of a corpus, an index of each from an untrained run, and questions about what changes."""
    out = tmp_path_factory.mktemp("live")
    for name in ("corpus", "edited-corpus", "world"):
        os.symlink(tiny_data / name, out / name)
    base = Corpus.open(out / "corpus")
    gone = [base[row].id for row in (3, 7)]

    def passages(name, texts):
        lines = [json.dumps({"id": i, "title": f"Entity {i}", "text": text}) for i, text in texts.items()]
        (out / name).write_text("\n".join(lines))
        return [out / name]

    text = base[5].text
    new = passages("new.jsonl", {"n0": text}), passages("other.jsonl", {base[5].id: base[6].text})
    update(out / "corpus", out / "one", add=new[0], replace=new[1], delete=gone[:1])
    update(out / "one", out / "two", add=passages("n1.jsonl", {"n1": text}), delete=gone[1:])
    update(out / "two", out / "three", add=passages("m.jsonl", {f"m{i}": text for i in range(10)}))
    tiny.untrained_run(out / "corpus", out / "run")
    assert tiny.rag_jax("index", out / "run", "--corpus", out / "corpus", "--out", out / "index-corpus") == 0
    for old, name in itertools.pairwise(NAMES):
        words = ["--run", out / "run", "--corpus", out / name, "--out", out / f"index-{name}"]
        assert tiny.rag_jax("index", "--update", out / f"index-{old}", *words) == 0
    asked = [{"id": f"q-{i}", "question": f"What of Entity {i}?", "answers": ["Bela"], "positive_passage_ids": [i]}
             for i in ("n0", "n1", base[5].id, *gone)]  # fmt: skip
    own = (out / "world/train.jsonl").read_text()
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked) + own)
    return out


def ids(corpus):
    """Ids of the valid passages."""
    dead = set() if corpus.live_N is None else set(np.flatnonzero(~corpus.live_N))
    return [corpus[row].id for row in range(len(corpus)) if row not in dead]


@contextlib.contextmanager
def compilations():
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.clear_event_listeners()


def test_the_versions(data):
    corpus = [Corpus.open(data / name) for name in NAMES]
    assert [len(c) for c in corpus] == [40, 42, 43, 53] and [c.n_live for c in corpus] == [40, 40, 40, 50]
    assert [c.n_live == len(ids(c)) for c in corpus] == [True] * 4
    assert [corpus[2].shared_rows(c) for c in corpus] == [40, 42, 43, 43]
    assert Corpus.open(data / "edited-corpus").shared_rows(corpus[2]) == 0
    assert [corpus[2].deleted(name) for name in (ids(corpus[0])[3], ids(corpus[0])[5], "n0", "x")] == [True] + [
        False
    ] * 3
    assert [runs.capacity(n) for n in (1, 15, 16, 40, 43, 44, 63, 64, 21_015_300)] == [
        *(2, 16, 18, 44, 44, 48, 64, 72, 23_068_672)
    ]


# --- deleted passages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "scann", "bm25", "hybrid"])
def test_deleted_passages_are_never_returned(kind, data, tmp_path):
    pytest.importorskip({"exact": "jax", "scann": "scann"}.get(kind, "bm25s"))
    corpus = Corpus.open(data / "two")
    shutil.copytree(data / "run", tmp_path / "run")
    opened = Pipeline.from_run(tmp_path / "run", data / "index-two", SearchConfig(kind=kind))
    base = Corpus.open(data / "corpus")
    questions = [base[3].text[:80], base[7].text[:80], "What of Entity n0?", "zzz qqq"]
    cfg = opened.answer_config(n_docs=40, n_retrieved=100, batch=8, retrieval_only=True)
    for found in opened.answer(questions, cfg):
        assert len(set(found.retrieved)) == len(found.retrieved) and set(found.retrieved) <= set(ids(corpus))
        if kind != "bm25":  # BM25 finds only passages that share a word
            assert len(found.retrieved) == 40  # all passages, including the replaced one
    few = opened.answer(questions, opened.answer_config(n_docs=2, n_retrieved=4, batch=8, retrieval_only=True))
    assert not {base[3].id, base[7].id} & {name for found in few for name in found.retrieved}
    with pytest.raises(InputError, match="n_docs=41, but the corpus has 40 passages; ask for at most 40"):
        opened.answer(questions, opened.answer_config(n_docs=41, batch=8, retrieval_only=True))


def test_gold_passages_and_denoising(data):
    base, corpus = Corpus.open(data / "corpus"), Corpus.open(data / "two")
    questions = formats.read_questions(data / "train.jsonl")
    gold = right_rows(questions[:5], corpus)
    assert gold == [[corpus.row("n0")], [corpus.row("n1")], [41], [], []] and corpus[41].id == base[5].id
    tally = Tally()
    assert right_rows(questions[:5], base, tally) == [[], [], [5], [3], [7]]
    assert (tally.named, tally.missing, tally.deleted, tally.first_missing) == (5, 2, 0, ["n0", "n1"])
    tally = Tally()
    assert right_rows(questions[:5], corpus, tally) == gold and (tally.missing, tally.deleted) == (0, 2)
    drawn, tokenizer = batching.denoise_batches(corpus, batch=8, seed=0, length=200), corpus.generator_tokenizer
    ids = [corpus.generator_ids[row][: corpus.generator_length[row]].tolist() for row in range(len(corpus))]
    row_of = {tuple(tokenizer.label(x, 200)): row for row, x in enumerate(ids)}
    made = [tuple(int(i) for i in x if i != tokenizer.pad_id) for n in range(10) for x in drawn[n]["labels"]]
    assert len(row_of) == 43 and {row_of[x] for x in made} == set(np.flatnonzero(corpus.live_N))


@pytest.mark.parametrize("name", ["n_docs", "n_retrieved", "hard_negatives"])
def test_more_than_there_are_is_refused(name, data):
    mesh, corpus = sharding.make_mesh(), Corpus.open(data / "two")
    stage = "retriever" if name == "hard_negatives" else "joint"
    for wanted in (40, 41):
        cfg = settings(data, data / "two", {f"stages.{stage}.{name}": wanted}, [stage])
        with pytest.raises(InputError, match=f"{name}=41, but the corpus has 40 passages") if wanted > 40 else FINE:
            setup.check(cfg, corpus, mesh)


# --- serving ----------------------------------------------------------------------------------------------------------


def same_answers(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.retrieved == b.retrieved and a.text == b.text
        assert [(p.id, p.text) for p in a.passages] == [(p.id, p.text) for p in b.passages]
        np.testing.assert_allclose([p.prior for p in a.passages], [p.prior for p in b.passages], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_another_index_is_swapped_in_without_compiling(dtype, data):
    search = SearchConfig(dtype=dtype)
    opened = Pipeline.from_run(data / "run", data / "index-corpus", search, live=True)
    cfg = opened.answer_config(n_docs=3, n_retrieved=100, batch=8, retrieval_only=True)
    questions = ["What of Entity n0?", "Who founded the guild?", "Where does it lie?"]
    first = opened.answer(questions, cfg)
    same_answers(first, Pipeline.from_run(data / "run", data / "index-corpus", search).answer(questions, cfg))
    fresh = {name: Pipeline.from_run(data / "run", data / f"index-{name}", search) for name in NAMES}
    expected = {name: pipeline.answer(questions, cfg) for name, pipeline in fresh.items()}
    with compilations() as compiled:
        one = opened.with_index(data / "index-one")
        found_one = one.answer(questions, cfg)
        two = one.with_index(data / "index-two")
        found_two, before = two.answer(questions, cfg), opened.answer(questions, cfg)
        back = two.with_index(data / "index-corpus").answer(questions, cfg)
        assert not compiled
    same_answers(found_one, expected["one"])
    same_answers(found_two, expected["two"])
    same_answers(before, first)
    same_answers(back, first)
    assert found_two[0].retrieved != first[0].retrieved and "n0" in found_two[0].retrieved
    assert two.params is opened.params and two.programs is opened.programs
    same_answers(two.with_index(data / "index-three").answer(questions, cfg), expected["three"])  # larger tables
    places = [
        [shard.data.unsafe_buffer_pointer() for shard in opened_.index.embeddings_NE.addressable_shards]
        for opened_ in (opened, two)
    ]
    shared = [a == b for a, b in zip(*places, strict=True)]
    assert shared == [True] * 6 + [False] * 2  # 48 rows on 8 devices, of which 40, 41 and 42 changed
    with pytest.raises(InputError, match="made with the corpus"):
        manifest = snapshots.open_snapshot(data / "index-one").manifest
        wrong = dataclasses.replace(manifest, corpus=str(data / "two"))
        blocks = [(np.arange(42), np.zeros((42, manifest.width), np.float32))]
        snapshots.write(data / f"wrong-{dtype}", wrong, blocks)
        opened.with_index(data / f"wrong-{dtype}")


@pytest.mark.parametrize("kind", ["scann", "hybrid"])
def test_another_index_with_a_search_on_the_host(kind, data, tmp_path):
    pytest.importorskip({"scann": "scann"}.get(kind, "bm25s"))
    shutil.copytree(data / "run", tmp_path / "run")
    opened = Pipeline.from_run(tmp_path / "run", data / "index-corpus", SearchConfig(kind=kind), live=True)
    cfg = opened.answer_config(n_docs=3, n_retrieved=10, batch=8, retrieval_only=True)
    opened.answer(["What of Entity n0?"], cfg)
    fresh = Pipeline.from_run(tmp_path / "run", data / "index-two", SearchConfig(kind=kind))
    swapped = opened.with_index(data / "index-two")
    same_answers(swapped.answer(["What of Entity n0?"], cfg), fresh.answer(["What of Entity n0?"], cfg))
    assert swapped.programs is opened.programs


# --- versions ---------------------------------------------------------------------------------------------------------


def switch(link, target):
    """Points the link to another directory atomically, as one replaces a server's data."""
    link.with_name("next").symlink_to(target)
    link.with_name("next").rename(link)


def test_looking_for_another_version(data, tmp_path, capsys):
    link = tmp_path / "now"
    switch(link, data / "corpus")
    base, versions = live_corpus.open_version(link), live_corpus.Versions(link)
    assert base.directory == (data / "corpus").resolve() and versions.look(base) is None
    switch(link, data / "two")
    found = versions.look(base)
    assert found.hash == Corpus.open(data / "two").hash and versions.look(base) is None  # said once
    link.unlink()
    assert versions.look(found) is None
    capsys.readouterr()
    for other in ("edited-corpus", "one"):  # an older version is not an update either
        switch(link, data / other)
        assert versions.look(found) is None and versions.look(found) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and Corpus.open(data / other).hash[:16] in said and found.hash[:16] in said


def test_a_directory_that_is_replaced(data, tmp_path):
    """An opened corpus stays readable; a checkpoint of one that is gone leads to an update of it."""
    shutil.copytree(data / "one", tmp_path / "now")
    corpus, position = (
        live_corpus.open_version(tmp_path / "now"),
        live_corpus.position(live_corpus.open_version(tmp_path / "now")),
    )
    versions = live_corpus.Versions(tmp_path / "now")
    assert live_corpus.reopen(position, tmp_path / "now").hash == corpus.hash
    shutil.rmtree(tmp_path / "now")
    shutil.copytree(data / "three", tmp_path / "now")
    found = versions.look(corpus)
    original = Corpus.open(data / "one")
    assert found.chain[1] == corpus.chain[1] and list(corpus) == list(original) and corpus.row("n0") == 40
    np.testing.assert_array_equal(corpus.generator_ids[:], original.generator_ids[:])
    assert live_corpus.reopen(position, tmp_path / "now").hash == found.hash
    with pytest.raises(InputError, match=f"{corpus.hash[:16]}, which is no longer there.*put one of the two back"):
        live_corpus.reopen(position, data / "edited-corpus")


# --- training ---------------------------------------------------------------------------------------------------------


def settings(data, corpus, changes=(), stages=None):
    changes = {"corpus": str(corpus), "train": str(data / "train.jsonl"), "live": True, **dict(changes)}
    assignments = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
    cfg = config.load(f"{tiny.__file__}:{data}", assignments)
    return cfg if stages is None else dataclasses.replace(
        cfg, stages=tuple(stage for stage in cfg.stages if stage.name in stages))  # fmt: skip


class Killed(Exception):
    pass


class Watched:
    """Training in which the link to the corpus is switched after given steps, and which can be killed there."""

    def __init__(self, monkeypatch, link, data):
        self.follow, self.link, self.data = train.follow, link, data
        self.kill, self.seen, self.compiled, self.listening = 0, {}, {}, []
        monkeypatch.setattr(train, "follow", self)

    def __call__(self, session, number, upkeep, params, step):
        if step in SWITCHES:
            switch(self.link, self.data / SWITCHES[step])
        if step == self.kill:
            raise Killed
        before = len(self.listening)
        moved = self.follow(session, number, upkeep, params, step)
        self.compiled[step] = before, len(self.listening)
        if moved is not session:
            self.seen[step] = moved
            check_index(moved, upkeep, params, step, len(session.data.corpus))
            self.compiled[step] = *self.compiled[step], len(self.listening)
        return moved


def check_index(session, upkeep, params, step, n_old):
    """Right after an update: new rows are embedded with the present parameters, deleted ones are never found."""
    corpus, loaded, index = session.data.corpus, session.loaded, upkeep.index
    assert (np.asarray(index.step_N)[n_old : len(corpus)] == step).all() and (
        np.asarray(index.step_N)[:n_old] < step
    ).all()
    embed = jax.jit(loaded.rag.embed_passages)
    d = embed(params, corpus.encoder_ids[n_old:].astype(np.int32),
              np.arange(corpus.encoder_ids.shape[1]) < corpus.encoder_length[n_old:][:, None])  # fmt: skip
    if getattr(index, "scale_N", None) is None:
        tolerance = {"float32": 1e-5, "bfloat16": 0.05}[str(index.embeddings_NE.dtype)]
        by_rows = np.arange(n_old, len(corpus))
        made = (
            device_index.stored(index, by_rows)
            if isinstance(index, device_index.Index)
            else index.embeddings_NE[by_rows]
        )
        np.testing.assert_allclose(made, d, atol=tolerance)
    cfg = pipelines.AnswerConfig(n_docs=corpus.n_live, n_retrieved=99, batch=8, retrieval_only=True)
    found = pipelines.answer_questions(session.location, params, index, ["What of Entity n0?"], cfg)[0]
    assert "n0" in found.retrieved and set(found.retrieved) <= set(ids(corpus))
    if session.cfg.search.kind != "bm25":  # BM25 leaves out what shares no word with the question
        assert sorted(found.retrieved) == sorted(ids(corpus))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_training_follows_and_resumes(mode, data, tmp_path, monkeypatch, capsys):
    """Killed between two versions, or after the tables grew, and resumed: bit for bit the uninterrupted run."""
    needs = {"scann": "scann", "hybrid": "scann", "bm25": "bm25s"}.get(mode)
    if needs:
        pytest.importorskip(needs)
    values = {"steps": STEPS} | MODES[mode]
    stage = values.pop("stage", "joint")
    changes = {key if "." in key else f"stages.{stage}.{key}": value for key, value in values.items()}
    changes |= {"evaluate_every": 5, "drift_sample": 16} | ({"model.generator": None} if stage == "retriever" else {})
    link = tmp_path / "now"
    watched = Watched(monkeypatch, link, data)

    def run(out, kill=0):
        watched.kill = kill
        train.train(settings(data, link, changes, [stage]), tmp_path / out)

    switch(link, data / "corpus")
    with compilations() as watched.listening:
        run("whole")
    said = capsys.readouterr().err
    assert sorted(watched.seen) == [10, 15, 25] and watched.seen[25].loaded.n_rows == 56
    for name in ("edited-corpus", "two"):
        assert Corpus.open(data / name).hash[:16] in next(line for line in said.splitlines() if "is no update" in line)
    gold = [[watched.seen[step].data.examples.gold[i].tolist() for i in range(5)] for step in (10, 15)]
    assert gold == [[[40], [], [41], [], [7]], [[40], [42], [41], [], []]]
    found = {row["step"]: (row.get("corpus"), row.get("n_passages")) for row in rows(tmp_path / "whole")}
    hashes = {step: Corpus.open(data / name).hash for step, name in SWITCHES.items()}
    assert found[10] == (hashes[10], 40) and found[25] == (hashes[25], 50) and found[20] == (None, None)
    assert snapshots.open_snapshot(tmp_path / "whole/index").manifest.corpus_hash == hashes[25]
    if mode == "contrastive":
        compiled = watched.compiled
        assert compiled[15][0] == compiled[15][1] and compiled[15][-1] == compiled[20][0]  # an update, and what follows
        assert compiled[25][-1] < compiled[30][0]  # the larger tables are heard

    switch(link, data / "corpus")
    for kill in (15, 20, 30):  # from the steps 10 and 20; before 15 the link led to what the checkpoint does not name
        with pytest.raises(Killed):
            run("cut", kill)
    run("cut")
    if mode not in ("scann", "hybrid"):  # ScaNN's training is not deterministic
        assert_same_run(tmp_path / "cut", tmp_path / "whole")
