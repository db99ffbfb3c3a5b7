"""A shard: the embeddings of consecutive passages in one file, which says what it is.

The file is in the safetensors format. Its tensors are `embeddings` [X, E] (F32, BF16 or I8) and, for I8, `scale` [X]
F32; its metadata is the shard's identity and the sha256 of all that comes after the header.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from rag_jax import files
from rag_jax.errors import InputError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
BLOCK = 2**24  # bytes hashed at a time


@dataclass(frozen=True)
class Identity:
    """Rows first ... last - 1 of a corpus under an encoder; corpus_hash is that of the corpus that they were read from,
    which a later one may extend.
    """

    corpus_hash: str
    encoder_hash: str
    first: int
    last: int
    width: int
    dtype: str

    @property
    def name(self) -> str:
        """The file's; names are in the order of the rows."""
        return f"rows-{self.first:012d}-{self.last:012d}.safetensors"

    @property
    def rows(self) -> int:
        return self.last - self.first


def cut(corpus_hash: str, encoder_hash: str, rows: range, shard_rows: int, width: int, dtype: str) -> list[Identity]:
    """The shards that `rows` make, each of `shard_rows` but the last."""
    return [
        Identity(corpus_hash, encoder_hash, first, min(first + shard_rows, rows.stop), width, dtype)
        for first in range(rows.start, rows.stop, shard_rows)
    ]


def tensors(embeddings_XE: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """What is stored for float32 embeddings; int8: row / scale rounded, with scale = max |row| / 127."""
    if dtype == "float32":
        return {"embeddings": np.ascontiguousarray(embeddings_XE, np.float32)}
    if dtype == "bfloat16":
        return {"embeddings": embeddings_XE.astype(jnp.bfloat16)}
    scale_X = np.abs(embeddings_XE).max(1, initial=0).astype(np.float32) / np.float32(127)
    steps_XE = embeddings_XE / np.where(scale_X > 0, scale_X, 1)[:, None]
    # the scale first: it wants to begin at a multiple of 4 bytes
    return {"scale": scale_X, "embeddings": np.rint(steps_XE).clip(-127, 127).astype(np.int8)}


def write(stream: BinaryIO, identity: Identity, embeddings_XE: np.ndarray) -> None:
    """Fills an empty unbuffered file; InputError for an embedding that is not finite."""
    if embeddings_XE.shape != (identity.rows, identity.width):
        raise ValueError(f"embeddings {embeddings_XE.shape} for rows [{identity.rows}, {identity.width}]")
    finite_X = np.isfinite(embeddings_XE).all(1)
    if not finite_X.all():
        bad = identity.first + int(np.flatnonzero(~finite_X)[0])
        raise InputError(f"passage row {bad}: its embedding is not finite; the encoder has diverged")
    stored = tensors(embeddings_XE, identity.dtype)
    data = [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data for tensor in stored.values()]
    digest = hashlib.sha256()
    for part in data:
        digest.update(part)
    about = {**{name: str(value) for name, value in asdict(identity).items()}, "sha256": digest.hexdigest()}
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for (name, tensor), part in zip(stored.items(), data, strict=True):
        begin, end = end, end + part.nbytes
        kind = "F32" if name == "scale" else DTYPES[identity.dtype]
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    files.write_all(stream, [struct.pack("<Q", len(text)) + text, *data])


@dataclass(frozen=True)
class Shard:
    """An opened shard file: its header alone was read."""

    path: Path
    identity: Identity
    sha256: str
    start: int  # of the data in the file
    offsets: dict[str, int]  # of each tensor, from there

    def embeddings_XE(self) -> np.ndarray:
        """Memory-mapped, as stored."""
        identity = self.identity
        kind = jnp.dtype(identity.dtype)
        return self._map("embeddings", kind, (identity.rows, identity.width))

    def scale_X(self) -> np.ndarray:
        """Memory-mapped; of int8 alone."""
        return self._map("scale", np.dtype(np.float32), (self.identity.rows,))

    def file_sha256(self) -> str:
        """Of the whole file, after the checksum that it carries was found right; InputError if it is not."""
        whole, data = hashlib.sha256(), hashlib.sha256()
        with self.path.open("rb") as stream:
            whole.update(stream.read(self.start))
            while block := stream.read(BLOCK):
                whole.update(block)
                data.update(block)
        if data.hexdigest() != self.sha256:
            raise InputError(f"{self.path}: its content has sha256 {data.hexdigest()[:16]}, it was {self.sha256[:16]}")
        return whole.hexdigest()

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        return np.memmap(self.path, dtype, "r", self.start + self.offsets[name], shape)


def read(path: Path) -> Shard:
    """Opens a shard by its header; InputError where that is none, or the file has not the size that it says."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 2**20:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        about = header.pop("__metadata__")
        identity = Identity(**{f.name: f.type(about[f.name]) for f in fields(Identity)})  # type: ignore[operator]
        spans = {name: tensor["data_offsets"] for name, tensor in header.items()}
        sha256 = about["sha256"]
        wanted = _spans(identity)
    except FileNotFoundError:
        raise InputError(f"{path}: the shard is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: not a shard of embeddings ({error!r})") from error
    if {name: tuple(span) for name, span in spans.items()} != wanted:
        raise InputError(f"{path}: holds {spans}, a shard of {identity.rows} rows holds {wanted}")
    size, expected = path.stat().st_size, 8 + length + max(end for _, end in wanted.values())
    if size != expected:
        raise InputError(f"{path}: {size} bytes, its header says {expected}")
    return Shard(path, identity, sha256, 8 + length, {name: span[0] for name, span in wanted.items()})


def _spans(identity: Identity) -> dict[str, tuple[int, int]]:
    """Begin and end of each tensor after the header."""
    cells = identity.rows * identity.width
    if identity.dtype == "int8":
        scales = 4 * identity.rows
        return {"scale": (0, scales), "embeddings": (scales, scales + cells)}
    return {"embeddings": (0, cells * {"float32": 4, "bfloat16": 2}[identity.dtype])}


def check(shard: Shard, wanted: Identity) -> None:
    """InputError with both values where a shard is not the one that was wanted."""
    for name, have in asdict(shard.identity).items():
        want = getattr(wanted, name)
        if have != want:
            raise InputError(f"{shard.path}: has {name} {_short(have)}, and {_short(want)} was wanted")


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) else str(value)


def read_all(directory: Path, wanted: list[Identity], mend: str) -> Iterator[Shard]:
    """The shards of a directory, each checked; an InputError ends in the words `mend`."""
    for identity in wanted:
        try:
            shard = read(directory / identity.name)
            check(shard, identity)
        except InputError as error:
            raise InputError(f"{error}; {mend}") from None
        yield shard
