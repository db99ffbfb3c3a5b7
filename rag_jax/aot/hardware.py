"""What chips can do, by data sheet, and how a topology is written: `v5e:16x16`, `v5p:4x4x4`, `h100:8`, `cpu:8`.

Peaks are of dense matrix products. Sources: cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x; the link rate is
half of the bidirectional one there) and NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (NVLink, one
way). A float32 product on a TPU at default precision is one pass in bfloat16; at the highest precision, as in exact
search over a float32 index, it is six. On a GPU at default precision it is TF32, half the rate of bfloat16.
"""

import math
import re
from dataclasses import dataclass

from rag_jax.errors import InputError

GB, GIB = 1e9, 2.0**30


@dataclass(frozen=True)
class Chip:
    """Rates of one chip, each per second: FLOP of products in bfloat16, in float32 at default and at highest precision,
    and of int8; bytes of memory; bytes sent to other chips. devices: that JAX sees of it.
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
        """Of products of this kind, as `counting.work` names them."""
        return {"float32": self.float32, "float32 highest": self.highest, "int8": self.int8}.get(kind, self.bfloat16)


def tpu(name: str, bfloat16: float, int8: float, memory: float, rate: float, link: float, devices: int = 1) -> Chip:
    """TFLOP/s, GiB, GB/s."""
    peak = bfloat16 * 1e12
    return Chip(name, peak, peak, peak / 6, int8 * 1e12, memory * GIB, rate * GB, link * GB, devices)


def gpu(name: str, bfloat16: float, float32: float, memory: float, rate: float, link: float) -> Chip:
    """TFLOP/s, GB, GB/s; float32: outside of the tensor cores."""
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


# what JAX calls the devices: the beginning of device_kind
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
    """FLOP/s of one device as JAX names it, None for one that is not in the table."""
    found = next((chip for name, chip in KINDS.items() if device_kind.startswith(name)), None)
    return None if found is None else found.rate(dtype) / found.devices


@dataclass(frozen=True)
class Topology:
    """Chips of one kind. kind: "tpu", "gpu" or "cpu"; chip: None for the fake devices of a CPU."""

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
        """As JAX counts them."""
        return self.chips * (self.chip.devices if self.chip else 1)


def topology(text: str) -> Topology:
    """`NAME:AxBxC` for a TPU slice, `NAME:COUNT` for GPUs or for fake CPU devices; InputError with the known names."""
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
