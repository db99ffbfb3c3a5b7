"""Measured limits of the machine, the rates of matmuls and of reading memory; its description; timing helpers."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rag_jax.ops import matmul
from rag_jax.system.logs import Progress


def timed(function: Any, repeats: int) -> list[float]:
    """Seconds of each call of a function, which must block until its result is there."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return seconds


PAUSE = 0.5  # seconds before each call, since torch's threads keep spinning for 0.2 s after one


def in_turn(
    calls: dict[str, Callable[[int], Any]], repeats: int, title: str
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds and results of call(i), by name and round; in round i every call runs once.

    Taking turns makes other load on the machine affect all alike. A warm-up round, with i = 0, is first in the lists.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, list[Any]] = {name: [] for name in calls}
    with Progress(repeats + 1, title, "round") as progress:
        for i in (0, *range(repeats)):
            for name, call in calls.items():
                time.sleep(PAUSE)
                begun = time.perf_counter()
                results[name].append(call(i))
                seconds[name].append(time.perf_counter() - begun)
            progress.update(1)
    return seconds, results


def matmul_limit(sizes: tuple[int, ...] = (1024, 2048, 3072), repeats: int = 7, dtype: str = "float32") -> float:
    """Best rate of a square matmul among these sizes, FLOP/s on one device; an accelerator has larger sizes instead."""
    rates = []
    multiply = jax.jit(partial(matmul.einsum, "ij,jk->ik"))
    for size in sizes if jax.default_backend() == "cpu" else (4096, 8192):
        a = jax.random.normal(jax.random.key(size), (size, size), jnp.dtype(dtype))
        jax.block_until_ready(multiply(a, a))
        rates.append(2 * size**3 / min(timed(lambda a=a: jax.block_until_ready(multiply(a, a)), repeats)))
    return max(rates)


def reading_limit(repeats: int = 7) -> float:
    """Rate at which one device reads memory, bytes/s, from the sum of an array that is larger than any cache."""
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**30, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(x))
    return x.nbytes / min(timed(lambda: jax.block_until_ready(total(x)), repeats))


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of these times, in milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
    }


def machine() -> dict[str, Any]:
    """Kind and number of the devices, and versions of the software."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version(), **versions},
    }


def peak_memory() -> dict[str, int]:
    """Peak memory in bytes, of this process and, where devices report it, of a device."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    held = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_process_bytes": process, **({"peak_device_bytes": max(held)} if held else {})}


def resident_memory() -> dict[str, int]:
    """Resident memory of this process in bytes; empty where the system does not report it."""
    table = Path("/proc/self/statm")
    return {"resident_bytes": int(table.read_text().split()[1]) * resource.getpagesize()} if table.exists() else {}


def largest(fits: Callable[[int], bool], most: int = 2**16) -> int:
    """The largest n up to `most` that fits, by doubling and then bisection; 0 where 1 does not fit.

    It assumes that everything smaller than what fits also fits.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
