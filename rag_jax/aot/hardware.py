"""Rates of chips by data sheet, and the syntax of topologies: `v5e:16x16`, `v5p:4x4x4`, `h100:8`, `cpu:8`.

Peaks are those of dense matmuls. Sources: cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x; the link rate is
half of the bidirectional one there) and NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (NVLink, one
way). A float32 matmul on a TPU at default precision is one pass in bfloat16; at the highest precision, as in exact
search over a float32 index, it is six. On a GPU at default precision it is TF32, half the rate of bfloat16.
"""

import math
import re
from dataclasses import dataclass

from rag_jax.errors import InputError

GB, GIB = 1e9, 2.0**30


@dataclass(frozen=True)
class Chip:
    """Rates of one chip.

    bfloat16, int8: FLOP/s of matmuls in these types.
    float32, highest: FLOP/s of float32 matmuls at default and at highest precision.
    memory_bytes: size of its memory.
    memory_rate: bytes/s read from or written to memory.
    link_rate: bytes/s sent to other chips.
    devices: JAX devices of one chip.
    """

    name: str
    bfloat16: float
    float32: float
    highest: float
    int8: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    devices: int = 1

    def rate(self, kind: str) -> float:
        """FLOP/s of matmuls of this kind, a name of `operation_count.work`."""
        return {"float32": self.float32, "float32 highest": self.highest, "int8": self.int8}.get(kind, self.bfloat16)


def tpu(name: str, bfloat16: float, int8: float, memory: float, rate: float, link: float, devices: int = 1) -> Chip:
    """A TPU from its data sheet, in TFLOP/s, GiB and GB/s."""
    peak = bfloat16 * 1e12
    return Chip(name, peak, peak, peak / 6, int8 * 1e12, memory * GIB, rate * GB, link * GB, devices)


def gpu(name: str, bfloat16: float, float32: float, memory: float, rate: float, link: float) -> Chip:
    """A GPU from its data sheet, in TFLOP/s, GB and GB/s; float32: without tensor cores."""
    peak = bfloat16 * 1e12
    return Chip(name, peak, peak / 2, float32 * 1e12, 2 * peak, memory * GB, rate * GB, link * GB)


TPUS = {
    "v4": tpu("TPU v4", 275, 275, 32, 1228, 300),
    "v5e": tpu("TPU v5e", 197, 393, 16, 819, 200),
    "v5p": tpu("TPU v5p", 459, 918, 95, 2765, 600),
    "v6e": tpu("TPU v6e", 918, 1836, 32, 1638, 400),
    "tpu7x": tpu("TPU7x", 2307, 2307, 192, 7380, 600, devices=2),
}
GPUS = {
    "a100": gpu("NVIDIA A100 80GB", 312, 19.5, 80, 2039, 300),
    "h100": gpu("NVIDIA H100", 989, 67, 80, 3350, 450),
    "h200": gpu("NVIDIA H200", 989, 67, 141, 4800, 450),
    "b200": gpu("NVIDIA B200", 2250, 75, 180, 7700, 900),
}


# by the beginning of device_kind, JAX's name of the devices
KINDS = {
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU7x": TPUS["tpu7x"],
    "NVIDIA A100": GPUS["a100"],
    "NVIDIA H100": GPUS["h100"],
    "NVIDIA H200": GPUS["h200"],
    "NVIDIA B200": GPUS["b200"],
}


def peak(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, by JAX's name of it; None for one that is not in the table."""
    chip = next((chip for name, chip in KINDS.items() if device_kind.startswith(name)), None)
    return None if chip is None else chip.rate(dtype) / chip.devices


@dataclass(frozen=True)
class Topology:
    """A number of connected chips of one kind.

    text: as written on the command line.
    kind: "tpu", "gpu" or "cpu".
    name: of the chip, a key of TPUS or GPUS, or "cpu".
    shape: sides of a TPU slice, or the number of chips.
    chip: its rates; None for the fake devices of a CPU.
    """

    text: str
    kind: str
    name: str
    shape: tuple[int, ...]
    chip: Chip | None

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * (self.chip.devices if self.chip else 1)


def topology(text: str) -> Topology:
    """The topology that a text describes: `NAME:AxBxC` for a TPU slice, `NAME:COUNT` for GPUs or fake CPU devices.

    InputError, with the known names, for any other text.
    """
    name, _, size = text.partition(":")
    shape = tuple(map(int, size.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) else ()
    known = {**dict.fromkeys(TPUS, "tpu"), **dict.fromkeys(GPUS, "gpu"), "cpu": "cpu"}
    kind = known.get(name)
    if kind is None or not shape or (kind == "tpu") != (len(shape) > 1):
        raise InputError(
            f"--topology {text}: write v5e:16x16 (also {', '.join(TPUS)}; v4, v5p and tpu7x have three sides), "
            f"h100:8 (also {', '.join(GPUS)}) or cpu:8"
        )
    return Topology(text, kind, name, shape, TPUS.get(name) or GPUS.get(name))
