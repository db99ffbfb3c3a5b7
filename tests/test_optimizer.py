"""Parameter groups, schedules and weight decay, against Adam in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.errors import InputError
from rag_jax.training import optimizer
from rag_jax.training.optimizer import GROUPS, OptimizerConfig

STEPS = 8
PLAIN = OptimizerConfig(learning_rate=0.1, schedule="constant", clip_norm=0.0)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        group: {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "bias": jnp.ones(2)} for group in GROUPS
    }


def gradients(params, step):
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def train(config, params, steps=STEPS, scale=1.0):
    """Parameters after the steps, and the last state."""
    trainable, frozen = optimizer.split(config, params)
    tx = optimizer.make(config, STEPS)
    state = tx.init(trainable)
    update = jax.jit(tx.update)
    for step in range(steps):
        mine, _ = optimizer.split(config, gradients(params, step))
        updates, state = update(jax.tree.map(lambda g: scale * g, mine), state, trainable)
        trainable = jax.tree.map(lambda p, u: p + u, trainable, updates)
    return {**trainable, **frozen}, state


def adam(config, params, group, name, rates, clip=None):
    """An array's value after Adam's steps in NumPy; clip: norms of all gradients by step, or None."""
    p = np.asarray(params[group][name], np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for step, rate in enumerate(rates):
        g = np.asarray(gradients(params, step)[group][name], np.float64)
        g = g if clip is None else g * min(1.0, config.clip_norm / clip[step])
        m, v = config.b1 * m + (1 - config.b1) * g, config.b2 * v + (1 - config.b2) * g**2
        update = m / (1 - config.b1 ** (step + 1)) / (np.sqrt(v / (1 - config.b2 ** (step + 1))) + config.eps)
        if p.ndim > 1:
            update = update + config.weight_decay * p
        p = p - config.groups[group] * rate * update
    return p


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_by_hand_with_a_rate_for_each_group(params, decay):
    config = dataclasses.replace(PLAIN, weight_decay=decay, groups=dict(zip(GROUPS, (1.0, 0.5, 0.01), strict=True)))
    found, _ = train(config, params)
    for group in GROUPS:
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(found[group][name], adam(config, params, group, name, [0.1] * STEPS), atol=1e-5)


def test_decay_alone_moves_matrices_and_nothing_else(params):
    config = dataclasses.replace(PLAIN, weight_decay=0.5)
    found, _ = train(config, params, steps=1, scale=0.0)
    for group in GROUPS:
        np.testing.assert_allclose(found[group]["kernel"], params[group]["kernel"] * (1 - 0.1 * 0.5), rtol=1e-6)
        np.testing.assert_array_equal(found[group]["bias"], params[group]["bias"])


@pytest.mark.parametrize("groups", [{"generator": 1.0}, {"generator": 1.0, "question_encoder": 0.0}])
def test_frozen_groups_do_not_move_and_have_no_state(params, groups):
    config = dataclasses.replace(PLAIN, weight_decay=0.5, groups=groups)
    found, state = train(config, params)
    for group in ("question_encoder", "context_encoder"):
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, found[group], params[group])))
    assert np.abs(found["generator"]["kernel"] - params["generator"]["kernel"]).max() > 0.1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert not [path for path in paths if "encoder" in path]
    assert len([path for path in paths if "generator" in path]) == 4  # two moments of two arrays


def test_clipping_is_of_all_trained_gradients_together(params):
    config = dataclasses.replace(PLAIN, clip_norm=0.5, groups={"question_encoder": 1.0, "generator": 1.0})
    found, _ = train(config, params)

    def norm(step):
        trained, _ = optimizer.split(config, gradients(params, step))
        return np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(trained)))

    norms = [norm(step) for step in range(STEPS)]
    assert min(norms) > 0.5
    expected = adam(config, params, "generator", "kernel", [0.1] * STEPS, norms)
    np.testing.assert_allclose(found["generator"]["kernel"], expected, atol=1e-5)
    assert np.abs(expected - adam(config, params, "generator", "kernel", [0.1] * STEPS)).max() > 1e-3


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules(name, warmup, final):
    config = OptimizerConfig(learning_rate=2.0, schedule=name, warmup_steps=warmup, final=final)
    rate = optimizer.schedule(config, 12)
    assert [float(rate(step)) for step in range(warmup)] == [0.0, 0.5, 1.0, 1.5][:warmup]
    assert float(rate(warmup)) == 2.0
    last = 2.0 if name == "constant" else 2.0 * final
    middle = warmup + (12 - warmup) // 2
    np.testing.assert_allclose([rate(12), rate(20), rate(middle)], [last, last, (2.0 + last) / 2], atol=1e-6)
    falling = [float(rate(step)) for step in range(warmup, 13)]
    assert falling == sorted(falling, reverse=True)


def test_the_schedule_is_what_the_update_uses(params):
    config = dataclasses.replace(PLAIN, schedule="linear", warmup_steps=2)
    rates = [float(optimizer.schedule(config, STEPS)(step)) for step in range(STEPS)]
    assert len(set(rates)) == STEPS - 1 and rates[0] == 0.0
    found, _ = train(config, params)
    expected = adam(config, params, "generator", "kernel", rates)
    np.testing.assert_allclose(found["generator"]["kernel"], expected, atol=1e-5)


def test_a_tied_model_has_no_context_encoder(params):
    del params["context_encoder"]
    found, _ = train(PLAIN, params, steps=1)
    assert set(found) == {"question_encoder", "generator"}


def test_what_cannot_be():
    with pytest.raises(InputError, match="warmup_steps=8 must be fewer than the stage's steps=8"):
        optimizer.schedule(OptimizerConfig(warmup_steps=8), 8)
    with pytest.raises(InputError, match=r"unknown parameter groups \['reader'\]; known: question_encoder"):
        optimizer.split(OptimizerConfig(groups={"reader": 1.0}), {})
