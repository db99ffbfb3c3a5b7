"""The float32 matrix products of a training step by themselves: XLA beside torch (oneDNN or MKL on a CPU), in turn.

    python scripts/product_speed.py [--load medium] [--rounds 5]

For the dense layers of the generator's encoder and its output layer: y = x W, the gradient in x, and that in W. Needs
the extra `parity`.
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

from rag_jax import heap
from rag_jax.bench_limits import in_turn
from rag_jax.bench_load import LOADS, Load

CALLS = 8  # in one turn


def shapes(load: Load) -> dict[str, tuple[int, int, int]]:
    """Tokens, width in and width out of the layers."""
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


def compare(tokens: int, wide: int, out: int, rounds: int) -> dict[str, list[float]]:
    """GFLOP/s of XLA and of torch: y, the gradient in x, that in W."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((tokens, wide), (wide, out), (tokens, out)))
    here, there = [jnp.asarray(a) for a in (x, w, g)], [torch.tensor(a) for a in (x, w, g)]
    products = (lambda x, w, g: x @ w), (lambda x, w, g: g @ w.T), (lambda x, w, g: x.T @ g)
    calls: dict[str, Callable[[int], Any]] = {}
    for number, product in enumerate(products):
        calls[f"xla {number}"] = partial(several, jax.jit(product), here)
        calls[f"torch {number}"] = partial(several, product, there)
    seconds, _ = in_turn(calls, rounds, f"{tokens} x {wide} x {out}")
    done = 2 * tokens * wide * out * CALLS / 1e9
    return {
        side: [done / statistics.median(seconds[f"{side} {n}"][1:]) for n in range(len(products))]
        for side in ("xla", "torch")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=tuple(LOADS), default="medium")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'GFLOP/s':<22}{'':<20}" + "".join(f"{side:>20}" for side in ("y", "gradient in x", "gradient in W")))
    for name, sizes in shapes(LOADS[args.load]).items():
        found = compare(*sizes, args.rounds)
        for side, rates in found.items():
            print(f"{name:<22}{side:<20}" + "".join(f"{rate:>20.0f}" for rate in rates), flush=True)
        print(json.dumps({"layer": name, "shape": sizes, **found}), flush=True)


if __name__ == "__main__":
    heap.keep(os.environ)
    main()
