"""Shard files: embeddings of consecutive passages, with a header that says which passages and encoder they are of.

The file is in the safetensors format. Its tensors are `embeddings` [X, E] (F32, BF16 or I8) and, for I8, `scale` [X]
F32; its metadata is the shard's identity and the sha256 of all that comes after the header.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from rag_jax.corpus.verified_arrays import Checked
from rag_jax.errors import InputError
from rag_jax.system import block_checksums, files, safetensors_header
from rag_jax.system.block_checksums import Blocks, Entry

DTYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
AGAIN = "restore the file, or build the index again"


@dataclass(frozen=True)
class Identity:
    """Identity of a shard: it has the embeddings of rows first to last - 1 of a corpus by an encoder.

    corpus_hash: of the corpus that was embedded; updates of the corpus keep its rows, and the shard with them.
    width: E; dtype: a key of DTYPES.
    """

    corpus_hash: str
    encoder_hash: str
    first: int
    last: int
    width: int
    dtype: str

    @property
    def name(self) -> str:
        """Name of the file; names sort in the order of rows."""
        return f"rows-{self.first:012d}-{self.last:012d}.safetensors"

    @property
    def rows(self) -> int:
        return self.last - self.first


def cut(corpus_hash: str, encoder_hash: str, rows: range, shard_rows: int, width: int, dtype: str) -> list[Identity]:
    """Divides `rows` into shards of `shard_rows` rows each, the last with what is left."""
    return [
        Identity(corpus_hash, encoder_hash, first, min(first + shard_rows, rows.stop), width, dtype)
        for first in range(rows.start, rows.stop, shard_rows)
    ]


def tensors(embeddings_XE: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The tensors stored for float32 embeddings; for int8, row / scale rounded, with scale = max |row| / 127."""
    if dtype == "float32":
        return {"embeddings": np.ascontiguousarray(embeddings_XE, np.float32)}
    if dtype == "bfloat16":
        return {"embeddings": embeddings_XE.astype(jnp.bfloat16)}
    scale_X = np.abs(embeddings_XE).max(1, initial=0).astype(np.float32) / np.float32(127)
    steps_XE = embeddings_XE / np.where(scale_X > 0, scale_X, 1)[:, None]
    # the scale comes first: float32 must begin at a multiple of 4 bytes, and int8 rows of any length may end elsewhere
    return {"scale": scale_X, "embeddings": np.rint(steps_XE).clip(-127, 127).astype(np.int8)}


def write(stream: BinaryIO, identity: Identity, embeddings_XE: np.ndarray) -> None:
    """Writes a shard into an empty unbuffered file; InputError for an embedding that is not finite."""
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
    files.write_all(stream, [header_of(identity, digest.hexdigest()), *data])


def header_of(identity: Identity, sha256: str) -> bytes:
    """The header of a shard, byte for byte: a file with any other header is damaged."""
    about = {**{name: str(value) for name, value in asdict(identity).items()}, "sha256": sha256}
    return safetensors_header.header(_stored(identity), about)


@dataclass(frozen=True)
class Shard:
    """An opened shard file, of which only the header was read."""

    path: Path
    identity: Identity
    sha256: str  # of the data after the header, as the header says
    start: int  # offset of the data in the file, in bytes
    offsets: dict[str, int]  # of each tensor in the data, in bytes
    blocks: Blocks  # checksums by block, if the manifest of an index has them

    def embeddings_XE(self) -> Checked:
        """Memory-mapped embeddings in the stored type."""
        identity = self.identity
        kind = jnp.dtype(identity.dtype)
        return self._map("embeddings", kind, (identity.rows, identity.width))

    def scale_X(self) -> Checked:
        """Memory-mapped scales of the rows; only int8 has them."""
        return self._map("scale", np.dtype(np.float32), (self.identity.rows,))

    def entry(self) -> Entry:
        """Size, hash and block checksums of the whole file, for a manifest; InputError where its data is damaged."""
        data = self.blocks.map()
        found = hashlib.sha256(data[self.start :].data).hexdigest()
        if found != self.sha256:
            raise InputError(f"{self.path}: damaged: its content has sha256 {found[:16]}, it was {self.sha256[:16]}")
        return block_checksums.of_file(self.path)

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Checked:
        return Checked(self.blocks, self.blocks.map(), self.start + self.offsets[name], dtype, shape)


def read(path: Path, entry: Entry | None = None) -> Shard:
    """Opens a shard and reads its header; InputError for another header, or a file of another size than it says.

    entry: of the file in the manifest of an index, by which data is verified when it is read; None: it is not.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > 2**20:
                raise ValueError("no header")
            text = stream.read(length)
        about = json.loads(text)["__metadata__"]
        identity = Identity(**{f.name: f.type(about[f.name]) for f in fields(Identity)})  # type: ignore[operator]
        sha256, wanted = str(about["sha256"]), safetensors_header.spans(_stored(identity))
        if start + text != header_of(identity, sha256):
            raise ValueError(f"its header is not that of {identity.rows} rows of {identity.width} {identity.dtype}")
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path}: the shard is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InputError(f"{path}: not a shard of embeddings ({error!r})") from error
    expected = 8 + length + max(end for _, end in wanted.values())
    if size != expected:
        raise InputError(f"{path}: {size} bytes, its header says {expected}")
    known = Blocks(path, entry or {"bytes": size}, AGAIN)
    return Shard(path, identity, sha256, 8 + length, {name: span[0] for name, span in wanted.items()}, known)


def _stored(identity: Identity) -> safetensors_header.Tensors:
    """Types and shapes of the tensors of a shard, in the order of the file."""
    rows = {"embeddings": (DTYPES[identity.dtype], (identity.rows, identity.width))}
    return {"scale": ("F32", (identity.rows,)), **rows} if identity.dtype == "int8" else rows


def check(shard: Shard, wanted: Identity) -> None:
    """InputError with both values where a shard has another identity than the wanted one."""
    for name, have in asdict(shard.identity).items():
        want = getattr(wanted, name)
        if have != want:
            raise InputError(f"{shard.path}: has {name} {_short(have)}, and {_short(want)} was wanted")


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) else str(value)


def read_all(
    directory: Path, wanted: list[Identity], mend: str, entries: Mapping[str, Entry] | None = None
) -> Iterator[Shard]:
    """Opens shards of a directory one after another and checks their identities.

    mend: how to mend a damaged shard, the end of every InputError; entries: files of an index' manifest, see `read`.
    """
    for identity in wanted:
        try:
            shard = read(directory / identity.name, entries.get(identity.name) if entries is not None else None)
            check(shard, identity)
        except InputError as error:
            raise InputError(f"{error}; {mend}") from None
        yield shard
