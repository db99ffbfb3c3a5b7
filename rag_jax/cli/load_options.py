"""Options of benchmarks that run on a synthetic load: --load names it, and an option for each field changes it."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from rag_jax.errors import InputError

Load = TypeVar("Load", bound=Any)  # a dataclass


def add_arguments(parser: argparse.ArgumentParser, loads: Mapping[str, Any]) -> None:
    """Adds --load and an option for each field of a load; loads: name -> load (a dataclass)."""
    parser.add_argument("--load", choices=tuple(loads), default="small", help="shapes to begin with (default: small)")
    for field in dataclasses.fields(loads["small"]):
        kind = str if field.name == "dtype" else int
        parser.add_argument(f"--{field.name}", type=kind, help=f"instead of the load's {field.name}")


def chosen(args: argparse.Namespace, loads: Mapping[str, Load], may_be_0: Sequence[str] = ()) -> Load:
    """The load that --load names, with the fields that options change.

    may_be_0: fields that may be 0. InputError for another field, or --repeats, below 1.
    """
    load = loads[args.load]
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(load)}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in (*changes.items(), ("repeats", args.repeats)):
        least = int(name not in may_be_0)
        if isinstance(value, int) and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least {least}")
    return dataclasses.replace(load, **changes)
