"""Paths as a user means them, before anything is written there. No numpy: the command line starts with it."""

import os
from pathlib import Path


def real(path: str | Path) -> Path:
    """The absolute path, links in the middle followed; `missing/..` counts as if `missing` were there (mkdir -p)."""
    path = Path(path)
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def crosses_missing(path: Path) -> bool:
    """Whether `..` stands behind a directory that is not there, so that the system would not find what is meant."""
    parts = path.parts
    return any(part == ".." and not Path(*parts[:i]).exists() for i, part in enumerate(parts) if i)
