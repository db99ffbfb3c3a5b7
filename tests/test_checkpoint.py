"""Checkpoints: written beside training, kept by age and score, verified, and restored onto any mesh."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.errors import InputError
from rag_jax.runs import checkpoint
from rag_jax.runs.checkpoint import Checkpoints, Damaged
from rag_jax.system import sharding


def arrays(value, mesh=None):
    """A sharded matrix, a replicated vector and a host array of `value`; the matrix plus each element's position."""
    mesh = mesh or sharding.make_mesh()
    matrix_NX = value + np.arange(48, dtype=np.float32).reshape(16, 3)
    return {
        "matrix": jax.device_put(matrix_NX, sharding.sharding(mesh, ("rows", None))),
        "vector": jax.device_put(np.full(5, value, np.float32), sharding.replicated(mesh)),
        "host": np.full(7, value, np.int32),
    }


def assert_equal(found, value):
    for name, array in arrays(value).items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array))


def saved(directory, *values, **options):
    keeper = Checkpoints(directory, **{"keep": 10, **options})
    for value in values:
        keeper.save(value, arrays(value), {"seconds": value / 2}, {"eval/f1": -abs(value - 2)})
    keeper.wait()
    return keeper


def test_what_was_saved_comes_back_on_another_mesh(tmp_path):
    keeper = saved(tmp_path, 1, 2)
    assert keeper.steps() == [2, 1] and keeper.latest() == 2 and keeper.position(1)["seconds"] == 0.5
    for shape in ({"data": 8}, {"fsdp": 4, "tensor": 2}):
        like = arrays(0, sharding.make_mesh(shape))
        found = keeper.restore(1, like)
        assert_equal(found, 1)
        assert found["matrix"].sharding == like["matrix"].sharding
    one = arrays(0, sharding.make_mesh(devices=jax.devices()[:1]))
    assert_equal(keeper.restore(2, one), 2)


def test_training_goes_on_while_it_is_written(tmp_path):
    """The next step overwrites the memory of the arrays at once; the checkpoint holds the values from before."""
    keeper, state = Checkpoints(tmp_path, keep=10), arrays(0)
    host, big = state.pop("host"), jnp.zeros((8, 1_000_000))
    state["big"] = jax.device_put(big, sharding.sharding(sharding.make_mesh(), ("rows", None)))
    places = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0, out_shardings=places)
    for value in range(3):
        keeper.save(value, {**state, "host": host}, {})
        for _ in range(5):
            state = step(state)
    keeper.wait()
    for value in range(3):
        found = keeper.restore(value, {**state, "host": host})
        assert (np.asarray(found["big"]) == 5 * value).all() and (np.asarray(found["vector"]) == 5 * value).all()
    keeper.close()


def test_the_newest_and_the_best_stay(tmp_path):
    keeper = saved(tmp_path, *range(1, 7), keep=2, keep_best=1, metric="eval/f1")
    keeper.close()
    assert keeper.steps() == [6, 5, 2]
    again = Checkpoints(tmp_path, 2, 1, "eval/f1")  # as after a restart
    again.save(7, arrays(7), {})  # without metrics
    again.close()
    assert again.steps() == [7, 6, 2]
    with pytest.raises(InputError, match="best_metric='eval/f1' is not measured; there are eval/bleu"):
        again = Checkpoints(tmp_path, 2, 1, "eval/f1")
        again.save(8, arrays(8), {}, {"eval/bleu": 1.0})


def largest(directory):
    return max((p for p in (directory / "arrays").rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "arrays": lambda d: flipped(largest(d)),
    "cut": lambda d: largest(d).write_bytes(largest(d).read_bytes()[:20]),
    "gone": lambda d: shutil.rmtree(d / "arrays"),
    "position": lambda d: flipped(d / "position" / "metadata"),
    "no position": lambda d: shutil.rmtree(d / "position"),
    "empty": lambda d: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in d.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen(kind, tmp_path):
    keeper = saved(tmp_path, 1, 2)
    DAMAGE[kind](tmp_path / "2")
    with pytest.raises(Damaged, match=r"its (position|arrays)|of its 3 arrays were altered"):
        keeper.restore(2, arrays(0))
    assert_equal(keeper.restore(1, arrays(0)), 1)
    keeper.set_aside(2)
    assert keeper.steps() == [1] and (tmp_path / "2.damaged").is_dir()
    again = Checkpoints(tmp_path, keep=10)
    again.save(2, arrays(5), {})
    again.close()
    assert_equal(again.restore(2, arrays(0)), 5)
    DAMAGE[kind](tmp_path / "2")
    again.set_aside(2)  # a second time


def test_values_that_orbax_reads_without_a_word(tmp_path, monkeypatch):
    """Changed values in a format that does not notice: our checksums do, and name the array."""
    keeper = saved(tmp_path, 1)
    plain = checkpoint.ocp.StandardCheckpointHandler.restore

    def other(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        return {**found, "vector": found["vector"].at[3].multiply(-1)}

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", other)
    with pytest.raises(Damaged, match=r"1 of its 3 arrays were altered after they were saved: \['vector'\]"):
        keeper.restore(1, arrays(0))


def test_other_shapes_are_refused_and_not_called_damaged(tmp_path):
    keeper = saved(tmp_path, 1)
    like = arrays(0) | {"vector": jnp.zeros(6)}
    with pytest.raises(InputError, match=r"\['vector'\] is \[\[5\], 'float32'\] there, \[\[6\], 'float32'\] now"):
        keeper.restore(1, like)
