"""Products of matrices in bfloat16 as the units that a CPU has for them (AMX, AVX512-BF16) want them.

XLA has a fast product there, whose result is float32 and whose operands lie in memory row after row. With a bfloat16
result, or an operand turned over, it multiplies in float32, three to eight times as slowly (jax 0.10.2;
`scripts/product_speed.py --dtype bfloat16`). On other devices nothing here changes anything, nor do its
products in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from rag_jax.system import sharding

# of both operands: the axes that are summed over, and the axes that they share, as jax.lax.dot_general has them
Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def in_rows(x: jax.Array) -> jax.Array:
    """x, on one CPU device written to memory row after row in the order of its axes. Where several share the work the
    compiler chooses: it does not cut an array whose layout is laid down, but gathers all of it on every device.
    """
    if sharding.platform() != "cpu" or sharding.shared():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def narrow(*operands: jax.Array) -> bool:
    """Whether their product is one that a CPU has to be helped with."""
    return sharding.platform() == "cpu" and all(x.dtype == jnp.bfloat16 for x in operands)


def dot_general(
    x: jax.Array,
    y: jax.Array,
    dimension_numbers: Dimensions,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kind: Any,
) -> jax.Array:
    """jax.lax.dot_general; on a CPU bfloat16 operands are turned over where they do not stand as they should."""
    if not narrow(x, y):
        return jax.lax.dot_general(x, y, dimension_numbers, precision, preferred_element_type, **kind)
    (summed_x, summed_y), (shared_x, shared_y) = dimension_numbers
    free_x, free_y = (
        [i for i in range(operand.ndim) if i not in {*summed, *shared}]
        for operand, summed, shared in ((x, summed_x, shared_x), (y, summed_y, shared_y))
    )

    def ordered(operand: jax.Array, axes: list[int]) -> jax.Array:
        return operand if axes == sorted(axes) else in_rows(operand.transpose(axes))

    x = ordered(x, [*shared_x, *free_x, *summed_x])
    y = ordered(y, [*shared_y, *summed_y, *free_y])
    shared, summed = range(len(shared_x)), len(summed_x)
    dimensions = (tuple(range(x.ndim - summed, x.ndim)), tuple(range(len(shared), len(shared) + summed)))
    product = jax.lax.dot_general(x, y, (dimensions, (shared, shared)), precision, jnp.float32, **kind)
    return product.astype(preferred_element_type or x.dtype)


einsum = partial(jnp.einsum, _dot_general=dot_general)
