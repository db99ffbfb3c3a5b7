"""Collectives, memory traffic and largest arrays of a compiled program, read from its HLO text.

The text is that of one device (`compiled.as_text()`, after partitioning), so all sizes are per device. The body of a
loop is counted once per iteration where the text gives their number: as XLA's `known_trip_count`, or as the constant
that the counter is compared with (loops that jax writes count from 0 in steps of 1).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

ITEM = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
ITEM |= {"u64": 8, "c64": 8, "c128": 16, "token": 0}  # all others have four bytes, or one
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+(?:[a-z]\d\w*)?|pred|token)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True)
class Op:
    """One instruction; `attributes` is the text after its operands."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; "" where it does not occur."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Computations = dict[str, dict[str, Op]]


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a module, each as its instructions by name, and the name of the entry computation."""
    computations: Computations = {}
    entry, ops = "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            ops = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif match := _OP.match(line):
            end = _closing(match[4])
            operands = tuple(re.findall(r"%([\w.\-]+)", match[4][:end])) or tuple(match[4][:end].split(", "))
            ops[match[1]] = Op(match[1], match[2], match[3], operands, match[4][end:])
    return computations, entry


def _closing(text: str) -> int:
    """Position of the bracket that closes the one opened just before `text`."""
    depth = 1
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(text)


def arrays(shape: str) -> list[tuple[float, str]]:
    """(bytes, text) of every array in a shape, which may be a tuple."""
    found = []
    for dtype, dims, _ in _ARRAY.findall(shape):
        item = ITEM.get(dtype, 1 if dtype.startswith("f8") else 4)
        found.append((item * math.prod(int(x) for x in dims.split(",") if x), f"{dtype}[{dims}]"))
    return found


def size(shape: str) -> float:
    """Bytes of all arrays in a shape."""
    return sum(nbytes for nbytes, _ in arrays(shape))


def trips(loop: Op, computations: Computations) -> int:
    """Number of iterations of a while loop; 0 where the text does not say."""
    known = loop.attribute(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')
    if known:
        return int(known)
    condition = computations.get(loop.attribute(r"condition=%?([\w.\-]+)"), {})
    for op in condition.values():
        if op.kind == "compare" and "direction=LT" in op.attributes:
            for name in op.operands:
                if name in condition and condition[name].kind == "constant":
                    return int(condition[name].operands[0])
    return 0


class Times(NamedTuple):
    """How often each computation runs (of), and the loops whose iterations are unknown and counted as one (unknown)."""

    of: dict[str, int]
    unknown: list[str]


def times(computations: Computations, entry: str) -> Times:
    """How often each computation of a program runs.

    Fused computations and reducers are left out: their instructions are part of the one that calls them.
    """
    of: dict[str, int] = defaultdict(int)
    unknown: list[str] = []

    def visit(name: str, count: int) -> None:
        of[name] += count
        for op in computations[name].values():
            if op.kind not in ("while", "conditional", "call", "async-start"):
                continue
            n = 1
            if op.kind == "while" and not (n := trips(op, computations)):
                unknown.append(op.name)
                n = 1
            called = _CALLED.findall(op.attributes)
            called += [x.strip().lstrip("%") for found in _BRANCHES.findall(op.attributes) for x in found.split(",")]
            for other in dict.fromkeys(called):
                if other in computations:
                    visit(other, count * n)

    visit(entry, 1)
    return Times(dict(of), unknown)


class Collective(NamedTuple):
    """A collective operation.

    bytes: of its result on a device, per run.
    sent: bytes that a device sends for it in a ring, per run.
    group: number of devices that take part.
    times: runs in one run of the program.
    loop: whether it is inside a loop.
    op: path of names in the program.
    line: source line, see `source_lines`.
    """

    kind: str
    shape: str
    bytes: float
    sent: float
    group: int
    times: int
    loop: bool
    op: str
    line: str


def group_size(op: Op) -> int:
    """Number of devices that take part, from any of XLA's notations of replica_groups; 0 for all."""
    if axes := op.attribute(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}"):
        mesh = dict(re.findall(r"'(\w+)'=(\d+)", op.attribute(r"replica_groups=mesh\[([^\]]*)\]")))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or mesh[axis]) for axis, part in parts)
    if per_group := op.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(per_group)
    first = op.attribute(r"replica_groups=\{\{([\d,]*)\}")
    return len(first.split(",")) if first else 0


def _result(op: Op) -> str:
    """Shape of the result of a collective, without the operands that asynchronous ones list before it."""
    if not op.kind.endswith("-start") or op.kind.startswith("all-reduce") or not op.shape.startswith("("):
        return op.shape
    found = arrays(op.shape)
    real = [text for nbytes, text in found if not text.endswith("[]")]
    return ", ".join(real[len(real) // 2 :])


def sent(kind: str, nbytes: float, group: int) -> float:
    """Bytes that each of `group` devices sends in a ring for a collective whose result has `nbytes` on it."""
    if kind == "collective-permute":
        return nbytes
    others = (group - 1) / max(group, 1)
    return nbytes * {"all-reduce": 2 * others, "reduce-scatter": group - 1.0}.get(kind, others)


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a program for `devices` devices, those that send most first.

    Where a TPU's compiler spreads one over several fusions (a chain, with one channel), it counts once.
    """
    computations, entry = parse(text)
    counts = times(computations, entry).of
    counts |= {name: 1 for name in computations if name not in counts}  # fused computations, which `times` leaves out
    frames, found, seen = source_lines(text), [], set()
    for name, ops in computations.items():
        for op in ops.values():
            kind = op.kind.removesuffix("-start")
            chain = op.attribute(r"channel_id=(\d+)"), op.attribute(r'chain_id="(\d+)"')
            if kind not in COLLECTIVES or (kind, chain) in seen:
                continue
            seen |= {(kind, chain)} if chain[1] else set()
            group = group_size(op) or devices
            nbytes = size(_result(op))
            shape = ", ".join(text for _, text in arrays(_result(op))[:3])
            where = op.attribute(r'op_name="([^"]*)"'), frames.get(op.attribute(r"stack_frame_id=(\d+)"), "")
            line = where[1] or op.attribute(r'source_file="([^"]*)"')
            found.append(
                Collective(
                    kind,
                    shape,
                    nbytes,
                    sent(kind, nbytes, group),
                    group,
                    counts[name],
                    counts[name] > 1,
                    where[0],
                    line,
                )
            )
    return sorted(found, key=lambda c: -c.sent * c.times)


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Count, bytes and bytes sent of one run of the program, by kind of collective."""
    table: dict[str, dict[str, float]] = {}
    for c in found:
        row = table.setdefault(c.kind, {"count": 0, "bytes": 0.0, "sent": 0.0})
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["sent"] += c.times * c.sent
    return dict(sorted(table.items()))


def source_lines(text: str) -> dict[str, str]:
    """`directory/file:line` of every stack frame in the text, by the frame's number."""

    def table(title: str, pattern: str) -> list[tuple[str, ...]]:
        section = re.search(rf"^{title}\n(.*?)\n\n", text, re.M | re.S)
        return re.findall(pattern, section[1], re.M) if section else []

    files = {number: "/".join(path.split("/")[-2:]) for number, path in table("FileNames", r'^(\d+) "(.*)"$')}
    places = {
        number: f"{files.get(file, '')}:{line}"
        for number, file, line in table("FileLocations", r"^(\d+) \{file_name_id=(\d+) .*?line=(\d+)")
    }
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+)")
    return {number: places.get(place, "") for number, place in frames}


def in_memory(shape: str) -> float:
    """Bytes of the arrays of a shape that are in main memory: a TPU's compiler marks others with S(1) and so on."""
    return sum(
        arrays(f"{dtype}[{dims}]")[0][0]
        for dtype, dims, layout in _ARRAY.findall(shape)
        if not re.search(r"S\(", layout)
    )


def _read(op: Op, position: int, operand: Op, computations: Computations) -> float:
    """Bytes that an instruction reads of an operand; if it only slices or gathers from it, those of the result."""
    whole = in_memory(operand.shape)
    if op.kind in ("dynamic-slice", "gather", "slice"):
        return min(whole, size(op.shape)) if position == 0 else whole
    if op.kind == "dynamic-update-slice":
        return 0.0 if position == 0 else whole
    body = computations.get(op.attribute(r"calls=%?([\w.\-]+)"), {})
    for parameter in body.values():
        if parameter.kind == "parameter" and parameter.operands == (str(position),):
            users = [other for other in body.values() if parameter.name in other.operands]
            if users and all(u.kind in ("dynamic-slice", "gather", "slice", "dynamic-update-slice") for u in users):
                slices = [u for u in users if u.operands[0] == parameter.name]
                if len(slices) == len(users):
                    return min(whole, sum(size(u.shape) for u in slices if u.kind != "dynamic-update-slice"))
    return whole


def _written(op: Op, computations: Computations) -> float:
    """Bytes that an instruction writes; if it updates an array in place, those of the update."""
    body = computations.get(op.attribute(r"calls=%?([\w.\-]+)"), {})
    update = next(
        (x for x in body.values() if x.kind == "dynamic-update-slice" and size(x.shape) == size(op.shape)), None
    )
    if op.kind == "dynamic-update-slice":
        return 0.0  # `_read` counts the update, which is about as large as what is written
    if update is not None and update.operands[1] in body:
        return size(body[update.operands[1]].shape)
    return in_memory(op.shape)


def traffic(text: str) -> float:
    """Bytes that a device reads from and writes to its main memory: operands and results of every instruction."""
    computations, entry = parse(text)
    total = 0.0
    for name, count in times(computations, entry).of.items():
        ops = computations[name]
        for op in ops.values():
            if op.kind in FREE or op.kind.endswith("-done"):
                continue
            read = sum(_read(op, i, ops[x], computations) for i, x in enumerate(op.operands) if x in ops)
            total += count * (read + _written(op, computations))
    return total


class Largest(NamedTuple):
    """An array that a program computes: bytes on a device, shape, path of names and source line."""

    bytes: float
    shape: str
    op: str
    line: str


def largest(text: str, n: int) -> list[Largest]:
    """The n largest arrays that instructions write to main memory; one for each shape and source line."""
    computations, entry = parse(text)
    frames = source_lines(text)
    found: dict[tuple[str, str], Largest] = {}  # by shape and line
    for name in times(computations, entry).of:
        for op in computations[name].values():
            if op.kind in FREE or op.kind.endswith("-done"):
                continue
            for dtype, dims, layout in _ARRAY.findall(op.shape):
                if re.search(r"S\(", layout):
                    continue
                nbytes, shape = arrays(f"{dtype}[{dims}]")[0]
                path = op.attribute(r'op_name="([^"]*)"')
                line = frames.get(op.attribute(r"stack_frame_id=(\d+)"), "")
                found.setdefault((shape, line), Largest(nbytes, shape, path, line))
    return sorted(found.values(), key=lambda x: -x.bytes)[:n]
