"""Will a configuration fit on these chips, and how fast can it be? Answered without the chips.

The real programs (the step of each stage, the search, the embedding of passages) are compiled ahead of time for a TPU
topology by libtpu, or for fake CPU devices; for GPUs, and without libtpu, memory and work are counted from shapes. The
roofline step time is the largest of three times: matmuls at the peak rate, memory traffic, and bytes over the links,
as if they overlapped perfectly; a real step takes longer.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rag_jax.aot import child_process, hardware, layer_extrapolation, stage_programs
from rag_jax.aot.hardware import GIB, Topology
from rag_jax.aot.memory import ProgramNeeds, compiled, counted
from rag_jax.aot.stage_programs import Sizes, TracedProgram
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


@dataclass(frozen=True)
class CompileOptions:
    """Options of `rag-jax compile`: which programs are compiled, and how.

    programs: names of stages, `search`, `encode`; none: all.
    passages: size of a corpus that is not built yet.
    encoder_length, generator_length: tokens of its passages for the encoder and the generator.
    batch, k: questions of one search, and passages that it finds for each.
    text_dir: directory that compiled programs are written to, as text.
    effort: of the compiler, -1 to 1.
    layers: layers of each stack that are compiled, from which the others are extrapolated; 0: all.
    count_only: compile nothing.
    apart: arguments of `rag-jax` that compile one program for TPUs, whose name is added, in a process of its own: a
      crash of the compiler ends that one alone. (): all are compiled in this process.
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
    apart: Sequence[str] = ()


def has_libtpu() -> bool:
    """Whether programs can be compiled for TPUs here."""
    return importlib.util.find_spec("libtpu") is not None


def devices(where: Topology) -> list[Any] | None:
    """Devices to compile for; None where that cannot be done here."""
    if where.kind == "gpu" or (where.kind == "tpu" and not has_libtpu()):
        return None
    if where.kind == "cpu":
        return cpu_devices(where.devices)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU whose metadata could be queried
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # ... and none that processes would compete for
    from jax.experimental import topologies

    how = {"chip_config_name": "megacore"} if where.name == "v4" else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=where.text, **how).devices)
    except Exception as error:  # whatever libtpu raises: its words say what it cannot do
        raise InputError(
            f"--topology {where.text}: libtpu has no such topology ({str(error).splitlines()[0]})"
        ) from error


def cpu_devices(count: int) -> list[Any]:
    """Fake devices of the CPU; InputError where jax was initialised with fewer of them."""
    with contextlib.suppress(RuntimeError):  # jax is initialised already, with its own number of devices
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise InputError(f"--topology cpu:{count}: there are {len(there)} devices; XLA_FLAGS sets another number")
    return there[:count]


@dataclass(frozen=True)
class StandIn:
    """Substitute for a device that is not there: enough for shapes and shardings, not for compiling."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


def stand_ins(cfg: TrainConfig, where: Topology) -> Mesh:
    """The mesh of a configuration over substitute devices, in the order of their ids."""
    # made of "cpu" devices, since jax would ask TPU devices for their coordinates
    plain: list[Any] = [StandIn(i, "cpu", where.name) for i in range(where.devices)]
    mesh = sharding.make_mesh(cfg.mesh or None, plain)
    away = np.array([dataclasses.replace(device, platform=where.kind) for device in plain])
    return Mesh(away.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def mesh_of(cfg: TrainConfig, where: Topology) -> tuple[Mesh, bool]:
    """The mesh of a configuration, and whether programs can be compiled for it; if not, its devices are substitutes."""
    targets = devices(where)
    if targets is not None:
        return sharding.make_mesh(cfg.mesh or None, targets), True
    return stand_ins(cfg, where), False


def few_layers(
    cfg: TrainConfig, program: TracedProgram, where: Topology, mesh: Mesh, wanted: CompileOptions
) -> ProgramNeeds:
    """Report of a program from compiling it with few layers, extrapolated linearly.

    It is compiled with wanted.layers layers in every stack, and again with one more layer in each deeper stack in turn.
    The work is not extrapolated but counted from all layers.
    """
    report, measured, times = counted(program, where, mesh), [], []
    for shallow, n in layer_extrapolation.shallow(cfg, program.name, wanted.layers):
        small = stage_programs.every(shallow, *sized(shallow, wanted), mesh, [program.name], wanted.batch, wanted.k)[
            program.name
        ]
        measured.append(compiled(small, where, mesh, wanted.effort, None))
        times.append(n)
        if measured[-1].said:  # too large for the compiler already
            return dataclasses.replace(measured[-1], name=program.name, flops=report.flops, layers=wanted.layers)
    memory, traffic, collectives = (
        layer_extrapolation.line([getattr(one, name) for one in measured], times)
        for name in ("memory", "traffic", "collectives")
    )
    return dataclasses.replace(
        report,
        compiled=True,
        memory=memory,
        total=sum(memory.values()),
        traffic=traffic,
        collectives=collectives,
        compile_seconds=sum(one.compile_seconds or 0.0 for one in measured),
        largest=measured[-1].largest,
        busiest=measured[-1].busiest,
        layers=wanted.layers,
    )


def sized(cfg: TrainConfig, wanted: CompileOptions) -> tuple[Rag, Sizes]:
    """`stage_programs.sizes` with the corpus options of the command."""
    return stage_programs.sizes(cfg, wanted.passages, wanted.encoder_length, wanted.generator_length)


def roofline(report: ProgramNeeds, where: Topology) -> None:
    """Adds the roofline to a report: seconds of matmuls, memory traffic and links, where the chip's rates are known."""
    chip = where.chip
    if chip is None:
        return
    share = chip.devices
    report.seconds["products"] = sum(flops / chip.rate(kind) for kind, flops in report.flops.items()) * share
    if report.traffic is not None:
        report.seconds["memory"] = report.traffic * share / chip.memory_rate
        sent = sum(row["sent"] for row in report.collectives.values())
        report.seconds["links"] = sent * share / chip.link_rate


def table(cfg: TrainConfig, where: Topology, mesh: Mesh, reports: list[ProgramNeeds], effort: float) -> str:
    """The reports as a readable table."""
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
        if r.limit is not None and not r.crashed:
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


def needs(
    cfg: TrainConfig, program: TracedProgram, where: Topology, mesh: Mesh, wanted: CompileOptions
) -> ProgramNeeds:
    """Compiles a program in this process and returns its needs."""
    if wanted.layers:
        return few_layers(cfg, program, where, mesh, wanted)
    text_file = wanted.text_dir and wanted.text_dir / f"{program.name}.txt"
    return compiled(program, where, mesh, wanted.effort, text_file)


def estimate(cfg: TrainConfig, topology: str, wanted: CompileOptions, out: Path | None = None) -> dict[str, Any]:
    """Memory, work and least time of each program on a topology such as v5e:16x16: a table as `text`, and all figures.

    out: a file for the needs of the one program asked for, which child_process reads.
    JAX is set to run on the CPU, unless JAX_PLATFORMS is set: accelerators that are here are not used.
    """
    if out is not None:
        child_process.no_core_dump()
    where = hardware.topology(topology)
    for name in ("batch", "k", "encoder_length", "generator_length"):
        if getattr(wanted, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(wanted, name)}: at least 1")
    if wanted.layers < 0 or (wanted.layers and wanted.text_dir):
        raise InputError(f"--layers {wanted.layers}: at least 1, and not with --hlo, which writes the whole program")
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    apart = where.kind == "tpu" and bool(wanted.apart) and not wanted.count_only and has_libtpu()
    mesh, compiles = (stand_ins(cfg, where), True) if apart else mesh_of(cfg, where)
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
        if apart:
            report = child_process.needs(wanted.apart, name, partial(counted, program, where, mesh))
        else:
            report = needs(cfg, program, where, mesh, wanted) if compiles else counted(program, where, mesh)
        roofline(report, where)
        reports.append(report)
    if out is not None:
        files.write_text(out, json.dumps(dataclasses.asdict(reports[0])))
    notes = [] if compiles else ["", ESTIMATED]
    return {
        "text": "\n".join([table(cfg, where, mesh, reports, wanted.effort), *notes]),
        "topology": where.text, "chips": where.chips, "devices": where.devices, "mesh": dict(mesh.shape),
        "chip": where.chip and where.chip.name, "jax": jax.__version__, "effort": wanted.effort,
        "passages": size.passages, "fits": all(r.fits for r in reports) if where.chip else None,
        "programs": [r.as_dict() for r in reports],
        **({"exit_status": 2} if any(r.crashed for r in reports) else {}),
    }  # fmt: skip
