"""The header of a safetensors file, for writers that do not hold all its tensors in memory at once.

A file is the header's length (uint64, little-endian), the header (JSON, padded with spaces), and the tensors' bytes.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}  # type -> bytes an element

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (type, shape), in the order of the file


def spans(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """Byte range [begin, end) of each tensor, counted from the end of the header."""
    found, end = {}, 0
    for name, (kind, shape) in tensors.items():
        begin, end = end, end + WIDTHS[kind] * math.prod(shape)
        found[name] = begin, end
    return found


def header(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """The header as bytes, with its length in front, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    for name, span in spans(tensors).items():
        kind, shape = tensors[name]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
