"""The ways to rebuild the index while training: all at once, beside training, a block in every step, or row by row.

One program embeds a block of every device's own rows. All blocks one after another are a synchronous refresh; the same
beside training is a background one; one block in every training step is a rolling one. None has a collective over rows.

Rows of different ages cannot be compared as they are: an encoder that trains moves all embeddings together, mostly
along their mean, and inner products with the newest rows become the largest (or smallest) whatever they say. So a row
that is re-embedded alone is stored less the drift up to then, the sum of the mean changes of rows re-embedded before;
what all rows share does not change the order of a search.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rag_jax.index.device_index import Index, blank, encoded, no_drift, stored
from rag_jax.ops.masks import length_mask
from rag_jax.rag import Params, Passages, Rag
from rag_jax.retrieval import mips_one_device
from rag_jax.system import sharding
from rag_jax.system.logs import Progress

CHUNK = 64  # passages of one device that are embedded at once
BLOCK = 8 * CHUNK  # rows of one device that one dispatch embeds

# (encoder, step, the old index, whose memory may be taken, or None; say nothing) -> a fresh index
Make = Callable[[Params, int, Any, bool], Any]


def drifted(index: Index, rows: jax.Array, embeddings: jax.Array) -> jax.Array:
    """drift_E now, seen on rows [...] that have just been embedded [..., E]: their mean change is the change of all."""
    change = embeddings - stored(index, rows)
    return (0 if index.drift_E is None else index.drift_E) + change.reshape(-1, change.shape[-1]).mean(0)


def put(index: Index, rows: jax.Array, embeddings: jax.Array, step: jax.Array, measure: bool = True) -> Index:
    """The index with other embeddings [X, E] at rows [X], made at `step`. A row that is named twice has to have the
    same embedding twice. measure: see `drifted`; not where other rows of this step have told.
    """
    drift_E = index.drift_E
    if drift_E is not None:
        drift_E = drifted(index, rows, embeddings) if measure else drift_E
        embeddings = embeddings - drift_E
    new, scale_X = encoded(embeddings, index.embeddings_NE.dtype)
    return index._replace(
        embeddings_NE=index.embeddings_NE.at[rows].set(new),
        step_N=index.step_N.at[rows].set(step),
        scale_N=None if scale_X is None or index.scale_N is None else index.scale_N.at[rows].set(scale_X),
        drift_E=drift_E,
    )


def rows_at_once(n: int, devices: int, turn: int) -> int:
    """How many of its rows a device has to embed in each step, so that all n are done within `turn` steps."""
    return -(-(n // devices) // min(turn, n // devices))


def embed_own(rag: Rag, mesh: jax.sharding.Mesh, params: Params, passages: Passages, rows_S: jax.Array) -> jax.Array:
    """Each device embeds its own rows at rows_S, CHUNK at a time: float32 [devices, S, E], without dropout.

    params: the part that embeds passages is enough.
    """
    devices, size = mesh.size, len(rows_S)
    chunk = min(CHUNK, size)
    place = sharding.sharding(mesh, ("rows", None, None))
    ids_DNL, length_DN = (_by_device(x, devices) for x in (passages.encoder_ids_NL, passages.encoder_length_N))

    def some(rows_C: jax.Array) -> jax.Array:
        ids = lax.with_sharding_constraint(ids_DNL[:, rows_C], place)
        ids = ids.reshape(devices * chunk, -1).astype(jnp.int32)
        mask = length_mask(length_DN[:, rows_C].reshape(-1), ids.shape[1])
        with sharding.running_on(mesh):
            fresh = lax.stop_gradient(rag.embed_passages(params, ids, mask))
        return fresh.reshape(devices, chunk, -1).astype(jnp.float32)

    chunks = -(-size // chunk)
    padded = jnp.concatenate([rows_S, jnp.broadcast_to(rows_S[-1:], (chunks * chunk - size,))])
    fresh = lax.map(some, padded.reshape(chunks, chunk))
    return jnp.moveaxis(fresh, 0, 1).reshape(devices, chunks * chunk, -1)[:, :size]


def _by_device(table: jax.Array, devices: int) -> jax.Array:
    return table.reshape(devices, len(table) // devices, *table.shape[1:])


def _own(index: Index, rows_S: jax.Array, devices: int) -> jax.Array:
    """What the index has at each device's own rows, as it stands there: float32 [devices, S, E]."""
    found = mips_one_device.decoded(_by_device(index.embeddings_NE, devices)[:, rows_S])
    return found if index.scale_N is None else found * _by_device(index.scale_N, devices)[:, rows_S][..., None]


def _put_own(index: Index, rows_S: jax.Array, fresh_DSE: jax.Array, step: Any) -> Index:
    """`fresh_DSE` as it is, at each device's own rows."""
    (devices, size, width), dtype = fresh_DSE.shape, index.embeddings_NE.dtype
    new, scale = encoded(fresh_DSE.reshape(-1, width), dtype)

    def written(table: jax.Array, values: jax.Array) -> jax.Array:
        values = values.reshape(devices, size, *table.shape[1:])
        return _by_device(table, devices).at[:, rows_S].set(values).reshape(table.shape)

    return index._replace(
        embeddings_NE=written(index.embeddings_NE, new),
        step_N=written(index.step_N, jnp.full(devices * size, step, jnp.int32)),
        scale_N=None if index.scale_N is None or scale is None else written(index.scale_N, scale),
    )


def embed_block(
    rag: Rag,
    mesh: jax.sharding.Mesh,
    params: Params,
    index: Index,
    passages: Passages,
    number: Any,
    step: Any,
    size: int,
) -> Index:
    """Block `number` of a whole rebuild: each device embeds `size` of its own rows, one after another; the last
    block reaches back to be full. `step` is written beside the rows.
    """
    local = len(index.embeddings_NE) // mesh.size
    size = min(size, local)
    rows_S = jnp.minimum(number * size, local - size) + jnp.arange(size)
    return _put_own(index, rows_S, embed_own(rag, mesh, params, passages, rows_S), step)


def roll(
    rag: Rag, mesh: jax.sharding.Mesh, params: Params, index: Index, passages: Passages, step: jax.Array, turn: int
) -> Index:
    """The block that step `step` of a rolling refresh embeds: after `turn` steps every row has been.

    Its rows lie evenly over the corpus, so that their mean change is that of the corpus (`drifted`).
    """
    devices, local = mesh.size, len(index.embeddings_NE) // mesh.size
    size = rows_at_once(len(index.embeddings_NE), devices, turn)
    blocks = -(-local // size)
    rows_S = jnp.minimum(step % blocks + blocks * jnp.arange(size), local - 1)
    fresh_DSE = embed_own(rag, mesh, params, passages, rows_S)
    drift_E = index.drift_E
    if drift_E is not None:
        change_DSE = fresh_DSE - _own(index, rows_S, devices) - drift_E
        live_DS = jnp.ones((devices, size), bool)
        if index.live_N is not None:
            live_DS = _by_device(index.live_N, devices)[:, rows_S]
        change_E = jnp.where(live_DS[..., None], change_DSE, 0).sum((0, 1)) / jnp.maximum(live_DS.sum(), 1)
        drift_E = drift_E + change_E
        fresh_DSE = fresh_DSE - drift_E
    return _put_own(index._replace(drift_E=drift_E), rows_S, fresh_DSE, step)


@functools.lru_cache(maxsize=8)
def _block_program(rag: Rag, mesh: jax.sharding.Mesh, size: int, chunk: int) -> Any:
    """(params, index, passages, number, step) -> index, jitted; kept, so that another version of the corpus with tables
    of the same size compiles nothing. chunk: CHUNK, which the program was made with.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def block(params: Params, index: Index, passages: Passages, number: Any, step: Any) -> Index:
        return embed_block(rag, mesh, params, index, passages, number, step, size)

    return block


def on_devices(
    rag: Rag, mesh: jax.sharding.Mesh, passages: Passages, dtype: str, live_N: np.ndarray | None = None
) -> Make:
    """Makes an Index of all passages on the devices, a block at a time. live_N: on the host, of as many rows as the
    tables or fewer; the index says the same, whatever an older one said.
    """
    block = _block_program(rag, mesh, BLOCK, CHUNK)
    rows = len(passages.encoder_length_N)
    local = rows // mesh.size
    blocks = -(-local // BLOCK)

    def make(encoder: Params, step: int, index: Index | None, quiet: bool) -> Index:
        index = blank(mesh, rows, rag.config.encoder.output_width, dtype) if index is None else index
        index = index._replace(live_N=None, drift_E=None)
        shown = Progress(rows, "embedding passages", "passage") if blocks >= 8 and not quiet else None
        with shown or nullcontext():
            for number in range(blocks):
                index = block(encoder, index, passages, np.int32(number), np.int32(step))
                jax.block_until_ready(index.embeddings_NE)  # one at a time: steps of training get in between
                if shown:
                    shown.update(min(BLOCK, local - number * BLOCK) * mesh.size)
        # arrays of their own: a step that is given the index may take its memory
        return index._replace(
            live_N=None if live_N is None else sharding.shard_rows(mesh, live_N, False, rows),
            drift_E=no_drift(mesh, index.embeddings_NE.shape[1]),
        )

    return make


class Refresher:
    """Rebuilds the index, while the caller waits or in a thread beside training."""

    def __init__(self, make: Make, mesh: jax.sharding.Mesh, side: str) -> None:
        self.make, self.mesh, self.side = make, mesh, side
        self._thread = ThreadPoolExecutor(1, "refresh")
        self._begun: tuple[int, Params, Future[Any]] | None = None

    def encoder(self, params: Params) -> Params:
        """The part that embeds passages, copied to every device: training may go on with its own."""
        copied = jax.tree.map(lambda x: jnp.array(x, copy=True), params[self.side])
        return {self.side: jax.device_put(copied, sharding.replicated(self.mesh))}

    def encoder_places(self, places: Params) -> Params:
        """Shapes, types and shardings of `encoder`, from those of all parameters."""
        everywhere = sharding.replicated(self.mesh)
        side = places[self.side]
        return {self.side: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), side)}

    def full(self, params: Params, step: int, old: Any = None) -> Any:
        """A fresh index; it takes the memory of the old one where one is given."""
        return self.make(self.encoder(params), step, old, False)

    def begin(self, params: Params, step: int) -> None:
        """Begin the same in a thread; `take` has the result."""
        self.resume(self.encoder(params), step)

    def resume(self, encoder: Params, step: int) -> None:
        """As `begin`, with an encoder that a checkpoint kept (`pending`)."""
        self._begun = step, encoder, self._thread.submit(self.make, encoder, step, None, True)

    @property
    def pending(self) -> tuple[int, Params] | None:
        """(step, encoder) of what was begun and not yet taken: what a checkpoint needs to begin it again."""
        return None if self._begun is None else self._begun[:2]

    def take(self) -> Any:
        """What was begun, when it is done."""
        assert self._begun is not None
        future, self._begun = self._begun[2], None
        return future.result()

    def drop(self) -> None:
        """Wait for what was begun, and forget it."""
        if self._begun is not None:
            self.take()


def sample(seed: tuple[int, ...], n: int, size: int) -> np.ndarray:
    """min(size, n) different rows of n, ascending int32: one drawn from each of equally long stretches."""
    size = min(size, n)
    edges = (np.arange(size + 1, dtype=np.int64) * n) // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).astype(np.int32)


def overlap(q_BE: jax.Array, stored_SE: jax.Array, fresh_SE: jax.Array, live_S: jax.Array, k: int) -> jax.Array:
    """Recall@k of stored against fresh embeddings of the same S passages: a scalar, 1 where the k best are the same."""

    def best(d_SE: jax.Array) -> jax.Array:
        scores = jnp.where(live_S, jnp.einsum("be,se->bs", q_BE, d_SE), -jnp.inf)
        return lax.top_k(scores.astype(jnp.float32), k)[1]

    return (best(stored_SE)[:, :, None] == best(fresh_SE)[:, None]).any(1).mean()
