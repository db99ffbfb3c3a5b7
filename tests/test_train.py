"""Training as a whole: what a run writes, killed and resumed against uninterrupted, and what is refused."""

import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from conftest import ROOT

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.index import snapshot as snapshots
from rag_jax.models.init_lexical import inverse_document_frequency, lexical_start
from rag_jax.pretrained import load
from rag_jax.runs import directory as runs
from rag_jax.system import logs, sharding
from rag_jax.training import config, session, setup, train

TIMES = {"step_seconds", "tokens_per_second", "host_share"}


def rows(run):
    return logs.read_rows(run / "metrics.jsonl")


def untimed(run):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(run)]


def last_step(run):
    found = rows(run) if (run / "metrics.jsonl").exists() else []
    return found[-1]["step"] if found else 0


def parameters(run):
    return jax.device_get(load.from_pretrained(run)[1])


def assert_same_run(a, b):
    """Checks that parameters, index and all metrics except times are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, parameters(a), parameters(b))
    embeddings = [snapshots.open_snapshot(run / "index").embeddings_NE for run in (a, b)]
    np.testing.assert_array_equal(*embeddings)
    assert untimed(a) == untimed(b)


def tiny_config(data, *assignments):
    return config.load(f"{tiny.__file__}:{data}", assignments)


def command(data, run, *words):
    return tiny.rag_jax("train", "--config", f"{tiny.__file__}:{data}", "--run", run, *words)


def refused(capsys, data, run, *words):
    """The standard error of a command that must be refused and leave nothing behind."""
    before = sorted(run.rglob("*")) if run.exists() else None
    assert command(data, run, *words) == 2
    assert (sorted(run.rglob("*")) if run.exists() else None) == before
    return capsys.readouterr().err


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_result(tiny_data, tiny_run):
    result = json.loads((tiny_data / "result.json").read_text())
    assert result["run"] == str(tiny_run) and result["steps"] == tiny.STEPS and result["training_seconds"] > 0
    assert result["last"] == rows(tiny_run)[-1]
    assert "WARNING" not in result["stderr"] and "absl" not in result["stderr"]
    said = [line for line in result["stderr"].splitlines() if " 0/" not in line]
    assert len(said) < 40, "the log is for people"


def test_metrics(tiny_run):
    found = rows(tiny_run)
    assert [row["step"] for row in found] == list(range(5, tiny.STEPS + 1, 5))
    stages = {"retriever": range(60), "read": range(60, 80), "denoise": range(80, 90), "joint": range(90, 110)}
    always = {"step", "stage", "loss", "learning_rate", "gradient_norm", *TIMES}
    own = {
        "retriever": {"in_batch_accuracy"},
        "read": {"nll_per_token"},
        "denoise": {"nll_per_token"},
        "joint": {
            *("nll_per_token", "prior_entropy", "unique_documents", "posterior_prior_gap", "index_age"),
            *("row_age", "row_age_max", "score_gap"),
            *("recall_at_1", "recall_at_3"),
        },
    }
    for row in found:
        assert row["step"] - 1 in stages[row["stage"]]
        evaluated = {name for name in row if name.startswith("eval/")}
        assert set(row) - evaluated == always | own[row["stage"]]
        assert all(math.isfinite(value) for name, value in row.items() if name != "stage")
        assert (
            evaluated == set() or {"eval/exact_match", "eval/f1", "eval/recall_at_1", "eval/recall_at_20"} <= evaluated
        )
        assert (evaluated != set()) == (row["step"] in (60, 80, 90, 110))
    assert [row["index_age"] for row in found if row["stage"] == "joint"] == [0, 1, 2, 3]  # rebuilt every 4 steps
    first, last = found[0], found[11]
    assert last["loss"] < first["loss"] - 0.3 and last["in_batch_accuracy"] > first["in_batch_accuracy"]


def test_run_directory(tiny_data, tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names == {
        *("config.json", "corpus.json", "manifest.json", "metrics.jsonl", "tensorboard"),
        *("tokenizers", "checkpoints", "params", "index", "examples"),
    }
    assert config.read_run(tiny_run) == tiny_config(tiny_data)
    assert sorted(path.name for path in (tiny_run / "checkpoints").iterdir()) == ["100", "110"]  # keep_checkpoints
    snapshot = snapshots.open_snapshot(tiny_run / "index")
    assert snapshot.manifest.step == tiny.STEPS and snapshot.manifest.n_passages == tiny.ENTITIES


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_started_again_does_nothing(tiny_data, tiny_run, capsys):
    files = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    began = time.monotonic()
    assert command(tiny_data, tiny_run, "--json") == 0
    assert time.monotonic() - began < 20
    captured = capsys.readouterr()
    expected = json.loads((tiny_data / "result.json").read_text())
    del expected["stderr"]
    found = json.loads(captured.out)
    assert abs(found.pop("training_seconds") - expected.pop("training_seconds")) < 5  # the checkpoint has less
    assert found == expected and "all 110 steps are done" in captured.err
    assert files == {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}


def test_killed_before_the_end_was_written(tiny_data, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "params")
    shutil.rmtree(run / "index")
    half = run / ".params.building-0123"
    half.mkdir()
    (half / "rest").write_text("of a killed run")
    result = tiny.train(tiny_data, run)
    assert "going on from step 110" in result["stderr"] and "first step" not in result["stderr"]
    assert_same_run(run, tiny_run)
    assert not half.exists()


def test_killed_and_resumed_is_uninterrupted(tiny_data, tiny_run, tmp_path):
    """At any step, those between two rebuilds of the index among them; scripts/kill_resume.py is the long form."""
    run, rng = tmp_path / "run", random.Random()
    step = rng.randrange(5, 106)
    process = tiny.start("train", "--config", f"{tiny.__file__}:{tiny_data}", "--run", run)
    while process.poll() is None and last_step(run) < step:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.3)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert "going on from step" in tiny.train(tiny_data, run)["stderr"]
    assert_same_run(run, tiny_run)


@pytest.mark.slow
def test_killed_ten_times_is_uninterrupted(tiny_data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "scripts/kill_resume.py", "--out", out]
    assert subprocess.run(command, env=tiny.environment(), check=False).returncode == 0
    report = json.loads((out / "report.json").read_text())
    assert report["kills"] == 10 and all(report["bit_identical"].values())


# --- --stage and --init -----------------------------------------------------------------------------------------------


def test_one_stage_from_the_parameters_of_another_run(tiny_data, tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--stage", "retriever", "--set", "stages.retriever.steps=5"]
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')  # of a run killed before its first checkpoint
    result = tiny.train(tiny_data, run, *words, "--init", tiny_run)
    assert result["steps"] == 5 and result["last"]["stage"] == "retriever" and len(rows(run)) == 1
    cfg = config.read_run(run)
    assert [stage.name for stage in cfg.stages] == ["retriever"] and cfg.init == str(tiny_run)
    before, after = parameters(tiny_run), parameters(run)
    jax.tree.map(np.testing.assert_array_equal, before["generator"], after["generator"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["question_encoder"], after["question_encoder"])
    assert 1e-4 < max(jax.tree.leaves(moved)) < 0.1
    assert result["last"]["loss"] < rows(tiny_run)[0]["loss"] - 0.3  # it starts where the other run ended
    said = refused(capsys, tiny_data, run, *words)
    assert f"init: {str(tiny_run)!r} there, '' now" in said


NO_QUESTIONS = [
    *("--stage", "retriever", "--set", "stages.retriever.objective=inverse_cloze", "--set", "train="),
    *("--set", "stages.retriever.steps=10", "--set", "best_metric=eval/accuracy", "--set", "keep_best=1"),
    *("--set", 'answering={"allowed_answers": ["Bela", "no"], "n_retrieved": 5}'),
]


def test_a_run_with_no_questions_is_evaluated_as_its_configuration_says(tiny_data, tmp_path):
    """A retriever trained on the corpus alone; the dev questions are answered within labels, and scored by them."""
    result = tiny.train(tiny_data, tmp_path / "run", *NO_QUESTIONS, "--profile", f"{tmp_path / 'trace'}@4")
    assert list((tmp_path / "trace").rglob("*.xplane.pb")) and "trace of steps from 4 on" in result["stderr"]
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in result["stderr"].splitlines())
    assert result["steps"] == 10 and "in_batch_accuracy" in result["last"]
    assert "step 10: 8 dev questions: accuracy 0.000, exact_match 0.000" in result["stderr"]
    assert "eval/accuracy" in result["last"] and "eval/recall_at_20" not in result["last"]


@pytest.mark.slow
def test_a_run_with_no_questions_is_the_same_again(tiny_data, tmp_path):
    first, again = (tiny.train(tiny_data, tmp_path / name, *NO_QUESTIONS) for name in ("run", "again"))
    assert_same_run(tmp_path / "again", tmp_path / "run")
    assert again["last"]["loss"] == first["last"]["loss"]


@pytest.mark.slow
def test_an_index_that_is_still_right_is_shared(tiny_data, tiny_run, tmp_path):
    """A run that does not train its encoder embeds nothing at its end; one that trains it does."""
    words = ["--init", tiny_run, "--set", f"index={tiny_run}/index", "--set", "evaluate_every=0"]
    reading = ["--stage", "read", "--set", "stages.read.steps=5"]
    said = tiny.train(tiny_data, tmp_path / "reads", *words, *reading)["stderr"]
    old, new = (snapshots.open_snapshot(run / "index") for run in (tiny_run, tmp_path / "reads"))
    assert new.manifest.step == 5 and "embedding the corpus" not in said
    assert [a.path.stat().st_ino for a in old.shards] == [b.path.stat().st_ino for b in new.shards]
    finding = ["--stage", "retriever", "--set", "stages.retriever.steps=5"]
    assert "embedding the corpus" in tiny.train(tiny_data, tmp_path / "finds", *words, *finding)["stderr"]
    other = snapshots.open_snapshot(tmp_path / "finds/index")
    assert other.manifest.encoder_hash != old.manifest.encoder_hash
    assert np.abs(other.embeddings_NE[:] - old.embeddings_NE[:]).max() > 1e-4


def test_init_refused(tiny_data, tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    assert "not a run directory" in refused(capsys, tiny_data, run, "--init", tiny_data)
    other = tmp_path / "other-corpus"
    passages = tiny_data / "world/passages.jsonl"
    sizes = ["--train-tokenizer", "--encoder-vocab", 300, "--generator-vocab", 300, "--encoder-length", 96]
    assert tiny.rag_jax("corpus", passages, "--out", other, *sizes) == 0
    said = refused(capsys, tiny_data, run, "--init", tiny_run, "--set", f"corpus={other}")
    assert "encoder_tokenizer" in said and "--tokenizers-from" in said
    said = refused(capsys, tiny_data, run, "--init", tiny_run, "--set", "model.generator.hidden=32")
    assert "parameter ['generator']" in said and "is [[64], 'float32'] there, the model has [[32], 'float32']" in said
    said = refused(capsys, tiny_data, run, "--init", tiny_data / "edited-corpus")
    assert "not a run directory" in said


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "stages.joint.steps=11"], "another configuration (stages[3].steps: 20 there, 11 now)"),
        (["--set", "seed=1"], "another configuration (seed: 0 there, 1 now)"),
        (["--stage", "joint"], "another configuration (stages: "),
        (["--stage", "joins"], "--stage joins: no such stage"),
        (["--set", "model.encoder.pooling=cls"], "model.encoder.pooling: 'mean' there, 'cls' now"),
    ],
)
def test_another_configuration_is_refused(tiny_data, tiny_run, capsys, words, message):
    assert message in refused(capsys, tiny_data, tiny_run, *words)


def test_other_data_is_refused(tiny_data, tmp_path):
    cfg = tiny_config(tiny_data)
    corpus = Corpus.open(cfg.corpus)
    data = setup.prepare(cfg, corpus)
    setup.open_run(cfg, tmp_path / "run", data)
    setup.open_run(cfg, tmp_path / "run", data)
    other = dataclasses.replace(data, examples=dataclasses.replace(data.examples, tail=data.examples.question))
    with pytest.raises(InputError, match=r"other data \(questions: '\w{64}' there, '\w{64}' now\); put back"):
        setup.open_run(cfg, tmp_path / "run", other)
    edited = dataclasses.replace(data, corpus=Corpus.open(tiny_data / "edited-corpus"))
    expected = f"corpus_hash: '{corpus.hash}' there, '{edited.corpus.hash}' now"
    with pytest.raises(InputError, match=expected):
        setup.open_run(cfg, tmp_path / "run", edited)


def questions_without(tiny_data, out, **changes):
    lines = (tiny_data / "world/train.jsonl").read_text().splitlines()
    out.write_text("".join(json.dumps(json.loads(line) | changes) + "\n" for line in lines))
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corpus=nowhere"], "nowhere: no such corpus directory"),
        (["train=nowhere.jsonl"], "nowhere.jsonl"),
        (["dev=nowhere.jsonl"], "nowhere.jsonl"),
        (["stages.joint.n_docs=41"], "stage joint: n_docs=41, but the corpus has 40 passages"),
        (["stages.retriever.hard_negatives=41"], "stage retriever: hard_negatives=41, but the corpus has 40 passages"),
        (["stages.denoise.batch=12"], "stage denoise: batch=12 does not divide over 8 devices"),
        (["stages.retriever.batch=800"], "171 training examples are fewer than one batch of 800"),
        (["stages.joint.questions=4"], "4 training examples are fewer than one batch of 8"),
        (["stages.joint.step=4"], "unknown key 'step'"),
        (['mesh={"data": 3}'], "does not fit 8 devices"),
        (["stages.joint.window=4"], "window=4 is only for"),
    ],
)
def test_bad_input_leaves_nothing(tiny_data, tmp_path, capsys, words, message):
    settings = [part for word in words for part in ("--set", word)]
    assert message in refused(capsys, tiny_data, tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_questions_that_lack_what_a_stage_needs(tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    for changes, message in (
        ({"positive_passage_ids": []}, "stage retriever: no training question names a gold passage"),
        ({"answers": ["qqqq"]}, "stage read: no answer occurs in its gold passage, which window=16 needs"),
        ({"answers": []}, "no question has an answer"),
        ({"positive_passage_ids": ["world-person-99"]}, "gold ids are not in the corpus"),
    ):
        file = questions_without(tiny_data, tmp_path / "questions.jsonl", **changes)
        assert message in refused(capsys, tiny_data, run, "--set", f"train={file}")


# --- parts ------------------------------------------------------------------------------------------------------------


def test_differences():
    old = {"a": 1, "b": [{"c": 1}, {"c": 2}], "d": {}}
    assert setup.differences(old, old) == ""
    assert setup.differences(old, {**old, "b": [{"c": 1}, {"c": 3}]}) == "b[1].c: 2 there, 3 now"
    assert setup.differences(old, {**old, "d": {"e": 1}}) == "d.e: None there, 1 now"
    assert setup.differences(old, {"a": 1, "b": [{"c": 1}], "d": {}}).startswith("b: [")


def test_average_passes_over_what_could_not_be_measured():
    nan = float("nan")
    found = train.average(
        [
            {"loss": 1.0, "recall_at_1": nan, "recall_at_5": nan, "learning_rate": 0.1},
            {"loss": 3.0, "recall_at_1": 0.5, "recall_at_5": nan, "learning_rate": 0.2},
        ]
    )
    assert found == {"loss": 2.0, "recall_at_1": 0.5, "learning_rate": 0.2}
    assert math.isnan(train.average([{"loss": nan, "learning_rate": 0.1}])["loss"])  # never hidden


def test_interval_leaves_out_the_step_that_compiled(monkeypatch):
    clock = iter([0.0, 0.0, 100.0, 104.0]).__next__
    monkeypatch.setattr(train.time, "perf_counter", clock)
    interval = train.Interval()
    row = {"loss": 1.0, "learning_rate": 0.1, "tokens": 50.0}
    interval.rows.append(row)
    interval.restart_clock()  # at 100
    interval.rows += [row, row]
    interval.host_seconds = 1.0
    found = interval.summary()  # at 104
    assert (found["step_seconds"], found["tokens_per_second"], found["host_share"]) == (2.0, 25.0, 0.25)


def test_a_step_alone_is_timed_with_its_compilation(monkeypatch):
    clock = iter([0.0, 0.0, 9.0, 10.0]).__next__
    monkeypatch.setattr(train.time, "perf_counter", clock)
    interval = train.Interval()
    interval.rows.append({"loss": 1.0, "learning_rate": 0.1, "tokens": 50.0})
    interval.restart_clock()
    assert interval.summary()["step_seconds"] == 10.0


def test_a_lexical_start_is_made_from_the_corpus(tiny_data):
    cfg = tiny_config(tiny_data)
    corpus, mesh = Corpus.open(cfg.corpus), sharding.make_mesh()
    starts = {}
    for init in ("copy", "lexical"):
        model = dataclasses.replace(cfg.model, encoder=dataclasses.replace(cfg.model.encoder, init=init))
        loaded = runs.load(model, corpus, mesh)
        starts[init] = session.init_params(loaded, 0, "")
    weight = inverse_document_frequency(corpus.encoder_ids, corpus.encoder_length, corpus.encoder_tokenizer.vocab_size)
    expected = lexical_start(starts["copy"]["question_encoder"], weight)
    jax.tree.map(np.testing.assert_array_equal, starts["lexical"]["question_encoder"], expected)
    jax.tree.map(np.testing.assert_array_equal, starts["lexical"]["generator"], starts["copy"]["generator"])
    places = [jax.tree.map(lambda x: x.sharding, start) for start in starts.values()]
    assert places[0] == places[1]
