"""One training step as one pure function: loss of the stage's objective, gradients, update of parameters and index.

It is jitted, takes the memory of its arguments (donation), and never visits the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rag_jax.index import device_index, refresh
from rag_jax.index.device_index import Index
from rag_jax.rag import Params, Rag, TokenTables
from rag_jax.retrieve import Batch, embed_questions, embed_rows
from rag_jax.runs import directory as runs
from rag_jax.system import sharding
from rag_jax.training import optimizer
from rag_jax.training.stage import Fresh, LossInput, Metrics, StageConfig, StepSetting, micro


class TrainState(NamedTuple):
    """Everything that a step updates besides the index; step: int32 scalar, updates since the start of the run."""

    step: jax.Array
    params: Params
    opt_state: Any


def first_optimizer_state(rag: Rag, stage: StageConfig) -> Any:
    """Initial optimiser state of a stage, boxed with logical axis names as the parameters are."""
    tx = optimizer.make(stage.optimizer, stage.steps)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), runs.abstract_params(rag))  # only shapes matter
    return tx.init(optimizer.split(stage.optimizer, params)[0])


def first_state(rag: Rag, stage: StageConfig, mesh: jax.sharding.Mesh, params: Params, step: int) -> TrainState:
    """The state at the start of a stage: given parameters, a new optimiser state sharded as they are, and `step`."""
    opt_state = sharding.init(mesh, lambda: first_optimizer_state(rag, stage))
    return TrainState(jax.device_put(np.int32(step), sharding.replicated(mesh)), params, opt_state)


def accumulated(s: StepSetting, differentiate: Callable, trainable: Params, batch: Batch, key: jax.Array) -> Any:
    """`differentiate(trainable, batch, key)`, a value_and_grad, computed in micro-batches one after another.

    Value and gradient are those of the whole batch (but for dropout); metrics are means over micro-batches, or as in
    TOGETHER; fresh rows are concatenated.
    """
    count = s.stage.accumulate
    parts = {name: micro(x, count) for name, x in batch.items()}
    weight_C = s.stage.objective.shares(s, batch, count)

    def one(total: Params, given: tuple[Batch, jax.Array, jax.Array]) -> tuple[Params, Any]:
        part, weight, key = given
        part = {name: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)) for name, x in part.items()}
        (value, aux), gradients = differentiate(trainable, part, key)
        return jax.tree.map(lambda a, b: a + weight * b, total, gradients), (weight * value, aux)

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    gradients, (values, (metrics, fresh)) = jax.lax.scan(one, zeros, (parts, weight_C, jax.random.split(key, count)))
    if fresh is not None:
        fresh = Fresh(fresh.rows.reshape(-1), fresh.embeddings.reshape(-1, fresh.embeddings.shape[-1]))
    metrics = {name: TOGETHER.get(name, jnp.nanmean)(x) for name, x in metrics.items()}
    return (values.sum(), (metrics, fresh)), gradients


# How a metric of micro-batches becomes that of the batch; all others by the mean of those that are not NaN.
TOGETHER: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tokens": jnp.sum,
    "row_age_max": jnp.max,
}


def changes_index(s: StepSetting) -> bool:
    """Whether the step returns an updated index: with rolling refresh and with write-back."""
    return s.when.kind == "rolling" or s.stage.write_back


def make_step(s: StepSetting, steps_before: int) -> Callable[..., tuple[TrainState, Index | None, Metrics]]:
    """The step of a stage, not yet jitted: (state, batch, index, passages, key) -> (state, index or None, metrics).

    The index is returned only where the step changes it. Rolling refresh and write-back store embeddings of the
    parameters before the update. steps_before: updates of earlier stages, which the learning rate does not count.
    """
    config = s.stage.optimizer
    tx, rate = optimizer.make(config, s.stage.steps), optimizer.schedule(config, s.stage.steps)
    side = s.rag.config.passage_side
    when = s.when

    def loss(
        trainable: Params,
        frozen: Params,
        batch: Batch,
        index: Index,
        passages: TokenTables,
        key: jax.Array,
        now: jax.Array,
    ) -> Any:
        given = LossInput(batch, index, passages, key, now, side in trainable)
        value, *rest = s.stage.objective.loss(s, {**frozen, **trainable}, given)
        return value, tuple(rest)

    def step(state: TrainState, batch: Batch, index: Index, passages: TokenTables, key: jax.Array) -> Any:
        with sharding.on(s.mesh):
            return on_mesh(state, batch, index, passages, key)

    def on_mesh(state: TrainState, batch: Batch, index: Index, passages: TokenTables, key: jax.Array) -> Any:
        trainable, frozen = optimizer.split(config, state.params)
        key = jax.random.fold_in(key, state.step)  # depends on the step alone: a resumed run has the same dropout
        differentiate = jax.value_and_grad(
            lambda trainable, batch, key: loss(trainable, frozen, batch, index, passages, key, state.step), has_aux=True
        )
        if s.stage.accumulate > 1 and s.stage.objective.in_parts:
            (value, (metrics, fresh)), gradients = accumulated(s, differentiate, trainable, batch, key)
        else:
            (value, (metrics, fresh)), gradients = differentiate(trainable, batch, key)
        new_index = None
        if changes_index(s):
            new_index = index
            if when.kind == "rolling":
                new_index = refresh.roll(s.rag, s.mesh, state.params, new_index, passages, state.step, when.turn)
            if s.stage.write_back and fresh is not None:
                measure = when.kind != "rolling"  # `roll` has measured the drift in this step already
                new_index = refresh.put(new_index, fresh.rows, fresh.embeddings, state.step, measure)
        updates, opt_state = tx.update(gradients, state.opt_state, trainable)
        params = {**frozen, **optax.apply_updates(trainable, updates)}
        metrics |= {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": rate(state.step - steps_before),
        }
        return TrainState(state.step + 1, params, opt_state), new_index, metrics

    return step


def jit_step(s: StepSetting, steps_before: int, state: TrainState, index: Index | None = None) -> Any:
    """The step, jitted; it takes the memory of the old state, and of an index that it changes.

    The shardings of the new state are pinned to those of the old one: left free, the compiler may choose others after
    the first step, and a resumed run would compile another program.
    """
    places = jax.tree.map(lambda x: x.sharding, (state, index if changes_index(s) else None))
    donated = (0, 2) if changes_index(s) else 0
    return jax.jit(make_step(s, steps_before), donate_argnums=donated, out_shardings=(*places, None))


def make_drift(s: StepSetting) -> Any:
    """Jitted function (params, batch, index, passages, rows_S) -> recall@k of the index against fresh embeddings.

    It ranks only the passages at rows_S, for the questions of the batch; k is the objective's n_ranked.
    """
    k = s.stage.objective.n_ranked

    @jax.jit
    def drift(params: Params, batch: Batch, index: Index, passages: TokenTables, rows_S: jax.Array) -> jax.Array:
        live_S = jnp.ones(rows_S.shape, bool) if index.live_N is None else index.live_N[rows_S]
        q_BE, fresh_SE = embed_questions(s, params, batch, None), embed_rows(s, params, passages, rows_S, None)
        return refresh.overlap(q_BE, device_index.stored(index, rows_S), fresh_SE, live_S, min(k, len(rows_S)))

    return drift
