"""Imports point one way: a package imports only those above it in ROOMS, and modules form no cycle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rag_jax"
ROOMS = (
    "errors rag_jax",
    "system metrics",
    "ops data",
    "corpus models losses",
    "decoding retrieval",
    "rag",
    "index",
    "retrieve",
    "runs",
    "inference pretrained",
    "evaluation",
    "training",
    "aot",
    "bench",
    "cli",
    "__main__",
)

FORBIDDEN = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "tensorflow"}
ALONE = {  # library -> the only modules that may import it
    "argparse": "cli __main__",
    "faiss": "bench.search",
    "matplotlib": "evaluation.report",
    "orbax": "runs.checkpoint",
    "tensorboardX": "system.logs",
    "torch": "pretrained.tensor_files bench",
}


def module_name(path: Path) -> str:
    """`rag_jax/models/bert.py` -> `models.bert`; the package itself -> `rag_jax`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".") or "rag_jax"


MODULES = {module_name(path): ast.parse(path.read_text(), path) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.Module) -> set[str]:
    """Full names of all imports of a module, inside functions too; `from a import b` is a.b if that is a module."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name.removeprefix("rag_jax.") in MODULES else str(node.module) for name in full}
    return names


def own(tree: ast.Module) -> set[str]:
    """The modules of the package that a module imports."""
    return {name.removeprefix("rag_jax.") for name in imported(tree) if name.split(".")[0] == "rag_jax"}


def test_rooms_import_one_way() -> None:
    level = {room: i for i, line in enumerate(ROOMS) for room in line.split()}
    imports = [(name, other) for name, tree in MODULES.items() for other in own(tree)]
    across = [(a, b) for a, b in imports if a.split(".")[0] != b.split(".")[0]]
    wrong = [f"{a} must not import {b}" for a, b in across if level[b.split(".")[0]] >= level[a.split(".")[0]]]
    assert not wrong


def test_no_circles() -> None:
    graph = {name: own(tree) - {name} for name, tree in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_libraries() -> None:
    for name, tree in MODULES.items():
        libraries = {full.split(".")[0] for full in imported(tree)}
        assert not libraries & FORBIDDEN, name
        for library in libraries & set(ALONE):
            assert any(f"{name}.".startswith(f"{place}.") for place in ALONE[library].split()), f"{name}: {library}"
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}:{node.value.lineno}"


def test_the_command_line_starts_without_jax() -> None:
    code = "import sys, rag_jax, rag_jax.__main__; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
