"""The index while training: rows on the devices, each with the step of its encoder; how they are stored and read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.index import shards
from rag_jax.retrieval import mips
from rag_jax.system import sharding


class Index(NamedTuple):
    """Passage embeddings, rows sharded over the mesh and padded, and for each row the step of its encoder.

    scale_N: of int8 rows, which are row * scale. live_N: False for deleted passages; None: there are none. drift_E: how
    far embeddings have moved together since all were rebuilt; each row is stored less what that was at its time.
    """

    embeddings_NE: jax.Array
    step_N: jax.Array
    scale_N: jax.Array | None = None
    live_N: jax.Array | None = None
    drift_E: jax.Array | None = None


def encoded(embeddings: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings [..., E] as an index of this type holds them, and their scales where it is int8."""
    return mips.quantise(embeddings) if dtype == jnp.int8 else (embeddings.astype(dtype), None)


def extended(index: Index, first: int, new_ME: Any, step: int, rows: int, live_N: jax.Array) -> Index:
    """The index with embeddings [M, E] float32, made at `step`, at the rows from `first` on, of other ones that are
    live. It has `rows` rows, a multiple of the devices; where that is as many as before nothing is compiled.
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
    """Embeddings of rows [...] by the index, with the drift since they were embedded: float32 [..., E]."""
    found = mips.rows_at(index.embeddings_NE, rows, index.scale_N)
    return found if index.drift_E is None else found + index.drift_E


def blank(mesh: jax.sharding.Mesh, n: int, width: int, dtype: str = "float32", live_N: Any = None) -> Index:
    """Zeros in the shape of an index of n rows (already a multiple of the devices)."""
    rows, table = sharding.sharding(mesh, ("rows",)), sharding.sharding(mesh, ("rows", None))
    return Index(
        jnp.zeros((n, width), jnp.dtype(dtype), device=table),
        jnp.zeros(n, jnp.int32, device=rows),
        jnp.zeros(n, jnp.float32, device=rows) if dtype == "int8" else None,
        live_N,
        no_drift(mesh, width),
    )


def no_drift(mesh: jax.sharding.Mesh, width: int) -> jax.Array:
    """drift_E of an index that has just been made."""
    return jnp.zeros(width, jnp.float32, device=sharding.replicated(mesh))
