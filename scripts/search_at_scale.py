"""Memory and collectives of exact search over DPR's Wikipedia (21,015,300 passages) on a TPU slice; needs no TPU.

    pip install libtpu     # with it the real programs are compiled ahead of time; without it only shapes are counted
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python scripts/search_at_scale.py --topology v5e:8x8

Prints a table, or with --json one line a program: bytes of the arguments and temporaries on one device, FLOPs of one
search on all devices (from the shapes), and the collectives of the compiled program with the bytes of their results on
a device. The index rows are sharded over all devices, queries and results over the batch as in training (or
--replicated).
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from rag_jax.aot import hlo
from rag_jax.retrieval import mips
from rag_jax.system import sharding

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def abstract_mesh(topology: str) -> Mesh:
    """A mesh with all chips of a TPU topology, which need not exist here, on the data axis."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(-1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def compiled(mesh: Mesh, n: int, args: argparse.Namespace, dtype: str, batch: int, k: int) -> dict[str, Any]:
    def array(shape: tuple[int, ...], kind: str, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding.sharding(mesh, names))

    rows_NE = array((-(-n // mesh.size) * mesh.size, args.width), dtype, ("rows", None))
    live_N = array(rows_NE.shape[:1], "bool", ("rows",))
    scale_N = array(rows_NE.shape[:1], "float32", ("rows",)) if dtype == "int8" else None
    queries_BE = array((batch, args.width), "float32", (None if args.replicated else "batch", None))
    out_axes = () if args.replicated else ("data", "fsdp")
    find = functools.partial(mips.search_with_normaliser if args.normaliser else mips.search, mesh=mesh, n_valid=n)
    program = jax.jit(lambda q, x, scale, live: find(q, x, k, scale_N=scale, live_N=live, out_axes=out_axes))
    begun = time.perf_counter()
    done = program.lower(queries_BE, rows_NE, scale_N, live_N).compile()
    memory = done.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": [f"{c.kind} {c.bytes:,.0f}" for c in hlo.collectives(done.as_text(), mesh.size)],
        "compile_seconds": round(time.perf_counter() - begun, 1),
    }


def counted(devices: int, n: int, args: argparse.Namespace, dtype: str, batch: int) -> dict[str, Any]:
    """Bytes of the arguments on one device from shapes alone: its rows with scale and validity, and its queries."""
    row_bytes = args.width * BYTES[dtype] + 1 + 4 * (dtype == "int8")
    share = batch if args.replicated else -(-batch // devices)
    return {"argument_bytes": -(-n // devices) * row_bytes + 4 * share * args.width}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:8x8", help="of the TPU slice (default: v5e:8x8)")
    parser.add_argument("--passages", type=int, default=21_015_300)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", nargs="+", choices=tuple(BYTES), default=list(BYTES))
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--k", type=int, nargs="+", default=[5, 100])
    parser.add_argument("--replicated", action="store_true", help="queries and results whole on every device")
    parser.add_argument(
        "--normaliser", action="store_true", help="with the mass of all others (search_with_normaliser)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line a program")
    args = parser.parse_args()
    chips = math.prod(int(x) for x in args.topology.split(":")[1].split("x"))
    mesh = abstract_mesh(args.topology) if importlib.util.find_spec("libtpu") else None
    if mesh is None:
        print("libtpu is not installed: counted from shapes, nothing is compiled (pip install libtpu)", file=sys.stderr)
    devices = chips if mesh is None else mesh.size
    if not args.json:
        head = f"{'type':<10}{'B':>6}{'k':>5}{'arguments':>13}{'temporary':>12}{'GFLOP':>10}{'compile':>9}"
        print(f"{args.passages:,} x {args.width} on {devices} devices of {args.topology}\n{head}  collectives (bytes)")
    for dtype, batch, k in itertools.product(args.dtype, args.batch, args.k):
        found = {"dtype": dtype, "batch": batch, "k": k, "devices": devices, "compiled": mesh is not None}
        found["flops"] = 2 * args.passages * args.width * batch
        found |= counted(devices, args.passages, args, dtype, batch)
        if mesh is not None:
            found |= compiled(mesh, args.passages, args, dtype, batch, k)
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        temporary = f"{found['temporary_bytes'] / 2**20:,.1f} MB" if mesh is not None else ""
        seconds = f"{found['compile_seconds']} s" if mesh is not None else ""
        line = f"{dtype:<10}{batch:>6}{k:>5}{found['argument_bytes'] / 2**20:>10,.1f} MB{temporary:>12}"
        print(
            f"{line}{found['flops'] / 1e9:>10,.0f}{seconds:>9}  {'; '.join(found.get('collectives', []))}", flush=True
        )


if __name__ == "__main__":
    main()
