"""Traces are whole or not there, and a run of training outlives one that cannot be written."""

import errno
import os

import jax
import jax.numpy as jnp
import pytest

from rag_jax.errors import InputError
from rag_jax.system.trace import Trace
from rag_jax.training.profile import STEPS, Profile


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_trace_is_written_and_nothing_beside_it(tmp_path):
    trace = Trace(tmp_path / "new" / "trace")
    trace.start()
    jnp.ones(3).block_until_ready()
    trace.stop()
    trace.stop()  # none is under way
    assert len(list(trace.directory.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert os.listdir(trace.directory) == ["plugins"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    trace, stop = Trace(tmp_path), jax.profiler.stop_trace
    trace.start()

    def stopped_by_a_full_disk():
        stop()
        full()

    monkeypatch.setattr(jax.profiler, "stop_trace", stopped_by_a_full_disk)
    with pytest.raises(InputError, match=r"no trace can be written there.*make room"):
        trace.stop()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path / name}.*no trace can be written there.*directory"):
        Profile(tmp_path / name, 3).prepare()


def test_training_goes_on_without_its_trace(tmp_path, monkeypatch, capsys):
    profile, stop = Profile(tmp_path / "trace", 2), jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (stop(), full()))
    for step in range(1, 2 + STEPS + 1):
        profile.before(step)
        profile.after(step, jnp.ones(1))
    said = capsys.readouterr().err
    assert "no trace can be written there" in said and "training goes on without it" in said
    profile.stop()
