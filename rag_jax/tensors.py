"""Checkpoint files: tensors read one at a time, by name, and written in shards.

safetensors, single or sharded; torch's .bin only where torch is installed, and only as plain weights.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag_jax.errors import InputError

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Tensors:
    """The tensors of one checkpoint: name -> (shape, type), and a function that reads one of them. Types are named as
    in NumPy where they can be weights.
    """

    where: Path
    shapes: dict[str, tuple[tuple[int, ...], str]]
    read: Callable[[str], np.ndarray]

    @property
    def bytes(self) -> int:
        """Of all weights, as they lie on disk."""
        return sum(int(np.prod(shape)) * (4 if kind == "float32" else 2) for shape, kind in self.shapes.values())


def open_tensors(directory: Path) -> Tensors:
    """The checkpoint of a Hugging Face directory; InputError where there is none or a file is damaged."""
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
    """tensor name -> file name, of a sharded checkpoint."""
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
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
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
        # opened anew for every tensor: the pages of a mapped file count as memory until it is closed
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
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds
            raise InputError(f"{file}: not a checkpoint of plain weights ({str(error).splitlines()[0]})") from error
        tensors |= {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    shapes = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:  # NumPy has none: by way of its bits
            return np.asarray(tensor.view(torch.int16).numpy()).view("bfloat16")
        return tensor.numpy()

    return Tensors(where, shapes, read)


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Writes model.safetensors, or shards with their index where there is more than `shard_bytes`; only one shard is
    in memory at a time. Returns name -> bytes.
    """
    from safetensors.numpy import save_file

    files: list[list[str]] = []
    sizes: dict[str, int] = {}
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, directory / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(shard))
        sizes |= {name: tensor.nbytes for name, tensor in shard.items()}
    if len(files) == 1:
        (directory / "part-0").rename(directory / SAFE)
        return sizes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{i}").rename(directory / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sizes


def _shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    yield shard
