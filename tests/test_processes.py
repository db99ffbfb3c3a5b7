"""Several processes give the results of one: what they divide, what they write, and how they end."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import several
import tiny
from conftest import ROOT
from test_checkpoint import flipped, largest
from test_train import command, parameters, rows

from rag_jax.corpus.directory import Corpus
from rag_jax.index import snapshot as snapshots
from rag_jax.inference.pipeline import Pipeline
from rag_jax.runs import checkpoint
from rag_jax.system import logs, sharding

sys.path.insert(0, str(ROOT / "scripts"))
import launch_local

TIMEOUT = 240
RETRIEVER = [
    *("--stage", "retriever", "--set", "stages.retriever.steps=6", "--set", "stages.retriever.hard_negatives=2"),
    *("--set", "model.generator=null", "--set", "log_every=1", "--set", "checkpoint_every=2"),
    *("--set", "evaluate_every=6", "--set", "stages.retriever.refresh=3"),
]


def environments(processes, devices):
    base = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    return launch_local.environments(processes, devices, 0, base)


def ended(processes):
    """The output of processes, all of which must have ended with status 0."""
    said = [process.communicate(timeout=TIMEOUT) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def test_own_rows_of_one_process_are_all():
    for sizes in several.MESHES:
        np.testing.assert_array_equal(sharding.own_rows(several.mesh_of(sizes), 16), np.arange(16))


@pytest.mark.slow
def test_what_four_processes_do_together(tiny_data, tmp_path):
    """Runs tests/several.py in each: batches, feeds, parameters and checkpoints equal those of one process."""
    (tmp_path / "corpus").symlink_to(tiny_data / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    _, params = several.model(corpus, several.mesh_of((8, 1, 1)))
    digest = checkpoint.tree_hash(params)
    np.savez(tmp_path / "expected.npz", hash=digest, **several.feeds(corpus, (8, 1, 1)))
    keeper = checkpoint.Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        keeper.save(step, {"params": params}, {})
    keeper.close()
    flipped(largest(tmp_path / "checkpoints/2"))
    port, started = launch_local.free_port(), []
    for i, environment in enumerate(environments(4, 8)):
        meet = ["--coordinator", f"127.0.0.1:{port}", "--processes", "4", "--process", str(i)]
        words = [sys.executable, several.__file__, str(tmp_path), *meet]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True))
    assert [out for out, _ in ended(started)] == ["all is well\n"] * 4
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    assert checkpoint.tree_hash(checkpoint.load_params(tmp_path / "params", like)) == digest


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_data, tmp_path):
    """The same losses, evaluation, parameters and index, with dropout, search and refresh; one process writes."""
    words = ["train", "--config", f"{tiny.__file__}:{tiny_data}", *RETRIEVER, "--json"]
    runs = {}
    for processes in (2, 1):
        run = runs[processes] = tmp_path / str(processes)
        mesh = ["--set", 'mesh={"fsdp": 2, "tensor": 2}', "--run", str(run)]
        said = ended(launch_local.start([*words, *mesh], environments(processes, 4)))
        if processes == 2:
            assert json.loads(said[0][0])["steps"] == 6 and said[1][0] == ""
            assert "retriever" in said[0][1] and "retriever" not in said[1][1]
    two, one = (rows(runs[processes]) for processes in (2, 1))
    assert [row["step"] for row in two] == list(range(1, 7))
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5)
    evaluated = [{name: row[name] for name in row if name.startswith("eval/")} for row in (two[-1], one[-1])]
    assert evaluated[0] == evaluated[1] != {}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(parameters(run) for run in runs.values()))
    embeddings = [snapshots.open_snapshot(run / "index").embeddings_NE for run in runs.values()]
    np.testing.assert_allclose(*embeddings, atol=1e-4)
    Pipeline.from_run(runs[2])  # index and parameters belong together


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tiny_data, tmp_path, monkeypatch, capsys):
    """Between two log lines and two checkpoints; everything measured up to there is logged."""
    words = [*RETRIEVER[:4], "--set", "model.generator=null", "--set", "log_every=2", "--set", "checkpoint_every=4"]
    words += ["--set", "evaluate_every=0", "--json"]
    plain, update = signal.getsignal(signal.SIGTERM), logs.Progress.update

    def then_terminated(self, n=1, **values):
        update(self, n, **values)
        if self.done == 3 and self.unit == "step":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(logs.Progress, "update", then_terminated)
    assert command(tiny_data, tmp_path / "run", *words) == 0
    found = capsys.readouterr()
    assert json.loads(found.out) == {"run": str(tmp_path / "run"), "steps": 3, "of": 6, "preempted": True}
    assert "SIGTERM: saved and stopped after step 3 of 6" in found.err
    assert signal.getsignal(signal.SIGTERM) == plain and not (tmp_path / "run/params").exists()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    monkeypatch.setattr(logs.Progress, "update", update)
    assert command(tiny_data, tmp_path / "run", *words) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert command(tiny_data, tmp_path / "whole", *words) == 0
    split, whole = rows(tmp_path / "run"), rows(tmp_path / "whole")
    assert [row["step"] for row in split] == [2, 3, 4, 6] and [row["step"] for row in whole] == [2, 4, 6]
    assert (split[1]["loss"] + split[2]["loss"]) / 2 == whole[1]["loss"]
    jax.tree.map(np.testing.assert_array_equal, *(parameters(tmp_path / name) for name in ("run", "whole")))


# --- the whole of it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["same", "killed", "sigterm", "damaged"])
def test_many_processes(part, tmp_path_factory):
    out = tmp_path_factory.getbasetemp() / "many"  # one directory for all parts
    command = [sys.executable, ROOT / "scripts/many_processes.py", "--out", out, "--only", part]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    assert subprocess.run(command, env=environment, check=False).returncode == 0
