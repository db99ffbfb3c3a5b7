"""Options of every command that say how its result is printed."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser, **default: Any) -> None:
    """Adds --json and --verbose; default: argparse.SUPPRESS where the parser above has them, too."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on standard output", **default
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print all of the result; with several processes, the lines of each",
        **default,
    )
