"""Paths that a user gives, resolved before anything is written there; without NumPy, to keep the start-up fast."""

import os
from pathlib import Path


def real(path: str | Path) -> Path:
    """The absolute path, with symbolic links followed except at its last name.

    `missing/..` is resolved as if `missing` existed, since `mkdir -p` would create it.
    """
    path = Path(path)
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def crosses_missing(path: Path) -> bool:
    """Whether `..` follows a directory that does not exist, so that the system could not resolve the path."""
    parts = path.parts
    return any(part == ".." and not Path(*parts[:i]).exists() for i, part in enumerate(parts) if i)
