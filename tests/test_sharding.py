"""The mesh, the rules and host arrays on eight devices."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from rag_jax.errors import InputError
from rag_jax.models.layers import Dense
from rag_jax.ops.attention import attention
from rag_jax.system import sharding


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, (8, 1, 1)),
        ({}, None),
        ({"data": -1, "tensor": 2}, (4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 3}, None),
        ({"data": 3, "fsdp": -1}, None),
        ({"data": 16, "fsdp": -1}, None),
        ({"data": -1, "fsdp": -1}, None),
        ({"data": 0, "fsdp": -1}, None),
        ({"model": 8}, None),
    ],
)
def test_make_mesh(shape: dict[str, int] | None, sizes: tuple[int, ...] | None) -> None:
    if sizes is None:
        with pytest.raises(InputError):
            sharding.make_mesh(shape)
        return
    mesh = sharding.make_mesh(shape)
    assert mesh.axis_names == sharding.AXES and mesh.devices.shape == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_make_mesh_of_some_devices() -> None:
    assert sharding.make_mesh(devices=jax.devices()[:2]).devices.shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4, "data": -1}, (2, 4, 1)),
        ({"fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, (1, 8, 1)),  # a run on four devices
        ({"data": -1, "fsdp": 16}, (1, 8, 1)),
        ({"data": 4}, (8, 1, 1)),
    ],
)
def test_the_mesh_of_a_run_made_elsewhere(shape: dict[str, int], sizes: tuple[int, ...]) -> None:
    assert tuple(sharding.mesh_here(shape).shape.values()) == sizes


def test_spec() -> None:
    assert sharding.spec(("embed", "mlp")) == PartitionSpec("fsdp", "tensor")
    assert sharding.spec(("batch", None, "length")) == PartitionSpec(("data", "fsdp"), None, None)
    with pytest.raises(ValueError, match="'wings'"):
        sharding.spec(("embed", "wings"))
    with pytest.raises(ValueError, match="two axes on mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="two axes on mesh axis 'fsdp'"):
        sharding.spec(("batch", "embed"))


def test_rules_name_axes_of_the_mesh() -> None:
    for names in sharding.RULES.values():
        assert names is None or set([names] if isinstance(names, str) else names) <= set(sharding.AXES)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("shape", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_shard_rows_pads_and_keeps_the_order(n: int, shape: dict[str, int] | None) -> None:
    mesh = sharding.make_mesh(shape)
    array = np.arange(n * 3, dtype=np.uint16).reshape(n, 3)
    rows = sharding.shard_rows(mesh, array, 65535)
    n_padded = -(-n // 8) * 8
    assert rows.shape == (n_padded, 3) and rows.dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(rows)[:n], array)
    assert np.all(np.asarray(rows)[n:] == 65535)
    assert {shard.data.shape for shard in rows.addressable_shards} == {(n_padded // 8, 3)}


def test_shard_rows_reads_a_memory_map_and_one_axis(tmp_path) -> None:
    np.save(tmp_path / "lengths.npy", np.arange(10, dtype=np.uint8))
    mapped = np.load(tmp_path / "lengths.npy", mmap_mode="r")
    rows = sharding.shard_rows(sharding.make_mesh(), mapped, 0)
    np.testing.assert_array_equal(rows, [*range(10), 0, 0, 0, 0, 0, 0])


def test_shard_rows_of_a_device_array() -> None:
    mesh = sharding.make_mesh()
    rows = sharding.shard_rows(mesh, jax.numpy.arange(12.0), 0)
    np.testing.assert_array_equal(rows, [*range(12), 0, 0, 0, 0])


def test_shard_batch() -> None:
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = sharding.shard_batch(mesh, {"ids": np.arange(24).reshape(8, 3), "step": np.float32(2)})
    np.testing.assert_array_equal(batch["ids"], np.arange(24).reshape(8, 3))
    assert {shard.data.shape for shard in batch["ids"].addressable_shards} == {(2, 3)}
    assert batch["step"].sharding.is_fully_replicated and batch["step"] == 2
    with pytest.raises(ValueError):
        sharding.shard_batch(mesh, np.zeros((6, 2)))


class Small(nn.Module):
    names: tuple[str, ...] = ("embed", "mlp")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.param("kernel", nn.with_logical_partitioning(nn.initializers.normal(), self.names), (8, 16))


def make_state(key: jax.Array, x: jax.Array) -> dict:
    params = Small().init(key, x)
    return {"params": params, "optimizer": optax.adam(1e-3).init(params), "key": key}


def test_init_makes_shards_and_the_same_values_on_every_mesh() -> None:
    key, x = jax.random.key(0), jax.numpy.ones((2, 8))
    plain = sharding.init(sharding.make_mesh(devices=jax.devices()[:1]), make_state, key, x)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    state = sharding.init(mesh, make_state, key, x)
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    np.testing.assert_array_equal(state["params"]["params"]["kernel"], plain["params"]["params"]["kernel"])
    for kernel in (state["params"]["params"]["kernel"], state["optimizer"][0].mu["params"]["kernel"]):
        assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
        assert kernel.addressable_shards[0].data.shape == (4, 8)


def test_init_refuses_an_array_without_names() -> None:
    mesh, x = sharding.make_mesh(), jax.numpy.ones((2, 8))
    with pytest.raises(ValueError, match=r"\['bias'\]"):
        sharding.init(mesh, lambda: {"bias": jax.numpy.zeros(3)})
    with pytest.raises(ValueError, match=r"'kernel'.*'embed'"):
        sharding.init(mesh, Small(("embed",)).init, jax.random.key(0), x)


def test_programs_for_elsewhere_have_the_forms_of_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own forms of an operation depend on the mesh's devices, not on this machine's, and are equivalent."""
    dense, x = Dense(5, ("embed", "mlp")), jax.random.normal(jax.random.key(1), (2, 3, 4))
    params = {"params": {"kernel": x[0, 0, :, None] * np.arange(5), "bias": np.ones(5)}}
    sources = [(x.reshape(1, 2, 4, 3), x.reshape(1, 2, 3, 4))]
    mask = np.ones((1, 1, 3, 3), bool)

    def loss(params: dict, x: jax.Array, sources: list) -> jax.Array:
        out = attention(x.reshape(1, 2, 3, 4), sources, mask)
        return (dense.apply(params, x) ** 2).sum() + (out**2).sum()

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    here = jax.grad(loss, (0, 1, 2))(params, x, sources)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert sharding.platform() == "tpu"
    with sharding.on(mesh):
        assert sharding.platform() == "cpu"
    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(params, x, sources)
    assert "layout_constraint" not in str(program) and "f32[6,4]" not in str(program)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jax.grad(loss, (0, 1, 2))(params, x, sources), here
    )
