"""Exact maximum inner product search over an index whose rows lie on many devices, inside any jitted program.

Each device scans its own rows (`mips_one_device`); then the candidates [B,k] of all devices, and nothing larger, are
exchanged and merged. The index may be float32, bfloat16 or int8. Of the two small types the candidates are found with
queries rounded alike, where that multiplies faster, more of them than asked for, and then scored again with the full
queries. The log of the sum of exponentials of all scores, log Z, or of those that were not found, can be had, with its
gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rag_jax.errors import InputError
from rag_jax.retrieval import mips_one_device
from rag_jax.retrieval.mips_one_device import LOWEST, Best, Mass, Pass, Rows, decoded, quantise
from rag_jax.system import sharding

__all__ = ["OVERSAMPLE", "quantise", "rows_at", "search", "search_with_normaliser"]

OVERSAMPLE = {"float32": 1, "bfloat16": 2, "uint16": 2, "int8": 2}


@functools.partial(
    jax.jit, static_argnames=("k", "mesh", "n_valid", "chunk", "oversample", "recall_target", "out_axes")
)
def search(
    queries_BE: jax.Array,
    index_NE: jax.Array,
    k: int,
    *,
    scale_N: jax.Array | None = None,
    live_N: jax.Array | None = None,
    mesh: Mesh | None = None,
    n_valid: int | None = None,
    chunk: int | None = None,
    oversample: int | None = None,
    recall_target: float = 1.0,
    out_axes: tuple[str, ...] = (),
) -> Best:
    """The k rows with the largest inner product: (scores_BK float32, ids_BK int32), best first, ties to the lower id.

    index_NE: float32, bfloat16 (or uint16, its bits: on a CPU XLA copies a bfloat16 index at every call, and not its
    bits), or int8 with scale_N (`quantise`). live_N: bool, false for deleted rows. Rows from n_valid on are padding.
    Neither is ever returned; where fewer than k rows are live the missing places have score -inf and id -1. A score of
    NaN counts as -inf. Products and sums may overflow and denormal numbers may count as zero, as the device has it.

    With a mesh the rows of index_NE, scale_N and live_N are cut over all its axes (`sharding.shard_rows`). The results
    are replicated, or have their batch cut over `out_axes` of the mesh, which then must divide B. Queries may lie
    anywhere: they are gathered, the index never is. Results depend neither on the mesh nor on the chunk, up to the
    rounding of the products. No gradient flows.

    chunk: rows whose scores are ranked at once; without it, as many as `mips_one_device.default_chunk` thinks good.
    oversample: candidates looked at for each of the k, where queries are rounded (OVERSAMPLE for the index's type).
    recall_target: below 1, a TPU ranks each chunk with `lax.approx_max_k`, and the lower id of a tie may lose. Other
    devices have no such instruction (XLA sorts everything there) and stay exact.
    Memory beyond the arguments: [B,chunk] scores and some rows (on a CPU 2,048, else a chunk) on each device.
    Raises InputError, when traced, for k outside 1..n_valid and for shapes and types that do not fit.
    """
    rows, how = _checked(queries_BE, index_NE, scale_N, live_N, mesh, n_valid, chunk, out_axes)
    if not 1 <= k <= how.n_valid:
        raise InputError(f"k = {k}, but the index has {how.n_valid} passages; ask for 1 to {how.n_valid}")
    oversample = OVERSAMPLE[str(index_NE.dtype)] if oversample is None else oversample
    if oversample < 1 or not 0 < recall_target <= 1:
        raise InputError(f"oversample = {oversample} must be at least 1, recall_target = {recall_target} in (0, 1]")
    # A CPU multiplies bfloat16 rows with full queries anyway.
    exact = index_NE.dtype == jnp.float32 or (index_NE.dtype != jnp.int8 and how.platform == "cpu")
    candidates = k if exact else min(k * oversample, how.n_valid)
    how = dataclasses.replace(how, k=candidates, exact=exact, recall_target=recall_target)
    best, _ = _on_mesh(lax.stop_gradient(queries_BE), rows, how, k, mesh, out_axes)
    assert best is not None
    return best


@functools.partial(jax.jit, static_argnames=("k", "mesh", "n_valid", "chunk", "out_axes"))
def search_with_normaliser(
    queries_BE: jax.Array,
    index_NE: jax.Array,
    k: int,
    *,
    scale_N: jax.Array | None = None,
    live_N: jax.Array | None = None,
    mesh: Mesh | None = None,
    n_valid: int | None = None,
    chunk: int | None = None,
    out_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`search` by exact scores, and the part of the normaliser that the k do not have: (scores_BK, ids_BK, log_rest_B).

    log_rest_B: the logsumexp over all other live rows, so log Z = logaddexp(log_rest_B, logsumexp(scores_BK)); of the
    stored rows in small types. NaN counts as -inf; it is -inf, with gradient 0, where no other row is live. It is
    summed in a second pass, without the k: taken from log Z they would leave nothing but its rounding where they have
    nearly all of it. Its gradient to the queries is the mean of those rows under their softmax, accumulated in that
    pass, with twice the products, only where a gradient is taken. None flows to the index, none through the scores.
    """
    rows, how = _checked(queries_BE, index_NE, scale_N, live_N, mesh, n_valid, chunk, out_axes)
    if not 1 <= k <= how.n_valid:
        raise InputError(f"k = {k}, but the index has {how.n_valid} passages; ask for 1 to {how.n_valid}")
    best, _ = _on_mesh(lax.stop_gradient(queries_BE), rows, dataclasses.replace(how, k=k), k, mesh, out_axes)
    assert best is not None
    return *best, _mass(dataclasses.replace(how, mass="sum"), mesh, out_axes, queries_BE, rows, best[1])


def rows_at(index_NE: jax.Array, ids_X: jax.Array, scale_N: jax.Array | None = None) -> jax.Array:
    """The rows with these ids [...,E] in float32, whatever the type of the index. An id of -1 gives the last row."""
    rows_XE = decoded(index_NE[ids_X])
    return rows_XE if scale_N is None else rows_XE * scale_N[ids_X][..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mass(
    how: Pass,
    mesh: Mesh | None,
    out_axes: tuple[str, ...],
    queries_BE: jax.Array,
    rows: Rows,
    left_out_BX: jax.Array,
) -> jax.Array:
    """The logsumexp of the scores of all rows but those left out."""
    mass = _on_mesh(queries_BE, rows, how, 0, mesh, out_axes, left_out_BX)[1]
    assert mass is not None
    return mass.top_B + jnp.log(mass.sum_B)


def _mass_forward(
    how: Pass,
    mesh: Mesh | None,
    out_axes: tuple[str, ...],
    queries_BE: jax.Array,
    rows: Rows,
    left_out_BX: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    mass = _on_mesh(queries_BE, rows, dataclasses.replace(how, mass="mean"), 0, mesh, out_axes, left_out_BX)[1]
    assert mass is not None and mass.weighted_BE is not None
    mean_BE = mass.weighted_BE / jnp.where(mass.sum_B > 0, mass.sum_B, 1)[:, None]
    return mass.top_B + jnp.log(mass.sum_B), mean_BE.astype(queries_BE.dtype)


def _mass_backward(
    how: Pass, mesh: Mesh | None, out_axes: tuple[str, ...], mean_BE: jax.Array, gradient_B: jax.Array
) -> tuple[jax.Array, None, None]:
    return (gradient_B[:, None] * mean_BE).astype(mean_BE.dtype), None, None


_mass.defvjp(_mass_forward, _mass_backward)


def _checked(
    queries_BE: jax.Array,
    index_NE: jax.Array,
    scale_N: jax.Array | None,
    live_N: jax.Array | None,
    mesh: Mesh | None,
    n_valid: int | None,
    chunk: int | None,
    out_axes: tuple[str, ...],
) -> tuple[Rows, Pass]:
    """The rows as they are scanned, and a pass that finds nothing yet. Raises InputError."""
    queries, index, dtype = queries_BE.shape, index_NE.shape, str(index_NE.dtype)
    if len(queries) != 2 or len(index) != 2 or queries[1] != index[1]:
        raise InputError(f"queries {queries} and index {index} must be [B,E] and [N,E] with the same E")
    if dtype not in OVERSAMPLE:
        raise InputError(f"the index is {dtype}; it must be one of {', '.join(OVERSAMPLE)} (int8: mips.quantise)")
    if (scale_N is not None) != (dtype == "int8"):
        raise InputError(f"an index of {dtype} with{'' if scale_N is not None else 'out'} scale_N; int8 alone has it")
    for name, x, kind in (("scale_N", scale_N, "float32"), ("live_N", live_N, "bool")):
        if x is not None and (x.shape != index[:1] or str(x.dtype) != kind):
            raise InputError(f"{name} is {x.dtype}{list(x.shape)}; for an index {index} it must be {kind}[{index[0]}]")
    n_valid = index[0] if n_valid is None else n_valid
    if not 0 <= n_valid <= index[0] < 2**31:
        raise InputError(f"n_valid = {n_valid} of {index[0]} rows; it must lie within them, and ids are 32 bits")
    n_devices = 1 if mesh is None else mesh.size
    if index[0] % n_devices:
        raise InputError(f"{index[0]} rows do not divide over {n_devices} devices; pad them with sharding.shard_rows")
    if index[0] // n_devices >= 2**30:
        raise InputError(
            f"{index[0] // n_devices} rows on a device; they must be fewer than 2**30, so take more devices"
        )
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk = {chunk} rows; it must be at least 1")
    sizes = {} if mesh is None else dict(mesh.shape)
    cuts = [sizes.get(axis, 0) for axis in out_axes]
    if 0 in cuts or len(set(out_axes)) < len(out_axes):
        raise InputError(f"out_axes = {out_axes} must be different axes of the mesh, which has {tuple(sizes)}")
    n_cuts = functools.reduce(lambda a, b: a * b, cuts, 1)
    if queries[0] % n_cuts:
        raise InputError(f"{queries[0]} queries do not divide over {n_cuts} devices of out_axes = {out_axes}")
    platform = sharding.platform(mesh)
    if dtype == "bfloat16" and platform == "cpu":
        index_NE = lax.bitcast_convert_type(index_NE, jnp.uint16)  # XLA would make all of it float32 before the scan
    rows = jax.tree.map(lax.stop_gradient, Rows(index_NE, scale_N, live_N))
    return rows, Pass(0, n_valid, chunk, platform, exact=True, axes=() if mesh is None else mesh.axis_names)


def _on_mesh(
    queries_BE: jax.Array,
    rows: Rows,
    how: Pass,
    k: int,
    mesh: Mesh | None,
    out_axes: tuple[str, ...],
    left_out_BX: jax.Array | None = None,
) -> tuple[Best | None, Mass | None]:
    def on_device(queries_BE: jax.Array, rows: Rows, left_out_BX: jax.Array | None) -> tuple[Best | None, Mass | None]:
        offset = lax.axis_index(how.axes) * rows.embeddings_NE.shape[0] if how.axes else 0
        best, mass = mips_one_device.scan(queries_BE, rows, offset, how, left_out_BX)
        if how.axes and mass is not None:
            mass = _total(mass, how.axes, out_axes)
        if best is None:
            return None, mass
        found = [*best] if how.exact else [*best, mips_one_device.rescored(queries_BE, rows, best[1], offset)]
        if how.axes:
            found = _merged(found, how, out_axes)
        if not how.exact:
            found = _best([found[2], found[1]], k)
        return (jnp.where(found[0] > LOWEST, found[0], -jnp.inf), found[1]), mass

    if mesh is None:
        return on_device(queries_BE, rows, left_out_BX)
    cut, whole = PartitionSpec(out_axes or None), PartitionSpec()
    specs = (whole, PartitionSpec(mesh.axis_names), whole)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=cut)(queries_BE, rows, left_out_BX)


def _best(found: list[jax.Array], k: int) -> list[jax.Array]:
    """The k best of [B,X] arrays: by the first, which are scores, then by the second, which are ids."""
    scores, *others = lax.sort([-found[0], *found[1:]], num_keys=2)
    return [x[:, :k] for x in (-scores, *others)]


def _merged(found: list[jax.Array], how: Pass, out_axes: tuple[str, ...]) -> list[jax.Array]:
    """The how.k best of all devices. Where the devices divide the batch each merges a part of it and passes that on,
    which moves 2 B k entries to a device instead of B k from each.
    """
    rest = tuple(axis for axis in how.axes if axis not in out_axes)
    even = found[0].shape[0] % lax.axis_size(how.axes) == 0
    split = (*out_axes, *rest) if even else out_axes
    if split:
        found = [lax.all_to_all(x, split, 0, 1, tiled=True) for x in found]
        found = _best(found, how.k)
    if rest:
        found = [lax.all_gather(x, rest, axis=0 if even else 1, tiled=True, to="invarying") for x in found]
    return found if even else _best(found, how.k)


def _total(mass: Mass, axes: tuple[str, ...], out_axes: tuple[str, ...]) -> Mass:
    """The mass of all devices, for this device's part of the batch."""
    top_B = lax.pmax(mass.top_B, axes)
    share_B = jnp.exp(mass.top_B - jnp.where(jnp.isfinite(top_B), top_B, 0))
    sum_B = lax.psum(mass.sum_B * share_B, axes)
    weighted_BE = None
    if mass.weighted_BE is not None:
        weighted_BE = lax.psum(mass.weighted_BE * share_B[:, None], axes)
    total = Mass(top_B, sum_B, weighted_BE)
    if not out_axes:
        return total
    part = top_B.shape[0] // lax.axis_size(out_axes)
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, lax.axis_index(out_axes) * part, part), total)
