"""docs/examples: what is there compiles, its commands parse, and all of it runs from an installed wheel."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wheels
from conftest import ROOT

from rag_jax import __main__ as cli
from rag_jax.training import config

sys.path.insert(0, str(ROOT / "scripts"))
import launch_local

EXAMPLES = ROOT / "docs" / "examples"
RUNS = {  # of each file the words after its name; ask.py opens the run that own_data.py keeps
    "own_data.py": ["--steps", "60", "--run", "runs/towns"],
    "ask.py": ["runs/towns", "On which river does Tirasburg 0 lie?"],
    "own_loss.py": ["--steps", "60"],
    "own_generator.py": ["--steps", "60"],
    "own_generator.py --kind my_nnx": ["--steps", "60"],
}


def notebook() -> dict[str, Any]:
    return json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))


def notebook_code() -> str:
    """The code cells of the notebook as one script."""
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    return "\n\n".join("".join(cell["source"]) for cell in cells) + "\n"


def commands() -> list[list[str]]:
    """The command lines of pod.md, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (EXAMPLES / "pod.md").read_text(encoding="utf-8"), re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_examples_compile() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert {path.name for path in files} == {name.split()[0] for name in RUNS}
    for path in files:
        compile(path.read_text(encoding="utf-8"), path.name, "exec")
    compile(notebook_code(), "tour.ipynb", "exec")


def test_the_notebook_is_valid_and_has_no_outputs() -> None:
    found = notebook()
    assert (found["nbformat"], found["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert set(found) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids) > 10 and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for cell in found["cells"]:
        needed = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            needed |= {"outputs", "execution_count"}
        assert set(cell) == needed and all(isinstance(line, str) for line in cell["source"])


def parsed(words: list[str]) -> None:
    """Parses a command of rag-jax; of one with a configuration, its values are checked, too."""
    _, args = cli.parse(words[0], words[1:])
    if words[0] in ("train", "compile"):
        config.check(config.load(args.config, args.set))


def launched_locally(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What launch_local.py would start, found by its own parser."""
    seen: list[list[str]] = []
    monkeypatch.setattr(launch_local, "start", lambda command, environments: seen.append(command) or [])
    monkeypatch.setattr(launch_local.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        launch_local.main()
    assert ended.value.code == 0
    return seen[0]


def test_the_commands_of_the_pod_page_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    kinds = set()
    for words in commands():
        script = next((word for word in words if word.startswith("scripts/")), "")
        if words[0] == "export":  # the variables that launch_tpu_pod.sh names
            text = (ROOT / "scripts/launch_tpu_pod.sh").read_text()
            assert all(f"{word.split('=')[0]}:-" in text for word in words[1:])
            continue
        if script == "scripts/launch_local.py":
            command = launched_locally(words[1:], monkeypatch)
        elif script:
            assert os.access(ROOT / script, os.X_OK)
            command = [*words[words.index(script) + 1 :], "--distributed", "auto"]
        else:
            command = words[words.index("rag-jax") + 1 :]
        parsed(command)
        kinds.add(script or command[0])
    assert kinds >= {"scripts/launch_local.py", "scripts/launch_tpu_pod.sh", "scripts/launch_slurm.sh", "compile"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the examples, and beside them a new environment `env` with the wheel; what the wheel needs is
    that of this one.
    """
    folder = tmp_path_factory.mktemp("examples")
    wheel = wheels.build(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    # A path in a .pth file comes after the environment's own packages, and the .pth files in it are not read, so that
    # an editable install of this repository is not found.
    packages = Path(importlib.util.find_spec("jax").origin).parents[1]  # type: ignore[union-attr, arg-type]
    (site / "installed.pth").write_text(f"{packages}\n")
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "examples/tour.py").write_text(notebook_code(), encoding="utf-8")
    return folder


def run(folder: Path, *words: str) -> str:
    """What a command in the environment prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MPLBACKEND": "Agg", "XLA_FLAGS": ""}  # one device, as a reader has it
    command = [str(folder / "env/bin/python"), *words]
    ended = subprocess.run(command, cwd=folder / "examples", env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_wheel_is_what_the_examples_import(elsewhere: Path) -> None:
    assert Path(run(elsewhere, "-c", "import rag_jax; print(rag_jax.__file__)").strip()).is_relative_to(elsewhere)


@pytest.mark.slow
def test_the_examples_run(elsewhere: Path) -> None:
    said = {name: run(elsewhere, *name.split(), *words) for name, words in RUNS.items()}
    assert "60 steps in" in said["own_data.py"] and said["own_data.py"].count("prior") == 6
    assert said["ask.py"].count("posterior") == 3
    assert "hard_em" in said["own_loss.py"]
    assert all("loss of reading" in said[name] for name in said if name.startswith("own_generator"))


@pytest.mark.slow
def test_the_notebook_runs(elsewhere: Path) -> None:
    said = run(elsewhere, "tour.py")
    right = re.search(r"right passage first ([\d.]+), right answer ([\d.]+)", said)
    assert right and float(right[1]) > 0.8 and float(right[2]) > 0.5, said
