"""Training on mixed data sets in buckets, with sampled answers and the files' negatives; killed and resumed."""

import json
import time

import jax
import numpy as np
import pytest
import tiny
from test_train import assert_same_run, command, last_step, rows

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.rag import Rag
from rag_jax.runs.directory import Loaded
from rag_jax.system import sharding
from rag_jax.training import config, session, setup

SETTINGS = {
    "answers": "sample",
    "evaluate_every": 0,
    "checkpoint_every": 5,
    "stages.retriever.steps": 10,
    "stages.retriever.hard_negatives": 2,
    "stages.retriever.negatives": "given",
    "stages.retriever.buckets": [20],
    "stages.joint.steps": 10,
    "stages.joint.buckets": [16, 20],
    "stages.joint.target_buckets": [6],
    "stages.joint.refresh": "",
}


def questions(source, out, passages, number):
    """The questions of `source` with a second answer and wrong passages."""
    lines = []
    for i, line in enumerate(source.read_text().splitlines()):
        row = json.loads(line)
        row["answers"] = [*row["answers"], f"{row['answers'][0]} and {number}"]
        row["hard_negative_passage_ids"] = [passages[(i + k) % len(passages)] for k in range(1, 2 + i % 3)]
        lines.append(json.dumps(row) + "\n")
    out.write_text("".join(lines[number::2]))


@pytest.fixture(scope="module")
def words(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    passages = [json.loads(line)["id"] for line in (tiny_data / "world/passages.jsonl").read_text().splitlines()]
    for number, name in enumerate(("a", "b")):
        questions(tiny_data / "world/train.jsonl", folder / f"{name}.jsonl", passages, number)
    settings = SETTINGS | {"train": f"3*{folder}/a.jsonl + 1*{folder}/b.jsonl"}
    said = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return [*("--stage", "retriever", "--stage", "joint"), *(word for one in said for word in ("--set", one))]


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(tiny_data, words, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    said = tiny.train(tiny_data, whole, *words)["stderr"]
    assert said.count("retriever: first step with ") == 2 and said.count("joint: first step with ") >= 3
    for step in (5, 15):
        process = tiny.start("train", "--config", f"{tiny.__file__}:{tiny_data}", "--run", run, *words)
        while process.poll() is None and last_step(run) < step:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    said = tiny.train(tiny_data, run, *words)["stderr"]
    assert "going on from step" in said and "tokenising" not in said
    assert_same_run(run, whole)
    for row in rows(run):
        shares = {name.rpartition("/")[2]: value for name, value in row.items() if name.startswith("share/")}
        assert shares == {"a.jsonl": pytest.approx(0.75, abs=0.1), "b.jsonl": pytest.approx(1 - shares["a.jsonl"])}
    searching = {row["stage"] for row in rows(run) if "index_age" in row}
    assert searching == {"joint"}  # negatives of the files need no index
    assert np.isfinite([row["loss"] for row in rows(run)]).all()


@pytest.mark.parametrize("answers", ["first", "sample", "every"])
@pytest.mark.parametrize(("name", "most"), [("joint", 0), ("joint", 9), ("retriever", 10)])
def test_an_epoch_is_of_what_the_stage_trains_on(tiny_data, words, answers, name, most):
    """Pairs of all answers, or questions; of every input the first `questions`; `refresh` counts them."""
    change = {"answers": answers, f"stages.{name}.questions": most, f"stages.{name}.batch": 4}
    change |= {"stages.joint.refresh": "epoch", "stages.retriever.buckets": [], "stages.joint.buckets": []}
    sets = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in change.items()]
    cfg = config.load(f"{tiny.__file__}:{tiny_data}", [*words[5::2], *sets])
    number = [stage.name for stage in cfg.stages].index(name)
    data = setup.prepare(cfg, Corpus.open(cfg.corpus))
    everything = len(data.examples) * (2 if answers == "every" else 1)  # every question has two answers
    epoch = (2 * most or everything) // 4
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    setting = session.setting_of(cfg, Loaded(Rag(cfg.model), data.corpus, mesh, None), data, number)
    assert setting.epoch == epoch > 1
    if name == "joint":
        assert [step for step in range(3 * epoch) if setting.when.due(step)] == [0, epoch, 2 * epoch]
    batches = setup.batches(cfg.stages[number], cfg, data, number)
    seen = np.concatenate([batches[step]["source"] for step in range(6 * epoch)])
    assert len(np.unique(seen)) <= (2 * most or everything)


def test_a_lag_longer_than_an_epoch_is_refused_before_the_first_step(tiny_data):
    """The length of an epoch is known only once the questions are read, so `config.check` cannot refuse it."""
    late = ["stages.joint.refresh=background+9:epoch", "stages.joint.questions=16"]
    cfg = config.load(f"{tiny.__file__}:{tiny_data}", late)
    config.check(cfg)
    data = setup.prepare(cfg, Corpus.open(cfg.corpus))
    with pytest.raises(InputError, match="a build takes 9 steps, and the next begins after 2"):
        setup.batches(cfg.stages[-1], cfg, data, len(cfg.stages) - 1)


def test_refused(tiny_data, words, tmp_path, capsys):
    """An input that a stage cannot use, negatives that no file names, and a weight that is not positive."""
    no_gold = tmp_path / "c.jsonl"
    no_gold.write_text('{"id": "1", "question": "Who?", "answers": ["a"]}\n')
    train = next(word for word in words if word.startswith("train="))
    plain = tiny_data / "world/train.jsonl"
    for change, message in (
        (f"{train} + 1*{no_gold}", f"stage retriever: {no_gold} has no question that the stage can use"),
        (f"train={plain}", "stage retriever: no training question names a wrong passage"),
        (f"{train} + -1*{no_gold}", f"the weight -1 of '{no_gold}' must be a positive number"),
    ):
        assert command(tiny_data, tmp_path / "run", *words, "--set", change) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
