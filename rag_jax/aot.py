"""`rag-jax compile`: will a configuration fit on these chips, and how fast can it be? Answered without the chips.

The real programs (the step of each stage, the search, the embedding of passages) are compiled ahead of time for a TPU
topology by libtpu, or for fake CPU devices; for GPUs, and without libtpu, memory and work are counted from shapes. The
roofline step time is the largest of three: products at the peak rate, memory traffic, and bytes over the links, each
as if perfectly overlapped with the others; a real step takes longer.
"""

import argparse
import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from rag_jax import config, counting, hardware, hlo, logs, programs, sharding
from rag_jax.config import TrainConfig
from rag_jax.errors import InputError
from rag_jax.hardware import GIB, Topology
from rag_jax.programs import Program

NO_LIBTPU = "libtpu is not installed (pip install libtpu): counted from shapes, nothing is compiled"
NO_GPU = "GPUs: counted from shapes, nothing is compiled"
ESTIMATED = "activations are those of an unfused program in its written order, cut over the batch: rather too many"
UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclass
class Report:
    """One program on one device, in bytes and seconds; None for what is not known. memory: by what it is of."""

    name: str
    compiled: bool
    memory: dict[str, float]
    total: float
    limit: float | None
    flops: dict[str, float]
    traffic: float | None = None
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of the roofline
    compile_seconds: float | None = None
    questions: int = 0
    tokens: int = 0
    passages: int = 0
    largest: list[hlo.Largest] = field(default_factory=list)
    busiest: list[hlo.Collective] = field(default_factory=list)
    said: str = ""

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.total <= self.limit

    @property
    def step_seconds(self) -> float | None:
        return max(self.seconds.values()) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        step = self.step_seconds
        rates = {"questions": self.questions, "tokens": self.tokens, "passages": self.passages}
        return {
            "program": self.name, "compiled": self.compiled, "memory_bytes": self.memory, "total_bytes": self.total,
            "limit_bytes": self.limit, "fits": self.fits, "flops_per_chip": self.flops,
            "traffic_bytes": self.traffic, "collectives": self.collectives, "roofline_seconds": self.seconds,
            "step_seconds": step, "compile_seconds": self.compile_seconds,
            **{f"{name}_per_second": n / step for name, n in rates.items() if step and n},
            "largest": [x._asdict() for x in self.largest], "busiest": [x._asdict() for x in self.busiest],
            **({"said": self.said} if self.said else {}),
        }  # fmt: skip


def devices(where: Topology) -> list[Any] | None:
    """Devices to compile for; None where that cannot be done here."""
    if where.kind == "gpu" or (where.kind == "tpu" and importlib.util.find_spec("libtpu") is None):
        return None
    if where.kind == "cpu":
        return cpu_devices(where.devices)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about itself
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # ... and none to take from others
    from jax.experimental import topologies

    how = {"chip_config_name": "megachip"} if where.name == "v4" else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=where.text, **how).devices)
    except Exception as error:  # whatever libtpu raises: its words say what it cannot do
        raise InputError(f"--topology {where.text}: libtpu has no such topology ({str(error).splitlines()[0]})") from error


def cpu_devices(count: int) -> list[Any]:
    """Fake devices of the CPU; InputError where jax began with fewer of them."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has begun
        pass
    there = jax.devices("cpu")
    if len(there) < count:
        raise InputError(f"--topology cpu:{count}: there are {len(there)} devices; XLA_FLAGS sets another number")
    return there[:count]


def mesh_of(cfg: TrainConfig, where: Topology) -> tuple[Mesh, bool]:
    """The mesh of a configuration, and whether programs can be compiled for it; if not, its devices are stand-ins."""
    found = devices(where)
    if found is not None:
        return sharding.make_mesh(cfg.mesh or None, found), True
    return stand_in(cfg, where.devices), False


def stand_in(cfg: TrainConfig, count: int) -> Any:
    """A mesh of so many devices that are not there: enough for shapes and shardings."""
    sizes = sharding.sizes(cfg.mesh or None, count)
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def shape_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of a device's part of an array, by its shape."""
    assert leaf.sharding is not None
    return counting.nbytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))


def padded_bytes(leaf: jax.ShapeDtypeStruct, layout: Any) -> float:
    """The same as it lies in memory, in tiles; 0 for an argument that the program does not use."""
    if layout is None:
        return 0.0
    shape = leaf.sharding.shard_shape(leaf.shape)  # type: ignore[union-attr]
    shape = [*[shape[axis] for axis in layout.major_to_minor], *((2,) if leaf.dtype == jax.random.key(0).dtype else ())]
    tile = (layout.tiling or ((),))[0]
    for i, edge in enumerate(reversed(tile)):
        if i < len(shape):
            shape[-1 - i] = -(-shape[-1 - i] // edge) * edge
    return math.prod(shape) * (4 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
