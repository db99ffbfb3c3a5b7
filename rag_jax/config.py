"""Configuration at the edge: `configs/*.py:get_config(arg)` (ml_collections) -> frozen dataclasses, where a typo
raises.
"""

import dataclasses
import importlib.util
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_collections

from rag_jax.errors import InputError
from rag_jax.optimizer import OptimizerConfig
from rag_jax.rag import RagConfig


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    objective: `contrastive` (in-batch, gold passages), `denoise` (masked spans of the corpus) or `rag` (the model's
    marginal likelihood). documents: `retrieved` searches the index in graph, `gold` reads the first gold passage
    alone. window: with gold documents, only that many tokens of the passage around the answer, 0 for the whole.
    refresh_every: steps between re-embeddings of the index, 0 for only at the stage's start. prior_gradient=False
    stops the gradient to the retriever. questions: train on this many of the questions only, 0 for all.
    """

    name: str
    objective: Literal["contrastive", "denoise", "rag"] = "rag"
    documents: Literal["retrieved", "gold"] = "retrieved"
    steps: int = 1000
    batch: int = 16
    n_docs: int = 5
    source_length: int = 0  # 0: the model's
    window: int = 0
    refresh_every: int = 0
    label_smoothing: float = 0.0
    hf_compat: bool = False
    prior_gradient: bool = True
    questions: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: data, model and stages. Vocabulary sizes of the model are those of the corpus' tokenizers."""

    corpus: str
    train: str
    dev: str
    stages: tuple[StageConfig, ...]
    model: RagConfig = field(default_factory=RagConfig)
    mesh: Mapping[str, int] = field(default_factory=dict)
    target_length: int = 32
    every_answer: bool = False
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    evaluate_questions: int = 200


def build(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A frozen dataclass from nested mappings; unknown or missing keys and wrong types raise InputError with their
    path.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected keys and values ({', '.join(typing.get_type_hints(cls))}), got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    kwargs = {name: convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    for name, f in fields.items():
        if name not in kwargs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: missing key {name!r}")
    return cls(**kwargs)


def convert(hint: Any, value: Any, where: str) -> Any:
    """One field's value in the type its dataclass states."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise InputError(f"{where}: expected a list, got {value!r}")
        return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected names and values, got {value!r}")
        return {name: convert(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
    """Apply `key.sub=value` (value as JSON, else text); `stages.NAME.key=value` picks a stage by its name."""
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}: expected key=value, such as stages.joint.steps=100")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, last = path.split(".")
        node: Any = config
        for i, name in enumerate(parents):
            node = child(node, name, f"--set {path}: {'.'.join(parents[: i + 1])}")
        if not isinstance(node, ml_collections.ConfigDict | dict):
            raise InputError(f"--set {path}: {'.'.join(parents)} has no keys to set")
        if isinstance(node, ml_collections.ConfigDict):
            node.unlock()
        try:
            node[last] = value
        except TypeError as error:  # ml_collections holds a field to the type of its value
            raise InputError(f"--set {assignment}: {error}") from error


def child(node: Any, name: str, where: str) -> Any:
    """What is under `name`: a key, or in a list of stages the one of that name."""
    if isinstance(node, tuple | list):
        stages = {stage["name"]: stage for stage in node}
        if name not in stages:
            raise InputError(f"{where}: no stage {name!r}; stages: {', '.join(stages)}")
        return stages[name]
    if not isinstance(node, ml_collections.ConfigDict | dict) or name not in node:
        known = ", ".join(node) if isinstance(node, ml_collections.ConfigDict | dict) else "none"
        raise InputError(f"{where}: no such key; known: {known}")
    return node[name]


def load(path: str, assignments: Sequence[str] = ()) -> TrainConfig:
    """`configs/NAME.py` or `configs/NAME.py:ARGUMENT` -> TrainConfig, with `key=value` overrides."""
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise InputError(f"{file}: no such configuration file; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location("rag_jax_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # a configuration may build on the one beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise InputError(f"{file}: a configuration file defines get_config(argument) -> ml_collections.ConfigDict")
    config = module.get_config(argument) if argument else module.get_config()
    override(config, assignments)
    return build(TrainConfig, plain(config))


def plain(value: Any) -> Any:
    """ConfigDicts, dataclasses and tuples as plain dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def save(config: TrainConfig, path: Path) -> None:
    path.write_text(json.dumps(plain(config), indent=2) + "\n")


def read(path: Path) -> TrainConfig:
    """The configuration that a run directory keeps."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); it must be in a run directory, made by rag-jax train"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    return build(TrainConfig, values, str(path))
