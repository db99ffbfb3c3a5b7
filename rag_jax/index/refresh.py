"""The ways to refresh the index while training: all at once, beside training, a block in every step, or single rows.

One program embeds a block of every device's own rows. All blocks one after another are a synchronous refresh; the same
in a thread beside training is a background refresh; one block in every training step is a rolling refresh. None of them
needs a collective over rows.

Rows of different ages cannot be compared directly: training moves all embeddings together, mostly along their mean, so
that inner products with the newest rows become the largest (or smallest) of all, whatever their passages say. So a row
that is re-embedded by itself is stored less the drift so far, drift_E, which is the sum of the mean changes of the rows
re-embedded until then. What is common to all rows does not change the order of a search.
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
from rag_jax.rag import Params, Rag, TokenTables
from rag_jax.retrieval import mips_one_device
from rag_jax.system import sharding
from rag_jax.system.logs import Progress

CHUNK = 64  # passages that a device embeds at once
BLOCK = 8 * CHUNK  # rows that a device embeds in one dispatch

# (encoder, step, old index whose memory may be taken, or None, quiet: without a progress line) -> a fresh index
Make = Callable[[Params, int, Any, bool], Any]


def drifted(index: Index, rows: jax.Array, embeddings: jax.Array) -> jax.Array:
    """The new drift_E [E], estimated from rows [...] with fresh embeddings [..., E]: all are taken to change alike."""
    change = embeddings - stored(index, rows)
    return (0 if index.drift_E is None else index.drift_E) + change.reshape(-1, change.shape[-1]).mean(0)


def put(index: Index, rows: jax.Array, embeddings: jax.Array, step: jax.Array, measure: bool = True) -> Index:
    """The index with fresh embeddings [X, E] at rows [X], made at `step`.

    A row that occurs twice must have the same embedding twice, as the order of writes is undefined.
    measure: update the drift from these rows (`drifted`); False if other rows of this step have done so.
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
    """Rows that each device has to embed per step so that all n rows are embedded within `turn` steps."""
    return -(-(n // devices) // min(turn, n // devices))


def embed_own(rag: Rag, mesh: jax.sharding.Mesh, params: Params, passages: TokenTables, rows_S: jax.Array) -> jax.Array:
    """Embeddings of each device's own rows at rows_S, float32 [devices, S, E], without dropout and gradient.

    Each device embeds CHUNK passages at a time. params: those of the encoder that embeds passages are enough.
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
    """Stored embeddings of each device's own rows at rows_S, without the drift: float32 [devices, S, E]."""
    found = mips_one_device.decoded(_by_device(index.embeddings_NE, devices)[:, rows_S])
    return found if index.scale_N is None else found * _by_device(index.scale_N, devices)[:, rows_S][..., None]


def _put_own(index: Index, rows_S: jax.Array, fresh_DSE: jax.Array, step: Any) -> Index:
    """The index with fresh_DSE, encoded in its type but otherwise unchanged, at each device's own rows rows_S."""
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
    passages: TokenTables,
    number: Any,
    step: Any,
    size: int,
) -> Index:
    """Block `number` of a full rebuild: each device embeds `size` consecutive rows of its own, made at `step`.

    The last block overlaps the one before, so that all blocks have the same shape.
    """
    local = len(index.embeddings_NE) // mesh.size
    size = min(size, local)
    rows_S = jnp.minimum(number * size, local - size) + jnp.arange(size)
    return _put_own(index, rows_S, embed_own(rag, mesh, params, passages, rows_S), step)


def roll(
    rag: Rag, mesh: jax.sharding.Mesh, params: Params, index: Index, passages: TokenTables, step: jax.Array, turn: int
) -> Index:
    """One step of a rolling refresh: re-embeds a block of rows so that every row is embedded within `turn` steps.

    The rows of a block are spread evenly over the corpus, so that their mean change is an estimate of that of all rows
    (`drifted`); deleted rows do not count in it.
    """
    devices, local = mesh.size, len(index.embeddings_NE) // mesh.size
    size = rows_at_once(len(index.embeddings_NE), devices, turn)
    blocks = -(-local // size)
    # clamped to the last row, which may then occur twice, with the same embedding twice
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
    """Jitted `embed_block`: (params, index, passages, number, step) -> index, which takes the memory of the old index.

    It is cached, so that another version of the corpus with tables of the same size needs no compilation. chunk: CHUNK,
    a part of the key of the cache because the program depends on it.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def block(params: Params, index: Index, passages: TokenTables, number: Any, step: Any) -> Index:
        return embed_block(rag, mesh, params, index, passages, number, step, size)

    return block


def on_devices(
    rag: Rag, mesh: jax.sharding.Mesh, passages: TokenTables, dtype: str, live_N: np.ndarray | None = None
) -> Make:
    """A function that builds the Index of all passages on the devices, block by block.

    live_N: bool on the host, False for deleted rows, of the rows of the tables or fewer; None: no row is deleted. The
    new index has these, not those of the old one.
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
                # one block in the queue of the devices at a time, so that training steps can run between two blocks
                jax.block_until_ready(index.embeddings_NE)
                if shown:
                    shown.update(min(BLOCK, local - number * BLOCK) * mesh.size)
        # new arrays for each index: a training step may take their memory
        return index._replace(
            live_N=None if live_N is None else sharding.shard_rows(mesh, live_N, False, rows),
            drift_E=no_drift(mesh, index.embeddings_NE.shape[1]),
        )

    return make


class Refresher:
    """Rebuilds the index, while the caller waits or in a thread beside training.

    make: builds an index from an encoder. side: group of the parameters that embeds passages.
    """

    def __init__(self, make: Make, mesh: jax.sharding.Mesh, side: str) -> None:
        self.make, self.mesh, self.side = make, mesh, side
        self._thread = ThreadPoolExecutor(1, "refresh")
        self._begun: tuple[int, Params, Future[Any]] | None = None

    def encoder(self, params: Params) -> Params:
        """A copy of the parameters that embed passages, on every device, which training does not change or donate."""
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
        """Begins to build a fresh index in a thread; `take` returns it."""
        self.resume(self.encoder(params), step)

    def resume(self, encoder: Params, step: int) -> None:
        """Begins a build with a given encoder, such as that of a checkpoint (`pending`)."""
        self._begun = step, encoder, self._thread.submit(self.make, encoder, step, None, True)

    @property
    def pending(self) -> tuple[int, Params] | None:
        """(step, encoder) of a build that was begun and not yet taken, with which a checkpoint can begin it again."""
        return None if self._begun is None else self._begun[:2]

    def take(self) -> Any:
        """Waits for the build that was begun, and returns its index."""
        assert self._begun is not None
        future, self._begun = self._begun[2], None
        return future.result()

    def drop(self) -> None:
        """Waits for the build that was begun, if any, and discards its index."""
        if self._begun is not None:
            self.take()


def sample(seed: tuple[int, ...], n: int, size: int) -> np.ndarray:
    """min(size, n) different rows below n, ascending int32: a random one of each of equally long ranges."""
    size = min(size, n)
    edges = (np.arange(size + 1, dtype=np.int64) * n) // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).astype(np.int32)


def overlap(q_BE: jax.Array, stored_SE: jax.Array, fresh_SE: jax.Array, live_S: jax.Array, k: int) -> jax.Array:
    """Recall@k of stored against fresh embeddings of the same S passages: scalar share of the k best in common, 0 to 1.

    live_S: bool, False for deleted passages, which are never among the k best.
    """

    def best(d_SE: jax.Array) -> jax.Array:
        scores = jnp.where(live_S, jnp.einsum("be,se->bs", q_BE, d_SE), -jnp.inf)
        return lax.top_k(scores.astype(jnp.float32), k)[1]

    return (best(stored_SE)[:, :, None] == best(fresh_SE)[:, None]).any(1).mean()
