"""Exact maximum inner product search over an index whose rows are sharded over many devices, inside any jitted program.

Each device scans its own rows (`mips_one_device`); then the candidates [B,k] of all devices, and nothing larger, are
exchanged and merged. The index may be float32, bfloat16 or int8. For the two small types, where it multiplies faster,
the scan rounds the queries to the type of the rows, takes more candidates than asked for, and rescores them with the
unrounded queries. `search_with_normaliser` also gives the log of the sum of exponentials of the scores of all other
rows, with its gradient; log Z follows from it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rag_jax.errors import InputError
from rag_jax.retrieval import mips_one_device
from rag_jax.retrieval.mips_one_device import LOWEST, Best, IndexRows, Mass, Pass, decoded, quantise
from rag_jax.system import sharding

__all__ = ["OVERSAMPLE", "quantise", "rows_at", "search", "search_with_normaliser"]

# Candidates for each of the k, by type of the index: scores of rounded queries may rank a row of the k best below k.
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

    index_NE: float32, bfloat16, uint16 (the bits of bfloat16: on a CPU XLA copies a bfloat16 index at every call, but
        not a uint16 one) or int8 with scale_N.
    scale_N: float32 scales of int8 rows (`quantise`).
    live_N: bool, False for deleted rows; they are never returned.
    n_valid: rows from n_valid on are padding and never returned; None: there is no padding.
    mesh: the rows of index_NE, scale_N and live_N are sharded over all its axes (`sharding.shard_rows`). Queries may
        have any sharding: they are gathered, the index never is.
    out_axes: axes of the mesh over which the batch of the results is sharded; their sizes must divide B. Without any,
        the results are replicated.
    chunk: rows whose scores are ranked at once; None: `mips_one_device.default_chunk`.
    oversample: candidates for each of the k, where queries are rounded; None: OVERSAMPLE of the index's type.
    recall_target: below 1, a TPU ranks each chunk with `lax.approx_max_k`, and the lower id of a tie may lose. Other
        devices have no such instruction (XLA sorts everything there) and stay exact.

    With fewer than k valid rows the remaining positions have score -inf and id -1. A score of NaN counts as -inf.
    Products and sums may overflow, and denormal numbers may count as zero, as on the device. Results depend neither on
    the mesh nor on the chunk, up to the rounding of the products. No gradient flows.
    Memory beyond the arguments: [B,chunk] scores and some rows (on a CPU 2,048, else a chunk) on each device.
    Raises InputError, when traced, for k outside 1..n_valid and for shapes and types that do not fit.
    """
    rows, how = _checked(queries_BE, index_NE, scale_N, live_N, mesh, n_valid, chunk, out_axes)
    if not 1 <= k <= how.n_valid:
        raise InputError(f"k = {k}, but the index has {how.n_valid} passages; ask for 1 to {how.n_valid}")
    oversample = OVERSAMPLE[str(index_NE.dtype)] if oversample is None else oversample
    if oversample < 1 or not 0 < recall_target <= 1:
        raise InputError(f"oversample = {oversample} must be at least 1, recall_target = {recall_target} in (0, 1]")
    # With bfloat16 rows a CPU does not round the queries (`rounded`), so there is nothing to rescore.
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
    """`search` with unrounded queries, and the normaliser over all other rows: (scores_BK, ids_BK, log_rest_B).

    log_rest_B: float32 logsumexp of the scores of all valid rows but the k, so that
        log Z = logaddexp(log_rest_B, logsumexp(scores_BK)). Small types are scored as stored. A score of NaN counts as
        -inf. Where no other row is valid it is -inf, with gradient 0.

    A first pass finds the k, a second one sums all others. One pass that sums everything, and a subtraction of the k,
    would leave only rounding errors where the k have nearly all of the mass. The gradient of log_rest_B to the queries
    is the mean of the other rows under their softmax; the second pass accumulates it, with twice the products, only
    where a gradient is taken. No gradient flows to the index or through the scores.
    """
    rows, how = _checked(queries_BE, index_NE, scale_N, live_N, mesh, n_valid, chunk, out_axes)
    if not 1 <= k <= how.n_valid:
        raise InputError(f"k = {k}, but the index has {how.n_valid} passages; ask for 1 to {how.n_valid}")
    best, _ = _on_mesh(lax.stop_gradient(queries_BE), rows, dataclasses.replace(how, k=k), k, mesh, out_axes)
    assert best is not None
    return *best, _mass(dataclasses.replace(how, mass="sum"), mesh, out_axes, queries_BE, rows, best[1])


def rows_at(index_NE: jax.Array, ids_X: jax.Array, scale_N: jax.Array | None = None) -> jax.Array:
    """The rows with these ids, float32 [...,E], whatever the type of the index. An id of -1 gives the last row."""
    rows_XE = decoded(index_NE[ids_X])
    return rows_XE if scale_N is None else rows_XE * scale_N[ids_X][..., None]


# A custom gradient, because the derivative of a scan keeps the scores of every chunk, [B,N] in all. The gradient of a
# logsumexp of inner products is the mean of the rows under their softmax, [B,E], which the scan itself can accumulate.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mass(
    how: Pass,
    mesh: Mesh | None,
    out_axes: tuple[str, ...],
    queries_BE: jax.Array,
    rows: IndexRows,
    left_out_BX: jax.Array,
) -> jax.Array:
    """The logsumexp, float32 [B], of the scores of all valid rows but those with ids left_out_BX."""
    mass = _on_mesh(queries_BE, rows, how, 0, mesh, out_axes, left_out_BX)[1]
    assert mass is not None
    return mass.top_B + jnp.log(mass.sum_B)


def _mass_forward(
    how: Pass,
    mesh: Mesh | None,
    out_axes: tuple[str, ...],
    queries_BE: jax.Array,
    rows: IndexRows,
    left_out_BX: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    mass = _on_mesh(queries_BE, rows, dataclasses.replace(how, mass="mean"), 0, mesh, out_axes, left_out_BX)[1]
    assert mass is not None and mass.weighted_BE is not None
    mean_BE = mass.weighted_BE / jnp.where(mass.sum_B > 0, mass.sum_B, 1)[:, None]  # no row counted: gradient 0
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
) -> tuple[IndexRows, Pass]:
    """The rows in the type that is scanned, and a `Pass` with k and mass still to be set.

    Raises InputError for shapes and types that do not fit, and for too many rows.
    """
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
    rows = jax.tree.map(lax.stop_gradient, IndexRows(index_NE, scale_N, live_N))
    return rows, Pass(0, n_valid, chunk, platform, exact=True, axes=() if mesh is None else mesh.axis_names)


def _on_mesh(
    queries_BE: jax.Array,
    rows: IndexRows,
    how: Pass,
    k: int,
    mesh: Mesh | None,
    out_axes: tuple[str, ...],
    left_out_BX: jax.Array | None = None,
) -> tuple[Best | None, Mass | None]:
    """One pass (`how`) over the rows of all devices: the k best of its how.k candidates, and the mass."""

    def on_device(
        queries_BE: jax.Array, rows: IndexRows, left_out_BX: jax.Array | None
    ) -> tuple[Best | None, Mass | None]:
        offset = lax.axis_index(how.axes) * rows.embeddings_NE.shape[0] if how.axes else 0
        best, mass = mips_one_device.scan(queries_BE, rows, offset, how, left_out_BX)
        if how.axes and mass is not None:
            mass = _total(mass, how.axes, out_axes)
        if best is None:
            return None, mass
        # Each device rescores its own candidates before they are exchanged: no other device has these rows.
        found = [*best] if how.exact else [*best, mips_one_device.rescored(queries_BE, rows, best[1], offset)]
        if how.axes:
            found = _merged(found, how, out_axes)
        if not how.exact:
            found = _best([found[2], found[1]], k)  # from the how.k candidates to k, by the scores of full queries
        return (jnp.where(found[0] > LOWEST, found[0], -jnp.inf), found[1]), mass  # LOWEST stood for NaN and -inf

    if mesh is None:
        return on_device(queries_BE, rows, left_out_BX)
    cut, whole = PartitionSpec(out_axes or None), PartitionSpec()
    specs = (whole, PartitionSpec(mesh.axis_names), whole)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=cut)(queries_BE, rows, left_out_BX)


def _best(found: list[jax.Array], k: int) -> list[jax.Array]:
    """The k best columns of each row of [B,X] arrays: highest score (the first array), then lowest id (the second)."""
    scores, *others = lax.sort([-found[0], *found[1:]], num_keys=2)
    return [x[:, :k] for x in (-scores, *others)]


def _merged(found: list[jax.Array], how: Pass, out_axes: tuple[str, ...]) -> list[jax.Array]:
    """The how.k best candidates of all devices, with their batch sharded over out_axes.

    Where the number of devices divides the batch, each device merges the candidates of its part of the batch and sends
    on the result: 2 B k entries reach a device instead of B k from every other one.
    """
    rest = tuple(axis for axis in how.axes if axis not in out_axes)
    even = found[0].shape[0] % lax.axis_size(how.axes) == 0
    # out_axes first: the gather over the rest then puts parts of the batch together that are neighbours in it.
    split = (*out_axes, *rest) if even else out_axes
    if split:
        found = [lax.all_to_all(x, split, 0, 1, tiled=True) for x in found]
        found = _best(found, how.k)
    if rest:
        found = [lax.all_gather(x, rest, axis=0 if even else 1, tiled=True, to="invarying") for x in found]
    return found if even else _best(found, how.k)


def _total(mass: Mass, axes: tuple[str, ...], out_axes: tuple[str, ...]) -> Mass:
    """The mass summed over all devices, for this device's part of the batch (sharded over out_axes)."""
    top_B = lax.pmax(mass.top_B, axes)
    # Each device's sums are relative to its own maximum: rescale them to the common one. Without any row both are -inf,
    # and their difference would be NaN.
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
