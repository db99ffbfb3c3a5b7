"""bfloat16 matmuls on a CPU: the same numbers, with operands and results of the types and order that are fast."""

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import layers
from rag_jax.ops import float32_sums, matmul, vocab_loss
from rag_jax.ops.attention import attention
from rag_jax.system import sharding

SIZES = {"b": 2, "h": 3, "t": 5, "c": 8, "l": 7}
EQUATIONS = [
    *("bhtc,bhcl->bhtl", "bhtc,bhlc->bhtl", "bhct,bhcl->bhtl", "bhct,bhlc->bhtl", "bhlt,bhtc->bhlc"),
    *("tc,cl->tl", "tc,lc->tl", "ct,cl->lt", "tbc,clh->tblh", "btc,bclh->tblh", "bct,tbc->t", "tc,tc->"),
]


def drawn(*shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


class Product(NamedTuple):
    """A matmul of a program: types of operand and result, and whether the operands are [..., R, I] and [..., I, O]."""

    operand: str
    result: str
    in_order: bool


FAST = Product("bf16", "f32", True)


def multiplied(function: Callable[..., jax.Array], *given: Any) -> list[Product]:
    text = jax.jit(function).lower(*given).as_text()
    found = re.findall(
        r"dot_general[^\n]*?(?:batching_dims = \[([\d, ]*)\][^\n]*?)?contracting_dims = \[([\d, ]*)\] x \[([\d, ]*)\]"
        r"[^\n]*\(tensor<([^>]*)>, tensor<[^>]*>\) -> tensor<([^>]*)>",
        text,
    )
    assert len(found) == text.count("stablehlo.dot_general")
    kinds = []
    for *axes, operand, result in found:
        shared, left, right = ([int(n) for n in word.split(",") if n.strip()] for word in axes)
        *sizes, kind = operand.split("x")
        first, last = len(shared), len(sizes) - len(left)
        in_order = left == [*range(last, len(sizes))] and right == [*range(first, first + len(right))]
        kinds.append(Product(kind, result.split("x")[-1], in_order))
    return kinds


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str) -> None:
    one, other = equation.split("->")[0].split(",")
    x, y = (drawn(*(SIZES[letter] for letter in word)) for word in (one, other))
    wanted = np.einsum(equation, exact(x), exact(y))
    for kind in (jnp.float32, None):
        got = jax.jit(lambda x, y, kind=kind: matmul.einsum(equation, x, y, preferred_element_type=kind))(x, y)
        assert got.dtype == (kind or jnp.bfloat16)
        np.testing.assert_allclose(exact(got), wanted, rtol=1e-5 if kind else 2**-8, atol=1e-5)


@pytest.mark.parametrize(("rows", "wide", "out"), [*itertools.product((1, 3, 64), (1, 8, 33), (1, 5, 128))])
def test_matmul_and_its_gradients(rows: int, wide: int, out: int) -> None:
    x, kernel, d = drawn(rows, wide), drawn(wide, out), drawn(rows, out)
    y, back = jax.vjp(jax.jit(lambda x, kernel: float32_sums.matmul(x, kernel, ("embed", "mlp"))), x, kernel)
    d_x, d_kernel = back(d)
    close = {"rtol": 2**-8, "atol": 1e-5}
    np.testing.assert_allclose(exact(y), exact(x) @ exact(kernel), **close)
    np.testing.assert_allclose(exact(d_x), exact(d) @ exact(kernel).T, **close)
    np.testing.assert_allclose(exact(d_kernel), exact(x).T @ exact(d), **close)


def test_float32_is_left_alone() -> None:
    x, y = drawn(3, 4, dtype="float32"), drawn(5, 4, dtype="float32")

    def ours(x: jax.Array, y: jax.Array) -> jax.Array:
        return matmul.einsum("ri,oi->ro", x, y)

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum("ri,oi->ro", x, y)

    assert str(jax.make_jaxpr(ours)(x, y)) == str(jax.make_jaxpr(plain)(x, y))


def test_products_of_a_layer_are_the_fast_ones() -> None:
    layer = nn.Sequential([layers.Dense(16, ("embed", "mlp"), dtype=jnp.bfloat16)])
    x = drawn(2, 6, 8)
    params = layer.init(jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(layer.apply(params, x).astype(jnp.float32)).sum()

    found = multiplied(jax.grad(loss, argnums=(0, 1)), params, x)
    assert found == 3 * [FAST]


def test_products_of_attention_are_the_fast_ones() -> None:
    B, H, T, C, L = 2, 2, 4, 8, 6
    query, key, value = drawn(B, H, T, C), drawn(B, H, C, L), drawn(B, H, L, C)
    mask = jnp.ones((B, 1, T, L), bool)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, [(key, value)], mask).astype(jnp.float32).sum()

    found = multiplied(jax.value_and_grad(loss, argnums=(0, 1, 2)), query, key, value)
    assert found == 6 * [FAST]


@pytest.mark.parametrize("chunk", [0, 8])
def test_products_of_the_vocabulary_are_the_fast_ones(chunk: int) -> None:
    hidden, kernel, bias = drawn(3, 4, 8), drawn(24, 8, dtype="float32"), drawn(24, dtype="float32")

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return vocab_loss.vocabulary_norm(hidden, kernel, bias, 1.0, chunk, 1, 1).sum()

    found = multiplied(jax.grad(loss, argnums=(0, 1)), hidden, kernel)
    assert [product for product in found if product.operand == "bf16"] == (4 if chunk else 3) * [FAST]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_devices_that_share_a_batch_send_each_other_none_of_it(dtype: str) -> None:
    """A pinned layout would make the compiler gather the array, which must stay sharded over the batch."""
    B, H, T, C, L = 8, 2, 4, 8, 6
    mesh = sharding.make_mesh({"data": 8})
    shapes = ((B, H, T, C), (B, H, C, L), (B, H, L, C))
    query, key, value = (
        jax.device_put(drawn(*shape, dtype=dtype), sharding.sharding(mesh, ["batch", None, None, None]))
        for shape in shapes
    )
    layer = nn.Sequential([layers.Dense(16, ("embed", "mlp"), dtype=jnp.dtype(dtype))])
    params = layer.init(jax.random.key(0), query)

    def loss(params: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        seen = attention(query, [(key, value)], jnp.ones((B, 1, T, L), bool))
        return jnp.square(layer.apply(params, seen).astype(jnp.float32)).sum()

    with sharding.on(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(params, query, key, value).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # of the layer's parameters
    assert "all-gather" not in text
