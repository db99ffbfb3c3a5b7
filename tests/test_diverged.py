"""A diverged run ends at the first step that is not finite, before it replaces a good checkpoint."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rag_jax.corpus.directory import Corpus
from rag_jax.errors import InputError
from rag_jax.runs import checkpoint, lock
from rag_jax.system import configuration
from rag_jax.training import config, diverged, setup


def rows(*pairs):
    return [{"loss": jnp.float32(loss), "gradient_norm": jnp.float32(norm), "tokens": 1} for loss, norm in pairs]


@pytest.mark.parametrize(
    ("pairs", "position"),
    [
        ([(1, 1), (2, 2)], None),
        ([(1, 1), (np.nan, 1), (np.nan, np.nan)], 1),
        ([(1, np.inf), (1, 1)], 0),
        ([(1, 1), (-np.inf, 1)], 1),
        ([(3e38, 3e38)], None),
    ],
)
def test_the_first_step_that_is_not_finite(pairs, position):
    found = diverged.first_bad(rows(*pairs))
    assert (found and found[0]) == position if position is not None else found is None


@pytest.fixture(scope="module")
def prepared(tiny_data):
    values = configuration.plain(tiny.get_config(str(tiny_data)))
    cfg = configuration.build(config.TrainConfig, values)
    return cfg, setup.prepare(cfg, Corpus.open(cfg.corpus))


@pytest.mark.parametrize(("number", "kind"), [(0, "questions"), (1, "questions"), (2, "passages"), (3, "questions")])
def test_the_message_names_step_and_batch_and_how_to_go_on(number, kind, prepared, tiny_data):
    cfg, data = prepared
    before = sum(stage.steps for stage in cfg.stages[:number])
    with pytest.raises(InputError) as error:
        diverged.check(cfg, data, number, 5, rows((2.5, 3), (np.nan, 7)), lambda: before or None)
    said, name = str(error.value), cfg.stages[number].name
    assert said.startswith(
        f"step {before + 7}, stage {name}: the loss is nan and the norm of the gradient 7 (the step "
    )
    assert "(the step before: 2.5 and 3)" in said and f"--set stages.{name}.optimizer.learning_rate=0.0003" in said
    assert (f"checkpoint of step {before} is whole" if before else "No checkpoint was written yet") in said
    listed = said.partition(f"its batch: {kind} ")[2].partition(". ")[0].split(", ")
    batch = setup.batches(cfg.stages[number], cfg, data, number)[6]  # the seventh batch of the stage
    if kind == "passages":
        assert listed == [data.corpus[row].id for row in batch["source"]]
    else:
        lines = (tiny_data / "world/train.jsonl").read_text().splitlines()
        by_id = {row["id"]: row["question"] for row in map(json.loads, lines)}
        assert [by_id[one] for one in listed] == data.examples.texts(batch["source"])


def test_switched_off_nothing_is_looked_at(prepared):
    cfg, data = prepared
    off = configuration.build(config.TrainConfig, configuration.plain(cfg) | {"stop_on_nonfinite": False})
    diverged.check(off, data, 0, 0, [object()], lambda: None)
    diverged.check_params(off, object(), 1, 0, lambda: None)


def test_parameters_that_an_update_has_spoilt(prepared):
    cfg, _ = prepared
    diverged.check_params(cfg, {"a": jnp.ones(3), "b": jnp.zeros(2)}, 1, 0, lambda: None)
    with pytest.raises(InputError, match="step 8: an update has made parameters that are not finite"):
        diverged.check_params(cfg, {"a": jnp.ones(3), "b": jnp.array([0, jnp.inf])}, 8, 0, lambda: 5)


def get_config(data):
    """The one stage that `RAG_JAX_TEST_STAGE` names, with few steps; it diverges at once at a huge learning rate."""
    c = tiny.get_config(data)
    wanted = os.environ.get("RAG_JAX_TEST_STAGE", "retriever")
    [stage] = [stage for stage in c.stages if stage.name == wanted]
    c.log_every, c.checkpoint_every, c.evaluate_every = 3, 3, 0
    stage.steps = 12
    c.stages = (stage,)
    return c


def end_to_end(tiny_data, tmp_path, capsys, name, *settings):
    words = ["train", "--config", f"{__file__}:{tiny_data}", "--run", tmp_path / "run", *settings, "--set"]
    os.environ["RAG_JAX_TEST_STAGE"] = name
    try:
        rate = f"stages.{name}.optimizer.learning_rate"
        assert tiny.rag_jax(*words, f"{rate}=0.001", "--set", f"stages.{name}.optimizer.warmup_steps=0") == 0
        killed_after_nine(tmp_path / "run")
        capsys.readouterr()
        assert tiny.rag_jax(*words, f"{rate}=1e36", "--set", f"stages.{name}.optimizer.warmup_steps=0") == 2
        said = capsys.readouterr().err
        steps = checkpoint.numbers(tmp_path / "run" / "checkpoints")
        assert "is changed: stages[0].optimizer.learning_rate: 0.001 before, 1e+36 now" in said
        assert "going on from step 9" in said and "The checkpoint of step 9 is whole" in said
        assert steps[0] == 9 and not (tmp_path / "run" / lock.NAME).exists()
        lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert lines == [3, 6, 9]
        assert tiny.rag_jax(*words, f"{rate}=0.0001", "--set", f"stages.{name}.optimizer.warmup_steps=0") == 0
        lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert lines == [3, 6, 9, 12]
        assert tiny.rag_jax("verify", tmp_path / "run") == 0
    finally:
        del os.environ["RAG_JAX_TEST_STAGE"]


def killed_after_nine(run):
    """Removes what a finished run wrote after step 9, as if it had been killed there."""
    shutil.rmtree(run / "checkpoints" / "12")
    shutil.rmtree(run / "params")


def test_a_run_goes_on_with_a_lower_rate(tiny_data, tmp_path, capsys):
    end_to_end(tiny_data, tmp_path, capsys, "retriever")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("read", ()),
        ("denoise", ()),
        ("joint", ()),
        ("read", ("--set", "stages.read.accumulate=2", "--set", "stages.read.batch=16")),
    ],
)
def test_other_objectives(name, settings, tiny_data, tmp_path, capsys):
    end_to_end(tiny_data, tmp_path, capsys, name, *settings)


def test_what_may_change_while_a_run_is_under_way():
    old = {"seed": 1, "stop_on_nonfinite": True, "stages": [{"optimizer": {"learning_rate": 1.0}}]}
    new = {"seed": 2, "stop_on_nonfinite": False, "stages": [{"optimizer": {"learning_rate": 0.5}}]}
    changed = setup.take_changes(old, new)
    assert changed == ["stages[0].optimizer.learning_rate: 1.0 before, 0.5 now",
                       "stop_on_nonfinite: True before, False now"]  # fmt: skip
    assert setup.differences(old, new) == "seed: 1 there, 2 now"


def test_a_second_training_is_refused(tiny_data, tmp_path, capsys):
    words = ["train", "--config", f"{__file__}:{tiny_data}", "--run", tmp_path / "run"]
    with lock.held(tmp_path / "run"):
        assert tiny.rag_jax(*words) == 2
        said = capsys.readouterr().err
        assert f"run: process {os.getpid()} on" in said and "trains here now" in said
        assert not (tmp_path / "run" / "config.json").exists()
