"""Where arrays lie: the mesh, the table from logical names to mesh axes, and arrays from host memory.

Parameters and batches name their axes in words (`("embed", "mlp")`); `RULES` is the one place that says which mesh
axis a word is cut over. A word that is not in the table, or two words on one mesh axis, is an error: nothing is
replicated by accident.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rag_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "documents": None,
    "length": None,
    "width": None,
    # parameters
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "position": None,
    "norm": None,
    # the index and the token table: one row a passage, over every device
    "rows": AXES,
    "retrieval": None,
}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor); an axis not named has size 1 and -1 takes the devices that are left.

    Without `shape`, all devices are on `data`. Raises InputError when the sizes do not multiply to their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = {"data": -1} if shape is None else dict(shape)
    unknown = [name for name in shape if name not in AXES]
    if unknown:
        raise InputError(f"mesh axis {unknown[0]!r} is unknown; the axes are {', '.join(AXES)}")
    sizes = [shape.get(name, 1) for name in AXES]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"mesh {shape}: sizes must be positive, and one of them at most may be -1 (the rest)")
    sizes = _filled(sizes, len(devices))
    if math.prod(sizes) != len(devices):
        raise InputError(f"mesh {shape} does not fit {len(devices)} devices; write -1 for one axis to give it the rest")
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError as error:  # a TPU slice has sides, and an axis takes whole ones
        raise InputError(f"mesh {shape} does not lie on these chips: {error}") from error


def _filled(sizes: list[int], devices: int) -> list[int]:
    """-1 becomes the devices that the other axes leave."""
    return [devices // -math.prod(sizes) if size == -1 else size for size in sizes]


def mesh_here(shape: Mapping[str, int]) -> Mesh:
    """The mesh of a run that was made elsewhere; where that has another number of devices, all that are here: on fsdp
    if the run's parameters were cut, else on data.
    """
    here = len(jax.devices())
    if not shape or math.prod(_filled(list(shape.values()), here)) == here:
        return make_mesh(shape or None)
    return make_mesh({"fsdp" if max(shape.get("fsdp", 1), shape.get("tensor", 1)) > 1 else "data": -1})


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not cut).

    Raises ValueError for a name that RULES does not have and for two names on one mesh axis.
    """
    entries = []
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} of {tuple(names)} is not in RULES; it has {', '.join(RULES)}")
        entries.append(None if name is None else RULES[name])
    used = [axis for entry in entries if entry for axis in ([entry] if isinstance(entry, str) else entry)]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(f"{tuple(names)} puts two axes on mesh axis {twice[0]!r}; each may be used once")
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, names: Sequence[str | None]) -> NamedSharding:
    """`spec(names)` on a mesh."""
    return NamedSharding(mesh, spec(names))


def placed(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Where a parameter of this shape lies: `sharding`, but that a vocabulary which does not divide is not cut.

    (Those of BERT and BART are odd numbers, which released checkpoints keep.) InputError for another axis that does
    not divide.
    """
    kept = list(names)
    for i, (name, size) in enumerate(zip(names, shape, strict=True)):
        cuts = 1 if name is None else extent(mesh, name)
        if size % cuts and (name == "vocab" or size == 1):
            kept[i] = None
        elif size % cuts:
            raise InputError(
                f"a parameter {tuple(shape)} with axes {tuple(names)}: {size} does not divide over the {cuts} devices "
                f"that RULES gives {name!r}; choose another mesh"
            )
    return sharding(mesh, kept)


def extent(mesh: Mesh | AbstractMesh, name: str) -> int:
    """Over how many devices a logical axis is cut."""
    axes = RULES[name] or ()
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """While a program is traced within, `constrain` and `gathered` know this mesh; without, they do nothing."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def running_on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """While a program is traced within, `platform` is that of this mesh; nothing else of `on`."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device))


def _current() -> AbstractMesh | None:
    """The mesh of `on`; None outside, on one device, and within shard_map, where each device is on its own."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def shared() -> bool:
    """Whether the compiler cuts the program that is being traced over several devices."""
    return _current() is not None


def platform(mesh: Mesh | None = None) -> str:
    """What the program that is being traced will run on: the devices of the mesh, or of that of `on`, else those that
    are here. Not always these, when it is compiled ahead of time.
    """
    if mesh is not None:
        return mesh.devices.flat[0].platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def pieces(name: str, size: int) -> int:
    """In how many pieces an axis of this name and size lies over the mesh of `on`."""
    mesh = _current()
    return 1 if mesh is None or size % extent(mesh, name) else extent(mesh, name)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Activations, as the mesh of `on` cuts axes of these names; a compiler that is left to guess cuts the width, too.

    An axis that does not divide, as that of a batch of one, is not cut.
    """
    mesh = _current()
    if mesh is None:
        return x
    kept = [None if name is None or n % extent(mesh, name) else name for name, n in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(kept))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(parameter: jax.Array, names: tuple[str | None, ...], dtype: Any) -> jax.Array:
    """A parameter as it is used: whole over `fsdp`, in the type of the products (ZeRO-3, Rajbhandari et al. 2020).

    What the devices send each other has that type. The gradient comes back sharded as the parameter is; it arrives in
    `dtype`, so where that is narrower `sums` has products and lookups that sum it in the parameter's own type.
    """
    whole = [None if name and RULES[name] == "fsdp" else name for name in names]
    used = parameter.astype(dtype)
    if used.dtype != parameter.dtype and _current() is not None:
        used = jax.lax.optimization_barrier(used)  # or the compiler converts after it has sent twice as much
    return constrain(used, *whole)


def _gathered_forward(parameter: jax.Array, names: tuple, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return gathered(parameter, names, dtype), jnp.zeros(0, parameter.dtype)


def _gathered_backward(names: tuple, _: Any, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient.astype(like.dtype), *names),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def init(mesh: Mesh, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` with every array made on its own shards and out of its box of names.

    Arrays are boxed by `nn.with_logical_partitioning`; an optimiser state made from boxed parameters is boxed too. An
    array with fewer axes than its names, as Adafactor keeps for rows and columns, lies whole on every device.
    Raises ValueError for an array without names, unless it is a scalar.
    """

    def boxed(leaf: Any, x: jax.ShapeDtypeStruct) -> Any:
        return leaf.replace_boxed(x.sharding) if _boxed(leaf) else x.sharding

    shapes = jax.eval_shape(function, *args)
    shardings = jax.tree.map(boxed, shapes, described(mesh, shapes), is_leaf=_boxed)
    made = jax.jit(function, out_shardings=shardings)(*args)  # of the same function, so it is traced once
    return jax.tree.map(lambda leaf: leaf.value if _boxed(leaf) else leaf, made, is_leaf=_boxed)


def described(mesh: Mesh, tree: Any) -> Any:
    """What `init` makes: from boxed shapes the shapes, types and shardings, out of their boxes."""

    def describe(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names, x = (leaf.names, leaf.value) if _boxed(leaf) else ((), leaf)
        if x.ndim > len(names):
            raise ValueError(f"{jax.tree_util.keystr(path)}: names {names} for {x}")
        where = placed(mesh, names, x.shape) if x.ndim == len(names) else replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(describe, tree, is_leaf=_boxed)


def _boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def shard_rows(mesh: Mesh, array_NX: Any, fill: Any, least: int = 0) -> jax.Array:
    """Rows over all devices, padded with `fill` to a multiple of their number: [ceil(N/D)*D, ...], or to `least` rows.

    Only the rows of this process's devices are read, so `array_NX` may be a memory map larger than memory.
    """
    n = array_NX.shape[0]
    n_padded = -(-max(n, least) // mesh.size) * mesh.size
    shape = (n_padded, *array_NX.shape[1:])

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(n_padded)
        part = np.full((stop - start, *shape[1:]), fill, array_NX.dtype)
        found = np.asarray(array_NX[min(start, n) : min(stop, n)])
        part[: len(found)] = found
        return part

    return jax.make_array_from_callback(shape, sharding(mesh, ("rows", *[None] * (len(shape) - 1))), rows)


def with_rows(array_NX: jax.Array, first: int, new_MX: Any) -> jax.Array:
    """The sharded array with other rows [first, first + M); the old array stays as it is, and nothing is compiled.

    A shard that holds none of them is shared by both arrays; the others go by way of the host.
    """
    n, last = array_NX.shape[0], first + new_MX.shape[0]
    if not 0 <= first <= last <= n:
        raise ValueError(f"rows {first} to {last} of an array {array_NX.shape}")
    parts = []
    for shard in array_NX.addressable_shards:
        start, stop, _ = shard.index[0].indices(n)
        low, high = max(start, first), min(stop, last)
        part = shard.data
        if low < high:
            rows = np.array(part)
            rows[low - start : high - start] = new_MX[low - first : high - first]
            part = jax.device_put(rows, shard.device)
        parts.append(part)
    return jax.make_array_from_single_device_arrays(array_NX.shape, array_NX.sharding, parts)


def with_more_rows(array_NX: jax.Array, n: int) -> jax.Array:
    """The array with zeros behind its rows, up to n of them: a multiple of the devices. Compiled for each size."""
    widths = [(0, n - array_NX.shape[0]), *[(0, 0)] * (array_NX.ndim - 1)]
    return jax.jit(lambda x: jnp.pad(x, widths), out_shardings=array_NX.sharding)(array_NX)


def own_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` lie on the devices of this process, ascending.

    Two processes may have the same ones, where the axes over which a batch is not cut reach across both.
    """
    places = sharding(mesh, ("batch",)).addressable_devices_indices_map((size,)).values()
    ranges = sorted({index[0].indices(size)[:2] for index in places if index is not None})
    return np.concatenate([np.arange(*one) for one in ranges])


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """A tree of host arrays, the `own_rows` of this process, as global arrays with rows over `batch`; numbers are the
    same in all processes.

    Raises ValueError (from JAX) when the rows do not divide over the devices of the data and fsdp axes.
    """

    arrays = jax.tree.map(np.asarray, batch)
    places = jax.tree.map(lambda x: sharding(mesh, ("batch", *[None] * (x.ndim - 1)) if x.ndim else ()), arrays)
    if jax.process_count() == 1:  # one call for the whole tree: most of the cost is per call
        return jax.device_put(arrays, places)
    cuts = mesh.shape["data"] * mesh.shape["fsdp"]
    share = len(own_rows(mesh, cuts))

    def whole(x: np.ndarray, place: NamedSharding) -> jax.Array:
        shape = x.shape if not x.ndim else (x.shape[0] // share * cuts, *x.shape[1:])
        own = own_rows(mesh, shape[0]) if x.ndim else np.zeros(0)

        def rows(index: Any) -> np.ndarray:
            if not x.ndim:
                return x
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(own, start))
            return x[first : first + stop - start]

        return jax.make_array_from_callback(shape, place, rows)

    return jax.tree.map(whole, arrays, places)


def fetched(tree: Any) -> Any:
    """Arrays that lie over the mesh, whole in the memory of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def own_mesh(mesh: Mesh) -> Mesh:
    """The mesh, or one of the devices of this process alone where there are several."""
    return mesh if jax.process_count() == 1 else make_mesh(devices=jax.local_devices())
