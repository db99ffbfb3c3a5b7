"""Lookups, additions and matmuls whose gradients, sums over the rows of a batch, are summed in float32.

bfloat16 has 8 significant bits. A running sum in it stops growing at about 256 times its addends: 0.01 added 10,000
times gives 4. XLA sums in the type that it is given, in a scatter, in a reduction and between devices. Derived
gradients would be summed in the type of the activations; these custom ones are summed in float32, the type of the
parameters, and never rounded on the way.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rag_jax.ops import matmul as matmul_ops
from rag_jax.system import sharding

Names = tuple[str | None, ...]  # logical axes of a parameter


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, ids: jax.Array, names: Names, dtype: Any) -> jax.Array:
    """Rows table_VD[ids] [..., D] in `dtype`; names: logical axes of the table."""
    return sharding.gathered(table_VD, names, dtype)[ids]


def _lookup_forward(table_VD: jax.Array, ids: jax.Array, names: Names, dtype: Any) -> tuple[jax.Array, tuple]:
    return lookup(table_VD, ids, names, dtype), (table_VD, ids)


def _lookup_backward(names: Names, _: Any, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, None]:
    table_VD, ids = saved
    summed_VD = jnp.zeros_like(table_VD).at[ids].add(gradient.astype(table_VD.dtype))
    return sharding.constrain(summed_VD, *names), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def add(x: jax.Array, small: jax.Array) -> jax.Array:
    """x + small in the type of x, with `small` broadcast.

    The addition is float32 so that the gradient of `small`, a sum over the axes it was broadcast to, is float32 too.
    """
    return (x.astype(jnp.float32) + small.astype(jnp.float32)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, kernel_IO: jax.Array, names: Names, out: Any = None) -> jax.Array:
    """x [..., I] @ kernel [I, O], with operands in the type of x.

    names: logical axes of the kernel.
    out: type of the result; None: that of x.
    """
    return _matmul_forward(x, kernel_IO, names, out)[0]


def _matmul_forward(x: jax.Array, kernel_IO: jax.Array, names: Names, out: Any) -> tuple[jax.Array, tuple]:
    used_IO = sharding.gathered(kernel_IO, names, x.dtype)
    y = matmul_ops.dot_general(x, used_IO, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out)
    return y, (x, used_IO, jnp.zeros(0, kernel_IO.dtype))  # the empty array carries the parameter's type


def _matmul_backward(names: Names, _: Any, saved: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, used_IO, like = saved
    d_y, rows = d_y.astype(x.dtype), tuple(range(x.ndim - 1))
    d_x = matmul_ops.dot_general(d_y, used_IO, (((x.ndim - 1,), (1,)), ((), ())))
    # the sum over rows, and then over devices, has the parameter's type, not that of x
    d_kernel_IO = matmul_ops.dot_general(x, d_y, ((rows, rows), ((), ())), preferred_element_type=like.dtype)
    return d_x, sharding.constrain(d_kernel_IO, *names)


matmul.defvjp(_matmul_forward, _matmul_backward)
