"""An installed wheel: every module, the templates, the types, and the configurations by name."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import wheels
from conftest import ROOT


def test_every_package_is_named() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "rag_jax").rglob("*.py")}
    assert set(settings["packages"]) == found | {"rag_jax.configs"}
    assert all((ROOT / name.replace(".", "/") / "__init__.py").exists() for name in found)


@pytest.mark.slow
def test_a_wheel_works_away_from_the_repository(tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels.build(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    for name in ("py.typed", "configs/world.py", "evaluation/report/templates/report.html"):
        assert (tmp_path / "site/rag_jax" / name).is_file(), name
    code = (
        "import rag_jax; from pathlib import Path; from rag_jax.training import config; "
        f"assert Path(rag_jax.__file__).is_relative_to({str(tmp_path)!r}), rag_jax.__file__; "
        "assert config.load('world').stages and callable(rag_jax.fit)"
    )
    site = {"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=site, check=True)
    wrong = subprocess.run(
        [sys.executable, "-m", "rag_jax", "train", "--config", "nowhere", "--run", "r"],
        cwd=tmp_path, env=site, capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2 and "the shipped ones are" in wrong.stderr and "world" in wrong.stderr
