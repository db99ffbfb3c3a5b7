"""The options of benchmarks that run on a load: a named one, whose fields options change."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rag_jax.errors import InputError

Load = TypeVar("Load", bound=Any)  # a dataclass


def add_arguments(parser: argparse.ArgumentParser, loads: Mapping[str, Any]) -> None:
    """--load, and an option a field."""
    parser.add_argument("--load", choices=tuple(loads), default="small", help="shapes to begin with (default: small)")
    for field in dataclasses.fields(loads["small"]):
        kind = str if field.name == "dtype" else int
        parser.add_argument(f"--{field.name}", type=kind, help=f"instead of the load's {field.name}")


def chosen(args: argparse.Namespace, loads: Mapping[str, Load], may_be_0: Sequence[str] = ()) -> Load:
    """The load that is named, with what the options change; InputError for a number below 1, or below 0 where it may
    be 0, --repeats included.
    """
    load = loads[args.load]
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(load)}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in (*changes.items(), ("repeats", args.repeats)):
        least = int(name not in may_be_0)
        if isinstance(value, int) and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least {least}")
    return dataclasses.replace(load, **changes)
