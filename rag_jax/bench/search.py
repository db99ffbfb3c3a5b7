"""Benchmark of exact search, beside faiss, NumPy and ScaNN on the same data, and beside the matmuls alone.

The embeddings are synthetic, distributed like those of dense encoders: clusters of very different sizes around
directions that share a mean, a few dimensions much larger than the others, and queries near single passages. The limit,
for each type of the index, is the matmul of the same tiles with only a maximum taken of the scores. All programs take
turns, one call each per round, so that other load on the machine affects all alike.
"""

import dataclasses
import gc
import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rag_jax.bench.machine_limits import spread
from rag_jax.errors import InputError
from rag_jax.retrieval import mips, mips_one_device, scann_index
from rag_jax.retrieval.search import IndexSource, Queries
from rag_jax.system.logs import Progress

DTYPES = ("float32", "bfloat16", "int8")
RIVALS = ("faiss", "numpy", "scann")
BLOCK = 65536  # passages drawn or converted at once
TUNING = 10**6  # number (seed) of the batch of questions that ScaNN is tuned on
Found = tuple[np.ndarray, np.ndarray]  # scores_BK, ids_BK


@dataclass(frozen=True)
class SearchLoad:
    """Size of the data: N passages of width E, and B questions per call."""

    passages: int = 100_000
    width: int = 768
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class SearchProgram:
    """A program that searches.

    call: (k, queries) -> scores and ids; blocks until they are there.
    bytes, build_seconds: size of its index, and time to build it.
    limit: name of the program that measures its limit; "": none.
    """

    call: Callable[[int, np.ndarray], Found]
    bytes: int
    build_seconds: float
    limit: str = ""


def passages(load: SearchLoad) -> Iterator[np.ndarray]:
    """Synthetic embeddings of unit scale, in blocks [X, E] float32; the same at every call."""
    rng = np.random.default_rng(load.seed)
    loud_E = np.where(rng.random(load.width) < 0.01, 4.0, 1.0).astype(np.float32)
    mean_E = rng.standard_normal(load.width, np.float32) * loud_E
    n_clusters = max(1, load.passages // 200)
    centres_CE = rng.standard_normal((n_clusters, load.width), np.float32) * loud_E
    for start in range(0, load.passages, BLOCK):
        size = min(BLOCK, load.passages - start)
        cluster_X = (n_clusters * rng.random(size) ** 2).astype(np.int64)  # the first clusters are the largest
        block_XE = centres_CE[cluster_X]
        block_XE += mean_E
        block_XE += 0.7 * rng.standard_normal(block_XE.shape, np.float32) * loud_E
        yield block_XE / np.float32(np.sqrt(load.width))


def collected(load: SearchLoad) -> np.ndarray:
    """All passages [N, E], without a second copy in memory while they are collected."""
    index_NE = np.empty((load.passages, load.width), np.float32)
    with Progress(load.passages, "bench search: embeddings", "passages") as progress:
        for i, block_XE in enumerate(passages(load)):
            index_NE[i * BLOCK : i * BLOCK + len(block_XE)] = block_XE
            progress.update(len(block_XE))
    return index_NE


def questions(load: SearchLoad, index_NE: np.ndarray, number: int) -> np.ndarray:
    """Questions [B, E]: random passages plus noise as large as the spread of a cluster; number: seed of the batch."""
    rng = np.random.default_rng((load.seed, number))
    near_BE = index_NE[rng.integers(0, load.passages, load.batch)]
    scale = 0.7 / np.float32(np.sqrt(load.width))
    return near_BE + scale * rng.standard_normal(near_BE.shape, np.float32)


@partial(jax.jit, static_argnames="k")
def products_alone(queries_BE: jax.Array, index_NE: jax.Array, *, k: int) -> jax.Array:
    """The largest score of each query [B]: the matmuls of `mips.search` in the same tiles, without ranking."""
    n, chunk = index_NE.shape[0], mips_one_device.default_chunk(queries_BE.shape[0], k)
    platform = jax.default_backend()
    into = mips_one_device.cut(n, k, chunk, mips_one_device.TILE if platform == "cpu" else chunk)
    left_BE, _ = mips_one_device.rounded(queries_BE, index_NE, platform)

    def step(best_B: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        rows_CE = lax.dynamic_slice_in_dim(index_NE, jnp.minimum(i * into.tile, n - into.tile), into.tile)
        scores_CB = mips_one_device.product(left_BE, rows_CE)
        return jnp.maximum(best_B, scores_CB.max(0)), None

    start_B = jnp.full(queries_BE.shape[0], -jnp.inf)
    return lax.scan(step, start_B, jnp.arange(-(-n // into.tile), dtype=jnp.int32))[0]


def ours(index_NE: np.ndarray, dtype: str) -> tuple[SearchProgram, SearchProgram]:
    """Our search with an index of this type, and its matmuls alone; on a CPU bfloat16 is kept as its bits."""
    begun = time.perf_counter()
    bits = dtype == "bfloat16" and jax.default_backend() == "cpu"
    rows_NE = jnp.zeros(index_NE.shape, "uint16" if bits else dtype)
    scale_N = jnp.zeros(len(index_NE)) if dtype == "int8" else None
    put = jax.jit(lambda whole, part, at: lax.dynamic_update_slice_in_dim(whole, part, at, 0), donate_argnums=0)
    for start in range(0, len(index_NE), BLOCK):
        block_XE = jnp.asarray(index_NE[start : start + BLOCK])
        if scale_N is not None:
            block_XE, scale_X = mips.quantise(block_XE)
            scale_N = put(scale_N, scale_X, start)
        elif dtype == "bfloat16":
            block_XE = block_XE.astype(jnp.bfloat16)
            block_XE = lax.bitcast_convert_type(block_XE, jnp.uint16) if bits else block_XE
        rows_NE = put(rows_NE, block_XE, start)
    jax.block_until_ready(rows_NE)
    size, seconds = rows_NE.nbytes + (0 if scale_N is None else scale_N.nbytes), time.perf_counter() - begun

    def call(k: int, queries_BE: np.ndarray) -> Found:
        scores_BK, ids_BK = mips.search(queries_BE, rows_NE, k, scale_N=scale_N)
        return np.asarray(scores_BK), np.asarray(ids_BK)

    def alone(k: int, queries_BE: np.ndarray) -> Found:
        best_B1 = np.asarray(products_alone(queries_BE, rows_NE, k=k))[:, None]
        return best_B1, np.zeros(best_B1.shape, np.int32)

    return SearchProgram(call, size, seconds, f"products {dtype}"), SearchProgram(alone, size, seconds)


def faiss_flat(index_NE: np.ndarray) -> SearchProgram:
    """faiss IndexFlatIP, with all its threads."""
    import faiss

    begun = time.perf_counter()
    index = faiss.IndexFlatIP(index_NE.shape[1])
    for start in range(0, len(index_NE), BLOCK):
        index.add(index_NE[start : start + BLOCK])
    return SearchProgram(
        lambda k, q: index.search(q, k), index_NE.nbytes, time.perf_counter() - begun, "products float32"
    )


def numpy_partition(index_NE: np.ndarray) -> SearchProgram:
    """NumPy: all scores by one matmul, argpartition, and a sort of the k best."""

    def call(k: int, queries_BE: np.ndarray) -> Found:
        scores_BN = queries_BE @ index_NE.T
        ids_BK = np.argpartition(scores_BN, -k, axis=1)[:, -k:]
        scores_BK = np.take_along_axis(scores_BN, ids_BK, 1)
        order_BK = np.argsort(-scores_BK, axis=1, kind="stable")
        return np.take_along_axis(scores_BK, order_BK, 1), np.take_along_axis(ids_BK, order_BK, 1)

    return SearchProgram(call, index_NE.nbytes, 0.0, "products float32")


def scann_tuned(load: SearchLoad, index_NE: np.ndarray, exact: SearchProgram) -> dict[str, SearchProgram]:
    """ScaNN as `retrieval.scann_index` builds it, and the library's own call with the same settings.

    It is tuned to a recall@20 of 0.95 on separate questions, for which `exact` has the true results.
    """
    begun, k = time.perf_counter(), min(20, load.passages)
    sample = questions(dataclasses.replace(load, batch=256), index_NE, TUNING)
    truth = np.concatenate([exact.call(k, sample[at : at + load.batch])[1] for at in range(0, 256, load.batch)])
    # tuned to a little more than 0.95, since the questions of the benchmark differ
    built = scann_index.build(index_NE, IndexSource("bench")).tune(sample, truth, 0.965)
    size = index_NE.nbytes // 2 + index_NE.shape[1] // 4 * 2 * len(index_NE)  # bfloat16 rows; codes, twice with SOAR
    seconds = time.perf_counter() - begun

    def call(k: int, queries_BE: np.ndarray) -> Found:
        found = built.search(Queries(queries_BE), k)
        return found.scores_BK, found.ids_BK

    def library(k: int, queries_BE: np.ndarray) -> Found:
        config = built.config
        more = max(config.reorder or max(100, 4 * k), k)
        how = {"leaves_to_search": config.leaves_to_search} if config.leaves else {}
        ids_BK, scores_BK = built.index.search_batched_parallel(queries_BE, k, more, **how)
        return scores_BK, ids_BK

    return {"scann": SearchProgram(call, size, seconds), "scann's own call": SearchProgram(library, size, seconds)}


def recall(found_BK: np.ndarray, exact_BK: np.ndarray) -> float:
    """Share of the exact k best passages that were found, averaged over the questions."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found_BK, exact_BK, strict=True)]))


def bench(
    load: SearchLoad, ks: Sequence[int], dtypes: Sequence[str], rivals: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Results of each program and k. Recall is against our own float32 search, which must be among `dtypes`."""
    index_NE = collected(load)
    batches = [questions(load, index_NE, i) for i in range(repeats)]
    programs: dict[str, SearchProgram] = {}
    for dtype in dtypes:
        programs[dtype], programs[f"products {dtype}"] = ours(index_NE, dtype)
    if "faiss" in rivals:
        programs["faiss"] = faiss_flat(index_NE)
    if "scann" in rivals:
        programs |= scann_tuned(load, index_NE, programs["float32"])
    if "numpy" in rivals:
        programs["numpy"] = numpy_partition(index_NE)
    else:
        del index_NE
    gc.collect()
    seconds: dict[tuple[str, int], list[float]] = {(name, k): [] for name in programs for k in ks}
    ids: dict[tuple[str, int], list[np.ndarray]] = {(name, k): [] for name in programs for k in ks}
    with Progress((repeats + 1) * len(ks), "bench search", "round") as progress:
        for i in (0, *range(repeats)):  # the first round warms up
            for k in ks:
                for name, program in programs.items():
                    begun = time.perf_counter()
                    found = program.call(k, batches[i])
                    seconds[name, k].append(time.perf_counter() - begun)
                    ids[name, k].append(found[1])
                progress.update(1)
    results = []
    for k in ks:
        for name, program in programs.items():
            times = seconds[name, k][1:]
            median = statistics.median(times)
            searches = not name.startswith("products")
            result = {
                "program": name,
                "k": k,
                "seconds": spread(times),
                "queries_per_second": load.batch / median,
                "flops_per_second": 2 * load.passages * load.width * load.batch / median,
                "index_bytes": program.bytes,
                "build_seconds": round(program.build_seconds, 2),
            }
            if searches:
                pairs = zip(ids[name, k][1:], ids["float32", k][1:], strict=True)
                result["recall"] = float(np.mean([recall(a, b) for a, b in pairs]))
            if program.limit in programs:
                # the ratio is taken per round, in which both were called shortly after each other
                limit = zip(seconds[program.limit, k][1:], times, strict=True)
                result["fraction_of_limit"] = statistics.median(a / b for a, b in limit)
            results.append(result)
    return results


def peak_bytes() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a readable table, one line per program and k."""
    lines = [f"{'':<18}{'k':>5}{'median':>11}{'least':>9}{'most':>9}{'queries/s':>11}{'GFLOP/s':>9}"]
    lines[0] += f"{'of the limit':>14}{'recall':>9}{'index':>11}{'building':>10}"
    for r in results:
        times = r["seconds"]
        line = (
            f"{r['program']:<18}{r['k']:>5}{times['median_ms']:>8.1f} ms{times['min_ms']:>9.1f}{times['max_ms']:>9.1f}"
        )
        line += f"{r['queries_per_second']:>11,.0f}{r['flops_per_second'] / 1e9:>9.0f}"
        line += f"{r['fraction_of_limit']:>14.0%}" if "fraction_of_limit" in r else f"{'':>14}"
        line += f"{r['recall']:>9.4f}" if "recall" in r else f"{'':>9}"
        lines.append(f"{line}{r['index_bytes'] / 2**20:>8,.0f} MB{r['build_seconds']:>8.1f} s")
    return "\n".join(lines)


def report(
    load: SearchLoad, ks: Sequence[int], dtypes: Sequence[str], rivals: Sequence[str] | None, repeats: int
) -> dict[str, Any]:
    """Results of `bench`, with a table as `text`.

    ks: numbers of passages to find.
    dtypes: types of the index; float32 is always added.
    rivals: None for those that are installed.
    repeats: rounds after the warm-up.

    InputError for values out of range and for rivals that are not installed.
    """
    for name, values in (("passages", [load.passages]), ("width", [load.width]), ("batch", [load.batch]),
                         ("repeats", [repeats]), ("k", ks)):  # fmt: skip
        if min(values) < 1:
            raise InputError(f"--{name} {min(values)}: at least 1")
    if max(ks) > load.passages:
        raise InputError(f"--k {max(ks)}: at most --passages {load.passages}")
    there = [name for name in RIVALS if importlib.util.find_spec(name)]
    rivals = there if rivals is None else rivals
    missing = [name for name in rivals if name not in there]
    if missing:
        package = {"faiss": "faiss-cpu"}.get(missing[0], missing[0])
        raise InputError(f"--rivals {missing[0]}: not installed; pip install {package}, or leave it out")
    dtypes = [dtype for dtype in DTYPES if dtype in dtypes or dtype == "float32"]
    results = bench(load, list(dict.fromkeys(ks)), dtypes, rivals, repeats)
    device, peak = jax.devices()[0].device_kind, peak_bytes()
    head = f"N={load.passages:,} E={load.width} B={load.batch}, {device}, peak memory {peak / 2**30:.1f} GB"
    about = {**dataclasses.asdict(load), "device": device, "jax": jax.__version__, "peak_bytes": peak}
    return {"text": f"{head}\n{table(results)}", **about, "results": results}
