"""Dropout's masks: the right share, no pattern over positions or keys; gelu against its float64 definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models.layers import Dropout, gelu
from rag_jax.ops.dropout import Drop, kept
from rag_jax.system import sharding


def mask(seed, rate=0.5, shape=(256, 4096)):
    return np.asarray(kept(Drop.drawn(jax.random.key(seed), rate), shape))


def together(a, b):
    """How far the share of positions at which two masks agree is from a half, in standard deviations."""
    return abs((a == b).mean() - 0.5) * 2 * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_share_is_the_rate_in_all_and_in_every_row_and_column(rate):
    found = mask(0, rate)
    for axis in (None, 0, 1) if rate > 0.01 else (None,):  # too few rare zeros in a row for the normal law
        share = np.atleast_1d(found.mean(axis))
        deviation = np.sqrt(rate * (1 - rate) / (found.size / share.size))
        z = (share - (1 - rate)) / deviation
        assert np.abs(z).max() < 5.5
        assert axis is None or 0.9 < z.std() < 1.1  # the variance of independent draws


def test_neighbours_and_distant_places_are_independent():
    found = mask(1).reshape(-1)
    for distance in (1, 2, 3, 4, 7, 8, 16, 64, 255, 256, 4095, 4096, 4097, 2**15, 2**19):
        assert together(found[distance:], found[:-distance]) < 5


def test_keys_are_independent():
    masks = [mask(seed) for seed in range(12)]
    splits = [np.asarray(kept(Drop.drawn(key, 0.5), (256, 4096))) for key in jax.random.split(jax.random.key(0), 4)]
    every = [*masks, *splits]
    for i, a in enumerate(every):
        for b in every[:i]:
            assert together(a, b) < 5 and together(a.reshape(-1)[1:], b.reshape(-1)[:-1]) < 5
    np.testing.assert_array_equal(mask(3), masks[3])


def test_eight_devices_draw_what_one_draws():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    cut = jax.jit(lambda key: kept(Drop.drawn(key, 0.3), (64, 128)), out_shardings=place)(jax.random.key(5))
    np.testing.assert_array_equal(cut, mask(5, 0.3, (64, 128)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_scales_what_it_keeps_and_so_does_its_gradient(dtype):
    x = jnp.full((64, 128), 2.0, dtype)
    module, rngs = Dropout(0.25), {"dropout": jax.random.key(7)}

    def total(x):
        return module.apply({}, x, False, rngs=rngs).astype(jnp.float32).sum()

    y, gradient = np.asarray(module.apply({}, x, False, rngs=rngs), np.float32), np.asarray(jax.grad(total)(x))
    assert y.dtype == np.float32 and set(np.unique(y)) == {0.0, np.float32(jnp.asarray(2 / 0.75, dtype))}
    np.testing.assert_array_equal(gradient != 0, y != 0)
    np.testing.assert_array_equal(np.asarray(module.apply({}, x)), np.asarray(x))  # in evaluation


def test_gelu_and_its_gradient():
    x = np.linspace(-12, 12, 4001)
    y, slope = jax.vmap(jax.value_and_grad(gelu))(jnp.asarray(x, jnp.float32))
    cdf = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])
    np.testing.assert_allclose(y, x * cdf, atol=1e-6)
    np.testing.assert_allclose(slope, cdf + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi), atol=1e-6)
