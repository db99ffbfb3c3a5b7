"""Checkpoint files: reads tensors one at a time, by name, and writes them one at a time, in shards.

Formats: safetensors, single or sharded; torch's .bin only for reading, only where torch is installed, and only with
plain weights.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.errors import InputError
from rag_jax.system import safetensors_header

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in the order in which a file stores its tensors
SHARD_BYTES = 5 * 10**9

Shapes = dict[str, tuple[tuple[int, ...], str]]  # name -> (shape, type); types of FLOATS have their NumPy names


@dataclass(frozen=True)
class Tensors:
    """The tensors of one checkpoint.

    where: the file with them, or their index.
    shapes: name -> (shape, type).
    read: reads one tensor, by name.
    """

    where: Path
    shapes: Shapes
    read: Callable[[str], np.ndarray]


def open_tensors(directory: Path) -> Tensors:
    """Opens the checkpoint of a Hugging Face directory; InputError where there is none or a file is damaged."""
    if (directory / SAFE_INDEX).is_file():
        return _open_safe(directory / SAFE_INDEX, _weight_map(directory / SAFE_INDEX))
    if (directory / SAFE).is_file():
        return _open_safe(directory / SAFE, None)
    for name in (BIN, BIN_INDEX):
        if (directory / name).is_file():
            files = sorted(set(_weight_map(directory / name).values())) if name == BIN_INDEX else [BIN]
            return _open_bin(directory / name, files)
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    raise InputError(f"{directory}: neither {SAFE} nor {BIN} here; found {', '.join(found[:10]) or 'nothing'}")


def _weight_map(index: Path) -> dict[str, str]:
    """The table tensor name -> file name of a sharded checkpoint."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: not the index of a sharded checkpoint ({error!r})") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise InputError(f"{index}: weight_map must give a file name for every tensor")
    for name in sorted(set(found.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name}, which is not beside it; download the checkpoint again")
    return found


def _open_safe(where: Path, weight_map: dict[str, str] | None) -> Tensors:
    from safetensors import SafetensorError, safe_open

    files = sorted(set(weight_map.values())) if weight_map is not None else [where.name]
    shapes: Shapes = {}
    homes: dict[str, Path] = {}
    for file in (where.parent / name for name in files):
        try:
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(name)
                    kind = part.get_dtype()
                    shapes[name] = (tuple(part.get_shape()), FLOATS.get(kind, kind))
                    homes[name] = file
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or not safetensors ({error}); download it again") from error
    for name in sorted(weight_map or {}):
        if name not in homes or homes[name].name != (weight_map or {})[name]:
            raise InputError(f"{where}: says that {name} is in {(weight_map or {})[name]}, which does not have it")

    def read(name: str) -> np.ndarray:
        # reopened for every tensor: the pages of a mapped file count as memory until it is closed
        with safe_open(homes[name], "np") as opened:
            return opened.get_tensor(name)

    return Tensors(where, shapes, read)


def _open_bin(where: Path, files: list[str]) -> Tensors:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{where}: a pickled checkpoint, which only torch can read; pip install torch, or use a copy with {SAFE}"
        ) from None
    tensors: dict[str, Any] = {}
    for file in (where.parent / name for name in files):
        try:
            # a file from before torch 1.6 is no zip archive and cannot be memory-mapped
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # torch raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{file}: not a checkpoint of plain weights ({reason})") from error
        if not isinstance(found, dict) or not any(isinstance(value, torch.Tensor) for value in found.values()):
            raise InputError(f"{file}: not a checkpoint of plain weights: it holds no tensors by name")
        tensors |= {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    shapes = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:  # torch gives NumPy no bfloat16, so its bits go as int16
            return np.asarray(tensor.view(torch.int16).numpy()).view("bfloat16")
        return tensor.numpy()

    return Tensors(where, shapes, read)


def write_tensors(
    directory: Path, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or shards with an index where there are more than `shard_bytes` of weights.

    shapes: all tensors; they fill the shards in this order.
    tensors: (name, tensor) of each, in any order; each is freed before the next is asked for.
    InputError for a type that weights cannot have, ValueError where `tensors` are not those of `shapes`.
    """
    for name, (_, kind) in shapes.items():
        if kind not in FLOATS.values():
            raise InputError(f"{name} is of type {kind}; weights are written as {', '.join(FLOATS.values())}")
    shards = _shards(shapes, shard_bytes)
    one = len(shards) == 1
    files = [SAFE if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    places: dict[str, int] = {}
    for file, shard in zip(files, shards, strict=True):
        places |= _write_header(directory / file, shard)
    for name, tensor in tensors:
        if name not in places or (tensor.shape, str(tensor.dtype)) != shapes[name]:
            raise ValueError(f"{directory}: {name} as {tensor.dtype}{tensor.shape} was not announced, or came twice")
        with (directory / weight_map[name]).open("r+b") as opened:
            opened.seek(places.pop(name))
            opened.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        del tensor  # before the next one is made
    if places:
        raise ValueError(f"{directory}: {', '.join(places)} did not come")
    if one:
        return
    total = sum(_bytes(*found) for found in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    return math.prod(shape) * (4 if kind == "float32" else 2)


def _shards(shapes: Shapes, limit: int) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    size = 0
    for name, found in shapes.items():
        if shards[-1] and size + _bytes(*found) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = found
        size += _bytes(*found)
    return shards


def _write_header(path: Path, shapes: Shapes) -> dict[str, int]:
    """Writes the header of a safetensors file; returns each tensor's position in the file, in bytes.

    safetensors' own writer, which gives the same header, needs all tensors in memory at once.
    """
    types = {ours: theirs for theirs, ours in FLOATS.items()}
    ordered = sorted(shapes.items(), key=lambda item: (list(types).index(item[1][1]), item[0]))
    tensors = {name: (types[kind], shape) for name, (shape, kind) in ordered}
    header = safetensors_header.header(tensors, {"format": "pt"})
    path.write_bytes(header)
    return {name: len(header) + begin for name, (begin, _) in safetensors_header.spans(tensors).items()}
