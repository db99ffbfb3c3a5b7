"""Loads the tensors of a checkpoint as sharded parameters, one at a time.

Every tensor is loaded, known to be a copy or ignorable, or an error.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rag_jax.errors import InputError
from rag_jax.models.hf import naming
from rag_jax.models.hf.naming import spell
from rag_jax.pretrained.hub import CONFIG
from rag_jax.pretrained.parts import ModelPart
from rag_jax.pretrained.tensor_files import FLOATS, Tensors

NAMED = 10  # names listed in an error


@dataclass(frozen=True)
class LazyParams:
    """Parameters that are read only when they are needed.

    places: side -> tree of shapes, types and shardings.
    read: yields (path with slashes, array) for the parameters of a side, in any order.
    """

    places: dict[str, Any]
    read: Callable[[str], Iterator[tuple[str, jax.Array]]]

    def items(self) -> Iterator[tuple[str, Any]]:
        """(side, tree of parameters) of each part, read one after another."""
        return ((side, unflatten_dict(dict(self.read(side)), sep="/")) for side in self.places)


@dataclass
class WeightReport:
    """How the tensors of one or several checkpoints were used.

    loaded, tied, ignored: names of tensors that are parameters, copies of others, and not needed.
    zeros: names that are missing and stand for zeros.
    parameters: number of values.
    """

    loaded: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    parameters: int = 0

    def summary(self) -> dict[str, Any]:
        counts = {name: len(getattr(self, name)) for name in ("loaded", "tied", "ignored", "zeros")}
        return counts | {"parameters": self.parameters}


def check_names(parts: list[ModelPart], tensors: Tensors, places: Any) -> None:
    """Raises InputError, with their names, where tensors are missing, unknown, or of another shape or type.

    parts: those with their tensors in this checkpoint. places: side -> tree of the shapes of its parameters.
    """
    missing, known = [], set()
    for part in parts:
        option = spelling(part)
        shapes = {path: leaf.shape for path, leaf in flatten_dict(places[part.side], sep="/").items()}
        for entry in part.family.entries(part.config):
            name = stored_name(part, option, entry.theirs)
            if name is None:
                missing += [] if entry.theirs in part.family.zeros else [part.base + spell(option, entry.theirs)]
                continue
            known.add(name)
            found, kind = tensors.shapes[name]
            wanted = naming.their_shape(entry, [shapes[path] for path in entry.ours])
            if found != wanted:
                raise InputError(f"{tensors.where}: {name} is {found}, the configuration asks for {wanted}")
            if kind not in FLOATS.values():
                raise InputError(
                    f"{tensors.where}: {name} is of type {kind}; weights must be {', '.join(FLOATS.values())}"
                )
        known |= {part.base + name for name in copies(part, option)}
    left = [name for name in tensors.shapes if name not in known]
    left = [name for name in left if not any(ignores(part, name) for part in parts)]
    if missing:
        beside = f", and {listed(left)} there that it does not name" if left else ""
        raise InputError(
            f"{tensors.where}: {listed(missing)} missing{beside}; {CONFIG} and the weights must be of one model, whole"
        )
    if left:
        raise InputError(
            f"{tensors.where}: {listed(left)} not part of the model that {CONFIG} describes; "
            "is it the configuration of another checkpoint?"
        )


def listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def spelling(part: ModelPart) -> tuple[str, str]:
    """The family's spelling of names with which the most tensors are found in the part's checkpoint."""
    names = [entry.theirs for entry in part.family.entries(part.config)]

    def there(option: tuple[str, str]) -> int:
        return sum(stored_name(part, option, name) is not None for name in names)

    return max(part.family.spellings, key=there)


def stored_name(part: ModelPart, option: tuple[str, str], theirs: str) -> str | None:
    """The name of a tensor of the table in the part's checkpoint, or None where it is missing.

    It may be the usual name, TensorFlow's for a LayerNorm (gamma, beta), or a tied copy's where only that was saved.
    """
    own = spell(option, theirs)
    tied = [copy for copy, source in copies(part, option).items() if source == own]
    names = (part.base + name for name in (own, naming.older_name(own), *tied))
    return next((name for name in names if name in part.tensors.shapes), None)


def copies(part: ModelPart, option: tuple[str, str]) -> dict[str, str]:
    """Names of tied copies, both as in the table and in this spelling -> the name of the tensor that they repeat."""
    table = part.family.copies(part.config)
    return {key: spell(option, value) for name, value in table.items() for key in {name, spell(option, name)}}


def ignores(part: ModelPart, name: str) -> bool:
    return name.startswith(part.base) and part.family.ignores(name.removeprefix(part.base))


def in_type(places: Any, dtype: str) -> Any:
    """The shapes and shardings of `places` with another type."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype), sharding=p.sharding), places)


def read_part(part: ModelPart, places: Any, report: WeightReport) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path, array) of each parameter of one part, tensor by tensor, and adds their names to the report."""
    option, leaves = spelling(part), flatten_dict(places, sep="/")
    names = [entry.theirs for entry in part.family.entries(part.config)]
    homes = {spell(option, name): stored_name(part, option, name) for name in names}

    def size(entry: naming.Entry) -> int:
        return sum(math.prod(leaves[path].shape) for path in entry.ours)

    # the largest first, while little else is in memory
    for entry in sorted(part.family.entries(part.config), key=size, reverse=True):
        name = homes[spell(option, entry.theirs)]
        if name is None:
            report.zeros.append(part.base + spell(option, entry.theirs))
            arrays = [np.zeros(leaves[path].shape, np.float32) for path in entry.ours]
        else:
            report.loaded.append(name)
            arrays = naming.to_ours(entry, read_finite(part.tensors, name))
        for path, array in zip(entry.ours, arrays, strict=True):
            yield path, put(array, leaves[path])
    for copy, source in copies(part, option).items():
        # `first` is the tensor that was loaded: the source or, where that is missing, another copy of it
        name, first = part.base + copy, str(homes[source])
        if name in part.tensors.shapes and name != first:
            if not np.array_equal(part.tensors.read(name), part.tensors.read(first)):
                raise InputError(f"{part.tensors.where}: {name} differs from {first}, of which it should be a copy")
            report.tied.append(name)
    report.ignored += [name for name in part.tensors.shapes if ignores(part, name)]


def read_finite(tensors: Tensors, name: str) -> np.ndarray:
    tensor = tensors.read(name)
    if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
        raise InputError(f"{tensors.where}: {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor


def put(array: np.ndarray, place: jax.ShapeDtypeStruct) -> jax.Array:
    """A host array as a device array of the type and sharding of `place`; each device gets only its own shard."""
    dtype = np.dtype(place.dtype)

    def part(index: Any) -> np.ndarray:
        return np.array(array[index], dtype, order="C")  # a copy, so that the tensor that was read can be freed

    return jax.make_array_from_callback(place.shape, place.sharding, part)
