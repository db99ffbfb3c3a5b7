"""p(z|x) over a whole corpus that mostly an older encoder embedded, while retrieved passages are embedded now."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import log_softmax, logsumexp

from rag_jax.index import device_index
from rag_jax.retrieval import mips
from rag_jax.training import retrieve_fresh

N, E, K, B = 60, 6, 4, 3


def corpus(seed: int, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Questions [B, E] and stored embeddings [N, E]."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for shape in ((B, E), (N, E)))


def found(q_BE: jax.Array, stored_NE: jax.Array, now_NE: jax.Array, own: bool = False) -> tuple[jax.Array, jax.Array]:
    """(log p(z|x) [B, K], rows) as in a step: the retrieved with fresh embeddings, the rest with stored ones."""
    _, rows_BK, log_rest_B = mips.search_with_normaliser(q_BE, stored_NE, K)
    fresh_BK, stored_BK = (jnp.einsum("be,bke->bk", q_BE, x[rows_BK]) for x in (now_NE, stored_NE))
    moved_B = None if own else q_BE @ retrieve_fresh.mean_change(now_NE[rows_BK], stored_NE[rows_BK])
    return fresh_BK - retrieve_fresh.fresh_normaliser(log_rest_B, stored_BK, fresh_BK, moved_B)[:, None], rows_BK


def embedded_whole(q_BE: jax.Array, now_NE: jax.Array, rows_BK: jax.Array) -> jax.Array:
    """log p(z|x) [B, K] with fresh embeddings of the whole corpus."""
    return jnp.take_along_axis(log_softmax(q_BE @ now_NE.T, -1), rows_BK, 1)


def test_a_fresh_index_is_exact() -> None:
    q_BE, x_NE = corpus(0)
    logp_BK, rows_BK = found(q_BE, x_NE, x_NE)
    np.testing.assert_allclose(logp_BK, embedded_whole(q_BE, x_NE, rows_BK), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("own", "stale", "size"), [(False, 0.0, 0.0), (False, 0.3, -30.0), (True, 0.3, 5.0)])
def test_a_shift_of_all_embeddings_changes_nothing(own: bool, stale: float, size: float) -> None:
    """Neither p(z|x) nor the gradient in the shift, which is 0 at every shift; also if rows had moved before."""
    q_BE, x_NE = corpus(1)
    now_NE = x_NE + stale * corpus(2)[1]
    shift_E = size * q_BE[0] / (q_BE[0] @ q_BE[0])

    def logp(shift_E: jax.Array) -> jax.Array:
        return found(q_BE, x_NE, now_NE + shift_E, own)[0]

    np.testing.assert_allclose(logp(shift_E), logp(jnp.zeros(E)), rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(jax.jacrev(logp)(shift_E), 0, atol=1e-5)
    still = jax.jacrev(lambda c: found(q_BE, x_NE, now_NE.at[found(q_BE, x_NE, now_NE)[1]].add(c))[0])(jnp.zeros(E))
    np.testing.assert_allclose(still, 0, atol=1e-5)  # likewise among the retrieved alone


@settings(max_examples=15)
@given(st.integers(0, 2**30), st.floats(0.1, 4), st.floats(0, 2), st.floats(-5, 5))
def test_the_error_is_at_most_what_the_rest_moved_more(seed: int, scale: float, stale: float, shift: float) -> None:
    q_BE, x_NE = corpus(seed, scale)
    now_NE = x_NE + stale * corpus(seed + 1)[1] + shift
    logp_BK, rows_BK = found(q_BE, x_NE, now_NE)
    moved_E = retrieve_fresh.mean_change(now_NE[rows_BK], x_NE[rows_BK])
    others_BN = np.ones((B, N), bool)
    np.put_along_axis(others_BN, np.asarray(rows_BK), False, 1)
    otherwise_BN = np.abs(np.asarray(q_BE @ (now_NE - x_NE - moved_E).T, np.float64))
    bound_B = np.where(others_BN, otherwise_BN, 0).max(1)
    error_BK = np.abs(logp_BK - embedded_whole(q_BE, now_NE, rows_BK))
    assert (error_BK.max(1) <= bound_B * (1 + 1e-5) + 1e-4).all()


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 4.0), ("bfloat16", 1.0), ("int8", 1.0)])
def test_a_rest_that_stays_by_autodiff_of_all_scores(dtype: str, scale: float) -> None:
    """Values and gradients with moved_B = 0, small types, deleted rows and a drift of the index."""
    rng = np.random.default_rng(0)
    q_BE, x_NE = corpus(3, scale)
    live_N, drift_E = jnp.asarray(rng.random(N) < 0.6), jnp.asarray(rng.normal(size=E), jnp.float32)
    rows, scale_N = device_index.encoded(x_NE, jnp.dtype(dtype))
    index = device_index.Index(rows, jnp.zeros(N, jnp.int32), scale_N, live_N, drift_E)
    rows_BK = mips.search_with_normaliser(q_BE, rows, K, scale_N=scale_N, live_N=live_N)[1]
    now_BKE = device_index.stored(index, rows_BK) + 0.3 * jnp.asarray(rng.normal(size=(B, K, E)), jnp.float32)

    def ours(q_BE: jax.Array, now_BKE: jax.Array) -> jax.Array:
        log_rest_B = mips.search_with_normaliser(q_BE, rows, K, scale_N=scale_N, live_N=live_N)[2] + q_BE @ drift_E
        fresh_BK = jnp.einsum("be,bke->bk", q_BE, now_BKE)
        stored_BK = jnp.einsum("be,bke->bk", q_BE, device_index.stored(index, rows_BK))
        return fresh_BK - retrieve_fresh.fresh_normaliser(log_rest_B, stored_BK, fresh_BK, jnp.zeros(B))[:, None]

    def dense(q_BE: jax.Array, now_BKE: jax.Array) -> jax.Array:
        scores_BN = jnp.where(live_N, q_BE @ device_index.stored(index, jnp.arange(N)).T, -jnp.inf)
        fresh_BK = jnp.einsum("be,bke->bk", q_BE, now_BKE)
        return fresh_BK - logsumexp(scores_BN.at[jnp.arange(B)[:, None], rows_BK].set(fresh_BK), -1)[:, None]

    weight_BK = rng.normal(size=(B, K))
    np.testing.assert_allclose(ours(q_BE, now_BKE), dense(q_BE, now_BKE), rtol=1e-5, atol=3e-5)
    by = [jax.grad(lambda *x, f=f: (f(*x) * weight_BK).sum(), (0, 1))(q_BE, now_BKE) for f in (ours, dense)]
    for a, b in zip(*by, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fall", [0.0, -5.0, -35.0, -80.0, 20.0])
def test_a_rest_of_nearly_no_mass_is_there_when_the_retrieved_fall(fall: float) -> None:
    """Three passages with all but e^-33 of the mass lose it alone: log Z is then the rest's, 7.66, after 35 nats."""
    x_NE = np.zeros((1000, 4), np.float32)
    x_NE[:3, 0], x_NE[3:, 1] = 40, np.random.default_rng(0).normal(size=997)
    q_BE = jnp.asarray([[1.0, 1, 0, 0]])
    scores_BK, _, log_rest_B = mips.search_with_normaliser(q_BE, jnp.asarray(x_NE), 3)
    got = retrieve_fresh.fresh_normaliser(log_rest_B, scores_BK, scores_BK + fall, jnp.zeros(1))
    all_N = (np.asarray(q_BE, np.float64) @ x_NE.T)[0] + np.where(np.arange(1000) < 3, fall, 0)
    np.testing.assert_allclose(got[0], all_N.max() + np.log(np.exp(all_N - all_N.max()).sum()), rtol=1e-6)


def test_no_rest() -> None:
    """Everything was retrieved: the result is a softmax over it, with its gradient."""
    q_BE, x_NE = corpus(4)
    x_NE = x_NE[:K]

    def logp(now_NE: jax.Array) -> jax.Array:
        return found(q_BE, x_NE, now_NE)[0][:, 0].sum()

    rows_BK = found(q_BE, x_NE, x_NE)[1]
    value, gradient = jax.value_and_grad(logp)(x_NE + 0.5)
    wanted = jax.value_and_grad(lambda now_NE: embedded_whole(q_BE, now_NE, rows_BK)[:, 0].sum())(x_NE + 0.5)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted[1], atol=1e-6)
