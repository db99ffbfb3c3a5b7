"""The weights of a directory for transformers, written one tensor at a time under their names there."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from rag_jax.models.decoder_only import LmConfig
from rag_jax.models.hf import decoder_only as decoder_only_models
from rag_jax.models.hf import naming
from rag_jax.models.hf.bart import without_logit_scale
from rag_jax.models.hf.naming import Family, spell
from rag_jax.models.protocols import GeneratorConfig
from rag_jax.pretrained.tensor_files import Shapes, write_tensors
from rag_jax.pretrained.weights import LazyParams


def family_name(config: GeneratorConfig) -> str:
    """The model_type that a generator is written as."""
    if isinstance(config, LmConfig):
        return decoder_only_models.lm_family(config)
    return {"bart": "mbart" if getattr(config, "norm", "") == "pre" else "bart", "t5": "t5"}[config.kind]


class Piece(NamedTuple):
    """One part as it is written: whose parameters, in the form of which family, under which name."""

    side: str
    family: Family
    config: Any
    base: str = ""

    def names(self) -> Iterator[tuple[str, naming.Entry]]:
        """(name, entry) of each tensor, as transformers writes them: no tied copies."""
        for entry in self.family.entries(self.config):
            yield self.base + spell(self.family.spellings[0], entry.theirs), entry


def write_pieces(out: Path, pieces: list[Piece], params: LazyParams, shard_bytes: int) -> None:
    """The weights of a directory, of which one tensor is in memory at a time, if `params` hold no more."""
    shapes: Shapes = {}
    for piece in pieces:
        leaves = flatten_dict(params.places[piece.side], sep="/")
        for name, entry in piece.names():
            shape = naming.their_shape(entry, [leaves[path].shape for path in entry.ours])
            shapes[name] = shape, str(leaves[entry.ours[0]].dtype)
    # chain holds nothing; the variable of a loop would hold a tensor while the next one is made
    tensors = chain.from_iterable(tensors_of(piece, params.read(piece.side)) for piece in pieces)
    write_tensors(out, shapes, tensors, shard_bytes)


def tensors_of(piece: Piece, parameters: Iterator[tuple[str, jax.Array]]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of one part, each when the last of its parameters has come."""
    homes = {path: (name, entry) for name, entry in piece.names() for path in entry.ours}
    waiting: dict[str, np.ndarray] = {}
    for path, parameter in parameters:
        waiting[path] = np.asarray(jax.device_get(without_logit_scale(piece.config, path, parameter)))
        del parameter
        name, entry = homes[path]
        if all(own in waiting for own in entry.ours):
            yield name, naming.to_theirs(entry, [waiting.pop(own) for own in entry.ours])
