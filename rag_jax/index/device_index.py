"""The index on the devices: how embeddings are stored, read and extended, each row with the step of its encoder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.index import shards
from rag_jax.retrieval import mips
from rag_jax.system import sharding


class Index(NamedTuple):
    """Passage embeddings on the devices, rows sharded over the whole mesh and padded to a multiple of its devices.

    embeddings_NE: float32, bfloat16 or int8.
    step_N: int32, training step of the encoder that embedded the row.
    scale_N: float32 factor of each int8 row; None for other types.
    live_N: bool, False for rows that are not valid (deleted or spare); None: all rows of the corpus are valid.
    drift_E: float32, common change of all embeddings since the last full rebuild (see index/refresh.py); a row is
      stored less the drift at the time it was embedded. None: 0.
    """

    embeddings_NE: jax.Array
    step_N: jax.Array
    scale_N: jax.Array | None = None
    live_N: jax.Array | None = None
    drift_E: jax.Array | None = None


def encoded(embeddings: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings [..., E] converted to the type of an index, and the scales [...] of int8, else None."""
    return mips.quantise(embeddings) if dtype == jnp.int8 else (embeddings.astype(dtype), None)


def extended(index: Index, first: int, new_ME: Any, step: int, rows: int, live_N: jax.Array) -> Index:
    """The index with new rows from `first` on, for an update of the corpus.

    new_ME: float32 embeddings of the new rows, computed with the encoder of `step`.
    rows: rows of the result, a multiple of the devices; if it has as many as before, nothing is compiled.
    live_N: valid rows of the result.
    """
    other = ("live_N", "drift_E")
    kept: dict[str, Any] = {name: x for name, x in index._asdict().items() if x is not None and name not in other}
    if rows != len(index.step_N):
        kept = {name: sharding.with_more_rows(x, rows) for name, x in kept.items()}
    new_ME = np.asarray(new_ME, np.float32) - (0 if index.drift_E is None else np.asarray(index.drift_E))
    new = shards.tensors(new_ME, str(index.embeddings_NE.dtype))
    kept["embeddings_NE"] = sharding.with_rows(kept["embeddings_NE"], first, new["embeddings"])
    kept["step_N"] = sharding.with_rows(kept["step_N"], first, np.full(len(new_ME), step, np.int32))
    if "scale_N" in kept:
        kept["scale_N"] = sharding.with_rows(kept["scale_N"], first, new["scale"])
    return Index(**kept, live_N=live_N, drift_E=index.drift_E)


def stored(index: Index, rows: jax.Array) -> jax.Array:
    """Embeddings of rows [...] as the index has them, with the drift added: float32 [..., E]."""
    found = mips.rows_at(index.embeddings_NE, rows, index.scale_N)
    return found if index.drift_E is None else found + index.drift_E


def blank(mesh: jax.sharding.Mesh, n: int, width: int, dtype: str = "float32", live_N: Any = None) -> Index:
    """An index of n rows of zeros, sharded over the mesh; n must be a multiple of the devices."""
    rows, table = sharding.sharding(mesh, ("rows",)), sharding.sharding(mesh, ("rows", None))
    return Index(
        jnp.zeros((n, width), jnp.dtype(dtype), device=table),
        jnp.zeros(n, jnp.int32, device=rows),
        jnp.zeros(n, jnp.float32, device=rows) if dtype == "int8" else None,
        live_N,
        no_drift(mesh, width),
    )


def no_drift(mesh: jax.sharding.Mesh, width: int) -> jax.Array:
    """The drift_E of an index that has just been rebuilt: zeros [width]."""
    return jnp.zeros(width, jnp.float32, device=sharding.replicated(mesh))
