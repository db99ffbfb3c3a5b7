"""Speed of ScaNN, tuned to a recall, beside exact search: seconds a batch, taking turns.

    python scripts/ann_speed.py --passages 1000000 --width 768
    python scripts/ann_speed.py --index DIR            # embeddings of rag-jax index, queries made from them

Synthetic passages form clusters of all sizes in a space of few dimensions, as embeddings of text do; a query is a
passage plus noise. Recall is measured on queries that were not used for tuning. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rag_jax.index import snapshot
from rag_jax.retrieval import scann_index
from rag_jax.retrieval.search import Exact, IndexSource, Queries, Searcher
from rag_jax.system import sharding
from rag_jax.system.logs import info


def synthetic(n: int, width: int, dims: int, rng: np.random.Generator, block: int = 65536) -> np.ndarray:
    """Vectors [n, width] of length 1: sqrt(n) clusters, sizes by Zipf's law, of `dims` dimensions, plus noise.

    block: rows made at a time.
    """
    clusters = max(int(n**0.5), 1)
    centres = rng.standard_normal((clusters, dims), np.float32)
    share = 1 / np.arange(1, clusters + 1) ** 0.7
    plane = rng.standard_normal((dims, width), np.float32)
    out = np.empty((n, width), np.float32)
    for start in range(0, n, block):
        part = out[start : start + block]
        inner = centres[rng.choice(clusters, len(part), p=share / share.sum())]
        inner += 0.7 * rng.standard_normal(inner.shape, np.float32)
        part[:] = inner @ plane + 0.3 * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def queries_near(passages: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    near = np.asarray(passages[np.sort(rng.choice(len(passages), n, replace=False))], np.float32)
    noise = rng.standard_normal(near.shape, np.float32)
    return near + 0.7 * noise * np.linalg.norm(near, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1)[:, None]


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(searchers: dict[str, Searcher], queries: Queries, k: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest seconds of `rounds` searches each, taking turns; one round before is not counted."""
    times: dict[str, list[float]] = {name: [] for name in searchers}
    for turn in range(rounds + 1):
        for name, searcher in searchers.items():
            taken = seconds(lambda searcher=searcher: searcher.search(queries, k))
            if turn:
                times[name].append(taken)
    return {name: {"median": statistics.median(x), "low": min(x), "high": max(x)} for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="index directory; without it synthetic passages")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dims", type=int, default=64, help="dimensions that synthetic passages lie in")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--queries", type=int, default=512, help="half to tune with, half to measure recall with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--leaves", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    if args.index:
        passages = snapshot.open_snapshot(args.index).embeddings_NE
    else:
        passages = synthetic(args.passages, args.width, args.dims, rng)
    queries = queries_near(passages, args.queries, rng)
    half = len(queries) // 2
    info(f"{passages.shape} embeddings, {len(queries)} queries")
    exact = Exact(passages, sharding.make_mesh(), IndexSource("synthetic"))
    truth = exact.search(Queries(queries), args.k).ids_BK
    started = time.perf_counter()
    built = scann_index.build(
        passages, IndexSource("synthetic"), scann_index.AnnConfig(leaves=args.leaves, exact_below=0)
    )
    build_seconds = time.perf_counter() - started
    started = time.perf_counter()
    tuned = built.tune(queries[:half], truth[:half], args.recall)
    tune_seconds = time.perf_counter() - started
    untuned = scann_index.recall_at(built.search(Queries(queries[half:]), args.k).ids_BK, truth[half:])
    found = scann_index.recall_at(tuned.search(Queries(queries[half:]), args.k).ids_BK, truth[half:])
    times = in_turn({"exact": exact, "scann": tuned}, Queries(queries[: args.batch]), args.k, args.rounds)
    figures = {
        "passages": len(passages), "width": passages.shape[1], "batch": args.batch, "k": args.k,
        "recall": round(found, 4), "recall_untuned": round(untuned, 4), "settings": dict(tuned.manifest["settings"]),
        "build_seconds": round(build_seconds, 1), "tune_seconds": round(tune_seconds, 1), "seconds": times,
        "times_faster": round(times["exact"]["median"] / times["scann"]["median"], 1),
        "device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
