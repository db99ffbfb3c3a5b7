"""Training with every kind of search and of refresh: its metrics, and killed and resumed."""

import json
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import tiny
from test_train import assert_same_run, last_step, rows

from rag_jax.index import snapshot as snapshots
from rag_jax.index.host_index import HostIndex
from rag_jax.inference.pipeline import Pipeline
from rag_jax.retrieval.config import SearchConfig
from rag_jax.retrieval.search import Queries
from rag_jax.runs import checkpoint
from rag_jax.runs.index_location import OnHost

STEPS = 12
MODES = {
    "rolling": {"refresh": "rolling:4"},
    "background": {"refresh": "background+2:5", "drift_every": 4},
    "when": {"refresh": "when:overlap<1:4"},
    "small": {"refresh": "5", "n_retrieved": 6, "write_back": True, "search.dtype": "int8"},
    "normaliser": {"refresh": "6", "normaliser": "corpus", "search.dtype": "bfloat16"},
    "scann": {"refresh": "background:4", "search.kind": "scann"},
    "bm25": {"search.kind": "bm25", "n_retrieved": 6},
    "hybrid": {"refresh": "when:overlap<1:4", "search.kind": "hybrid"},
}


def words(mode, run):
    """The command line of the joint stage alone, from the parameters of another run."""
    needs = {"scann": "scann", "bm25": "bm25s", "hybrid": "bm25s"}.get(mode)
    if needs:
        pytest.importorskip(needs)
    settings = {"steps": STEPS, "refresh": ""} | MODES[mode]
    sets = {key if "." in key else f"stages.joint.{key}": json.dumps(value) for key, value in settings.items()}
    assignments = [part for key, value in sets.items() for part in ("--set", f"{key}={value.strip(chr(34))}")]
    return ["--stage", "joint", "--init", run, "--set", "evaluate_every=0", "--set", "checkpoint_every=5", *assignments]


QUICK = ("small",)  # the others are as long, and their parts are tested in test_train_step.py and others


@pytest.mark.parametrize("mode", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
def test_trains(mode, tiny_data, tiny_run, tmp_path):
    result = tiny.train(tiny_data, tmp_path / "run", *words(mode, tiny_run))
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [5, 10, 12]
    assert all(np.isfinite(row["loss"]) and row["recall_at_1"] >= 0 for row in found)
    assert result["last"]["nll_per_token"] < 6
    ages = [row["index_age"] for row in found]  # at the steps 4, 9 and 11
    drift = [row.get("index_overlap") for row in found]
    if mode == "rolling":
        assert all(row["row_age_max"] <= 4 for row in found) and 0 < ages[2] < 4
    elif mode == "background":
        assert ages == [4, 4, 6] and found[2]["row_age_max"] <= 7  # begun at 5, used from 7 on; begun at 10, dropped
        assert all(0 < value <= 1 for value in drift[:2])
    elif mode == "small":
        assert 0 < ages[0] < 4 and all(row["score_gap"] > 0 for row in found)
    elif mode == "normaliser":
        assert all(0 < row["prior_mass"] <= 1 for row in found)
    elif mode == "scann":
        assert ages == [4, 5, 7]  # begun at 4, used from 8 on
    elif mode == "bm25":
        assert ages == [4, 9, 11]
    else:
        assert all(0 < value <= 1 for value in drift[:2]) and (ages[0] == 0) == (drift[0] < 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "scann"])  # ScaNN's training is not deterministic
def test_killed_and_resumed_is_uninterrupted(mode, tiny_data, tiny_run, tmp_path):
    said = words(mode, tiny_run)
    tiny.train(tiny_data, tmp_path / "whole", *said)
    for step in (5, 10):
        config = ["--config", f"{tiny.__file__}:{tiny_data}", "--run", tmp_path / "run"]
        process = tiny.start("train", *config, *said)
        while process.poll() is None and last_step(tmp_path / "run") < step:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    tiny.train(tiny_data, tmp_path / "run", *said)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_resumed_within_a_background_build(tiny_data, tiny_run, tmp_path):
    """The checkpoint of step 10 was taken during a build; resuming from it ends like the uninterrupted run."""
    said = [*words("background", tiny_run), "--set", "stages.joint.refresh=background+4:5"]
    tiny.train(tiny_data, tmp_path / "whole", *said, "--set", "stages.joint.steps=16")
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    for name in ("params", "index", "checkpoints/16", "checkpoints/15"):
        shutil.rmtree(run / name, ignore_errors=True)
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert not kept or kept == [10]
    said_again = tiny.train(tiny_data, run, *said, "--set", "stages.joint.steps=16")["stderr"]
    assert "going on from step 10" in said_again or not kept
    assert_same_run(run, tmp_path / "whole")


def test_given_an_index_nothing_is_embedded(tiny_data, tiny_run, tmp_path, capsys):
    """The run starts with `index` of the configuration, and checkpoints name it; one of another encoder is refused."""
    said = [*words("bm25", tiny_run)[:8], "--set", "stages.joint.steps=2", "--set", "stages.joint.refresh="]
    tiny.train(tiny_data, tmp_path / "with", *said, "--set", f"index={tiny_run / 'index'}")
    tiny.train(tiny_data, tmp_path / "without", *said)
    one, other = (rows(tmp_path / name)[-1]["loss"] for name in ("with", "without"))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    keeper = checkpoint.Checkpoints(tmp_path / "with/checkpoints")
    assert keeper.position(2)["index_hash"] == snapshots.open_snapshot(tiny_run / "index").hash
    keeper.close()
    said = [word if word != tiny_run else tmp_path / "with" for word in said]
    config = ["--config", f"{tiny.__file__}:{tiny_data}", "--run", tmp_path / "run"]
    assert tiny.rag_jax("train", *config, *said, "--set", f"index={tiny_run / 'index'}") == 2
    other = snapshots.open_snapshot(tmp_path / "with/index").manifest.encoder_hash[:16]
    assert other in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shards", [(10,), (6, 4)])
def test_a_checkpoint_keeps_rows_of_any_type_on_the_host(dtype, shards, tmp_path):
    """Saved from files of a given index, restored as the float32 rows that a run computes itself."""
    rng, ends = np.random.default_rng(0), np.cumsum([0, *shards])
    rows_NE = rng.normal(size=(10, 4)).astype(np.float32)
    parts = [(np.arange(a, b), rows_NE[a:b]) for a, b in pairwise(ends)]
    manifest = snapshots.Manifest("c", "h", "e", "t", 0, 10, 4, dtype)
    given = snapshots.write(tmp_path / "index", manifest, parts).embeddings_NE
    keeper = checkpoint.Checkpoints(tmp_path / "checkpoints")
    location = OnHost(None, None)
    keeper.save(1, {"index": location.kept(HostIndex(given, np.arange(10, dtype=np.int32), None))}, {})
    keeper.wait()
    like = {"index": location.kept(HostIndex(np.zeros((10, 4), np.float32), np.zeros(10, np.int32), None))}
    found = keeper.restore(1, like)["index"]
    keeper.close()
    np.testing.assert_array_equal(found["embeddings_NE"], np.asarray(given, np.float32))
    np.testing.assert_array_equal(found["step_N"], np.arange(10))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", "bm25"])
def test_killed_and_resumed_with_a_given_bfloat16_index_on_the_host(kind, tiny_data, tiny_run, tmp_path):
    pytest.importorskip("bm25s")
    index = tmp_path / "index"
    assert tiny.rag_jax("index", tiny_run, "--corpus", tiny_data / "corpus", "--out", index, "--dtype", "bfloat16") == 0
    said = [*words(kind, tiny_run), "--set", "stages.joint.refresh=8", "--set", f"index={index}"]
    said += ["--set", "checkpoint_every=5", "--set", "log_every=5"]
    tiny.train(tiny_data, tmp_path / "whole", *said)
    for step in (5, 10):  # with the given rows, and with those rebuilt at step 8
        config = ["--config", f"{tiny.__file__}:{tiny_data}", "--run", tmp_path / "run"]
        process = tiny.start("train", *config, *said)
        while process.poll() is None and last_step(tmp_path / "run") < step:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    assert "going on from step" in tiny.train(tiny_data, tmp_path / "run", *said)["stderr"]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "scann", "bm25", "hybrid"])
def test_answers_with_every_search(kind, tiny_data, tiny_run, tmp_path):
    """Prior and text belong to the passages that the search found; scann on 40 passages equals exact."""
    pytest.importorskip({"scann": "scann"}.get(kind, "bm25s"))
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    pipeline = Pipeline.from_run(run, search=SearchConfig(kind=kind))
    exact = Pipeline.from_run(run)
    questions = ["Who founded the guild?", "Where does it lie?", "zzz qqq"]
    cfg = pipeline.answer_config(n_docs=3, n_retrieved=10, batch=8)
    found, plain = pipeline.answer(questions, cfg), exact.answer(questions, cfg)
    assert pipeline.search_manifest()["kind"] == {"scann": "ann"}.get(kind, kind)
    for one, other in zip(found, plain, strict=True):
        priors = [passage.prior for passage in one.passages]
        if kind == "bm25" and one is found[2]:
            assert one.passages == one.retrieved == ()  # no word is known: nothing is found, and nothing read
            continue
        assert len(priors) == 3 and priors == sorted(priors, reverse=True) and abs(sum(priors) - 1) < 1e-5
        if kind in ("exact", "scann"):
            assert one.retrieved == other.retrieved and one.text == other.text
            np.testing.assert_allclose(priors, [passage.prior for passage in other.passages], atol=1e-4)
    if kind == "bm25":
        corpus = pipeline.loaded.corpus
        right = pipeline.index.searcher.search(Queries(None, questions), 10).ids_BK
        for one, ids in zip(found, right, strict=True):
            assert tuple(corpus[int(row)].id for row in ids if row >= 0) == one.retrieved
        by_search = pipeline.answer(questions, pipeline.answer_config(n_docs=3, batch=8, prior="search"))
        scores = pipeline.index.searcher.search(Queries(None, questions[:1]), 3).scores_BK[0]
        expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        np.testing.assert_allclose([p.prior for p in by_search[0].passages], expected, rtol=1e-4)
        kept = list((run / "search").iterdir())
        assert len(kept) == 1
        again = Pipeline.from_run(run, search=SearchConfig(kind=kind))  # from the index on disk
        assert again.answer(questions, cfg) == found


def test_closed_book_and_retrieval_alone_on_the_host(tiny_run, tmp_path):
    pytest.importorskip("bm25s")
    pipeline = Pipeline.from_run(tiny_run, search=SearchConfig(kind="hybrid"))
    exact = Pipeline.from_run(tiny_run)
    question = ["Who founded the guild?"]
    closed = [p.answer(question, p.answer_config(closed_book=True, batch=8)) for p in (pipeline, exact)]
    assert closed[0][0].text == closed[1][0].text and closed[0][0].passages == ()
    np.testing.assert_allclose(closed[0][0].score, closed[1][0].score, rtol=1e-4)
    alone = pipeline.answer(question, pipeline.answer_config(retrieval_only=True, batch=8))[0]
    assert alone.text == "" and len(alone.retrieved) == len(pipeline.loaded.corpus)
    shutil.rmtree(tiny_run / "search")


def test_the_report_names_the_index_and_the_search(tiny_data, tiny_run, tmp_path, capsys):
    words = ["evaluate", tiny_run, "--retrieval-only", "--limit", 4, "--out", tmp_path / "out", "--search"]
    assert tiny.rag_jax(*words, '{"kind": "exact", "dtype": "int8"}') == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    snapshot = snapshots.open_snapshot(tiny_run / "index")
    assert report["index_hash"] == snapshot.hash and report["encoder_hash"] == snapshot.manifest.encoder_hash
    assert report["search"] == {"kind": "exact", "dtype": "int8", "recall_target": 1.0}
    for wrong, message in (("often", "'often' is not one of"), ('{"kind"', "not JSON"), ('{"k": 1}', "unknown key")):
        assert tiny.rag_jax(*words, wrong) == 2
        assert message in capsys.readouterr().err
