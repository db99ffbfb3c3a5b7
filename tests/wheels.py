"""Builds a wheel of this repository, for the tests of what is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def build(out: Path) -> Path:
    """The wheel, built in `out` from a copy, since a build leaves folders behind."""
    source = out / "source"
    for name in ("rag_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = out.glob("*.whl")
    return wheel
