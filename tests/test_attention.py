"""Attention and its gradient against loops over NumPy arrays and against the gradient derived by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.ops.attention import attention, fused_attention, has_fused
from rag_jax.ops.dropout import Drop, kept


def test_attention_is_that_of_loops():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
    mask = rng.random((2, 1, 3, 5)) < 0.6
    mask[0, 0, 0] = False
    found = attention(query, [(key.swapaxes(2, 3), value)], mask)
    for b in range(2):
        for h in range(2):
            for t in range(3):
                allowed = np.flatnonzero(mask[b, 0, t])
                if not len(allowed):  # a query that may attend to nothing gets the mean
                    np.testing.assert_allclose(found[b, h, t], value[b, h].mean(0), rtol=1e-5, atol=1e-6)
                    continue
                weights = np.exp(key[b, h, allowed].astype(np.float64) @ query[b, h, t] / 2.0)
                expected = weights / weights.sum() @ value[b, h, allowed]
                np.testing.assert_allclose(found[b, h, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradient_of_attention_is_the_derived_one(rate):
    rng = np.random.default_rng(0)
    query, key, value, weight = (rng.normal(size=(2, 2, n, 4)).astype(np.float32) for n in (3, 5, 5, 3))
    mask = rng.random((2, 1, 3, 5)) < 0.6
    mask[..., 0] = True
    drop = Drop.drawn(jax.random.key(3), rate) if rate else None

    def gradients(attend):
        return jax.grad(lambda *given: (attend(*given) * weight).sum(), (0, 1, 2))(query, key, value)

    def in_two(cut, query, key, value):
        turned = key.swapaxes(2, 3)
        sources = [(turned[..., :cut], value[:, :, :cut]), (turned[..., cut:], value[:, :, cut:])]
        return attention(query, sources, mask, drop)

    def plain(query, key, value):
        scores = jnp.where(mask, jnp.einsum("bhtc,bhlc->bhtl", query, key) / 2, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        if drop:
            weights = weights * kept(drop, weights.shape) / (1 - rate)
        return jnp.einsum("bhtl,bhlc->bhtc", weights, value)

    own, two, derived = jax.jit(lambda: [gradients(f) for f in (partial(in_two, 5), partial(in_two, 2), plain)])()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), own, derived)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), two, derived)
    value_own, value_plain = (f(query, key, value) for f in (partial(in_two, 2), plain))
    np.testing.assert_allclose(value_own, value_plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("groups", "biased", "scale"), [(4, False, None), (2, True, 1.0)])
def test_the_fused_attention_is_the_same_function(groups, biased, scale):
    """Checks the axes and the mask that it is called with; cuDNN's kernel itself needs a GPU."""
    rng = np.random.default_rng(0)
    query, key, value, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 4, 6, 8), (2, groups, 8, 10), (2, groups, 10, 8), (1, 4, 6, 10))
    )
    mask = jnp.asarray(np.arange(10) < np.array([[7], [10]]))[:, None, None]
    given = mask, bias if biased else None, scale
    ours = attention(query, [(key, value)], given[0], bias_BHTL=given[1], scale=scale)
    fused = fused_attention(query, key, value, *given, "xla")
    np.testing.assert_allclose(fused, ours, rtol=1e-5, atol=1e-5)


def test_which_attention_is_fused(monkeypatch):
    def source(length, dtype=jnp.bfloat16, width=64):
        return jnp.zeros((1, 2, width, length), dtype), jnp.zeros((1, 2, length, width), dtype)

    query = jnp.zeros((1, 2, 4, 64), jnp.bfloat16)
    assert not has_fused(query, [source(8)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert has_fused(query, [source(8)])
    assert not has_fused(query, [source(7)])
    assert not has_fused(query, [source(8), source(8)])
    assert not has_fused(query[:, :, :1], [source(8)])
    assert not has_fused(query.astype(jnp.float32), [source(8, jnp.float32)])
