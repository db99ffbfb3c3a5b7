"""Passages -> embeddings: the whole table on device at once (refresh while training), or a corpus into an index
snapshot.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from rag_jax.logs import Progress

Embed = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, ids_BL, mask_BL) -> d_BE


def _mask(length_B: jax.Array, width: int) -> jax.Array:
    return jnp.arange(width)[None] < length_B.astype(jnp.int32)[:, None]


def embed_table(embed: Embed, mesh: Mesh, batch: int = 64) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """A jitted function (params, ids_NL, length_N) -> embeddings_NE; each device embeds its own rows, `batch` at a
    time.

    N must divide over the devices of the mesh (`sharding.shard_rows`); rows come back where they were.
    """
    rows = PartitionSpec(mesh.axis_names)

    def on_device(params: Any, ids_NL: jax.Array, length_N: jax.Array) -> jax.Array:
        n, width = ids_NL.shape
        size = min(batch, n)
        pad = -n % size
        ids = jnp.pad(ids_NL, ((0, pad), (0, 0))).reshape(-1, size, width)
        lengths = jnp.pad(length_N, (0, pad)).reshape(-1, size)
        out = jax.lax.map(lambda x: embed(params, x[0].astype(jnp.int32), _mask(x[1], width)), (ids, lengths))
        return out.reshape(n + pad, -1)[:n]

    # the encoder's parameters are replicated for this, so varying and invariant values mix freely
    return jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows, check_vma=False)
    )


def embed_stream(
    embed: Embed, params: Any, ids_NL: np.ndarray, length_N: np.ndarray, batch: int = 256, window: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows [X], embeddings [X, E]) block by block over tables that need not fit in memory, with progress.

    Among `window` batches the passages go in order of length, and a batch is as wide as its longest one needs, up to
    the next eighth of the table's width: short passages cost little, and no more than eight programs are compiled.
    """
    n, width = ids_NL.shape
    step = -(-width // 8)

    @jax.jit
    def block(params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        return embed(params, ids.astype(jnp.int32), _mask(lengths, ids.shape[1]))

    with Progress(n, "embedding passages", "passage") as progress:
        for first in range(0, n, batch * window):
            length_W = np.asarray(length_N[first : first + batch * window])
            order = np.argsort(length_W, kind="stable")
            for start in range(0, len(order), batch):
                here = order[start : start + batch]
                wide = min(max(-(-int(length_W[here].max()) // step), 1) * step, width)
                ids = np.zeros((batch, wide), ids_NL.dtype)
                lengths = np.zeros(batch, length_N.dtype)
                ids[: len(here)], lengths[: len(here)] = ids_NL[first + here, :wide], length_W[here]
                yield first + here, np.asarray(block(params, ids, lengths))[: len(here)]
                progress.update(len(here))
