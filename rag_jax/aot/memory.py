"""Memory and work of one program on one device: counted from its shapes, or read from the compiled program."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rag_jax.aot import hlo, operation_count
from rag_jax.aot.hardware import Topology
from rag_jax.aot.stage_programs import TracedProgram
from rag_jax.system import files

UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


@dataclass
class ProgramNeeds:
    """Needs of one program on one device, in bytes and seconds; None for what is not known.

    compiled: whether figures are those of the compiled program, else they are counted from shapes.
    memory: bytes by use (parameters, index, ...); total is their sum.
    limit: bytes of a device's memory.
    flops: of matmuls, by kind, see `operation_count.work`.
    traffic: bytes read from and written to memory.
    collectives: count, bytes and bytes sent, by kind, see `hlo.by_kind`.
    seconds: of the roofline, by resource.
    questions, tokens, passages: of one run.
    largest, busiest: the largest arrays, and the collectives that send most.
    layers: if not 0, figures are extrapolated from this many layers of each stack, and one more.
    said: message of the compiler, if the program is too large for it.
    """

    name: str
    compiled: bool
    memory: dict[str, float]
    total: float
    limit: float | None
    flops: dict[str, float]
    traffic: float | None = None
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float | None = None
    questions: int = 0
    tokens: int = 0
    passages: int = 0
    largest: list[hlo.Largest] = field(default_factory=list)
    busiest: list[hlo.Collective] = field(default_factory=list)
    layers: int = 0
    said: str = ""
    crashed: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProgramNeeds":
        """From what dataclasses.asdict made, through JSON."""
        largest = [hlo.Largest(*row) for row in values["largest"]]
        return cls(**{**values, "largest": largest, "busiest": [hlo.Collective(*row) for row in values["busiest"]]})

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None or self.crashed else self.total <= self.limit

    @property
    def step_seconds(self) -> float | None:
        return max(self.seconds.values()) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for --json."""
        step = self.step_seconds
        rates = {"questions": self.questions, "tokens": self.tokens, "passages": self.passages}
        return {
            "program": self.name, "compiled": self.compiled, "memory_bytes": self.memory, "total_bytes": self.total,
            "limit_bytes": self.limit, "fits": self.fits, "flops_per_chip": self.flops,
            "traffic_bytes": self.traffic, "collectives": self.collectives, "roofline_seconds": self.seconds,
            "step_seconds": step, "compile_seconds": self.compile_seconds, "layers_compiled": self.layers or None,
            **{f"{name}_per_second": n / step for name, n in rates.items() if step and n},
            "largest": [x._asdict() for x in self.largest], "busiest": [x._asdict() for x in self.busiest],
            **({"said": self.said} if self.said else {}), **({"crashed": True} if self.crashed else {}),
        }  # fmt: skip


def shape_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of one device's shard of an array, by its shape."""
    assert leaf.sharding is not None
    return operation_count.nbytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))


def padded_bytes(leaf: jax.ShapeDtypeStruct, layout: Any) -> float:
    """Bytes of one device's shard of an array in its memory layout, with the padding of tiles.

    layout: None for an argument that the program does not use, which has 0.
    """
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


def group_bytes(program: TracedProgram, formats: Any | None) -> dict[str, float]:
    """Bytes on a device of each group of arguments.

    formats: memory layouts of a compiled program's arguments; None: by shape alone.
    """
    size: dict[int, float] = {}
    leaves = jax.tree.leaves(program.arguments)
    layouts: list[Any] = [None] * len(leaves) if formats is None else jax.tree.leaves(formats)
    for leaf, form in zip(leaves, layouts, strict=True):
        size[id(leaf)] = shape_bytes(leaf) if formats is None else padded_bytes(leaf, form.layout)
    return {name: sum(size[id(x)] for x in jax.tree.leaves(group)) for name, group in program.groups.items()}


def counted(program: TracedProgram, where: Topology, mesh: Mesh) -> ProgramNeeds:
    """Report from shapes alone: arguments and work are exact, activations are estimated."""
    jaxpr = jax.make_jaxpr(program.call)(*program.arguments).jaxpr
    memory = group_bytes(program, None)
    # activations are assumed to be sharded over the batch only, which is over data and fsdp
    memory["activations and the like"] = operation_count.peak_bytes(jaxpr) / (mesh.shape["data"] * mesh.shape["fsdp"])
    chip = where.chip
    return ProgramNeeds(
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


def compiled(
    program: TracedProgram, where: Topology, mesh: Mesh, effort: float, text_file: Path | None
) -> ProgramNeeds:
    """Report with memory, traffic and collectives of the compiled program; see `too_large` if it does not compile.

    effort: of the compiler, -1 to 1.
    text_file: where the program's text is written; None: nowhere.
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


def too_large(report: ProgramNeeds, message: str) -> ProgramNeeds:
    """Report of a program that does not fit in memory, from libtpu's error; RuntimeError if it failed otherwise."""
    said = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    said = said or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if said is None:
        raise RuntimeError(f"{report.name}: {message}")
    report.total, report.limit = float(said[1]) * UNIT[said[2]], float(said[3]) * UNIT[said[4]]
    del report.memory["activations and the like"]
    report.memory["activations and temporaries"] = report.total - sum(report.memory.values())
    report.compiled, report.said = True, message.splitlines()[0]
    return report
