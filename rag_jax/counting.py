"""How much work a program is, counted from the shapes in its jaxpr."""

import math
from typing import Any


def matmul_flops(jaxpr: Any) -> float:
    """Floating-point operations of all matrix products in a jaxpr, 2 per multiply-add; a loop's body times its length.

    A while loop of unknown length counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(left[axis] for axis in contracting)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        devices = equation.params["mesh"].size if equation.primitive.name == "shard_map" else 1
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    total += times * devices * matmul_flops(inner)
    return total
