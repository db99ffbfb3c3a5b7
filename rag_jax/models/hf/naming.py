"""The building blocks of a model family: entries of its table of names, the family itself, readers of config.json."""

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
    """One tensor of a checkpoint and the parameters that it becomes here.

    theirs: the tensor's name.
    ours: paths of the parameters, with slashes; the tensor is their concatenation along the last axis.
    form: "transposed" for a linear layer, which is [out, in] in torch and [in, out] here; "row" for [1, V] in torch and
        [V] here.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = "same"


def to_ours(entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
    """The parameters of an entry from its tensor; they are views of it."""
    if entry.form == "transposed":
        tensor = tensor.T
    elif entry.form == "row":
        tensor = tensor[0]
    return np.split(tensor, len(entry.ours), axis=-1) if len(entry.ours) > 1 else [tensor]


def to_theirs(entry: Entry, parameters: list[np.ndarray]) -> np.ndarray:
    """The tensor of an entry from its parameters, the inverse of `to_ours`."""
    tensor = np.concatenate(parameters, axis=-1) if len(parameters) > 1 else parameters[0]
    return tensor.T if entry.form == "transposed" else tensor[None] if entry.form == "row" else tensor


def their_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that the tensor of an entry must have, given the shapes of its parameters."""
    shape = (*shapes[0][:-1], sum(s[-1] for s in shapes))
    return shape[::-1] if entry.form == "transposed" else (1, *shape) if entry.form == "row" else shape


@dataclass(frozen=True)
class HfFamily:
    """Names and settings of one architecture at Hugging Face.

    config: (config.json, its path for messages) -> our configuration.
    describe: our configuration -> config.json.
    entries: our configuration -> the table of tensors and parameters.
    architecture: the class of transformers that loads an export.
    settings: the fate of each key of config.json.
    spellings: pairs (prefix in the table, prefix in a checkpoint in its place), the usual pair first.
    copies: our configuration -> {name of a tied tensor: name of the tensor that it repeats}.
    ignorable: patterns of names of tensors that the model does not need.
    zeros: names of tensors that stand for zeros where they are missing.
    adapt: (configuration, names of the checkpoint's tensors) -> the configuration, corrected by which are there.
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
    """A name of the table as it is in a checkpoint with this spelling."""
    written, found = spelling
    return found + name.removeprefix(written) if name.startswith(written) else name


OLDER_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def older_name(name: str) -> str:
    """A tensor's name in TensorFlow, which many released checkpoints keep (bert-base-uncased)."""
    return next((name[: -len(new)] + old for new, old in OLDER_NAMES.items() if name.endswith(new)), name)


# --- reading config.json ----------------------------------------------------------------------------------------------


def need(config: HfConfig, key: str, where: str, kind: type = int) -> Any:
    """The value of a key that has no default; InputError where it is missing or of another type."""
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"is {value!r}" if key in config else "is missing"
        raise InputError(f"{where}: {key} {found}; it must be given, as {kind.__name__}")
    return value


def refuse(config: HfConfig, where: str, **known: Any) -> None:
    """Raises InputError where a setting has another value than the only one supported here, given by `known`."""
    for key, value in known.items():
        if config.get(key, value) != value:
            raise InputError(f"{where}: {key}={config[key]!r} is not supported; only {value!r} is")


ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # the same functions


def activation(config: HfConfig, key: str, default: str, where: str) -> Any:
    """Our name of the activation function under a key of config.json; InputError for one that is not supported."""
    name = config.get(key, default)
    name = ACTIVATION_NAMES.get(name, name)
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: {key}={name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return name


def special_tokens(config: HfConfig, where: str, bos: int, pad: int, eos: int, start: int) -> dict[str, Any]:
    """The fields of `SpecialTokens` from a config.json.

    bos, pad, eos, start: the ids to use where the config has none or null.
    """

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
    again = bos_id if config.get("force_bos_token_to_be_generated") else NONE  # the key of older BARTs
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
    """The special tokens under their keys of config.json, the inverse of `special_tokens`."""
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
    """Entries of a linear layer."""
    weight = Entry(f"{theirs}.weight", (f"{ours}/kernel",), "transposed")
    return [weight, Entry(f"{theirs}.bias", (f"{ours}/bias",))] if bias else [weight]


def norm(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    """Entries of a LayerNorm, or of an RMSNorm (without bias)."""
    weight = Entry(f"{theirs}.weight", (f"{ours}/scale",))
    return [weight, Entry(f"{theirs}.bias", (f"{ours}/bias",))] if bias else [weight]


def table(theirs: str, ours: str) -> list[Entry]:
    """The entry of an embedding table."""
    return [Entry(f"{theirs}.weight", (f"{ours}/embedding",))]
