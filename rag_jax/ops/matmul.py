"""bfloat16 matmuls in the form that uses a CPU's bfloat16 units (AMX, AVX512-BF16).

XLA on a CPU has a fast bfloat16 matmul only for a float32 result and operands that are row-major in memory. With a
bfloat16 result, or a transposed operand, it multiplies in float32, three to eight times as slowly (jax 0.10.2;
`scripts/product_speed.py --dtype bfloat16`). Matmuls on other devices, and those in float32, are not changed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from rag_jax.system import sharding

# dimension_numbers of jax.lax.dot_general: of both operands the contracted axes, then of both the batch axes
Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def in_rows(x: jax.Array) -> jax.Array:
    """x; in a program for a single CPU device its layout is pinned to row-major.

    Not in a program for several devices: the compiler does not shard an array whose layout is pinned, but gathers all
    of it on every device.
    """
    if sharding.platform() != "cpu" or sharding.shared():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def narrow(*operands: jax.Array) -> bool:
    """Whether the matmul of these operands is a bfloat16 matmul on a CPU, which needs the form above."""
    return sharding.platform() == "cpu" and all(x.dtype == jnp.bfloat16 for x in operands)


def dot_general(
    x: jax.Array,
    y: jax.Array,
    dimension_numbers: Dimensions,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kind: Any,
) -> jax.Array:
    """jax.lax.dot_general; on a CPU, bfloat16 operands are transposed in memory to the order of the fast matmul."""
    if not narrow(x, y):
        return jax.lax.dot_general(x, y, dimension_numbers, precision, preferred_element_type, **kind)
    (summed_x, summed_y), (shared_x, shared_y) = dimension_numbers
    free_x, free_y = (
        [i for i in range(operand.ndim) if i not in {*summed, *shared}]
        for operand, summed, shared in ((x, summed_x, shared_x), (y, summed_y, shared_y))
    )

    # the fast order: batch axes first, then [free, contracted] @ [contracted, free]
    def ordered(operand: jax.Array, axes: list[int]) -> jax.Array:
        return operand if axes == sorted(axes) else in_rows(operand.transpose(axes))

    x = ordered(x, [*shared_x, *free_x, *summed_x])
    y = ordered(y, [*shared_y, *summed_y, *free_y])
    shared, summed = range(len(shared_x)), len(summed_x)
    dimensions = (tuple(range(x.ndim - summed, x.ndim)), tuple(range(len(shared), len(shared) + summed)))
    product = jax.lax.dot_general(x, y, (dimensions, (shared, shared)), precision, jnp.float32, **kind)
    return product.astype(preferred_element_type or x.dtype)


einsum = partial(jnp.einsum, _dot_general=dot_general)
