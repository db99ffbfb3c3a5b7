"""Exact inner product search over the rows of one device, as a scan that never holds more than a chunk of scores.

Rows come in chunks, chunks in tiles, tiles in blocks. A tile is what is multiplied at once: on a CPU as many rows as
fit its cache, elsewhere the whole chunk. A chunk is what is ranked at once: ranking costs by the chunk, so chunks are
large. A block is what is ranked by its maximum alone, against the k-th best score of the chunks before: a block whose
maximum does not beat that score holds none of the k best, and of the others the k with the largest maxima hold them
all. So after a few chunks there is little left to rank (2 cores, k = 100: a seventh of the time of ranking the maxima
alone).

The same pass can keep the logarithm of the sum of exponentials of all scores, as a running maximum and a sum relative
to it, and beside it the mean of the rows under their softmax, as flash attention does (Dao et al. 2022, section 3.1).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 2048  # rows multiplied at once on a CPU: 6 MB of float32 rows of 768
# The lowest score of a valid row within a scan; NaN and -inf are raised to it. A row that must not be returned scores
# -inf, and so does a position of the result that is still empty (id -1). Of equal scores the first wins, and the empty
# positions come first, so such a row is never taken, while a valid row always beats an empty position.
LOWEST = float(np.finfo(np.float32).min)

Best = tuple[jax.Array, jax.Array]  # scores_BK, ids_BK: scores descending, equal scores by ascending id


class IndexRows(NamedTuple):
    """Rows of the index on one device, or of the whole index; fields as in `mips.search`."""

    embeddings_NE: jax.Array
    scale_N: jax.Array | None = None
    live_N: jax.Array | None = None


class Mass(NamedTuple):
    """Running sums of exponentials of the scores, relative to the largest score so far so that none overflows.

    top_B: the largest score so far; -inf before the first row.
    sum_B: sum of exp(score - top_B) over the rows so far.
    weighted_BE: sum of exp(score - top_B) * row over the rows so far; None where only the sum is asked for.
    """

    top_B: jax.Array
    sum_B: jax.Array
    weighted_BE: jax.Array | None


@dataclass(frozen=True)
class Pass:
    """Settings of one pass over the rows: which results it computes, and how.

    k: best rows to find; 0: none.
    n_valid: rows with this id or a higher one are padding.
    chunk: rows to rank at once; None: `default_chunk`.
    platform: "cpu", "gpu" or "tpu".
    exact: score with float32 queries, not with queries rounded to the type of the index.
    mass: "sum": the sum of exponentials of all scores; "mean": also the sum of the rows weighted by them.
    recall_target: see `mips.search`.
    axes: all axes of the mesh whose shard_map the pass runs in; () without a mesh.
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
    """Numbers by which N rows are split: `chunks` chunks of `tiles` tiles of `tile` rows, in blocks of `block` rows.

    Together they cover at least N rows. A tile that would pass the end starts earlier, so that it is full.
    """

    chunks: int
    tiles: int
    tile: int
    block: int


def default_chunk(batch: int, k: int) -> int:
    """Rows to rank at once: many, as ranking costs by the chunk, but some 8 MB of scores, which a CPU's caches hold."""
    return max(8192, min(65536, 2**21 // max(batch, 1)), 64 * k)


def cut(n: int, k: int, chunk: int, tile: int) -> Cut:
    """Splits n rows into chunks and tiles of even size, so that few rows are read twice at the end."""
    # chunk / block maxima are ranked, then k * block scores: the sum of both is least at block = sqrt(chunk / k).
    block = 2 ** round(math.log2(max(1.0, min(128.0, math.sqrt(min(chunk, n) / max(k, 1))))))
    tile, per_chunk = min(tile, chunk, n), max(1, chunk // min(tile, chunk, n))
    for block_ in (block, 1):  # 1 where tiles rounded up to whole blocks would be larger than n
        count = -(-n // tile)
        chunks = -(-count // per_chunk)
        tiles = -(-count // chunks)
        even = -(-n // (chunks * tiles))
        even += -even % block_
        if even <= n:
            break
    return Cut(chunks, tiles, even, block_)


def decoded(embeddings_XE: jax.Array) -> jax.Array:
    """Stored rows as float32, without their scale; uint16 are the bits of bfloat16."""
    if embeddings_XE.dtype == jnp.uint16:
        return lax.bitcast_convert_type(embeddings_XE.astype(jnp.uint32) << 16, jnp.float32)
    return embeddings_XE.astype(jnp.float32)


def quantise(embeddings_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 rows_NE and float32 scale_N: rows_NE * scale_N[:, None] is within half a scale of the embeddings.

    A row that is not finite gets the scale NaN, so that its scores count as -inf.
    """
    embeddings_NE = embeddings_NE.astype(jnp.float32)
    largest_N = jnp.abs(embeddings_NE).max(1)
    scale_N = jnp.where(jnp.isfinite(largest_N), largest_N, jnp.nan) / 127
    scaled_NE = jnp.where(scale_N[:, None] > 0, embeddings_NE / scale_N[:, None], 0)
    return jnp.clip(jnp.round(scaled_NE), -127, 127).astype(jnp.int8), scale_N


def product(queries_BE: jax.Array, embeddings_CE: jax.Array) -> jax.Array:
    """Inner products, float32 [C,B]: int8 with int8 sums exactly, in int32; all others accumulate in float32.

    The rows are converted to the type of the queries. Rows come first: on a CPU up to 1.5 times as fast as [B,C].
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
    """The queries in the type that multiplies fastest with these rows, and their scale_B where that is int8.

    int8 with int8 everywhere. bfloat16 with bfloat16 on accelerators only: CPUs multiply in float32 faster.
    """
    if embeddings_NE.dtype == jnp.int8:
        return quantise(queries_BE)
    half = embeddings_NE.dtype in (jnp.bfloat16, jnp.uint16) and platform != "cpu"
    return queries_BE.astype(jnp.bfloat16 if half else jnp.float32), None


def scan(
    queries_BE: jax.Array, rows: IndexRows, offset: jax.Array | int, how: Pass, left_out_BX: jax.Array | None = None
) -> tuple[Best | None, Mass | None]:
    """The how.k best of these rows, and the mass of all valid rows but those with ids left_out_BX.

    offset: id of the first of these rows.
    Positions without a row have score -inf and id -1. Scores of NaN and -inf are LOWEST in the best rows, and count
    nothing in the mass.
    """
    n, batch = rows.embeddings_NE.shape[0], queries_BE.shape[0]
    chunk = default_chunk(batch, how.k) if how.chunk is None else how.chunk
    into = cut(n, how.k, chunk, TILE if how.platform == "cpu" else chunk)
    typed_BE, scale_B = queries_BE.astype(jnp.float32), None
    if not how.exact:
        typed_BE, scale_B = rounded(queries_BE, rows.embeddings_NE, how.platform)

    def one_tile(mass: Mass | None, first: jax.Array) -> tuple[Mass | None, tuple[jax.Array, jax.Array] | None]:
        # The tile of rows from `first` on. The last ones start earlier to be full (slices have one size), and their
        # rows before `first`, which the tile before had, do not count.
        start = jnp.minimum(first, n - into.tile)
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, into.tile), rows)
        scores_CB = product(typed_BE, part.embeddings_NE)
        scores_CB = scores_CB if scale_B is None else scores_CB * scale_B
        scores_CB = scores_CB if part.scale_N is None else scores_CB * part.scale_N[:, None]
        row_C = start + jnp.arange(into.tile, dtype=jnp.int32)
        valid_C = (row_C >= first) & (row_C + offset < how.n_valid)
        if part.live_N is not None:
            valid_C &= part.live_N
        if mass is not None:
            counted_CB = valid_C[:, None] & (scores_CB > LOWEST)
            if left_out_BX is not None:
                at_BX = left_out_BX - offset - start
                at_BX = jnp.where(at_BX < 0, into.tile, at_BX)  # a negative position would count from the end
                counted_CB = counted_CB.at[at_BX, jnp.arange(batch)[:, None]].set(False, mode="drop")
            mass = _more(mass, jnp.where(counted_CB, scores_CB, -jnp.inf), part)
        if not how.k:
            return mass, None
        scores_CB = jnp.where(scores_CB > LOWEST, scores_CB, LOWEST)  # false for NaN
        scores_CB = jnp.where(valid_C[:, None], scores_CB, -jnp.inf)
        return mass, (scores_CB, scores_CB.reshape(-1, into.block, batch).max(1))

    def one_chunk(carry: tuple[Best | None, Mass | None], i: jax.Array) -> tuple[tuple[Best | None, Mass | None], None]:
        best, mass = carry
        first_T = (i * into.tiles + jnp.arange(into.tiles, dtype=jnp.int32)) * into.tile
        mass, found = lax.scan(one_tile, mass, first_T)
        if best is not None and found is not None:
            scores_CB, maxima_RB = (x.reshape(-1, batch) for x in found)
            scores_BX, at_BX = _shortlist(scores_CB, maxima_RB, best[0][:, -1:], how, n)
            row_BX = i * (into.tiles * into.tile) + at_BX
            row_BX -= jnp.maximum(row_BX // into.tile * into.tile - (n - into.tile), 0)  # where a tile started earlier
            # Ids of earlier chunks are lower, and top_k takes the first of equal scores: so ties go to the lower id.
            best = _top(jnp.concatenate([best[0], scores_BX], 1), jnp.concatenate([best[1], row_BX + offset], 1), how.k)
        return (best, mass), None

    nothing = _nothing(batch, queries_BE.shape[1], how)
    return lax.scan(one_chunk, nothing, jnp.arange(into.chunks, dtype=jnp.int32))[0]


def rescored(queries_BE: jax.Array, rows: IndexRows, ids_BK: jax.Array, offset: jax.Array | int) -> jax.Array:
    """Scores, float32 [B,K], of rows that `scan` found: unrounded query times stored row. An id of -1 scores -inf."""

    def one(query_E: jax.Array, id_K: jax.Array) -> jax.Array:
        row_K = jnp.maximum(id_K - offset, 0)
        # The order of a sum must not depend on the position of a row, so that equal rows tie: no matmul here.
        scores_K = (decoded(rows.embeddings_NE[row_K]) * query_E).sum(-1)
        if rows.scale_N is not None:
            scores_K *= rows.scale_N[row_K]
        return jnp.where(id_K < 0, -jnp.inf, jnp.where(scores_K > LOWEST, scores_K, LOWEST))

    # Some queries at a time (32 MB of gathered rows): those of all queries in float32 could be larger than a chunk.
    at_once = max(1, 2**23 // max(1, ids_BK.shape[1] * queries_BE.shape[1]))
    pairs = queries_BE.astype(jnp.float32), ids_BK
    return lax.map(lambda pair: one(*pair), pairs, batch_size=min(at_once, len(ids_BK)))


def _nothing(batch: int, width: int, how: Pass) -> tuple[Best | None, Mass | None]:
    """The best rows and the mass of no rows at all, where a scan starts."""
    best = (jnp.full((batch, how.k), -jnp.inf), jnp.full((batch, how.k), -1, jnp.int32)) if how.k else None
    weighted_BE = jnp.zeros((batch, width)) if how.mass == "mean" else None
    mass = Mass(jnp.full(batch, -jnp.inf), jnp.zeros(batch), weighted_BE) if how.mass else None
    # Within shard_map a carry must vary over the mesh from the start, as it does once it holds rows of a device.
    return lax.pcast((best, mass), how.axes, to="varying") if how.axes else (best, mass)


def _more(mass: Mass, scores_CB: jax.Array, part: IndexRows) -> Mass:
    """The mass with these rows added; a score of -inf adds nothing."""
    top_B = jnp.maximum(mass.top_B, scores_CB.max(0))
    shift_B = jnp.where(jnp.isfinite(top_B), top_B, 0)  # no row yet: -inf - -inf would be NaN
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
    """Scores [B,X] among which are all of the how.k best of a chunk that beat least_B1, and their positions in it.

    scores_CB: the scores of the chunk. maxima_RB: the maximum of each of its blocks. least_B1: the k-th best score of
    the chunks before. n: rows on the device. Positions ascend, except those of `lax.approx_max_k`.
    """
    (chunk, batch), blocks = scores_CB.shape, maxima_RB.shape[0]
    if how.recall_target < 1 and how.platform == "tpu":
        found_KB, at_KB = lax.approx_max_k(
            scores_CB, min(how.k, chunk), reduction_dimension=0, recall_target=how.recall_target,
            reduction_input_size_override=max(n, chunk),
        )  # fmt: skip
        return found_KB.T, at_KB.T
    if how.k >= blocks:  # the k best may lie in as many blocks: rank all scores
        return scores_CB.T, jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), (batch, chunk))
    # k copies of the k-th best so far precede the maxima: top_k prefers them to every block that does not beat them.
    # That also makes top_k fast. Sorted by block, so that ties go to the lower id; the copies become negative numbers.
    ranked_BY = jnp.concatenate([jnp.broadcast_to(least_B1, (batch, how.k)), maxima_RB.T], 1)
    block_BK = jnp.sort(lax.top_k(ranked_BY, how.k)[1], axis=1) - how.k
    scores_RWB = scores_CB.reshape(blocks, -1, batch)
    scores_BKW = scores_RWB[jnp.maximum(block_BK, 0), :, jnp.arange(batch)[:, None]]
    scores_BKW = jnp.where(block_BK[:, :, None] >= 0, scores_BKW, -jnp.inf)
    at_BKW = block_BK[:, :, None] * scores_RWB.shape[1] + jnp.arange(scores_RWB.shape[1])
    return scores_BKW.reshape(batch, -1), at_BKW.reshape(batch, -1)


def _top(scores_BX: jax.Array, ids_BX: jax.Array, k: int) -> Best:
    """The k best scores and their ids; of equal scores the first ones, as `lax.top_k` has it."""
    scores_BK, at_BK = lax.top_k(scores_BX, k)
    return scores_BK, jnp.take_along_axis(ids_BX, at_BK, axis=1)
