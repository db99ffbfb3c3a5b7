"""Exact inner product search over the rows of one device, as a scan that never holds more than a chunk of scores.

A chunk is multiplied a tile at a time (on a CPU a tile of rows fits its cache; elsewhere the tile is the chunk) and
ranked at once. Only the maximum of each block of its rows is ranked, and only against the k-th best of the chunks
before: a block that does not beat that one holds none of the k best, and of the others the k largest hold them all. So
after a few chunks there is little left to rank (2 cores, k = 100: a seventh of the time of ranking the maxima alone).

In the same pass the logarithm of the sum of exponentials of all scores can be kept as a running maximum and a sum, and
the mean of the rows under their softmax beside it, as flash attention does (Dao et al. 2022, section 3.1).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 2048  # rows multiplied at once on a CPU: 6 MB of float32 rows of 768
# A valid row never scores lower than this, not even NaN or -inf. A row that must not be returned scores -inf, as does
# a place that is still empty (id -1) and stands before it: so it takes no place, not even an empty one.
LOWEST = float(np.finfo(np.float32).min)

Best = tuple[jax.Array, jax.Array]  # scores_BK, ids_BK: scores descending, equal scores by ascending id


class Rows(NamedTuple):
    """Rows of the index on one device, or all of them; see `mips.search`."""

    embeddings_NE: jax.Array
    scale_N: jax.Array | None = None
    live_N: jax.Array | None = None


class Mass(NamedTuple):
    """exp(top_B) * sum_B is the sum of exponentials so far, exp(top_B) * weighted_BE that of the rows times theirs."""

    top_B: jax.Array
    sum_B: jax.Array
    weighted_BE: jax.Array | None


@dataclass(frozen=True)
class Pass:
    """What one pass over the rows is to find: the k best (0: none) and, if wanted, the mass of all of them.

    exact: full float32 queries, not queries rounded to the type of the index. axes: of the mesh it runs in.
    """

    k: int
    n_valid: int
    chunk: int | None
    platform: str
    exact: bool
    mass: Literal["", "sum", "mean"] = ""
    recall_target: float = 1.0
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """N rows as `chunks` chunks of `tiles` tiles of `tile` rows; the last tiles reach back to be full. block divides
    tile.
    """

    chunks: int
    tiles: int
    tile: int
    block: int


def default_chunk(batch: int, k: int) -> int:
    """Rows to rank at once: many, as ranking costs by the chunk, but of 8 MB of scores, which a CPU's caches hold."""
    return max(8192, min(65536, 2**21 // max(batch, 1)), 64 * k)


def cut(n: int, k: int, chunk: int, tile: int) -> Cut:
    """Tiles of even size, so that the last has little to go over again."""
    # The maxima of chunk / block blocks are ranked, then k blocks: the sum of both is least at the root of chunk / k.
    block = 2 ** round(math.log2(max(1.0, min(128.0, math.sqrt(min(chunk, n) / max(k, 1))))))
    tile, per_chunk = min(tile, chunk, n), max(1, chunk // min(tile, chunk, n))
    for block_ in (block, 1):
        count = -(-n // tile)
        chunks = -(-count // per_chunk)
        tiles = -(-count // chunks)
        even = -(-n // (chunks * tiles))
        even += -even % block_
        if even <= n:
            break
    return Cut(chunks, tiles, even, block_)


def decoded(embeddings_XE: jax.Array) -> jax.Array:
    """float32 of stored rows, before their scale; uint16 are the bits of bfloat16."""
    if embeddings_XE.dtype == jnp.uint16:
        return lax.bitcast_convert_type(embeddings_XE.astype(jnp.uint32) << 16, jnp.float32)
    return embeddings_XE.astype(jnp.float32)


def quantise(embeddings_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as int8 with a float32 scale each: rows_NE * scale_N[:, None] is within half a scale of the embeddings.

    A row that is not finite gets the scale NaN, so that its scores count as -inf.
    """
    embeddings_NE = embeddings_NE.astype(jnp.float32)
    largest_N = jnp.abs(embeddings_NE).max(1)
    scale_N = jnp.where(jnp.isfinite(largest_N), largest_N, jnp.nan) / 127
    scaled_NE = jnp.where(scale_N[:, None] > 0, embeddings_NE / scale_N[:, None], 0)
    return jnp.clip(jnp.round(scaled_NE), -127, 127).astype(jnp.int8), scale_N


def product(queries_BE: jax.Array, embeddings_CE: jax.Array) -> jax.Array:
    """Inner products [C,B] in float32: of int8 with int8 exactly, all others accumulated in float32.

    The rows become what the queries are. Rows stand first: on a CPU that is up to 1.5 times as fast as [B,C].
    """
    integers = queries_BE.dtype == jnp.int8
    if queries_BE.dtype == jnp.float32:
        embeddings_CE = decoded(embeddings_CE)
    elif not integers and embeddings_CE.dtype == jnp.uint16:
        embeddings_CE = lax.bitcast_convert_type(embeddings_CE, jnp.bfloat16)
    products_CB = lax.dot_general(
        embeddings_CE,
        queries_BE,
        (((1,), (1,)), ((), ())),
        precision=None if integers else lax.Precision.HIGHEST,
        preferred_element_type=jnp.int32 if integers else jnp.float32,
    )
    return products_CB.astype(jnp.float32)


def rounded(queries_BE: jax.Array, embeddings_NE: jax.Array, platform: str) -> tuple[jax.Array, jax.Array | None]:
    """The queries in the type that multiplies fastest with rows of this type, and a scale of each if they have one.

    int8 with int8 everywhere. bfloat16 with bfloat16 on accelerators only: CPUs multiply in float32 faster.
    """
    if embeddings_NE.dtype == jnp.int8:
        return quantise(queries_BE)
    half = embeddings_NE.dtype in (jnp.bfloat16, jnp.uint16) and platform != "cpu"
    return queries_BE.astype(jnp.bfloat16 if half else jnp.float32), None


def scan(
    queries_BE: jax.Array, rows: Rows, offset: jax.Array | int, how: Pass, left_out_BX: jax.Array | None = None
) -> tuple[Best | None, Mass | None]:
    """The k best of these rows, the first of which has id `offset`, and the mass of all but those with ids left_out_BX.

    Missing places have score -inf and id -1; scores of -inf or NaN are LOWEST.
    """
    n, batch = rows.embeddings_NE.shape[0], queries_BE.shape[0]
    chunk = default_chunk(batch, how.k) if how.chunk is None else how.chunk
    into = cut(n, how.k, chunk, TILE if how.platform == "cpu" else chunk)
    left_BE, scale_B = queries_BE.astype(jnp.float32), None
    if not how.exact:
        left_BE, scale_B = rounded(queries_BE, rows.embeddings_NE, how.platform)

    def one_tile(mass: Mass | None, first: jax.Array) -> tuple[Mass | None, tuple[jax.Array, jax.Array] | None]:
        start = jnp.minimum(first, n - into.tile)
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, into.tile), rows)
        scores_CB = product(left_BE, part.embeddings_NE)
        scores_CB = scores_CB if scale_B is None else scores_CB * scale_B
        scores_CB = scores_CB if part.scale_N is None else scores_CB * part.scale_N[:, None]
        row_C = start + jnp.arange(into.tile, dtype=jnp.int32)
        wanted_C = (row_C >= first) & (row_C + offset < how.n_valid)
        if part.live_N is not None:
            wanted_C &= part.live_N
        if mass is not None:
            counted_CB = wanted_C[:, None] & (scores_CB > LOWEST)
            if left_out_BX is not None:
                at_BX = left_out_BX - offset - start
                at_BX = jnp.where(at_BX < 0, into.tile, at_BX)  # a negative position would count from the end
                counted_CB = counted_CB.at[at_BX, jnp.arange(batch)[:, None]].set(False, mode="drop")
            mass = _more(mass, jnp.where(counted_CB, scores_CB, -jnp.inf), part)
        if not how.k:
            return mass, None
        scores_CB = jnp.where(scores_CB > LOWEST, scores_CB, LOWEST)  # false for NaN
        scores_CB = jnp.where(wanted_C[:, None], scores_CB, -jnp.inf)
        return mass, (scores_CB, scores_CB.reshape(-1, into.block, batch).max(1))

    def one_chunk(carry: tuple[Best | None, Mass | None], i: jax.Array) -> tuple[tuple[Best | None, Mass | None], None]:
        best, mass = carry
        first_T = (i * into.tiles + jnp.arange(into.tiles, dtype=jnp.int32)) * into.tile
        mass, found = lax.scan(one_tile, mass, first_T)
        if best is not None and found is not None:
            scores_CB, maxima_RB = (x.reshape(-1, batch) for x in found)
            scores_BX, at_BX = _shortlist(scores_CB, maxima_RB, best[0][:, -1:], how, n)
            row_BX = i * (into.tiles * into.tile) + at_BX
            row_BX -= jnp.maximum(row_BX // into.tile * into.tile - (n - into.tile), 0)  # where a tile reached back
            # Ids of earlier chunks are lower, so they stand first.
            best = _top(jnp.concatenate([best[0], scores_BX], 1), jnp.concatenate([best[1], row_BX + offset], 1), how.k)
        return (best, mass), None

    nothing = _nothing(batch, queries_BE.shape[1], how)
    return lax.scan(one_chunk, nothing, jnp.arange(into.chunks, dtype=jnp.int32))[0]


def rescored(queries_BE: jax.Array, rows: Rows, ids_BK: jax.Array, offset: jax.Array | int) -> jax.Array:
    """float32 scores of rows that `scan` found: the unrounded query times the stored row. An id of -1 scores -inf."""

    def one(query_E: jax.Array, id_K: jax.Array) -> jax.Array:
        row_K = jnp.maximum(id_K - offset, 0)
        # The order of a sum must not depend on where a row stands: no matrix product here.
        scores_K = (decoded(rows.embeddings_NE[row_K]) * query_E).sum(-1)
        if rows.scale_N is not None:
            scores_K *= rows.scale_N[row_K]
        return jnp.where(id_K < 0, -jnp.inf, jnp.where(scores_K > LOWEST, scores_K, LOWEST))

    # Some queries at a time: the candidates of all of them in float32 could be larger than a chunk.
    at_once = max(1, 2**23 // max(1, ids_BK.shape[1] * queries_BE.shape[1]))
    pairs = queries_BE.astype(jnp.float32), ids_BK
    return lax.map(lambda pair: one(*pair), pairs, batch_size=min(at_once, len(ids_BK)))


def _nothing(batch: int, width: int, how: Pass) -> tuple[Best | None, Mass | None]:
    best = (jnp.full((batch, how.k), -jnp.inf), jnp.full((batch, how.k), -1, jnp.int32)) if how.k else None
    weighted_BE = jnp.zeros((batch, width)) if how.mass == "mean" else None
    mass = Mass(jnp.full(batch, -jnp.inf), jnp.zeros(batch), weighted_BE) if how.mass else None
    return lax.pcast((best, mass), how.axes, to="varying") if how.axes else (best, mass)


def _more(mass: Mass, scores_CB: jax.Array, part: Rows) -> Mass:
    top_B = jnp.maximum(mass.top_B, scores_CB.max(0))
    shift_B = jnp.where(jnp.isfinite(top_B), top_B, 0)
    weight_CB, fade_B = jnp.exp(scores_CB - shift_B), jnp.exp(mass.top_B - shift_B)
    weighted_BE = mass.weighted_BE
    if weighted_BE is not None:
        embeddings_CE = decoded(part.embeddings_NE)
        if part.scale_N is not None:
            embeddings_CE *= part.scale_N[:, None]
        # A row without weight must add nothing, also where it is not finite.
        embeddings_CE = jnp.where(jnp.isfinite(embeddings_CE), embeddings_CE, 0)
        added_BE = lax.dot_general(weight_CB, embeddings_CE, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        weighted_BE = weighted_BE * fade_B[:, None] + added_BE
    return Mass(top_B, mass.sum_B * fade_B + weight_CB.sum(0), weighted_BE)


def _shortlist(scores_CB: jax.Array, maxima_RB: jax.Array, least_B1: jax.Array, how: Pass, n: int) -> Best:
    """Scores [B,X] among which are the k best above the least so far, by ascending row, and where they stand."""
    (chunk, batch), blocks = scores_CB.shape, maxima_RB.shape[0]
    if how.recall_target < 1 and how.platform == "tpu":
        found_KB, at_KB = lax.approx_max_k(
            scores_CB, min(how.k, chunk), reduction_dimension=0, recall_target=how.recall_target,
            reduction_input_size_override=max(n, chunk),
        )  # fmt: skip
        return found_KB.T, at_KB.T
    if how.k >= blocks:
        return scores_CB.T, jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
    # The least stands k times before the maxima, so of the blocks those remain that beat it. It also makes top_k fast.
    ranked_BY = jnp.concatenate([jnp.broadcast_to(least_B1, (batch, how.k)), maxima_RB.T], 1)
    block_BK = jnp.sort(lax.top_k(ranked_BY, how.k)[1], axis=1) - how.k
    scores_RWB = scores_CB.reshape(blocks, -1, batch)
    scores_BKW = scores_RWB[jnp.maximum(block_BK, 0), :, jnp.arange(batch)[:, None]]
    scores_BKW = jnp.where(block_BK[:, :, None] >= 0, scores_BKW, -jnp.inf)
    at_BKW = block_BK[:, :, None] * scores_RWB.shape[1] + jnp.arange(scores_RWB.shape[1])
    return scores_BKW.reshape(batch, -1), at_BKW.reshape(batch, -1)


def _top(scores_BX: jax.Array, ids_BX: jax.Array, k: int) -> Best:
    """The k best; `lax.top_k` takes the first of equal ones."""
    scores_BK, at_BK = lax.top_k(scores_BX, k)
    return scores_BK, jnp.take_along_axis(ids_BX, at_BK, axis=1)
