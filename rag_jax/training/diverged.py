"""Ends a run that has diverged (loss, gradient or parameters not finite) before anything is saved of it.

Losses and gradient norms are checked at log lines, which come before every checkpoint and evaluation, in values that
the devices have computed by then: no step waits for the check.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.data import batching, examples, tasks
from rag_jax.data.readers import formats
from rag_jax.errors import InputError
from rag_jax.training import setup
from rag_jax.training.config import TrainConfig
from rag_jax.training.data import Data

Kept = Callable[[], int | None]
NAMED = 16  # ids of the batch that the message lists at most


def first_bad(rows: Sequence[dict[str, jax.Array]]) -> tuple[int, np.ndarray] | None:
    """The first of n consecutive steps whose loss or gradient norm is not finite; None where all are finite.

    Returns its position among them, and [n, 2]: loss and gradient norm of every step.
    """
    fetched = jax.device_get([(row["loss"], row["gradient_norm"]) for row in rows])
    values = np.asarray(fetched, np.float64).reshape(-1, 2)
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    return (int(bad[0]), values) if len(bad) else None


def check(cfg: TrainConfig, data: Data, number: int, before: int, rows: Sequence[Any], kept: Kept) -> None:
    """InputError where a step since the last check has diverged; it names step, batch and a way to continue.

    number: of the stage; before: steps of the stage before these; rows: metrics of these steps; kept: returns the step
    of the newest checkpoint, or None.
    """
    found = first_bad(rows) if cfg.stop_on_nonfinite and rows else None
    if found is None:
        return
    (position, values), stage = found, cfg.stages[number]
    into, start = before + position, sum(other.steps for other in cfg.stages[:number])
    loss, norm = values[position]
    was = f" (the step before: {values[position - 1][0]:.4g} and {values[position - 1][1]:.4g})" if position else ""
    raise InputError(
        f"step {start + into + 1}, stage {stage.name}: the loss is {loss:.4g} and the norm of the gradient {norm:.4g}"
        f"{was}; its batch: {batch_ids(cfg, data, number, into)}. {go_on(cfg, number, kept())}"
    )


def go_on(cfg: TrainConfig, number: int, kept: int | None) -> str:
    """Advice for the message: the checkpoint to resume from, and the settings that help."""
    stage = cfg.stages[number]
    where = f"The checkpoint of step {kept} is whole" if kept else "No checkpoint was written yet"
    rate = stage.optimizer.learning_rate
    return (
        f"{where}, and nothing was written after it: go on from there with a lower rate (it is {rate:g}): the same "
        f"command with --set stages.{stage.name}.optimizer.learning_rate={rate / 10:g}; or go on regardless with "
        "--set stop_on_nonfinite=False"
    )


def batch_ids(cfg: TrainConfig, data: Data, number: int, into: int) -> str:
    """Ids of the questions or passages of step `into` of a stage, whose batch is recomputed from seed and step."""
    stage = cfg.stages[number]
    batch = next(batching.iterate(setup.batches(stage, cfg, data, number), into))
    if stage.objective.asks:
        kind, ids = "questions", question_ids(cfg, data, batch["source"])
    else:
        rows = batch["source"] if "source" in batch else batch["gold"][:, 0]
        kind, ids = "passages", [data.corpus[row].id for row in rows]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"{kind} {', '.join(ids[:NAMED])}{more}"


def question_ids(cfg: TrainConfig, data: Data, numbers: np.ndarray) -> list[str]:
    """Ids of training questions by their numbers in `examples`, which does not keep ids: the files are read again."""
    each = itertools.chain.from_iterable(
        tasks.each(formats.iterate_questions(one), cfg.task, data.corpus) for one in data.weights
    )
    asked = (question for question in each if examples.wanted_answers(question, cfg.answers))
    names, wanted = {}, set(numbers.tolist())
    for position, question in enumerate(itertools.islice(asked, max(wanted) + 1)):
        if position in wanted:
            names[position] = question.id
    return [names[position] for position in numbers.tolist()]


def check_params(cfg: TrainConfig, params: Any, step: int, number: int, kept: Kept) -> None:
    """InputError where parameters are not finite after an update whose loss and gradient were; see `check`."""
    if cfg.stop_on_nonfinite and not bool(_finite()(params)):
        raise InputError(
            f"step {step}: an update has made parameters that are not finite. {go_on(cfg, number, kept())}"
        )


@functools.cache
def _finite() -> Any:
    return jax.jit(lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all())
