"""Exact maximum inner product search over an index whose rows lie on many devices, inside any jitted program.

Each device scans its own rows a chunk at a time and keeps the k best; then the candidates [B,k] of all devices, and
nothing larger, are gathered and merged. Inside a chunk only the maximum of each block of 32 rows is ranked: the k best
rows lie in the k blocks with the largest maxima, so the others need no ranking (on CPU, k = 5, 1.5 to 2 times as fast
as ranking the whole chunk).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rag_jax.errors import InputError

BLOCK = 32
# A valid row never scores lower than this, not even NaN or -inf, and a row that must not be returned scores -inf. So
# rows past n_valid lose against every valid one, and k <= n_valid is all it takes to keep them out.
LOWEST = float(np.finfo(np.float32).min)

Best = tuple[jax.Array, jax.Array]  # scores_BK, ids_BK: scores descending, equal scores by ascending id


@functools.partial(jax.jit, static_argnames=("k", "mesh", "n_valid", "chunk"))
def search(
    queries_BE: jax.Array,
    index_NE: jax.Array,
    k: int,
    *,
    mesh: Mesh | None = None,
    n_valid: int | None = None,
    chunk: int = 8192,
) -> Best:
    """The k rows with the largest inner product: (scores_BK float32, ids_BK int32), best first, ties to the lower id.

    With a mesh the rows of the index are cut over all its axes (`sharding.shard_rows`) and the result is replicated;
    without one everything is on one device. Rows from n_valid on are padding and are never returned. A NaN score counts
    as -inf. No gradient flows. Memory beyond the arguments: [B,chunk] scores and [chunk,E] rows on each device, with a
    chunk of at least k rows.
    Raises InputError, when traced, for k outside 1..n_valid and for shapes that do not fit.
    """
    n, n_devices = index_NE.shape[0], 1 if mesh is None else mesh.size
    n_valid = n if n_valid is None else n_valid
    _check(queries_BE.shape, index_NE.shape, k, n_valid, n_devices, chunk)
    queries_BE, index_NE = lax.stop_gradient((queries_BE, index_NE))
    if mesh is None:
        scores_BK, ids_BK = _search_rows(queries_BE, index_NE, 0, k, n_valid, chunk)
    else:
        axes = mesh.axis_names

        def on_device(queries_BE: jax.Array, rows_NE: jax.Array) -> Best:
            offset = lax.axis_index(axes) * rows_NE.shape[0]
            best = _search_rows(queries_BE, rows_NE, offset, k, n_valid, chunk)
            # In the order of the devices, hence of the ids: the merge below keeps ties at the lower id.
            gathered = [lax.all_gather(x, axes, axis=1, tiled=True, to="invarying") for x in best]
            return _top(gathered[0], gathered[1], k)

        specs = PartitionSpec(), PartitionSpec(axes)
        scores_BK, ids_BK = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(
            queries_BE, index_NE
        )
    return jnp.where(scores_BK > LOWEST, scores_BK, -jnp.inf), ids_BK


def _check(queries: tuple, index: tuple, k: int, n_valid: int, n_devices: int, chunk: int) -> None:
    if len(queries) != 2 or len(index) != 2 or queries[1] != index[1]:
        raise InputError(f"queries {queries} and index {index} must be [B,E] and [N,E] with the same E")
    if not 0 <= n_valid <= index[0] < 2**31:
        raise InputError(f"n_valid = {n_valid} of {index[0]} rows; it must lie within them, and ids are 32 bits")
    if not 1 <= k <= n_valid:
        raise InputError(f"k = {k}, but the index has {n_valid} passages; ask for 1 to {n_valid}")
    if index[0] % n_devices:
        raise InputError(f"{index[0]} rows do not divide over {n_devices} devices; pad them with sharding.shard_rows")
    if chunk < 1:
        raise InputError(f"chunk = {chunk} rows; it must be at least 1")


def _search_rows(
    queries_BE: jax.Array, rows_NE: jax.Array, offset: jax.Array | int, k: int, n_valid: int, chunk: int
) -> Best:
    """The min(k, N) best of these rows, the first of which has id `offset`; rows past n_valid come out as -inf."""
    n = rows_NE.shape[0]
    k = min(k, n)
    chunk = min(max(chunk, k), n)
    even = -(-n // -(-n // chunk))  # chunks of one size, so that the last has little to go over again
    chunk = max(k, min(chunk, even + -even % BLOCK))

    def one_chunk(i: jax.Array | int) -> Best:
        first = i * chunk
        start = jnp.minimum(first, n - chunk)  # the last chunk reaches back over rows already seen, to be full
        rows_CE = lax.dynamic_slice_in_dim(rows_NE, start, chunk)
        scores_BC = jnp.einsum(
            "BE,CE->BC", queries_BE, rows_CE, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        row_C = start + jnp.arange(chunk)
        wanted_C = (row_C >= first) & (row_C + offset < n_valid)
        scores_BC = jnp.where(scores_BC > LOWEST, scores_BC, LOWEST)  # false for NaN
        scores_BX, column_BX = _shortlist(jnp.where(wanted_C, scores_BC, -jnp.inf), k)
        return scores_BX, column_BX + (start + offset)

    def step(best: Best, i: jax.Array) -> tuple[Best, None]:
        scores_BX, ids_BX = one_chunk(i)
        # Ids of earlier chunks are lower, so they stand first.
        return _top(jnp.concatenate([best[0], scores_BX], 1), jnp.concatenate([best[1], ids_BX], 1), k), None

    best = _top(*one_chunk(0), k)
    n_chunks = -(-n // chunk)
    return best if n_chunks == 1 else lax.scan(step, best, jnp.arange(1, n_chunks))[0]


def _shortlist(scores_BC: jax.Array, k: int) -> Best:
    """Columns among which are the k best of each row, in ascending order, and their scores."""
    batch, n = scores_BC.shape
    if k * BLOCK >= n:
        return scores_BC, jnp.broadcast_to(jnp.arange(n), (batch, n))
    padded = jnp.pad(scores_BC, ((0, 0), (0, -n % BLOCK)), constant_values=-jnp.inf)
    blocks_BRW = padded.reshape(batch, -1, BLOCK)
    # The k largest maxima, of equal ones the first: whatever lies outside these blocks has k better or earlier columns.
    block_BK = jnp.sort(lax.top_k(blocks_BRW.max(-1), k)[1], axis=1)
    scores_BKW = jnp.take_along_axis(blocks_BRW, block_BK[:, :, None], axis=1)
    column_BKW = block_BK[:, :, None] * BLOCK + jnp.arange(BLOCK)
    return scores_BKW.reshape(batch, -1), column_BKW.reshape(batch, -1)


def _top(scores_BX: jax.Array, ids_BX: jax.Array, k: int) -> Best:
    """The k best; `lax.top_k` takes the first of equal ones."""
    scores_BK, at_BK = lax.top_k(scores_BX, k)
    return scores_BK, jnp.take_along_axis(ids_BX, at_BK, axis=1)
