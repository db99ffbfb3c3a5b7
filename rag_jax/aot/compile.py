"""Will a configuration fit on these chips, and how fast can it be? Answered without the chips.

The real programs (the step of each stage, the search, the embedding of passages) are compiled ahead of time for a TPU
topology by libtpu, or for fake CPU devices; for GPUs, and without libtpu, memory and work are counted from shapes. The
roofline step time is the largest of three: products at the peak rate, memory traffic, and bytes over the links, each
as if perfectly overlapped with the others; a real step takes longer.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rag_jax.aot import hardware, hlo, layer_extrapolation, operation_count, stage_programs
from rag_jax.aot.hardware import GIB, Topology
from rag_jax.aot.stage_programs import Program, Sizes
from rag_jax.errors import InputError
from rag_jax.rag import Rag
from rag_jax.system import files, logs, sharding
from rag_jax.training.config import TrainConfig

NO_LIBTPU = "libtpu is not installed (pip install 'rag-jax[compile]'): counted from shapes, nothing is compiled"
NO_GPU = "GPUs: counted from shapes, nothing is compiled"
ESTIMATED = (
    "activations are those of an unfused program in its written order, cut over the batch; weights that are gathered\n"
    "over fsdp while they are used are not among them"
)
UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclass(frozen=True)
class Wanted:
    """What is compiled, and how.

    programs: names of stages, `search`, `encode`; none: all. passages, encoder_length, generator_length: of a corpus
    that is not there yet. batch, k: questions of one search, and passages it finds for each. text_dir: where compiled
    programs are written as text. effort: of the compiler, -1 to 1. layers: how many of each stack are compiled, the
    others reckoned from them; 0: all. count_only: compile nothing.
    """

    programs: Sequence[str] = ()
    passages: int = 0
    encoder_length: int = 160
    generator_length: int = 160
    batch: int = 64
    k: int = 20
    text_dir: Path | None = None
    effort: float = 0.0
    layers: int = 0
    count_only: bool = False


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
    layers: int = 0  # of each stack that the compiler saw, and one more; 0: all
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
            "step_seconds": step, "compile_seconds": self.compile_seconds, "layers_compiled": self.layers or None,
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

    how = {"chip_config_name": "megacore"} if where.name == "v4" else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=where.text, **how).devices)
    except Exception as error:  # whatever libtpu raises: its words say what it cannot do
        raise InputError(
            f"--topology {where.text}: libtpu has no such topology ({str(error).splitlines()[0]})"
        ) from error


def cpu_devices(count: int) -> list[Any]:
    """Fake devices of the CPU; InputError where jax began with fewer of them."""
    with contextlib.suppress(RuntimeError):  # it has begun with another number
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise InputError(f"--topology cpu:{count}: there are {len(there)} devices; XLA_FLAGS sets another number")
    return there[:count]


@dataclass(frozen=True)
class StandIn:
    """A device that is not there: enough for shapes and shardings, not for compiling."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


def stand_ins(cfg: TrainConfig, where: Topology) -> Mesh:
    """The mesh of a configuration over devices that are not there, in the order of their numbers."""
    plain: list[Any] = [StandIn(i, "cpu", where.name) for i in range(where.devices)]
    mesh = sharding.make_mesh(cfg.mesh or None, plain)  # jax would ask TPUs where they stand
    away = np.array([dataclasses.replace(device, platform=where.kind) for device in plain])
    return Mesh(away.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def mesh_of(cfg: TrainConfig, where: Topology) -> tuple[Mesh, bool]:
    """The mesh of a configuration, and whether programs can be compiled for it; if not, its devices are stand-ins."""
    found = devices(where)
    if found is not None:
        return sharding.make_mesh(cfg.mesh or None, found), True
    return stand_ins(cfg, where), False


def shape_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of a device's part of an array, by its shape."""
    assert leaf.sharding is not None
    return operation_count.nbytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))


def padded_bytes(leaf: jax.ShapeDtypeStruct, layout: Any) -> float:
    """The same as it lies in memory, in tiles; 0 for an argument that the program does not use."""
    if layout is None:
        return 0.0
    shape, item = leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        shape, item = (*shape, 2), 4
    sides = [shape[axis] for axis in layout.major_to_minor]
    for i, edge in enumerate(reversed((layout.tiling or ((),))[0]), 1):
        if i <= len(sides):
            sides[-i] = -(-sides[-i] // edge) * edge
    return math.prod(sides) * item


def group_bytes(program: Program, formats: Any | None) -> dict[str, float]:
    """Bytes on a device of each group of arguments; formats: those of a compiled program, else by shape alone."""
    size: dict[int, float] = {}
    leaves = jax.tree.leaves(program.arguments)
    layouts: list[Any] = [None] * len(leaves) if formats is None else jax.tree.leaves(formats)
    for leaf, form in zip(leaves, layouts, strict=True):
        size[id(leaf)] = shape_bytes(leaf) if formats is None else padded_bytes(leaf, form.layout)
    return {name: sum(size[id(x)] for x in jax.tree.leaves(group)) for name, group in program.groups.items()}


def counted(program: Program, where: Topology, mesh: Mesh) -> Report:
    """What shapes tell: arguments, work, and an estimate of the rest."""
    jaxpr = jax.make_jaxpr(program.call)(*program.arguments).jaxpr
    memory = group_bytes(program, None)
    memory["activations and the like"] = operation_count.peak_bytes(jaxpr) / (mesh.shape["data"] * mesh.shape["fsdp"])
    chip = where.chip
    return Report(
        name=program.name,
        compiled=False,
        memory=memory,
        total=sum(memory.values()),
        limit=chip.memory_bytes / chip.devices if chip else None,
        flops={kind: flops / mesh.size for kind, flops in operation_count.work(jaxpr).items()},
        questions=program.questions,
        tokens=program.tokens,
        passages=program.passages,
    )


def compiled(program: Program, where: Topology, mesh: Mesh, effort: float, text_file: Path | None) -> Report:
    """The same, with memory, traffic and collectives of the compiled program; where it is too large for the compiler
    to place, what the compiler says of that.
    """
    report = counted(program, where, mesh)
    begun = time.perf_counter()
    options = {"exec_time_optimization_effort": effort} if effort else None
    try:
        done = program.jitted.lower(*program.arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        report.compile_seconds = time.perf_counter() - begun
        return too_large(report, str(error))
    report.compile_seconds = time.perf_counter() - begun
    memory, text = done.memory_analysis(), done.as_text()
    if text_file is not None:
        files.write_text(text_file, text)
    groups = group_bytes(program, done.input_formats[0])
    rest = memory.argument_size_in_bytes - sum(groups.values())
    report.memory = {
        **groups,
        "other arguments": max(rest, 0),
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "activations and temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes if where.kind == "tpu" else 0,
    }
    report.compiled, report.total = True, sum(report.memory.values())
    report.traffic = hlo.traffic(text)
    found = hlo.collectives(text, mesh.size)
    report.collectives, report.busiest, report.largest = hlo.by_kind(found), found[:8], hlo.largest(text, 8)
    return report


def too_large(report: Report, message: str) -> Report:
    """What libtpu says of a program that it cannot place; RuntimeError where it failed for another reason."""
    said = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    said = said or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if said is None:
        raise RuntimeError(f"{report.name}: {message}")
    report.total, report.limit = float(said[1]) * UNIT[said[2]], float(said[3]) * UNIT[said[4]]
    del report.memory["activations and the like"]
    report.memory["activations and temporaries"] = report.total - sum(report.memory.values())
    report.compiled, report.said = True, message.splitlines()[0]
    return report


def few_layers(cfg: TrainConfig, program: Program, where: Topology, mesh: Mesh, wanted: Wanted) -> Report:
    """`compiled`, where the compiler sees wanted.layers layers of each stack and once more one more of each; what it
    says of those is drawn on in a straight line. The work is counted from all layers.
    """
    report, found, times = counted(program, where, mesh), [], []
    for shallow, n in layer_extrapolation.shallow(cfg, program.name, wanted.layers):
        made = stage_programs.every(shallow, *sized(shallow, wanted), mesh, [program.name], wanted.batch, wanted.k)[
            program.name
        ]
        found.append(compiled(made, where, mesh, wanted.effort, None))
        times.append(n)
        if found[-1].said:
            return dataclasses.replace(found[-1], name=program.name, flops=report.flops, layers=wanted.layers)
    memory, traffic, collectives = (
        layer_extrapolation.line([getattr(one, name) for one in found], times)
        for name in ("memory", "traffic", "collectives")
    )
    return dataclasses.replace(
        report,
        compiled=True,
        memory=memory,
        total=sum(memory.values()),
        traffic=traffic,
        collectives=collectives,
        compile_seconds=sum(one.compile_seconds or 0.0 for one in found),
        largest=found[-1].largest,
        busiest=found[-1].busiest,
        layers=wanted.layers,
    )


def sized(cfg: TrainConfig, wanted: Wanted) -> tuple[Rag, Sizes]:
    """`programs.sizes` with what is said of the corpus."""
    return stage_programs.sizes(cfg, wanted.passages, wanted.encoder_length, wanted.generator_length)


def roofline(report: Report, where: Topology) -> None:
    """Seconds of products, of memory traffic and of links, where the chip's rates are known."""
    chip = where.chip
    if chip is None:
        return
    share = chip.devices
    report.seconds["products"] = sum(flops / chip.rate(kind) for kind, flops in report.flops.items()) * share
    if report.traffic is not None:
        report.seconds["memory"] = report.traffic * share / chip.memory_rate
        sent = sum(row["sent"] for row in report.collectives.values())
        report.seconds["links"] = sent * share / chip.link_rate


def table(cfg: TrainConfig, where: Topology, mesh: Mesh, reports: list[Report], effort: float) -> str:
    """For people."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [f"{where.text}: {where.chips} chips, mesh {axes}; all figures are per device"]
    if where.chip and where.chip.devices > 1:
        lines[0] += f", of which a chip has {where.chip.devices}"
    for r in reports:
        how = f"compiled in {r.compile_seconds:,.0f} s" if r.compiled else "counted from shapes"
        how += f" with {r.layers} and {r.layers + 1} layers, the others in a straight line" if r.layers else ""
        lines += ["", f"{r.name} ({how})"]
        lines += [f"  {name:<28}{size / GIB:>10.3f} GiB" for name, size in r.memory.items() if size]
        lines.append(f"  {'total':<28}{r.total / GIB:>10.3f} GiB")
        if r.limit is not None:
            gap = abs(r.limit - r.total) / GIB
            lines[-1] += f" of {r.limit / GIB:.2f}: " + (
                f"fits, {gap:.2f} to spare" if r.fits else f"DOES NOT FIT, by {gap:.2f}"
            )
        work = ", ".join(f"{flops / 1e9:,.1f} GFLOP {kind}" for kind, flops in r.flops.items()) or "none"
        lines.append(f"  {'products':<28}{work}")
        if r.traffic is not None:
            lines.append(f"  {'memory traffic':<28}{r.traffic / 1e9:,.2f} GB")
        for kind, row in r.collectives.items():
            lines.append(
                f"  {kind:<28}{row['count']:,.0f} times, {row['bytes'] / 1e6:,.1f} MB, {row['sent'] / 1e6:,.1f} MB sent"
            )
        if r.step_seconds:
            parts = ", ".join(f"{name} {1e3 * seconds:,.2f}" for name, seconds in r.seconds.items())
            rates = {"questions": r.questions, "tokens": r.tokens, "passages": r.passages}
            text = ", ".join(f"{n / r.step_seconds:,.0f} {name}/s" for name, n in rates.items() if n)
            lines.append(f"  {'roofline':<28}{1e3 * r.step_seconds:,.2f} ms ({parts}); {text}")
        lines += [
            f"  {'largest':<28}{x.bytes / 2**20:>10,.1f} MiB {x.shape} {x.line} {x.op[-60:]}" for x in r.largest[:3]
        ]
        lines += [
            f"  {'busiest':<28}{c.sent * c.times / 2**20:>10,.1f} MiB {c.kind} {c.shape} {c.line} {c.op[-60:]}"
            for c in r.busiest[:3]
        ]
        lines += [f"  {r.said}"] if r.said else []
    return "\n".join(lines)


def estimate(cfg: TrainConfig, topology: str, wanted: Wanted) -> dict[str, Any]:
    """Memory, work and least time of each program on a topology such as v5e:16x16: a table as `text`, and all figures.

    Devices that are here are not asked: the CPU is what JAX runs on afterwards.
    """
    where = hardware.topology(topology)
    for name in ("batch", "k", "encoder_length", "generator_length"):
        if getattr(wanted, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(wanted, name)}: at least 1")
    if wanted.layers < 0 or (wanted.layers and wanted.text_dir):
        raise InputError(f"--layers {wanted.layers}: at least 1, and not with --hlo, which writes the whole program")
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    mesh, compiles = mesh_of(cfg, where)
    if not compiles:
        logs.info(NO_GPU if where.kind == "gpu" else NO_LIBTPU)
    compiles &= not wanted.count_only
    rag, size = sized(cfg, wanted)
    found = stage_programs.every(cfg, rag, size, mesh, wanted.programs, wanted.batch, wanted.k)
    if wanted.text_dir is not None:
        wanted.text_dir.mkdir(parents=True, exist_ok=True)
    reports = []
    for name, program in found.items():
        logs.info(f"{name}: {'compiling' if compiles else 'counting'}")
        if not compiles:
            report = counted(program, where, mesh)
        elif wanted.layers:
            report = few_layers(cfg, program, where, mesh, wanted)
        else:
            text_file = wanted.text_dir and wanted.text_dir / f"{name}.txt"
            report = compiled(program, where, mesh, wanted.effort, text_file)
        roofline(report, where)
        reports.append(report)
    notes = [] if compiles else ["", ESTIMATED]
    return {
        "text": "\n".join([table(cfg, where, mesh, reports, wanted.effort), *notes]),
        "topology": where.text, "chips": where.chips, "devices": where.devices, "mesh": dict(mesh.shape),
        "chip": where.chip and where.chip.name, "jax": jax.__version__, "effort": wanted.effort,
        "passages": size.passages, "fits": all(r.fits for r in reports) if where.chip else None,
        "programs": [r.as_dict() for r in reports],
    }  # fmt: skip
