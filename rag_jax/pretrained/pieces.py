"""Writes the weights of a directory for transformers, one tensor at a time, under transformers' names."""

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
from rag_jax.models.hf.naming import HfFamily, spell
from rag_jax.models.protocols import GeneratorConfig
from rag_jax.pretrained.tensor_files import Shapes, write_tensors
from rag_jax.pretrained.weights import LazyParams


def family_name(config: GeneratorConfig) -> str:
    """The model_type of transformers with which a generator is exported."""
    if isinstance(config, LmConfig):
        return decoder_only_models.lm_family(config)
    return {"bart": "mbart" if getattr(config, "norm", "") == "pre" else "bart", "t5": "t5"}[config.kind]


class Piece(NamedTuple):
    """One part of a model to be written.

    side: the part of the parameters.
    family: the architecture whose names and shapes are written.
    config: the part's configuration.
    base: prefix of the names of its tensors in the checkpoint.
    """

    side: str
    family: HfFamily
    config: Any
    base: str = ""

    def names(self) -> Iterator[tuple[str, naming.Entry]]:
        """(name, entry) of each tensor that transformers writes; tied copies are not among them."""
        for entry in self.family.entries(self.config):
            yield self.base + spell(self.family.spellings[0], entry.theirs), entry


def write_pieces(out: Path, pieces: list[Piece], params: LazyParams, shard_bytes: int) -> None:
    """Writes the weights of a directory; with lazy `params`, one tensor is in memory at a time."""
    shapes: Shapes = {}
    for piece in pieces:
        leaves = flatten_dict(params.places[piece.side], sep="/")
        for name, entry in piece.names():
            shape = naming.their_shape(entry, [leaves[path].shape for path in entry.ours])
            shapes[name] = shape, str(leaves[entry.ours[0]].dtype)
    # a generator, not a loop: the loop's variable would keep a tensor in memory while the next one is read
    tensors = chain.from_iterable(tensors_of(piece, params.read(piece.side)) for piece in pieces)
    write_tensors(out, shapes, tensors, shard_bytes)


def tensors_of(piece: Piece, parameters: Iterator[tuple[str, jax.Array]]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of one part; a tensor of several parameters is yielded once the last of them has been read."""
    homes = {path: (name, entry) for name, entry in piece.names() for path in entry.ours}
    waiting: dict[str, np.ndarray] = {}
    for path, parameter in parameters:
        waiting[path] = np.asarray(jax.device_get(without_logit_scale(piece.config, path, parameter)))
        del parameter
        name, entry = homes[path]
        if all(own in waiting for own in entry.ours):
            yield name, naming.to_theirs(entry, [waiting.pop(own) for own in entry.ours])
