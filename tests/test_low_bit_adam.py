"""Adam with moments in fewer bits: unbiased, close, the same on every device; Adafactor against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rag_jax.errors import InputError
from rag_jax.ops import low_bit_adam
from rag_jax.system import sharding
from rag_jax.training import optimizer
from rag_jax.training.optimizer import OptimizerConfig

RATES = {"bfloat16": 2**-7, "int8": 2 ** (1 / 8) - 1}  # relative distance to the next representable number


def values(signed, shape=(4, 64), octaves=12.0):
    rng = np.random.default_rng(0)
    x = np.exp2(-rng.uniform(0, octaves, shape)).astype(np.float32)
    return x * rng.choice([-1, 1], shape).astype(np.float32) if signed else x


def rounded(x, kind, step, signed):
    rolled = low_bit_adam.dice(x.shape, jnp.asarray(step), int(signed))
    if kind == "bfloat16":
        return low_bit_adam.to_bfloat16(jnp.asarray(x), rolled).astype(jnp.float32)
    codes, scale = low_bit_adam.to_int8(jnp.asarray(x), rolled, signed)
    assert codes.dtype == (jnp.int8 if signed else jnp.uint8) and scale.shape == (*x.shape[:-1], 1)
    return (low_bit_adam.signed_level if signed else low_bit_adam.unsigned_level)(codes.astype(jnp.float32)) * scale


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", RATES)
def test_rounding_is_to_a_neighbour_and_right_on_average(kind, signed):
    x = values(signed)
    many = np.asarray(jax.vmap(lambda step: rounded(x, kind, step, signed))(jnp.arange(2000)), np.float64)
    assert (np.abs(many - x) <= np.abs(x) * RATES[kind] * 1.01).all()
    error = np.abs(many.mean(0) - x) / np.abs(x)
    assert error.max() < 5 * RATES[kind] / 2 / np.sqrt(2000)  # five standard deviations of the worst case
    assert (np.ptp(many, axis=0) > 0).mean() > 0.9  # rounding is indeed random


def test_zero_and_what_is_below_every_level():
    x = np.array([[0.0, 1.0, 1e-12, -1e-12]], np.float32)
    for step in range(50):
        found = np.asarray(rounded(x, "int8", step, True))
        assert found[0, 0] == 0 and found[0, 1] == 1 and abs(found[0, 2:]).max() < 2e-5
        assert (np.asarray(rounded(np.abs(x), "int8", step, False))[0] > 1e-10).all()  # nothing is divided by zero
    assert (np.asarray(rounded(np.zeros((2, 3), np.float32), "int8", 0, True)) == 0).all()


def train(kind, steps=400):
    """Distance from the optimum of an ill-conditioned quadratic, after training with noisy gradients."""
    rng = np.random.default_rng(1)
    scale = np.exp2(-rng.uniform(0, 8, (16, 64))).astype(np.float32)
    config = OptimizerConfig(0.02, "cosine", moments=kind, clip_norm=0.0, groups={"generator": 1.0})
    tx = optimizer.make(config, steps)

    def step(carry, noise):
        x, state = carry
        g = {"generator": {"w": scale * x["generator"]["w"] + 0.1 * scale * noise, "b": x["generator"]["b"]}}
        updates, state = tx.update(g, state, x)
        return (optax.apply_updates(x, updates), state), None

    x = {"generator": {"w": jnp.ones((16, 64)), "b": jnp.ones(3)}}
    noise = jnp.asarray(rng.normal(size=(steps, 16, 64)), jnp.float32)
    (x, state), _ = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), noise))(x)
    return float(jnp.abs(x["generator"]["w"]).mean()), state


def test_training_with_small_moments_goes_as_with_float32():
    exact, _ = train("float32")
    for kind, bytes_each in (("bfloat16", 2), ("int8", 1)):
        found, (_, state, *_) = train(kind)
        assert found < 1.25 * exact + 1e-3, kind
        assert state.mu["generator"]["w"].dtype.itemsize == state.nu["generator"]["w"].dtype.itemsize == bytes_each
        assert state.mu["generator"]["b"].dtype == jnp.float32
    assert exact < 0.05


@pytest.mark.parametrize("changes", [{"moments": "int8"}, {"moments": "bfloat16"}, {"kind": "adafactor"}], ids=str)
def test_eight_devices_keep_what_one_keeps(changes):
    """The state is sharded like its parameters, and rounding does not depend on the sharding."""
    import flax.linen as nn

    config = dataclasses.replace(OptimizerConfig(1e-2, "constant", groups={"generator": 1.0}), **changes)
    tx, rng = optimizer.make(config, 10), np.random.default_rng(3)
    gradients = rng.normal(size=(3, 128, 256)).astype(np.float32)

    def boxed():
        w = nn.LogicallyPartitioned(jnp.ones((128, 256)), ("embed", "mlp"))
        return {"generator": {"w": w, "b": nn.LogicallyPartitioned(jnp.ones(256), ("mlp",))}}

    def run(shape, devices):
        mesh = sharding.make_mesh(shape, devices)
        params, state = sharding.init(mesh, boxed), sharding.init(mesh, lambda: tx.init(boxed()))
        update = jax.jit(tx.update)
        for g in gradients:
            given = {"generator": {"w": jax.device_put(g, params["generator"]["w"].sharding), "b": g[0]}}
            updates, state = update(given, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    one, _ = run({"data": 1}, jax.devices()[:1])
    eight, state = run({"fsdp": 4, "tensor": 2}, jax.devices())
    pairs = zip(*map(jax.tree.leaves, jax.device_get((one, eight))), strict=True)
    differ = np.concatenate([(np.abs(a - b) > 1e-6).ravel() for a, b in pairs])
    assert differ.mean() < 1e-4  # the last bit of the clipped norm may change a rounding
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


def test_adafactor_is_that_of_the_paper():
    """Algorithm 4 without a relative step, in NumPy: factored for matrices of at least 128 x 128."""
    rng, rate = np.random.default_rng(4), 0.01
    config = OptimizerConfig(rate, "constant", kind="adafactor", clip_norm=0.0, groups={"generator": 1.0})
    tx = optimizer.make(config, 10)
    params = {"generator": {"w": jnp.zeros((128, 160)), "small": jnp.zeros((4, 5))}}
    state = tx.init(params)
    by_hand = {name: np.zeros(p.shape) for name, p in params["generator"].items()}
    row, column, whole = np.zeros(128), np.zeros(160), np.zeros((4, 5))
    for step in range(4):
        g = {name: rng.normal(size=p.shape) for name, p in by_hand.items()}
        decay = 1 - (step + 1.0) ** -0.8
        squared = g["w"] ** 2 + 1e-30
        row, column = decay * row + (1 - decay) * squared.mean(1), decay * column + (1 - decay) * squared.mean(0)
        whole = decay * whole + (1 - decay) * (g["small"] ** 2 + 1e-30)
        for name, second in (("w", row[:, None] * column / row.mean()), ("small", whole)):
            u = g[name] / np.sqrt(second)
            by_hand[name] -= rate * u / max(1.0, np.sqrt((u**2).mean()))
        updates, state = tx.update({"generator": jax.tree.map(jnp.float32, g)}, state, params)
        params = optax.apply_updates(params, updates)
    for name, expected in by_hand.items():
        np.testing.assert_allclose(params["generator"][name], expected, atol=1e-5)
    sizes = sum(x.size for x in jax.tree.leaves(state))
    assert sizes < 400


def test_what_does_not_go_together_is_named():
    with pytest.raises(InputError, match="moments='int8' is for kind='adamw'"):
        optimizer.check(OptimizerConfig(kind="adafactor", moments="int8"))
