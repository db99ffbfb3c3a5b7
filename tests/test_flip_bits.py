"""A flipped bit in any file of an artifact is reported, or changes no value that is read; it never causes other values
in silence, or a traceback.
"""

import importlib.util
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rag_jax.runs.checkpoint import Checkpoints

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "flip_bits.py"
spec = importlib.util.spec_from_file_location("flip_bits", SCRIPT)
assert spec is not None and spec.loader is not None
flip_bits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flip_bits)


@pytest.fixture(scope="module")
def work(tiny_data, tmp_path_factory):
    """The files for the experiment, from an untrained run, without export and tokenised questions."""
    out = tmp_path_factory.mktemp("flips")
    shutil.copytree(tiny_data / "corpus", out / "corpus")
    run = tiny.untrained_run(out / "corpus", out / "run")
    assert tiny.rag_jax("index", run, "--corpus", out / "corpus", "--out", run / "index") == 0
    keeper = Checkpoints(run / "checkpoints")
    keeper.save(1, {"x": jnp.arange(5000.0), "y": np.arange(7)}, {"seconds": 1.0})
    keeper.close()
    flip_bits.make_job(run, out)
    return out


def test_a_few_flips_of_every_kind(work):
    rng = np.random.default_rng(0)
    kinds = flip_bits.kinds(work)
    sure = ("token tables", "corpus files", "index rows", "job shards")
    seen = dict.fromkeys((*sure, "final parameters", "checkpoints"), 0)
    for name in seen:
        kind = kinds[name]
        before = kind.read()
        assert kind.read() == before  # otherwise "harmless" would mean nothing
        for _ in range(4):
            path = kind.files[int(rng.integers(len(kind.files)))]
            outcome, said = flip_bits.judge(kind, path, rng, before)
            assert outcome in ("detected", "harmless"), f"{path}: {outcome} {said}"
            seen[name] += outcome == "detected"
    assert all(seen[name] == 4 for name in sure)
    assert seen["final parameters"] and seen["checkpoints"]


def test_it_can_fail(work, monkeypatch):
    """A reader that verifies nothing is reported as silent."""
    kind = flip_bits.kinds(work)["token tables"]
    path = work / "corpus" / "encoder_ids.npy"
    careless = kind._replace(read=lambda: flip_bits.digest(path.read_bytes()))
    outcome, _ = flip_bits.judge(careless, path, np.random.default_rng(0), careless.read())
    assert outcome == "SILENT"
    broken = kind._replace(read=lambda: {}["x"])
    assert flip_bits.judge(broken, path, np.random.default_rng(0), "")[0] == "TRACEBACK"


@pytest.mark.slow
def test_the_experiment(tiny_data, tiny_run):
    table = flip_bits.experiment(tiny_data, tiny_run, 150, seed=2)
    assert sum(sum(counts.values()) for counts in table.values()) == 150
    assert not any(counts["SILENT"] or counts["TRACEBACK"] for counts in table.values()), table
