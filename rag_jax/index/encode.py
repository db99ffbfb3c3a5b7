"""Embeds passages range by range, from a token table that need not fit in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rag_jax.ops.masks import length_mask

Embed = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, ids_BL, mask_BL) -> d_BE
BATCH = 256


@functools.lru_cache(maxsize=8)
def _program(embed: Embed) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The jitted `embed`, cached so that embedding again with other parameters needs no compilation."""

    @jax.jit
    def block(params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        return embed(params, ids.astype(jnp.int32), length_mask(lengths, ids.shape[1])).astype(jnp.float32)

    return block


EmbedRows = Callable[[int, int, Callable[[int], None]], np.ndarray]  # (first, last, done) -> embeddings_XE


def plan(length_X: np.ndarray, batch: int, width: int) -> list[tuple[np.ndarray, int]]:
    """Batches of positions in order of length, each with the width each is padded to (the next eighth of `width`)."""
    order, step = np.argsort(length_X, kind="stable"), -(-width // 8)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [(here, min(max(-(-int(length_X[here].max()) // step), 1) * step, width)) for here in batches]


def row_embedder(
    embed: Embed, params: Any, ids_NL: Any, length_N: Any, batch: int = BATCH, devices: list[jax.Device] | None = None
) -> EmbedRows:
    """A function (first, last, done) -> float32 embeddings [last - first, E] of rows first to last - 1 of the tables.

    It calls done(n) when n more rows are embedded.

    Within a range the passages are batched in order of length, and a batch is padded to its longest one, up to the next
    eighth of the table's width: short passages cost little, and at most eight programs are compiled. A batch is sharded
    over the devices (default: all of this process), each of which has all parameters. The next batch is dispatched
    before the last one is fetched. Equal ranges give equal bytes.
    """
    devices = devices or jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    params = jax.device_put(params, everywhere)
    batch = -(-batch // mesh.size) * mesh.size
    width = ids_NL.shape[1]

    block = _program(embed)

    def dispatch(ids_XL: np.ndarray, length_X: np.ndarray, here: np.ndarray, wide: int) -> jax.Array:
        ids, lengths = np.zeros((batch, wide), ids_XL.dtype), np.zeros(batch, length_X.dtype)
        ids[: len(here)], lengths[: len(here)] = ids_XL[here, :wide], length_X[here]
        return block(params, *jax.device_put((ids, lengths), rows))

    def embed_rows(first: int, last: int, done: Callable[[int], None]) -> np.ndarray:
        ids_XL, length_X = np.asarray(ids_NL[first:last]), np.asarray(length_N[first:last])
        batches = plan(length_X, batch, width)
        waiting = dispatch(ids_XL, length_X, *batches[0])
        out_XE = np.empty((last - first, waiting.shape[1]), np.float32)
        for i, (here, _) in enumerate(batches):
            ready = waiting
            if i + 1 < len(batches):
                waiting = dispatch(ids_XL, length_X, *batches[i + 1])
            out_XE[here] = np.asarray(ready)[: len(here)]
            done(len(here))
        return out_XE

    return embed_rows
