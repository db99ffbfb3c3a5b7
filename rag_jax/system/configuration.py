"""Configurations: frozen dataclasses built from nested values or from `configs/*.py:get_config(argument)`.

Every key is checked against the fields of its dataclass, so that a typo raises.
"""

import dataclasses
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_collections

from rag_jax.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = PACKAGE / "configs", PACKAGE.parent / "configs"  # in an installed wheel; in a checkout


def build(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A frozen dataclass built from nested mappings; a class may define its own `from_values(values, where)`.

    where: the path of `values` in the configuration, for messages.
    InputError, naming the path, for unknown or missing keys and for values of a wrong type.
    """
    own = getattr(cls, "from_values", None)
    return own(values, where) if own is not None and isinstance(values, Mapping) else build_fields(cls, values, where)


def build_fields(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Builds the dataclass field by field, as `build` does for a class without `from_values`."""
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
    """The value of a field in the type that its dataclass declares; InputError if it cannot be that."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return build(typing.cast(type, hint), value, where)
    if hint is object or getattr(hint, "_is_protocol", False):
        return value  # checked where it is used, or built by its class's from_values
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if dataclasses.is_dataclass(value):
            return value
        return one_of([kind for kind in arguments if kind is not type(None)], value, where)
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
    if hint in (float, str) and isinstance(value, int) and not isinstance(value, bool):
        return hint(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def one_of(classes: Sequence[type], value: Any, where: str) -> Any:
    """The value as the dataclass of `classes` that has its `kind`, the first where it names none; None stays None."""
    if value is None:
        return None
    kinds = {cls.kind: cls for cls in classes}  # type: ignore[attr-defined]
    kind = value.get("kind", next(iter(kinds))) if isinstance(value, Mapping) else next(iter(kinds))
    if kind not in kinds:
        raise InputError(f"{where}.kind: {kind!r} is not one of {', '.join(map(repr, kinds))}")
    return build(kinds[kind], value, where)


def plain(value: Any) -> Any:
    """ConfigDicts, dataclasses and tuples as plain dicts and lists; a class may define its own `to_values()`."""
    if hasattr(value, "to_values"):
        return value.to_values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated with `changes`, section by section; a section of another `kind` replaces the old one whole."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same = value.get("kind", old.get("kind")) == old.get("kind")
            value = merge(old, value) if same else value
        merged[name] = value
    return merged


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass whose values are not the defaults, by name."""
    found = {}
    for f in dataclasses.fields(config):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if getattr(config, f.name) != default:
            found[f.name] = getattr(config, f.name)
    return found


def at_least(least: int, name: str, value: int) -> None:
    """Raises InputError if the value of the setting `name` is below `least`."""
    if value < least:
        raise InputError(f"{name}={value} must be at least {least}")


def evaluated(path: str, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values of the configuration file `configs/NAME.py` or `configs/NAME.py:ARGUMENT`, after overrides.

    assignments: `key.sub=value`, see `override`.
    """
    file, _, argument = path.partition(":")
    file = str(found_file(file))
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
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    override(config, assignments)
    return plain(config)


def found_file(name: str) -> Path:
    """The configuration file at this path or, for a name without directory and suffix, the one that is shipped."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for folder in SHIPPED for path in sorted(folder.glob("*.py"))}
    if name not in shipped:
        raise InputError(f"{name}: no such configuration file; the shipped ones are {', '.join(shipped)}")
    return shipped[name]


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
    """Sets `key.sub=value` in the configuration; `stages.NAME.key=value` picks a stage by its name.

    A value is read as JSON where it is JSON, else it is text.
    """
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
        for name in parents:
            node = section(node, name, f"--set {path}")
        if not isinstance(node, ml_collections.ConfigDict):
            raise InputError(f"--set {path}: {'.'.join(parents)} holds no keys, it is {node!r}")
        if isinstance(node.get(last), str) and not isinstance(value, str):
            value = text  # such as 250 in refresh=250, where refresh is a text
        try:
            with node.unlocked():
                node[last] = value
        except TypeError as error:  # ml_collections holds a key to the type of its value
            raise InputError(f"--set {assignment}: {error}") from error


def section(node: Any, name: str, where: str) -> Any:
    """The section `name` of a configuration, added if it is absent; in a list of stages, the stage of that name.

    A misspelt name becomes a new section here; `build` refuses it later.
    """
    if isinstance(node, tuple | list):
        stages = {stage["name"]: stage for stage in node}
        if name not in stages:
            raise InputError(f"{where}: no stage {name!r}; stages: {', '.join(stages)}")
        return stages[name]
    if not isinstance(node, ml_collections.ConfigDict):
        raise InputError(f"{where}: nothing stands under {name!r}, since above it is {node!r}")
    if name not in node:
        with node.unlocked():
            node[name] = ml_collections.ConfigDict()
    return node[name]
