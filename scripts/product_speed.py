"""The speed of a training step's matmuls alone: with jax.numpy, with `rag_jax.ops.float32_sums`, and with torch (oneDNN
or MKL on a CPU), taking turns.

    python scripts/product_speed.py [--load medium] [--dtype bfloat16] [--rounds 5]

Measured for the dense layers of the generator's encoder and its output layer: y = x W, the gradient of x, and that of
W. In float32 the first two are the same, and `float32_sums` is left out. Needs the extra `parity`.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from rag_jax.bench.machine_limits import in_turn
from rag_jax.bench.synthetic_load import DTYPES, LOADS, StepLoad
from rag_jax.ops import float32_sums
from rag_jax.system import malloc

CALLS = 8  # matmuls in one turn
AXES = ("embed", "mlp")


def shapes(load: StepLoad) -> dict[str, tuple[int, int, int]]:
    """Name of a layer -> (tokens, input width, output width)."""
    sources, targets = load.questions * load.docs * load.source, load.questions * load.docs * load.target
    return {
        "attention": (sources, load.width, load.width),
        "feed-forward, inner": (sources, load.width, load.hidden),
        "feed-forward, outer": (sources, load.hidden, load.width),
        "vocabulary": (targets, load.width, load.vocabulary),
    }


def several(product: Callable[..., Any], given: list[Any], _round: int) -> None:
    for _ in range(CALLS):
        jax.block_until_ready(product(*given))


PLAIN = (lambda x, w, g: x @ w), (lambda x, w, g: g @ w.T), (lambda x, w, g: x.T @ g)
OURS = (
    lambda x, w, g: float32_sums.matmul(x, w, AXES),
    lambda x, w, g: jax.vjp(lambda x: float32_sums.matmul(x, w, AXES), x)[1](g)[0],
    lambda x, w, g: jax.vjp(lambda w: float32_sums.matmul(x, w, AXES), w)[1](g)[0],
)


def compare(tokens: int, wide: int, out: int, dtype: str, rounds: int) -> dict[str, list[float]]:
    """GFLOP/s of each library, for y, the gradient of x and that of W."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((tokens, wide), (wide, out), (tokens, out))]
    here = [jnp.asarray(a, dtype) for a in arrays]
    there = [torch.tensor(a, dtype=getattr(torch, dtype)) for a in arrays]
    calls: dict[str, Callable[[int], Any]] = {}
    for number, (plain, ours) in enumerate(zip(PLAIN, OURS, strict=True)):
        calls[f"jax.numpy {number}"] = partial(several, jax.jit(plain), here)
        if dtype != "float32":
            calls[f"rag_jax {number}"] = partial(several, jax.jit(ours), here)
        calls[f"torch {number}"] = partial(several, plain, there)
    seconds, _ = in_turn(calls, rounds, f"{tokens} x {wide} x {out}")
    found: dict[str, list[float]] = {}
    for name, times in seconds.items():
        rate = 2 * tokens * wide * out * CALLS / 1e9 / statistics.median(times[1:])
        found.setdefault(name.split()[0], []).append(rate)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=tuple(LOADS), default="medium")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'GFLOP/s':<22}{'':<20}" + "".join(f"{side:>20}" for side in ("y", "gradient in x", "gradient in W")))
    for name, sizes in shapes(LOADS[args.load]).items():
        found = compare(*sizes, args.dtype, args.rounds)
        for side, rates in found.items():
            print(f"{name:<22}{side:<20}" + "".join(f"{rate:>20.0f}" for rate in rates), flush=True)
        print(json.dumps({"layer": name, "shape": sizes, **found}), flush=True)


if __name__ == "__main__":
    malloc.keep(os.environ)
    main()
