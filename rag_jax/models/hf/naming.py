"""What every family is made of: an entry of a table of names, a family, and how values of config.json are read."""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from rag_jax.errors import InputError
from rag_jax.models.hf.settings import Table
from rag_jax.models.layers import ACTIVATIONS
from rag_jax.models.protocols import GeneratorConfig
from rag_jax.models.special_tokens import NONE

HfConfig = Mapping[str, Any]
Form = Literal["same", "transposed", "row"]


class Entry(NamedTuple):
    """One tensor of a checkpoint, and the parameters it is here, as paths with slashes.

    Several paths: the tensor is their concatenation along the last axis. transposed: torch keeps a linear layer's
    weight as [out, in], here it is [in, out]. row: [1, V] there, [V] here.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = "same"


def to_ours(entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
    """The parameters of an entry, views of the tensor where they can be."""
    if entry.form == "transposed":
        tensor = tensor.T
    elif entry.form == "row":
        tensor = tensor[0]
    return np.split(tensor, len(entry.ours), axis=-1) if len(entry.ours) > 1 else [tensor]


def to_theirs(entry: Entry, parameters: list[np.ndarray]) -> np.ndarray:
    """The inverse of `to_ours`."""
    tensor = np.concatenate(parameters, axis=-1) if len(parameters) > 1 else parameters[0]
    return tensor.T if entry.form == "transposed" else tensor[None] if entry.form == "row" else tensor


def their_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that the tensor of an entry must have, from those of its parameters."""
    shape = (*shapes[0][:-1], sum(s[-1] for s in shapes))
    return shape[::-1] if entry.form == "transposed" else (1, *shape) if entry.form == "row" else shape


@dataclass(frozen=True)
class Family:
    """What one architecture is called there.

    spellings: prefixes (written in the table, found in a checkpoint), the usual one first. copies: name -> the name
    that it repeats. ignorable: patterns of names that carry nothing the model needs. zeros: names that, where they are
    missing, stand for zeros. architecture: the class that reads an export. settings: what becomes of each key of
    config.json. adapt: the configuration, once it is known which names are there.
    """

    config: Callable[[HfConfig, str], Any]
    describe: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], list[Entry]]
    architecture: str
    settings: Table
    spellings: tuple[tuple[str, str], ...] = (("", ""),)
    copies: Callable[[Any], dict[str, str]] = lambda config: {}
    ignorable: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    adapt: Callable[[Any, Container[str]], Any] = lambda config, names: config

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignorable)


def spell(spelling: tuple[str, str], name: str) -> str:
    """A name of the table as a checkpoint with this spelling has it."""
    written, found = spelling
    return found + name.removeprefix(written) if name.startswith(written) else name


OLDER_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def older_name(name: str) -> str:
    """The name that a tensor had in TensorFlow, which many released checkpoints keep (bert-base-uncased)."""
    return next((name[: -len(new)] + old for new, old in OLDER_NAMES.items() if name.endswith(new)), name)


# --- reading config.json ----------------------------------------------------------------------------------------------


def need(config: HfConfig, key: str, where: str, kind: type = int) -> Any:
    """A value that the shapes depend on; InputError where it is missing or of another type."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"is {value!r}" if key in config else "is missing"
        raise InputError(f"{where}: {key} {found}; it must be given, as {kind.__name__}")
    return value


def refuse(config: HfConfig, where: str, **known: Any) -> None:
    """InputError where a setting has a value that is not built here; `known` gives the one that is."""
    for key, value in known.items():
        if config.get(key, value) != value:
            raise InputError(f"{where}: {key}={config[key]!r} is not supported; only {value!r} is")


ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # the same functions


def activation(config: HfConfig, key: str, default: str, where: str) -> Any:
    name = config.get(key, default)
    name = ACTIVATION_NAMES.get(name, name)
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: {key}={name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return name


def special_tokens(config: HfConfig, where: str, bos: int, pad: int, eos: int, start: int) -> dict[str, Any]:
    """The fields of `SpecialTokens`; bos, pad, eos and start stand for what is missing or null."""

    def one(key: str, default: int) -> int:
        value: Any = config.get(key)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, list) and value:
            raise InputError(f"{where}: {key}={value!r} has several tokens; give one of them")
        return default if value is None or value == [] else need({key: value}, key, where)

    ends: Any = config.get("eos_token_id")
    several = isinstance(ends, list) and len(ends) > 1
    ends = [need({"eos_token_id": end}, "eos_token_id", where) for end in ends] if several else []
    bos_id = one("bos_token_id", bos)
    again = bos_id if config.get("force_bos_token_to_be_generated") else NONE  # as older BARTs say it
    return {
        "bos_id": bos_id,
        "pad_id": one("pad_token_id", pad),
        "eos_id": ends[0] if ends else one("eos_token_id", eos),
        "end_ids": tuple(ends),
        "start_id": one("decoder_start_token_id", start),
        "forced_bos_id": one("forced_bos_token_id", again),
        "forced_eos_id": one("forced_eos_token_id", NONE),
        "tokens_from": "checkpoint",
    }


def describe_tokens(c: GeneratorConfig) -> dict[str, Any]:
    """The same as config.json has them."""
    return {
        "bos_token_id": c.bos_id,
        "pad_token_id": c.pad_id,
        "eos_token_id": list(c.ends) if len(c.ends) > 1 else c.ends[0],
        "decoder_start_token_id": c.start_id,
        "forced_bos_token_id": None if c.forced_bos_id == NONE else c.forced_bos_id,
        "forced_eos_token_id": None if c.forced_eos_id == NONE else c.forced_eos_id,
    }


# --- tables ---------------------------------------------------------------------------------------------------------


def dense(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    weight = Entry(f"{theirs}.weight", (f"{ours}/kernel",), "transposed")
    return [weight, Entry(f"{theirs}.bias", (f"{ours}/bias",))] if bias else [weight]


def norm(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    weight = Entry(f"{theirs}.weight", (f"{ours}/scale",))
    return [weight, Entry(f"{theirs}.bias", (f"{ours}/bias",))] if bias else [weight]


def table(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.weight", (f"{ours}/embedding",))]
