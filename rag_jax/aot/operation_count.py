"""Work and memory of a program, counted from the shapes in its jaxpr without compiling it."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def inner(equation: Any) -> Iterator[Any]:
    """The jaxprs within an equation: bodies of loops, branches, calls."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            body = getattr(part, "jaxpr", part)
            if hasattr(body, "eqns"):
                yield body


def work(jaxpr: Any) -> Counter[str]:
    """Floating-point operations of all matmuls, 2 per multiply-add, by the type of the operands.

    float32 at the highest precision is "float32 highest". The body of a scan counts once per iteration, that of a while
    loop, whose length is unknown, once, and that of a shard_map once per device.
    """
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval
            precision = equation.params["precision"]
            highest = left.dtype == "float32" and precision is not None and jax.lax.Precision.HIGHEST in precision
            size = math.prod(left.shape[axis] for axis in contracting)
            total[f"{left.dtype}{' highest' * highest}"] += 2.0 * math.prod(equation.outvars[0].aval.shape) * size
        times = equation.params.get("length", 1) if name == "scan" else 1
        times *= equation.params["mesh"].size if name == "shard_map" else 1
        for body in inner(equation):
            for kind, flops in work(body).items():
                total[kind] += times * flops
    return total


def matmul_flops(jaxpr: Any) -> float:
    """Sum of `work` over all types."""
    return float(sum(work(jaxpr).values()))


def nbytes(aval: Any) -> int:
    """Bytes of an array of this shape and type; a random key counts as two words."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(aval.shape)
    return math.prod(aval.shape) * aval.dtype.itemsize


SAME = {"reshape", "squeeze", "expand_dims", "stop_gradient", "pvary", "copy"}  # results take no memory of their own


def peak_bytes(jaxpr: Any) -> int:
    """Peak bytes of intermediate values if the equations ran in their written order without fusion.

    It estimates activations and gradients, rather too high than too low. Arguments do not count.
    """
    last = {v: i for i, equation in enumerate(jaxpr.eqns) for v in equation.invars if isinstance(v, core.Var)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)}
    ends: Counter[int] = Counter()
    alive = most = 0
    for i, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        made = 0 if name in SAME else sum(nbytes(v.aval) for v in equation.outvars if v in last)
        devices = equation.params["mesh"].size if name == "shard_map" else 1
        within = devices * max((peak_bytes(body) for body in inner(equation)), default=0)
        most = max(most, alive + max(made, within))
        alive += made
        for v in equation.outvars:
            if made and v in last:
                ends[last[v]] += nbytes(v.aval)
        alive -= ends.pop(i, 0)
    return most
