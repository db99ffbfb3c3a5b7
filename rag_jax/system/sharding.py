"""The device mesh, the table from logical axis names to mesh axes, and sharded arrays made from host memory.

Parameters and batches give each axis a logical name (`("embed", "mlp")`); `RULES` is the only place that says over
which mesh axis a name is sharded. A name that is not in the table, or two names on one mesh axis, is an error: nothing
is replicated by accident.
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
    # activations: the devices of an fsdp group share the parameters and divide the batch, so both axes shard it
    "batch": ("data", "fsdp"),
    "documents": None,
    "length": None,
    "width": None,
    # parameters: fsdp shards how they are stored (`gathered` where they are used), tensor how they are used, too
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "position": None,
    "norm": None,
    # the index and the token table: one row a passage, sharded over all devices
    "rows": AXES,
    "retrieval": None,
}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes (data, fsdp, tensor).

    shape: axis name -> size. An axis that is not named has size 1; -1 takes the devices that the other axes leave.
        None puts all devices on `data`.
    devices: by default all of JAX's.
    Raises InputError for an unknown axis, and for sizes whose product is not the number of devices.
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
        # Auto: the compiler propagates shardings; make_mesh's default, Explicit, refuses a plain matmul or top_k
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError as error:  # chips of a TPU slice form a torus, and a mesh axis takes whole sides of it
        raise InputError(f"mesh {shape} does not lie on these chips: {error}") from error


def _filled(sizes: list[int], devices: int) -> list[int]:
    """The sizes with -1 replaced by the number of devices that the other axes leave."""
    # the product is negative, since it contains the -1
    return [devices // -math.prod(sizes) if size == -1 else size for size in sizes]


def mesh_here(shape: Mapping[str, int]) -> Mesh:
    """A mesh over the devices of this machine for a run that was trained on another one.

    It has the run's `shape` where that fits the number of devices. Else all devices are on one axis: on fsdp if the
    run's parameters were sharded (its fsdp or tensor axis is larger than 1), so that they still fit, else on data.
    """
    here = len(jax.devices())
    if not shape or math.prod(_filled(list(shape.values()), here)) == here:
        return make_mesh(shape or None)
    return make_mesh({"fsdp" if max(shape.get("fsdp", 1), shape.get("tensor", 1)) > 1 else "data": -1})


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names; an axis with None is not sharded.

    Raises ValueError for a name that is not in RULES and for two names on one mesh axis.
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
    """The NamedSharding of an array whose axes have these logical names, see `spec`."""
    return NamedSharding(mesh, spec(names))


def placed(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter of this shape: `sharding`, except that an axis may stay whole that does not divide.

    That is an axis of size 1, and the vocabulary: BERT's and BART's have an odd size, which released checkpoints keep.
    InputError for any other axis whose size the number of devices on it does not divide.
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
    """The number of shards of a logical axis: the product of the sizes of its mesh axes."""
    axes = RULES[name] or ()
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Context manager: a program traced inside is for this mesh, and `constrain` and `gathered` shard over it.

    Outside, these two leave shardings to the compiler.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def running_on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Context manager: inside, `platform` is that of this mesh, but `constrain` and `gathered` pin no layout."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device))


def _current() -> AbstractMesh | None:
    """The mesh of `on`; None outside, on one device, and within shard_map, where the program is that of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def shared() -> bool:
    """Whether the compiler partitions the program that is being traced over several devices."""
    return _current() is not None


def platform(mesh: Mesh | None = None) -> str:
    """The platform ("cpu", "gpu", "tpu") that the program being traced will run on.

    It is that of the devices of `mesh`, else of the mesh of `on` or `running_on`, else JAX's default backend. The last
    may be another platform than the target when a program is compiled ahead of time.
    """
    if mesh is not None:
        return mesh.devices.flat[0].platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def pieces(name: str, size: int) -> int:
    """The number of shards of an axis of this name and size on the mesh of `on`; 1 if the size does not divide."""
    mesh = _current()
    return 1 if mesh is None or size % extent(mesh, name) else extent(mesh, name)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins activations to the sharding that their axes' logical names have on the mesh of `on`.

    Without it the compiler chooses, and may shard the width as well. An axis that does not divide, such as a batch of
    one, is not sharded.
    """
    mesh = _current()
    if mesh is None:
        return x
    kept = [None if name is None or n % extent(mesh, name) else name for name, n in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(kept))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(parameter: jax.Array, names: tuple[str | None, ...], dtype: Any) -> jax.Array:
    """A stored parameter as a matmul uses it: cast to `dtype` and gathered over `fsdp` (ZeRO-3, Rajbhandari et al.
    2020).

    The devices send each other values in `dtype`. The gradient has the sharding of the parameter. It arrives in
    `dtype`; where that is narrower than the parameter, use the matmuls and lookups of `ops.float32_sums`, which sum
    the gradient in the parameter's type.
    """
    whole = [None if name and RULES[name] == "fsdp" else name for name in names]
    used = parameter.astype(dtype)
    if used.dtype != parameter.dtype and _current() is not None:
        # without the barrier the compiler may cast after the all-gather, which then sends twice as many bytes
        used = jax.lax.optimization_barrier(used)
    return constrain(used, *whole)


def _gathered_forward(parameter: jax.Array, names: tuple, dtype: Any) -> tuple[jax.Array, jax.Array]:
    # the backward pass needs the parameter's type alone, and only arrays can be saved: an empty one carries it
    return gathered(parameter, names, dtype), jnp.zeros(0, parameter.dtype)


def _gathered_backward(names: tuple, _: Any, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # JAX's own rule would pin the gradient to the gathered layout; this one reduces it straight into the shards
    return (constrain(gradient.astype(like.dtype), *names),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def init(mesh: Mesh, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, compiled so that each device computes only its shard of every array; boxes are removed.

    A box, made by `nn.with_logical_partitioning`, holds an array with the logical names of its axes; an optimiser state
    made from boxed parameters is boxed, too. An array with fewer axes than names, such as Adafactor's statistics of
    rows and columns, is replicated. Raises ValueError for an array without names, unless it is a scalar.
    """

    def boxed(leaf: Any, x: jax.ShapeDtypeStruct) -> Any:
        return leaf.replace_boxed(x.sharding) if _boxed(leaf) else x.sharding

    shapes = jax.eval_shape(function, *args)
    shardings = jax.tree.map(boxed, shapes, described(mesh, shapes), is_leaf=_boxed)
    made = jax.jit(function, out_shardings=shardings)(*args)  # of the same function, so it is traced once
    return jax.tree.map(lambda leaf: leaf.value if _boxed(leaf) else leaf, made, is_leaf=_boxed)


def described(mesh: Mesh, tree: Any) -> Any:
    """Shapes, types and shardings of the arrays that `init` makes, from the boxed shapes of its function's result."""

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
    """A host array with its rows sharded over all D devices: [ceil(max(N, least) / D) * D, ...].

    fill: the value of the rows that are added. least: the array has at least that many rows.
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
    """The sharded array with its rows first ... first + M - 1 replaced; the old array stays valid.

    Nothing is compiled: a shard without such rows is shared by both arrays, the others are changed on the host.
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
    """The array with rows of zeros appended, n rows in all (a multiple of the devices). Compiled for each size."""
    widths = [(0, n - array_NX.shape[0]), *[(0, 0)] * (array_NX.ndim - 1)]
    return jax.jit(lambda x: jnp.pad(x, widths), out_shardings=array_NX.sharding)(array_NX)


def own_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The positions, ascending, of the rows of a batch of `size` that the devices of this process hold.

    Two processes hold the same rows where the tensor axis, over which a batch is not sharded, spans both.
    """
    places = sharding(mesh, ("batch",)).addressable_devices_indices_map((size,)).values()
    ranges = sorted({index[0].indices(size)[:2] for index in places if index is not None})
    return np.concatenate([np.arange(*one) for one in ranges])


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Global arrays, rows sharded over `batch`, from a tree of host arrays that hold the `own_rows` of this process.

    A scalar is replicated and must be the same in all processes. Raises ValueError (from JAX) when the rows do not
    divide over the devices of the data and fsdp axes.
    """

    arrays = jax.tree.map(np.asarray, batch)
    places = jax.tree.map(lambda x: sharding(mesh, ("batch", *[None] * (x.ndim - 1)) if x.ndim else ()), arrays)
    if jax.process_count() == 1:  # one call for the whole tree: most of the cost is per call
        return jax.device_put(arrays, places)
    # a batch of one row a shard shows how many of the shards this process holds, and so how large the whole batch is
    cuts = mesh.shape["data"] * mesh.shape["fsdp"]
    share = len(own_rows(mesh, cuts))

    def whole(x: np.ndarray, place: NamedSharding) -> jax.Array:
        shape = x.shape if not x.ndim else (x.shape[0] // share * cuts, *x.shape[1:])
        own = own_rows(mesh, shape[0]) if x.ndim else np.zeros(0)

        def rows(index: Any) -> np.ndarray:
            if not x.ndim:
                return x
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(own, start))  # from a row of the whole batch to a row of this process's x
            return x[first : first + stop - start]

        return jax.make_array_from_callback(shape, place, rows)

    return jax.tree.map(whole, arrays, places)


def fetched(tree: Any) -> Any:
    """A tree of sharded arrays as NumPy arrays, each whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def own_mesh(mesh: Mesh) -> Mesh:
    """The mesh itself in a single process; of several, a mesh of the devices of this process alone."""
    return mesh if jax.process_count() == 1 else make_mesh(devices=jax.local_devices())
